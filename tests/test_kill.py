"""kill -9 before every single operation on files, a full disk at every one, a power failure."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from conftest import leftovers, read_report
from crash import Killed, crash, watch
from fake_circleci import FakeCircleCI


@pytest.fixture
def fake(fake: FakeCircleCI, monkeypatch: pytest.MonkeyPatch) -> FakeCircleCI:
    """A small export that is soon complete, and no limits: the tests below run many exports."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # It takes most of the time.
    fake.job_seconds = 1
    fake.part_count = 1
    fake.limits = {"POST": 10**6, "GET": 10**6}
    return fake


def operations(run, folder: Path) -> list[str]:
    """The operations of an undisturbed run."""
    with watch(folder) as disk:
        assert run("--quiet", "--output-dir", str(folder)).code == 0
    return disk.operations


def kill(run, folder: Path, number: int) -> None:
    """A run that is killed before an operation. Its report, if any, gets a name of its own."""

    def before(count: int, operation: str) -> None:
        if count == number:
            raise Killed

    with watch(folder, before), pytest.raises(Killed):
        run("--quiet", "--output-dir", str(folder))
    for report in folder.glob("all_orgs_2*"):
        report.rename(folder / "all_orgs_first.csv")


def downloads(fake: FakeCircleCI) -> list[str]:
    """The numbers of the parts, as in their files' names."""
    paths = [seen.path for seen in fake.requests("GET", "store", "data_")]
    return [f"{int(re.search('data_([0-9])', path)[1]) + 1:04}" for path in paths]


def test_a_run_killed_before_any_operation_can_be_resumed(fake, run, tmp_path):
    """One gap no client can close: CircleCI has accepted the POST, but the job ID is not in a file
    yet. A run that is killed after it has published the report may publish it again."""
    gap = []
    for number, operation in enumerate(operations(run, tmp_path / "undisturbed"), 1):
        folder = tmp_path / str(number)
        jobs_before = len(fake.jobs)
        kill(run, folder, number)
        saved = "".join(path.read_text() for path in folder.glob(".export-*/job.json"))
        lost = [job for job in list(fake.jobs)[jobs_before:] if job not in saved]
        complete = {path.name[-4:] for path in folder.glob(".export-*/part-????")}
        published = list(folder.glob("all_orgs_*"))
        served = len(downloads(fake))
        result = run("--quiet", "--output-dir", str(folder))
        assert result.code == 0, operation
        assert leftovers(folder) == [], operation
        for report in [*published, result.report]:
            assert read_report(report) == fake.table(), operation
        assert len(fake.jobs) - jobs_before == 1 + len(lost), operation
        if not lost:
            assert not complete & {*downloads(fake)[served:]}, operation
        elif not published:
            gap.append(operation)
    assert gap and not [operation for operation in gap if not operation.endswith("job.json.new")]


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_killed_again_and_again_gets_there(fake, run, output, step):
    """Each run is killed `step` operations later than the one before it."""
    number = 1
    while not list(output.glob("all_orgs_*")):
        kill(run, output, number)
        number += step
    (report,) = output.glob("all_orgs_*")
    assert read_report(report) == fake.table()


def test_parts_of_a_finished_export_are_not_used_for_the_next(fake, run, output):
    """The first run is killed while it removes the folder."""
    crash(run, output, "remove part-")
    fake.usage = dict(list(fake.usage.items())[:1])
    assert read_report(run().report) == fake.table()


def test_a_power_failure_loses_nothing_that_has_its_final_name(run, tmp_path):
    """A file is flushed before it gets its name, and then its folder."""
    done = operations(run, tmp_path)
    flush_output = f"fsync {tmp_path.name}"
    created = next(number for number, what in enumerate(done) if what.startswith("mkdir .export-"))
    assert flush_output in done[created : done.index("open part-0001.new")]
    drafts = [operation for operation in done if re.match(r"rename .*\.new", operation)]
    assert len(drafts) == 3
    for draft in drafts:
        number = done.index(draft)
        assert done[number - 1] == draft.replace("rename", "fsync")
        assert done[number + 1].startswith("fsync .export-")
    assert done[done.index("rename merged.csv") + 1] == flush_output


def test_a_full_disk_loses_no_export(fake, run, tmp_path):
    """The same command resumes. If the job ID cannot be saved, --job-id collects the export."""
    with_job_id = []
    for first, operation in enumerate(operations(run, tmp_path / "undisturbed"), 1):
        folder = tmp_path / str(first)
        jobs_before = len(fake.jobs)

        def refuse(count: int, operation: str, first: int = first) -> None:
            if count >= first and not operation.startswith(("remove", "rmdir")):
                raise OSError(errno.ENOSPC, "No space left on device")

        with watch(folder, refuse):
            result = run("--quiet", "--output-dir", str(folder))
        assert not list(folder.rglob("*.new")), operation
        arguments = []
        if result.code == 0:
            assert operation.startswith(("remove", "rmdir"))
            continue
        if result.code == 1:
            arguments = re.search(r"--job-id [\w-]+", result.err)[0].split()
            with_job_id.append(operation)
        assert result.code in (1, 75) and "No space left" in result.err, operation
        again = run("--quiet", "--output-dir", str(folder), *arguments)
        assert again.code == 0, operation
        assert leftovers(folder) == [] or arguments, operation
        for report in folder.glob("all_orgs_*"):
            assert read_report(report) == fake.table(), operation
        assert len(fake.jobs) - jobs_before == 1, operation
    assert with_job_id[0] == "open job.json.new"
    assert re.match(r"fsync \.export-|rename job.json.new", with_job_id[-1])
