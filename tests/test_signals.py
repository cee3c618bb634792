"""Signals at any moment: one POST, the right exit code, an end within seconds, no traceback."""

from __future__ import annotations

import contextlib
import gzip
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from clocks import PROJECT, REAL_SLEEP, REAL_TIME, FastTime, Result, wait_for_exit
from conftest import leftovers
from fake_circleci import HEADER, Answer, make_rows, problem, split

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

CTRL_C, TERM = signal.SIGINT, signal.SIGTERM
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)
CODES = {CTRL_C: 130, TERM: 143, HANGUP: 129}

# Runs in the child before anything else: stops for a while at one moment, and says so.
STOP = """
import sys, time
pause, stops = time.sleep, [{stop!r}]

def stop():
    open({mark!r}, "w").close()
    for _ in range({slices}):
        pause(0.02)

class Stop:
    def __del__(self):
        stop()

def audit(name, arguments):
    words = " ".join(map(str, arguments[:2]))
    if stops and name == stops[0][0] and stops[0][1] in words:
        in_destructor = stops.pop()[2]
        Stop() if in_destructor else stop()

sys.addaudithook(audit)
"""


def wait_for(what, seconds: float = 8.0) -> None:
    for _ in range(int(seconds / 0.005)):
        if what():
            return
        REAL_SLEEP(0.005)
    raise AssertionError("waited in vain")


class Child(NamedTuple):
    process: subprocess.Popen[str]
    mark: Path  # exists once the child has stopped at the chosen moment

    def send(self, number: int, times: int = 1) -> Result:
        """Send signals in quick succession and wait for the end."""
        started = REAL_TIME()
        for _ in range(times):
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
            REAL_SLEEP(0.02)
        result = wait_for_exit(self.process)
        assert REAL_TIME() - started < 5, "the run did not end within seconds"
        assert "Traceback" not in result.err
        return result


@pytest.fixture
def start(fake, output, tmp_path):
    """start(event, text) starts a child. It stops, for four seconds at most, at an audit event
    whose arguments contain the text."""
    fast = FastTime(200)
    fake.clock = fast.time
    children = []

    def start(event="", text="", destructor=False, slices=200, **options) -> Child:
        mark, folder = tmp_path / "mark", tmp_path / "site"
        folder.mkdir(exist_ok=True)
        site = PROJECT / "tests" / "fast_time" / "sitecustomize.py"
        stop = (event, text, destructor)
        hook = STOP.format(stop=stop, mark=str(mark), slices=slices) if event else ""
        (folder / "sitecustomize.py").write_text(hook + site.read_text())
        options = {"PYTHONPATH": str(folder), **options}
        child = Child(fast.start(fake, "--output-dir", output, **options), mark)
        children.append(child.process)
        return child

    yield start
    for process in children:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def resume(fake, run, clock):
    """resume() runs the same command in this process, where it takes less time."""

    def resume() -> Result:
        clock.now = fake.clock()
        fake.clock = clock.time
        month = time.gmtime(REAL_TIME() - 28 * 86400)
        window = {"START_DATE": "%Y-%m-01", "END_DATE": "%Y-%m-28"}
        return run(**{name: time.strftime(day, month) for name, day in window.items()})

    return resume


def before_the_post(fake) -> dict:
    fake.plan("me", *[problem(429, "Later.", **{"Retry-After": "9999"})] * 9)
    return {}


def during_the_post(fake) -> dict:
    fake.post_seconds = 0.3
    return {}


def waiting(fake) -> dict:
    fake.job_seconds = 7200
    return {}


def downloading(fake) -> dict:
    parts = [gzip.compress(HEADER + b"".join(rows)) for rows in split(make_rows(60), 3)]
    fake.parts = [[Answer(body, write_size=len(body) // 40, pause=0.2)] for body in parts]
    fake.parts[0][0].pause = 0
    return {}


def at_file(event: str, text: str, destructor: bool = False):
    """Options for a child that stops before this file operation."""
    return lambda fake: {"event": event, "text": text, "destructor": destructor}


REACHED_BY = {
    before_the_post: ("GET", "api", "/me"),
    during_the_post: ("POST", "api", "export_job"),
    waiting: ("GET", "api", "export_job/"),
    downloading: ("GET", "store", "data_2"),
}
drafting_state = at_file("open", "state.json.new")
merging = at_file("os.rename", "merged.csv.new")
in_a_destructor = at_file("os.rename", "merged.csv.new", destructor=True)
publishing = at_file("os.link", "all_orgs_")
cleaning_up = at_file("os.remove", "merged.csv")
summarizing = at_file("open", "all_orgs_")


@pytest.mark.parametrize(
    "moment, number, times, kept",
    [
        pytest.param(before_the_post, HANGUP, 3, False, id="before the POST, SIGHUP 3 times"),
        pytest.param(drafting_state, TERM, 1, False, id="just before the POST, SIGTERM"),
        pytest.param(during_the_post, TERM, 3, True, id="during the POST, SIGTERM 3 times"),
        pytest.param(during_the_post, CTRL_C, 1, True, id="during the POST, Ctrl-C"),
        pytest.param(waiting, TERM, 1, True, id="waiting, SIGTERM"),
        pytest.param(waiting, HANGUP, 3, True, id="waiting, SIGHUP 3 times"),
        pytest.param(downloading, CTRL_C, 3, True, id="downloading, Ctrl-C 3 times"),
        pytest.param(merging, HANGUP, 1, True, id="merging, SIGHUP"),
        pytest.param(in_a_destructor, CTRL_C, 1, True, id="inside a destructor, Ctrl-C"),
    ],
)
def test_an_interrupted_run_says_what_to_do_and_can_be_resumed(
    fake, start, resume, output, moment, number, times, kept
):
    child = start(**moment(fake))
    seen = REACHED_BY.get(moment)
    wait_for(lambda: fake.requests(*seen) if seen else child.mark.exists())
    REAL_SLEEP(0.05)
    result = child.send(number, times)
    assert (result.code, result.out) == (CODES[number], "")
    assert result.err.count("Interrupted") == 1
    collect = "CircleCI keeps working on the export. Run the same command to collect it."
    advice = collect if kept else "Run the same command again."
    assert result.last_line.endswith(f"Z Interrupted. {advice}")
    assert len(fake.jobs) == kept and not list(output.glob("all_orgs_*"))
    assert bool(leftovers(output)) == kept
    fake.planned.clear()
    fake.job_seconds = fake.post_seconds = 0
    for answers in fake.parts or []:
        answers[0].pause = 0
    served = len(fake.requests("GET", "store", "data_0"))
    resumed = resume()
    assert resumed.code == 0, resumed.err
    expected = HEADER + b"".join(make_rows(60)) if fake.parts else fake.report()
    assert resumed.report.read_bytes() == expected
    assert len(fake.requests("POST")) == 1 and leftovers(output) == []
    if moment is downloading:
        assert len(fake.requests("GET", "store", "data_0")) == served == 1


def test_the_first_of_several_signals_decides_the_exit_code(fake, start):
    fake.post_seconds = 0.3
    child = start()
    wait_for(lambda: fake.requests("POST"))
    child.process.send_signal(HANGUP)
    REAL_SLEEP(0.05)
    assert child.send(TERM, 2).code == 129


@pytest.mark.parametrize(
    "moment, number, times",
    [
        pytest.param(cleaning_up, CTRL_C, 3, id="removing the folder, Ctrl-C 3 times"),
        pytest.param(summarizing, CTRL_C, 1, id="during the summary, Ctrl-C"),
        pytest.param(summarizing, HANGUP, 3, id="during the summary, SIGHUP 3 times"),
    ],
)
def test_a_signal_after_the_path_is_printed_still_exits_with_0(
    fake, start, output, moment, number, times
):
    """The run has succeeded."""
    child = start(**moment(fake), slices=20)
    wait_for(child.mark.exists)
    result = child.send(number, times)
    assert result.code == 0, result.err
    assert result.report.read_bytes() == fake.report() and leftovers(output) == []
    assert "Interrupted" not in result.err and "error" not in result.err


def test_interrupted_while_publishing(fake, start, resume, output):
    """The report is published once, by this run or by the next."""
    child = start(**publishing(fake), slices=20)
    wait_for(child.mark.exists)
    result = child.send(TERM, 2)
    assert result.code in (0, 143) and (result.out != "") == (result.code == 0)
    if result.code:
        result = resume()
    assert [*output.iterdir()] == [result.report] and result.report.read_bytes() == fake.report()
    assert len(fake.requests("POST")) == 1


def test_under_nohup_a_closed_terminal_does_not_interrupt(fake, start, output):
    before = signal.signal(HANGUP, signal.SIG_IGN)  # A child inherits this.
    try:
        child = start(**at_file("os.rename", "merged.csv.new")(fake), slices=10)
    finally:
        signal.signal(HANGUP, before)
    wait_for(child.mark.exists)
    result = child.send(HANGUP, 3)
    assert result.code == 0 and result.report.read_bytes() == fake.report()


@pytest.mark.parametrize("number", [HANGUP, TERM], ids=["SIGHUP", "SIGTERM"])
def test_a_signal_after_stderr_closes_still_ends_the_run_with_its_code(fake, start, resume, number):
    fake.job_seconds = 7200
    child = start()
    wait_for(lambda: fake.requests("GET"))
    child.process.stderr.close()
    child.process.send_signal(number)
    assert child.process.wait(5) == CODES[number]
    child.process.stdout.close()
    fake.job_seconds = 0
    assert resume().code == 0 and len(fake.requests("POST")) == 1


def test_without_stderr_the_run_succeeds(fake, start, output):
    child = start()
    child.process.stderr.close()
    assert child.process.wait(10) == 0
    (report,) = output.iterdir()
    assert child.process.stdout.read() == f"{report}\n"
    child.process.stdout.close()


def test_kill_9_needs_no_cleanup(fake, start, resume, output):
    """The lock of a killed run blocks nobody."""
    downloading(fake)
    child = start()
    wait_for(
        lambda: (
            list(output.glob(".export-*/part-0001-*.gz"))
            and fake.requests("GET", "store", "data_2")
        )
    )
    child.process.kill()
    assert wait_for_exit(child.process).code == -9
    for answers in fake.parts:
        answers[0].pause = 0
    result = resume()
    assert result.code == 0 and result.report.read_bytes() == HEADER + b"".join(make_rows(60))
    assert len(fake.requests("POST")) == 1 and [*output.iterdir()] == [result.report]
    assert len(fake.requests("GET", "store", "data_0")) == 1


def test_a_signal_while_a_posts_outcome_is_unknown_warns_of_a_second_export(fake, start):
    fake.post_seconds = 0.5
    fake.plan("POST", Answer(b"Bad gateway", 502, replaced=True))
    child = start()
    wait_for(lambda: fake.requests("POST"))
    result = child.send(TERM)
    assert result.code == 143 and len(fake.requests("POST")) == 1
    assert "CircleCI may have started an export" in result.last_line
