"""The command: its exit codes, what goes to stdout and stderr, and what Ctrl-C does."""

from __future__ import annotations

import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from datetime import datetime

import pytest
from clocks import PROJECT, REAL_SLEEP, REAL_TIME, wait_for_exit
from conftest import always, leftovers
from crash import crash_after, watch
from fake_circleci import ORGANIZATIONS, PRIMARY, Answer, Job, problem

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
CTRL_C = signal.SIGINT
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)
JOB_ID = "01be7c2d-0516-f103-001b-7a8345600000"
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ [ -~]*\n")


@pytest.mark.parametrize(
    "kind, answers, arguments, code",
    [
        pytest.param("GET", [], ["--output-dir", "reports"], 0, id="the report is published"),
        pytest.param("POST", [problem(401, "No.")], [], 1, id="failed"),
        pytest.param("GET", [], ["--start", "soon"], 2, id="an invalid setting"),
        pytest.param("GET", [], ["--job-id", JOB_ID], 3, id="no usage"),
        pytest.param("me", always(problem(503, "Busy.")), [], 75, id="not finished"),
    ],
)
def test_exit_codes(fake, run, monkeypatch, output, kind, answers, arguments, code):
    """stdout has the absolute path or nothing. With --quiet, stderr has an error or nothing."""
    monkeypatch.chdir(output.parent)
    fake.plan(kind, *answers)
    fake.jobs[JOB_ID] = Job(list(ORGANIZATIONS)[2], {}, 0.0, 0)  # without usage
    result = run("--quiet", *arguments)
    assert result.code == code, result.err
    assert bool(result.err) == (code != 0)
    reports = list(output.glob("*.csv"))
    assert len(reports) == (1 if code == 0 else 0)
    assert result.out == "".join(f"{report}\n" for report in reports)
    assert leftovers(output) == []


@POSIX
def test_a_shell_gets_the_path_from_a_link_in_any_folder(fast, fast_fake, tmp_path):
    """Settings and reports are next to the script itself, even if stdout has other letters."""
    tool = tmp_path / "\u0141ukasz's tools"
    tool.mkdir()
    shutil.copy(PROJECT / "usage_report.py", tool)
    (tool / ".env").write_text(f"SHARED_ORG_IDS={PRIMARY}\n")
    (tmp_path / "link").symlink_to(tool / "usage_report.py")
    script = f'cd / && csv=$("$1" {tmp_path}/link --quiet) && cat "$csv"'
    prefix = ("sh", "-c", script, "sh")
    result = fast.run(fast_fake, prefix=prefix, PYTHONIOENCODING="cp1252")
    (report,) = (tool / "usage_reports").iterdir()
    assert (result.code, result.err, result.out) == (0, "", report.read_text("utf-8"))
    assert not fast_fake.requests("GET", contains="shares-for")


def test_a_dry_run_shows_the_next_request(fake, run, clock, output):
    post = run("--dry-run")
    body = post.err.partition("POST")[2]
    assert [each for each in (*ORGANIZATIONS, "2026-09-30T23:59:59Z") if each not in body] == []
    collect = run("--dry-run", "--job-id", JOB_ID)
    assert f"{JOB_ID}\n" in collect.err and "POST" not in collect.err
    assert leftovers(output) == [] and not fake.requests("POST")
    crash_after(5, clock, run)
    kept = sorted(output.rglob("*"))
    resume = run("--dry-run")
    assert f"{next(iter(fake.jobs))}\n" in resume.err and "POST" not in resume.err
    assert sorted(output.rglob("*")) == kept and not fake.requests("GET")
    assert {(each.code, each.out) for each in (post, collect, resume)} == {(0, "")}


def test_a_log_has_plain_lines_with_utc_timestamps(fast, fast_fake, output):
    fast_fake.job_seconds = 100
    result = fast.run(fast_fake, "--verbose", "--output-dir", output, TZ="Asia/Tokyo")
    assert result.code == 0 and list(output.iterdir()) == [result.report]
    assert LOG_LINE.sub("", result.err) == ""
    first = datetime.strptime(result.err[:20] + "+0000", "%Y-%m-%dT%H:%M:%SZ%z")
    assert abs(first.timestamp() - REAL_TIME()) < 3600
    assert result.err.count("Next check") <= 6, "no countdown"


def test_trouble_in_the_summary_is_no_failure(run, output, tmp_path):
    """Another program moves the report while the run ends."""

    def move(count: int, operation: str) -> None:
        if operation.startswith("rmdir"):
            next(output.glob("all_orgs_*")).rename(tmp_path / "moved.csv")

    with watch(output, move):
        result = run()
    assert result.code == 0 and result.report.parent == output
    assert "summary" in result.last_line and list(output.iterdir()) == []


def test_an_existing_report_is_not_overwritten(run, output):
    output.mkdir()
    while datetime.now().microsecond > 500_000:  # The name has the second.
        REAL_SLEEP(0.05)
    taken = output / f"all_orgs_{datetime.now():%Y%m%d_%H%M%S}_2026-09-01_2026-09-30.csv"
    taken.write_text("mine")
    assert sorted([taken, run().report]) == sorted(output.iterdir())
    assert taken.read_text() == "mine"


@POSIX
@pytest.mark.parametrize("width", [40, 80])
def test_a_terminal_has_one_live_line_that_fits(fast, fast_fake, output, width):
    import fcntl
    import pty
    import termios

    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    fast_fake.job_seconds = 100
    child = fast.start(fast_fake, "--output-dir", output, stderr=terminal)
    os.close(terminal)
    raw = b""
    try:
        while block := os.read(controller, 4096):
            raw += block
    except OSError:  # how Linux says that the child has closed it
        os.close(controller)
    assert wait_for_exit(child).code == 0 and len(list(output.iterdir())) == 1
    lines = raw.decode().replace("\r\n", "\n").split("\n")
    assert not re.search(r"[^ -~\r]|\d{4}-\d\d-\d\dT", "".join(lines)), "no escapes, no timestamps"
    assert max(line.count("\rExport job: ") for line in lines) > 3
    for line in lines:
        live = line.split("\r")
        last = live.pop()
        assert "Next check" not in last
        for text, over_it in zip(live, [*live[1:], last]):
            assert len(text) < width and len(over_it) >= len(text.rstrip())


@POSIX
@pytest.mark.parametrize(
    "until, number, times, code",
    [
        pytest.param("GET api /me", CTRL_C, 9, 130, id="Ctrl-C before the POST"),
        pytest.param("POST api export_job", CTRL_C, 9, 130, id="Ctrl-C nine times in the POST"),
        pytest.param("GET api export_job/", CTRL_C, 9, 130, id="Ctrl-C nine times in the wait"),
        pytest.param("GET store data_", CTRL_C, 1, 130, id="Ctrl-C in a download"),
        pytest.param("GET api export_job/", signal.SIGTERM, 1, -signal.SIGTERM, id="SIGTERM"),
        pytest.param("GET api export_job/", HANGUP, 1, -HANGUP, id="SIGHUP"),
    ],
)
def test_after_a_signal_the_next_run_resumes(
    fast, fake, run, clock, output, until, number, times, code
):
    fake.clock = fast.time
    fake.post_seconds = 0.3
    fake.job_seconds = 1 if "store" in until else 9999
    fake.parts = [[Answer(b"a,b\n1,2\n", write_size=4, pause=0.3)]]
    if "/me" in until:
        fake.plan("me", problem(429, "No.", **{"Retry-After": "9999"}))
    child = fast.start(fake, "--output-dir", output, "--period", "last-month")
    while not fake.requests(*until.split()) and child.poll() is None:
        REAL_SLEEP(0.005)
    REAL_SLEEP(0.05)
    for _ in range(times):
        child.send_signal(number)
        REAL_SLEEP(0.005)
    result = wait_for_exit(child)
    assert (result.code, result.out) == (code, "")
    assert len(leftovers(output)) == len(fake.jobs) and not list(output.rglob("*.new"))
    fake.job_seconds = 0
    clock.now = fast.time()
    fake.clock = clock.time
    result = run("--period", "last-month")
    assert result.code == 0 and list(output.iterdir()) == [result.report]
    assert len(fake.requests("POST")) == 1


def test_ctrl_c_between_the_report_and_its_path_changes_nothing(run, output):
    def press(count: int, operation: str) -> None:
        if operation == "remove job.json":
            signal.raise_signal(CTRL_C)

    with watch(output, press):
        result = run()
    assert result.code == 0 and result.report.exists()


@POSIX
def test_ctrl_c_during_the_summary_is_no_failure(fast, fast_fake, output):
    """The summary of 3,000 organizations fills the pipe, so it lasts until somebody reads it."""
    row = fast_fake.usage[PRIMARY][0]
    rows = [[f"{n:036}", f"Organization {n}", *row[2:]] for n in range(3000)]
    fast_fake.usage = {PRIMARY: rows}
    child = fast.start(fast_fake, "--output-dir", output)
    path = child.stdout.readline()
    REAL_SLEEP(0.2)
    child.send_signal(CTRL_C)
    assert wait_for_exit(child).code == 0
    assert [f"{report}\n" for report in output.iterdir()] == [path]


def test_a_python_without_the_packages_gets_one_sentence():
    command = [sys.executable, "-S", "-E", PROJECT / "usage_report.py"]
    child = subprocess.run(command, capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (1, "")
    assert child.stderr.count("\n") == 1 and "requirements.txt" in child.stderr
