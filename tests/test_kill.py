"""kill -9 before every single operation on files, and a disk that is full at every one."""

from __future__ import annotations

import errno
import itertools
import os
import re
from pathlib import Path

import pytest
from conftest import leftovers
from crash import Disk, Killed, kill_before, watch
from fake_circleci import FakeCircleCI

ALL = 10**6


@pytest.fixture
def small(fake: FakeCircleCI) -> FakeCircleCI:
    """An export that is soon complete, and no limits: the tests below run many exports."""
    fake.job_seconds, fake.part_count, fake.limits = 1, 2, {"POST": ALL, "GET": ALL}
    return fake


@pytest.fixture(params=[True, False], ids=["hard links", "no hard links"])
def hard_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    def refuse(*paths: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    if not request.param:
        monkeypatch.setattr(os, "link", refuse)
    return bool(request.param)


def operations(run, folder: Path) -> list[str]:
    """The operations of an undisturbed run."""
    with watch(folder) as disk:
        assert run("--quiet", "--output-dir", str(folder)).code == 0
    return disk.operations


def reports(folder: Path) -> list[Path]:
    return sorted(folder.glob("all_orgs_*"))


def kill(run, folder: Path, number: int) -> Disk:
    """A run that is killed before an operation. It may end before it gets there."""
    with watch(folder, kill_before(number)) as disk:
        try:
            run("--quiet", "--output-dir", str(folder))
        except Killed:
            assert disk.dead
        else:
            assert not disk.dead, "the script handled a kill"
    return disk


def test_a_run_killed_before_any_operation_can_be_resumed(small, run, tmp_path, hard_links, capsys):
    """One POST, one report, nothing left behind. One gap no client can close: CircleCI has accepted
    the POST, but the job ID is not in a file yet."""
    done = operations(run, tmp_path / "undisturbed")
    gap = []
    first = 1 if hard_links else done.index("open merged.csv.new")  # Links come later.
    for number in range(first, len(done) + 1):
        folder, posts = tmp_path / str(number), len(small.jobs)
        disk = kill(run, folder, number)
        printed = capsys.readouterr().out
        doing = f"killed before {number}: {disk.operations[-1]}"
        assert disk.dead, doing
        jobs = list(small.jobs)[posts:]
        states = [path.read_text() for path in folder.glob(".export-*/state.json*")]
        lost = [job for job in jobs if not any(job in state for state in states)]
        complete = [int(path.name.split("-")[1]) - 1 for path in folder.rglob("part-*.gz")]
        served = len(small.requests("GET", "store", "data_"))

        result = run("--quiet", "--output-dir", str(folder))

        assert result.code == 0, doing
        assert leftovers(folder) == [], doing
        assert {path.read_bytes() for path in reports(folder)} == {small.report()}, doing
        repeated = [seen.path for seen in small.requests("GET", "store", "data_")[served:]]
        if printed and not states:  # The killed run had done all its work: this was another one.
            continue
        assert reports(folder) == [result.report], doing
        assert printed in ("", result.out), doing
        assert len(small.jobs) - posts == 1 + len(lost), doing
        assert not [n for n in complete for path in repeated if f"data_{n}." in path], doing
        if lost:
            gap.append(disk.operations[-1])
    assert gap == (["open state.json.new", "write state.json.new"] if hard_links else [])


@pytest.mark.parametrize("step", [1, 3, 7])
def test_killed_again_and_again(small, run, tmp_path, step):
    """Each run is killed `step` operations later than the one before it."""
    lost, disk = 0, kill(run, tmp_path, 1)
    for number in itertools.count(1 + step, step):
        posts = len(small.jobs)
        disk = kill(run, tmp_path, number)
        states = "".join(path.read_text() for path in tmp_path.glob(".export-*/state.json*"))
        if not disk.dead or (reports(tmp_path) and not states):
            break
        lost += any(job not in states for job in list(small.jobs)[posts:])
    (report,) = reports(tmp_path)
    assert report.read_bytes() == small.report()
    assert len(small.jobs) == 1 + lost


def test_a_power_cut_loses_no_file_that_has_its_final_name(small, run, tmp_path, hard_links):
    """A file is flushed before it gets its name, and its folder afterwards."""
    done = operations(run, tmp_path)
    named = [n for n, what in enumerate(done) if re.match("rename|link", what)]
    assert len(named) >= 6
    for number in named:
        verb, name = done[number].split(" ", 1)
        if name.endswith(".new"):
            assert done[number - 1] == f"fsync {name}"
        if verb == "link":
            assert f"fsync {tmp_path.name}" in done[number:]
    posted = done.index("rename state.json.new", done.index("rename state.json.new") + 1)
    assert re.match(r"fsync \.export-", done[posted + 1]), "the job ID comes before anything else"
    removed = [operation for operation in done if operation.startswith(("remove", "rmdir"))]
    assert removed[-3:-1] == ["remove state.json", "remove lock"], removed


def test_a_disk_that_is_full_at_every_operation(small, run, tmp_path):
    """Success, or exit 75 and the same command resumes; no half-written file. If the disk fills up
    between the POST and the recording of its job ID: exit 1, and the message says how to resume."""
    count = len(operations(run, tmp_path / "undisturbed"))
    hints = []
    for number in range(1, count + 1):
        folder, posts = tmp_path / str(number), len(small.jobs)

        def refuse(done: int, operation: str, number: int = number) -> None:
            removal = operation.startswith(("remove", "rmdir"))
            if done >= number and not removal and not operation.startswith("open lock"):
                raise OSError(errno.ENOSPC, "No space left on device")

        with watch(folder, refuse) as disk:
            result = run("--quiet", "--output-dir", str(folder))
        doing = f"full before {number}: {disk.operations[number - 1]}: {result.err}"
        files = [path.name for path in folder.rglob("*")]
        assert not [name for name in files if name.endswith(".new")], doing
        assert "Traceback" not in result.err and "Unexpected" not in result.err, doing
        assert len(reports(folder)) == (result.code == 0), doing
        if result.code == 0:
            assert result.report.read_bytes() == small.report() and leftovers(folder) == [], doing
            continue
        assert "No space left on device" in result.err, doing
        arguments: list[str] = []
        if hint := re.search(r"--job-id ([0-9a-f-]{36})", result.err):
            hints.append(disk.operations[number - 1])
            arguments = ["--job-id", hint[1]]
            assert result.code == 1, doing
        else:
            assert result.code == 75, doing
        again = run("--quiet", "--output-dir", str(folder), *arguments)
        assert again.code == 0 and again.report.read_bytes() == small.report(), doing
        assert leftovers(folder) == [] or arguments, doing
        assert len(small.jobs) == posts + 1, doing
    assert hints


def test_a_disk_without_room_for_a_job_id_costs_no_export(fake, run, output):
    def refuse(done: int, operation: str) -> None:
        if operation == "open state.json.new":
            raise OSError(errno.ENOSPC, "No space left on device")

    with watch(output, refuse):
        assert run().code == 75
    assert not fake.requests("POST") and run().code == 0


def test_a_used_up_quota_exits_with_75(run, output):
    def refuse(done: int, operation: str) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with watch(output, refuse):
        result = run()
    assert result.code == 75 and "Disk quota exceeded" in result.err
