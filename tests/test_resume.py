"""An export is never paid for twice: whatever interrupts a run, the same command goes on."""

from __future__ import annotations

import gzip
import json
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from clocks import REAL_SLEEP, Clock, FastTime, ended
from conftest import leftovers
from fake_circleci import HEADER, ORGANIZATIONS, PRIMARY, Answer, FakeCircleCI, make_rows, problem, split

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")


def slow_parts(fake: FakeCircleCI, parts: int = 5, pause: float = 0.02) -> bytes:
    """Parts that take a few tenths of a second each; returns the report they make."""
    rows = make_rows(2000)
    bodies = [gzip.compress(HEADER + b"".join(piece), 1) for piece in split(rows, parts)]
    pauses = [pause * (1 + 2 * number) for number in range(parts)]
    fake.parts = [[Answer(body, bytes_a_write=len(body) // 8, pause=pause)] for body, pause in zip(bodies, pauses)]
    return HEADER + b"".join(rows)


def wait_for(what, timeout: float = 20.0) -> None:
    for _ in range(int(timeout / 0.005)):
        if what():
            return
        REAL_SLEEP(0.005)
    raise AssertionError("waited in vain")


def state_of(output: Path) -> dict[str, object]:
    files = list(output.glob(".export-*/state.json"))
    return json.loads(files[0].read_text()) if files else {}


@POSIX
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments_until_the_report_stands(output, seed):
    """kill -9, again and again. What can cost a second POST is a kill between CircleCI's taking it on and
    its answer being on disk; no client can close that gap, so those kills are counted."""
    dice, fast = random.Random(seed), FastTime(2000)
    fake = FakeCircleCI(fast.time)
    expected = slow_parts(fake)
    fake.job_seconds = 60
    jobs = unlucky = kills = 0
    fetched: dict[str, int] = {}  # GETs of the parts that were complete at a kill
    while True:
        before = len(fake.seen)
        child = fast.start(fake, "--output-dir", output)
        wait_for(lambda: len(fake.seen) > before or child.poll() is not None)
        if kills < 12:
            REAL_SLEEP(dice.random() * 0.4)
            child.kill()
        result = ended(child)
        if result.code == 0:
            break
        assert result.code == -9, result.err
        kills += 1
        unlucky += len(fake.jobs) > jobs and not state_of(output).get("job_id")
        jobs = len(fake.jobs)
        for path, count in fetched.items():
            assert len(fake.requests("GET", "store", path)) == count
        for part in output.glob(".export-*/part-*.csv"):
            path = f"data_{int(part.name[5:9])}."
            fetched[path] = len(fake.requests("GET", "store", path))
    fake.close()
    (report,) = output.glob("all_orgs_*.csv")
    assert report == result.report and report.read_bytes() == expected
    assert leftovers(output) == []
    assert len(fake.jobs) == 1 + unlucky
    assert kills >= 2, "the kills came too late to show anything"


@POSIX
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("stage", ["waiting", "downloading"])
def test_interrupted_it_says_that_the_same_command_goes_on(output, number, code, stage):
    fast = FastTime(100 if stage == "waiting" else 1000)
    fake = FakeCircleCI(fast.time)
    expected = slow_parts(fake, pause=0.2 if stage == "downloading" else 0)
    fake.job_seconds = 60
    child = fast.start(fake, "--output-dir", output)
    kind = "usage_export_job/" if stage == "waiting" else "data_"
    wait_for(lambda: [one for one in fake.seen if kind in one.path])
    asked = time.time()
    child.send_signal(number)
    result = ended(child)
    assert time.time() - asked < 5  # the downloads alone would take 14
    assert result.code == code and result.out == ""
    assert "it goes on at CircleCI, and the same command collects it" in result.last_line
    assert "Traceback" not in result.err
    for answers in fake.parts:
        answers[0].pause = 0
    assert (result := fast.run(fake, "--output-dir", output)).code == 0, result.err
    assert result.report.read_bytes() == expected and len(fake.jobs) == 1 and leftovers(output) == []
    fake.close()


@POSIX
@pytest.mark.parametrize("times", [1, 3], ids=["once", "three times"])
def test_ctrl_c_while_the_post_is_under_way_keeps_its_job(fast, fast_fake, output, times):
    fast_fake.post_seconds = 0.7
    child = fast.start(fast_fake, "--output-dir", output)
    wait_for(lambda: fast_fake.requests("POST"))
    for _ in range(times):
        REAL_SLEEP(0.1)
        child.send_signal(signal.SIGINT)
    result = ended(child)
    assert result.code == 130 and "Waiting for CircleCI's answer first" in result.err
    assert fast.run(fast_fake, "--output-dir", output).code == 0
    assert len(fast_fake.jobs) == 1


@POSIX
def test_interrupted_before_the_post_it_says_so(fast, fast_fake, output):
    fast_fake.plan("me", *[problem(429, "Later.", **{"Retry-After": "3000"})] * 9)
    child = fast.start(fast_fake, "--output-dir", output)
    wait_for(lambda: fast_fake.seen)
    REAL_SLEEP(0.2)
    child.send_signal(signal.SIGINT)
    result = ended(child)
    assert result.code == 130 and result.last_line.endswith("Interrupted before an export was asked for.")


@POSIX
@pytest.mark.parametrize("limit", [60_000, 400_000], ids=["downloading", "merging"])
def test_a_disk_that_fills_up(output, tmp_path, limit):
    """Stood in for by a limit on the size of a file: parts have about 200 kB, the report has 1 MB."""
    fast = FastTime(1000)
    fake = FakeCircleCI(fast.time)
    expected = slow_parts(fake, pause=0)
    full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    site = tmp_path / "sitecustomize.py"
    site.write_text(full + Path(__file__).with_name("fast_time").joinpath("sitecustomize.py").read_text())
    result = fast.run(fake, "--output-dir", output, PYTHONPATH=str(tmp_path))
    assert result.code == 75 and "File too large" in result.err and "Traceback" not in result.err
    assert not list(output.glob("all_orgs_*"))
    assert "the same command collects it" in result.last_line
    served = len(fake.requests("GET", "store", "data_"))
    result = fast.run(fake, "--output-dir", output)
    fake.close()
    assert result.code == 0 and result.report.read_bytes() == expected
    assert len(fake.jobs) == 1 and leftovers(output) == []
    if limit > 200_000:
        assert len(fake.requests("GET", "store", "data_")) == served == 5


def interrupt_after(clock: Clock, seconds: float, monkeypatch: pytest.MonkeyPatch, then=lambda: None):
    """Make the clock raise Ctrl-C once, so many seconds from now."""
    at = clock.now + seconds

    def sleep(pause: float) -> None:
        Clock.sleep(clock, pause)
        if clock.now > at:
            monkeypatch.setattr(clock, "sleep", lambda pause: Clock.sleep(clock, pause))
            then()
            raise KeyboardInterrupt

    monkeypatch.setattr(clock, "sleep", sleep)


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b'{"job_id": 1}', b"\xff\xfe", b'{"job_id":"x","asked_at":"y","label":"","report":"","polls":[],"parts":[]}'],
    ids=["empty", "cut off", "a list", "keys missing", "no UTF-8", "no number"],
)  # fmt: skip
def test_a_damaged_state_is_treated_as_absent(fake, run, clock, output, monkeypatch, damage):
    def spoil() -> None:
        next(output.glob(".export-*/state.json")).write_bytes(damage)

    interrupt_after(clock, 5, monkeypatch, spoil)
    assert run().code == 130
    result = run()
    assert result.code == 0 and "is damaged, so the export is asked for anew" in result.err
    assert len(fake.requests("POST")) == 2 and leftovers(output) == []


def test_a_state_that_cannot_be_read_for_now_is_not_lost(fake, run, clock, output, monkeypatch):
    interrupt_after(clock, 5, monkeypatch)
    assert run().code == 130
    state = next(output.glob(".export-*/state.json"))
    kept = state.with_name("kept")
    state.rename(kept)
    state.mkdir()
    assert run().code == 75
    state.rmdir()
    kept.rename(state)
    assert run().code == 0 and len(fake.requests("POST")) == 1


def test_a_job_that_circleci_no_longer_knows_is_asked_for_anew(fake, run, clock, output, monkeypatch):
    interrupt_after(clock, 5, monkeypatch)
    assert run().code == 130
    fake.jobs.clear()
    result = run()
    assert result.code == 0 and "asked for anew" in result.err
    assert len(fake.requests("POST")) == 2 and leftovers(output) == []
    assert result.report.name.endswith("_2026-09-01_2026-09-30.csv")


def test_a_job_that_is_never_known_is_asked_for_anew_once(fake, run, output):
    fake.plan("GET", *[problem(404, "Usage export job does not exist.")] * 9)
    assert run().code == 1
    assert len(fake.requests("POST")) == 2 and leftovers(output) == []


@pytest.mark.parametrize(
    "arguments, variables, posts",
    [
        ([], {}, 1),
        (["--end", "2026-09-29"], {}, 2),
        ([], {"PRIMARY_ORG_ID": list(ORGANIZATIONS)[1]}, 2),
        ([], {"SHARED_ORG_IDS": PRIMARY}, 2),
        ([], {"SHARED_ORG_IDS": ",".join(reversed(list(ORGANIZATIONS)))}, 1),
        (["--period", "2026-09"], {}, 1),
    ],
    ids=["the same", "another window", "another primary", "other organizations", "another order", "the same by --period"],
)
def test_what_makes_another_export(fake, run, clock, monkeypatch, arguments, variables, posts):
    interrupt_after(clock, 5, monkeypatch)
    assert run().code == 130
    assert run(*arguments, **variables).code == 0
    assert len(fake.requests("POST")) == posts


def test_an_end_in_the_future_stays_the_same_export_and_keeps_its_name(fake, run, clock, monkeypatch):
    arguments = ["--start", "2026-10-10", "--end", "2026-10-31"]
    interrupt_after(clock, 5, monkeypatch)
    assert run(*arguments).code == 130
    clock.now += 86400
    result = run(*arguments)
    assert result.code == 0 and len(fake.requests("POST")) == 1
    assert result.report.name.endswith("_2026-10-10_2026-10-24.csv")


def test_interrupted_while_merging_it_goes_on_without_a_request_for_the_job_or_its_parts(fake, run, output, monkeypatch):
    import usage_report

    def stop(tally: usage_report.Tally, block: bytes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(usage_report.Tally, "count", stop)
        assert run().code == 130
    assert not list(output.glob("all_orgs_*"))
    asked = len(fake.requests("GET")), len(fake.requests("GET", "store", ""))
    result = run()
    assert result.code == 0 and result.report.read_bytes() == fake.report()
    assert (len(fake.requests("GET")), len(fake.requests("GET", "store", ""))) == asked


def test_killed_between_placing_the_report_and_cleaning_up(fake, run, output, monkeypatch):
    import usage_report

    forget = usage_report.Export.forget

    def stop(export: usage_report.Export) -> None:
        if list(output.glob("all_orgs_*")):
            raise KeyboardInterrupt
        forget(export)

    with monkeypatch.context() as patch:
        patch.setattr(usage_report.Export, "forget", stop)
        assert run().code == 130
    (report,) = output.glob("all_orgs_*")
    result = run()
    assert (result.code, result.report) == (0, report)
    assert [*output.iterdir()] == [report]


@pytest.mark.parametrize("removed", range(6))
def test_killed_while_cleaning_up(fake, run, output, monkeypatch, removed):
    """What tells of the report goes last, so the next run finds the report and no second export is asked for."""
    unlink, done = Path.unlink, []

    def stop_after(path: Path, **options: bool) -> None:
        if path.parent.name.startswith(".export") and list(output.glob("all_orgs_*")):
            if len(done) == removed:
                raise KeyboardInterrupt
            done.append(path)
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop_after)
        run()
    result = run()
    if done[-1:] and done[-1].name in ("merged.csv", "lock"):
        return  # all was done before it was killed, and the second run is another
    assert result.code == 0 and len(list(output.glob("all_orgs_*"))) == 1
    assert len(fake.requests("POST")) == 1 and leftovers(output) == []


def test_a_report_that_was_renamed_after_a_crash_is_not_touched(fake, run, output, monkeypatch):
    """It is still a second name of the merged file."""
    import usage_report

    monkeypatch.setattr(usage_report, "print", lambda *words, **how: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        run()
    monkeypatch.delattr(usage_report, "print")
    (report,) = output.glob("all_orgs_*")
    renamed = report.rename(output / "mine.csv")
    before, inode = renamed.read_bytes(), renamed.stat().st_ino
    result = run()
    assert result.code == 0 and result.report.stat().st_ino != inode
    assert renamed.read_bytes() == before == result.report.read_bytes()


def test_a_crash_while_the_state_is_written_leaves_the_old_one(fake, run, clock, output, monkeypatch):
    import os

    replace, calls = os.replace, []

    def crash(draft: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 4:
            raise KeyboardInterrupt
        replace(draft, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        assert run().code == 130
    assert state_of(output)["job_id"] in fake.jobs
    assert run().code == 0 and len(fake.requests("POST")) == 1


def test_parts_without_a_state_are_not_taken_for_the_next_job(fake, run, clock, output, monkeypatch):
    interrupt_after(clock, 5, monkeypatch)
    assert run().code == 130
    (folder,) = output.glob(".export-*")
    (folder / "state.json").unlink()
    (folder / "part-0000-0123456789ab.csv").write_text("of another job")
    import usage_report

    save, seen = usage_report.Export.save, set()
    monkeypatch.setattr(usage_report.Export, "save", lambda export: save(export) or seen.update(folder.iterdir()))
    result = run()
    assert folder / "part-0000-0123456789ab.csv" not in seen
    assert result.code == 0 and result.report.read_bytes() == fake.report() and leftovers(output) == []


def test_a_disk_that_is_full_just_after_the_post(fake, run, monkeypatch):
    """The ID cannot be written; the words say how to go on."""
    import usage_report

    flush, calls = usage_report.flush, []

    def fill(file: object) -> None:
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        flush(file)

    monkeypatch.setattr(usage_report, "flush", fill)
    result = run()
    (job_id,) = fake.jobs
    assert result.code == 75 and f"No space left on device: tell the next run the job ID, by --job-id {job_id}" in result.last_line
    assert run("--job-id", job_id).code == 0 and len(fake.requests("POST")) == 1


def test_a_file_system_that_cannot_lock_is_not_another_run(fake, run, monkeypatch):
    import usage_report

    def fail(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(usage_report.fcntl, "flock", fail)
    result = run()
    assert result.code == 75 and "Operation not supported" in result.err and "Another run" not in result.err


def test_two_runs_of_one_request_at_once(fake, run, output, clock):
    """The second leaves at once; the first is not disturbed. A killed run's lock blocks nobody: see above."""
    fake.job_seconds, waiting, leave = 40, threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        if threading.current_thread() is first:
            waiting.set()
            leave.wait(10)
        Clock.sleep(clock, seconds)

    clock.sleep = sleep  # type: ignore[method-assign]
    codes = []
    first = threading.Thread(target=lambda: codes.append(run().code))
    first.start()
    assert waiting.wait(10)
    result = run()
    leave.set()
    first.join(20)
    assert result.code == 75 and "Another run is at work on this export" in result.err
    assert codes == [0] and len(fake.requests("POST")) == 1 and leftovers(output) == []


def test_the_state_holds_neither_the_token_nor_a_signed_url(fake, run, clock, output, monkeypatch):
    fake.parts = [[problem(404, "gone")]]
    assert run().code == 1
    state = state_of(output)
    assert state["job_id"] in fake.jobs and state["parts"]
    assert fake.token not in json.dumps(state) and "http" not in json.dumps(state)
