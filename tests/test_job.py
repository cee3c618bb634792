"""The export job: requested once, saved at once, and found again by the same command."""

from __future__ import annotations

import errno
import json
import re

import pytest
from clocks import NOW, REAL_SLEEP, FastTime, wait_for_exit
from conftest import always, leftovers, read_report
from crash import crash, crash_after, watch
from fake_circleci import ORGANIZATIONS, PRIMARY, TOKEN, Answer, Job, in_json, problem

HTML = Answer(b"<html>Log in</html>", headers={"Content-Type": "text/html"})
UNKNOWN = problem(404, "Usage export job does not exist.")


def job_file(output):
    return next(output.glob(".export-*/job.json"))


def downloads(fake) -> int:
    return len(fake.requests("GET", "store", "data_"))


def assert_resumed(fake, output, result) -> None:
    """One POST, the right report, nothing left behind."""
    assert result.code == 0, result.err
    assert read_report(result.report) == fake.table()
    assert list(output.iterdir()) == [result.report]
    assert len(fake.requests("POST")) == 1


def test_the_job_id_is_saved_before_the_run_waits(fake, run, clock, output):
    crash_after(0, clock, run)
    (job_id,) = fake.jobs
    assert sorted(json.loads(job_file(output).read_text()).values(), key=str) == [job_id, NOW]
    assert not fake.requests("GET")


@pytest.mark.parametrize("at", ["open part-0002", "write merged.csv"])
def test_neither_the_token_nor_a_signed_url_is_on_disk(run, clock, output, at):
    crash_after(5, clock, run)
    crash(run, output, at)
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        assert not re.search(rf"{TOKEN}|signature|SIGNED".encode(), path.read_bytes())


@pytest.mark.parametrize(
    "at, expected_downloads",
    [("open part-0001", 4), ("open part-0003", 4), ("write merged.csv", 3), ("rename merged", 3)],
)
def test_complete_parts_are_not_downloaded_again(fake, run, output, at, expected_downloads):
    crash(run, output, at)
    assert_resumed(fake, output, run())
    assert downloads(fake) == expected_downloads


@pytest.mark.parametrize(
    "arguments, variables, posts",
    [
        pytest.param(["--period", "2026-09"], {}, 1, id="the same window by --period"),
        pytest.param(["--raw", "--verbose"], {}, 1, id="another format"),
        pytest.param(["--end", "2026-09-29"], {}, 2, id="another window"),
        pytest.param([], {"PRIMARY_ORG_ID": list(ORGANIZATIONS)[1]}, 2, id="another primary"),
        pytest.param([], {"SHARED_ORG_IDS": PRIMARY}, 2, id="fewer organizations"),
        pytest.param([], {"SHARED_ORG_IDS": ",".join([*ORGANIZATIONS][::-1])}, 1, id="their order"),
        pytest.param([], {"CIRCLECI_BASE_URL": "http://localhost"}, 2, id="another base URL"),
    ],
)
def test_other_settings_can_mean_another_export(
    fake, run, clock, output, arguments, variables, posts
):
    crash_after(5, clock, run)
    if "CIRCLECI_BASE_URL" in variables:
        variables = {"CIRCLECI_BASE_URL": fake.url.replace("127.0.0.1", "localhost")}
    assert run(*arguments, **variables).code == 0
    assert len(fake.requests("POST")) == posts
    assert len(leftovers(output)) == posts - 1


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"job_id": "0', id="cut off"),
        pytest.param(b"\xff\xfe", id="not UTF-8"),
        pytest.param(b'{"job_id": "a"}', id="no time"),
        pytest.param(b'{"job_id": "../../me", "requested_at": 1.0}', id="a path as the ID"),
    ],
)
def test_a_job_that_cannot_be_read_needs_a_human(fake, run, clock, output, content):
    crash_after(5, clock, run)
    file = job_file(output)
    file.write_bytes(content)
    result = run()
    assert result.code == 1 and str(file.parent) in result.last_line
    assert file.read_bytes() == content and len(fake.requests("POST")) == 1


def test_a_second_run_of_the_same_export_is_refused(fake, run, clock, output):
    fast = FastTime(200)
    fake.clock = fast.time
    fake.job_seconds = 10**9
    child = fast.start(fake, "--output-dir", output)
    while not fake.requests("GET"):
        REAL_SLEEP(0.01)
    clock.now = fast.time()
    requested = json.loads(fake.requests("POST")[0].body)
    second = run("--start", requested["start"], "--end", requested["end"])
    fake.job_seconds = 0
    assert_resumed(fake, output, wait_for_exit(child))
    assert second.code == 1 and "Another run" in second.last_line


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param(always(Answer(b"Oops", 502, replaced=True)), id="502"),
        pytest.param(always(problem(408, "Slow.")), id="408"),
        pytest.param(always(Answer(drop=True, replaced=True)), id="lost connection"),
        pytest.param(always(HTML), id="HTML"),
        pytest.param(always(in_json({"usage_export_job_id": "../me"}, 201)), id="a path as the ID"),
        pytest.param([problem(500, "?"), problem(429, "?"), Answer(drop=True)], id="with a 429"),
        pytest.param([problem(502, "?"), problem(400, "No.")], id="then a 400"),
    ],
)
def test_a_post_without_a_clear_answer_is_repeated_once(fake, run, output, answers):
    fake.plan("POST", *answers)
    result = run()
    posts = [seen.at for seen in fake.requests("POST")]
    assert result.code == 1 and "may have started" in result.last_line
    assert len(posts) == (3 if len(answers) == 3 else 2)
    assert posts[1] - posts[0] >= 10 and leftovers(output) == []


def test_a_repeated_post_may_work(fake, run, output):
    fake.plan("POST", problem(503, "Busy."))
    result = run()
    assert result.code == 0 and len(fake.requests("POST")) == 2 and leftovers(output) == []


@pytest.mark.parametrize(
    "header", ["Retry-After", "date", "X-RateLimit-Reset", "RateLimit-Reset", "none"]
)
def test_a_post_waits_for_a_rate_limit(fake, run, clock, header):
    fake.throttle_header = header
    fake.job_seconds = 1
    fake.spent["POST", PRIMARY] = [NOW - 1800] * 10
    result = run()
    (job,) = fake.jobs.values()
    assert result.code == 0 and "429" in result.err
    assert 1800 <= job.created_at - NOW <= (2160 if header == "none" else 1802)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(problem(400, "The window is too long."), id="400"),
        pytest.param(problem(403, "Permission denied."), id="403"),
        pytest.param(Answer(b"", 302, {"Location": "/login"}), id="302"),
    ],
)
def test_a_refused_post_is_not_repeated(fake, run, output, answer):
    fake.plan("POST", answer)
    result = run()
    assert result.code == 1 and str(answer.status) in result.last_line
    assert len(fake.requests("POST")) == 1 and leftovers(output) == []


def test_a_post_that_cannot_connect_starts_no_export(fake, run, output):
    def hang_up(count: int, operation: str) -> None:
        if operation == "open lock":  # the last operation before the POST
            fake.servers[0].shutdown()
            fake.servers[0].server_close()

    with watch(output, hang_up):
        result = run()
    assert result.code == 75 and "may have started" not in result.err
    assert not fake.requests("POST") and leftovers(output) == []


def test_after_an_unclear_answer_a_post_that_cannot_connect_fails(fake, run, clock, monkeypatch):
    def hang_up(seconds: float) -> None:
        fake.servers[0].shutdown()
        fake.servers[0].server_close()
        clock.sleep(seconds)

    fake.plan("POST", problem(502, "?"))
    monkeypatch.setattr("time.sleep", hang_up)
    result = run()
    assert result.code == 1 and "may have started" in result.last_line


def test_a_job_id_that_cannot_be_saved_is_in_the_message(fake, run, output):
    def refuse(count: int, operation: str) -> None:
        if operation == "write job.json.new":
            raise OSError(errno.ENOSPC, "No space left on device")

    with watch(output, refuse):
        result = run()
    (job_id,) = fake.jobs
    assert result.code == 1 and f"--job-id {job_id}" in result.last_line
    assert_resumed(fake, output, run("--job-id", job_id))


@pytest.mark.parametrize("job_id", ["01be7c2d-0516-f103-001b-7a8345603546", "-A_z-09_"])
def test_job_id_collects_an_export_that_exists(fake, run, clock, output, job_id):
    fake.jobs[job_id] = Job(PRIMARY, {"shared_org_ids": [*ORGANIZATIONS]}, NOW - 9999, 0)
    result = run(f"--job-id={job_id}", START_DATE=None, END_DATE=None)
    assert result.code == 0 and read_report(result.report) == fake.table()
    assert result.report.name.endswith(f"_{job_id}.csv") and leftovers(output) == []
    assert clock.now - NOW < 5, "checked at once"
    paths = [seen.path for seen in fake.seen if seen.server == "api"]
    assert [path.split("/")[-1] for path in paths] == ["me", job_id]


def test_job_id_resumes_after_an_interruption(fake, run, output):
    assert run().code == 0
    (job_id,) = fake.jobs
    crash(run, output, "open part-0003", "--job-id", job_id)
    assert run("--job-id", job_id).code == 0
    assert downloads(fake) == 3 + 3 + 1
    assert len(fake.requests("POST")) == 1 and leftovers(output) == []


def test_an_unknown_job_id_fails(fake, run, output):
    result = run("--job-id", "unknown")
    assert result.code == 1 and "404" in result.last_line and "unknown" in result.last_line
    assert not fake.requests("POST") and leftovers(output) == []


@pytest.mark.parametrize(
    "changes, checks, code, kept",
    [
        pytest.param({"job_fails": "too large"}, [], 1, False, id="the job failed"),
        pytest.param({"empty_answers": 9}, [], 3, False, id="no links"),
        pytest.param({"usage": {}}, [], 3, False, id="no rows"),
        pytest.param({}, [UNKNOWN] * 5, 1, False, id="CircleCI does not know it"),
        pytest.param({}, [problem(401, "No.")], 1, True, id="a token that has expired"),
        pytest.param({"parts": [[problem(404, "gone")]]}, [], 1, True, id="a part that is gone"),
        pytest.param({"link_seconds": -9}, [], 75, True, id="an expired link"),
        pytest.param({"parts": [[Answer(b"\x1f\x8b")]]}, [], 75, True, id="a damaged part"),
        pytest.param({"parts": [[HTML]]}, [], 1, True, id="a part that is a web page"),
    ],
)
def test_what_can_still_be_collected_is_kept(
    fake, run, monkeypatch, output, changes, checks, code, kept
):
    """The next run resumes it, or else requests a new export."""
    with monkeypatch.context() as patch:
        for name, value in changes.items():
            patch.setattr(fake, name, value)
        fake.plan("GET", *checks)
        result = run()
    assert (result.code, result.out) == (code, "")
    assert bool(leftovers(output)) == kept
    assert ("new export" in result.last_line) == (checks == [UNKNOWN] * 5)
    assert run().code == 0 and leftovers(output) == []
    assert len(fake.requests("POST")) == (1 if kept else 2)
