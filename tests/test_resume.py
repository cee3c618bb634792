"""An export is never paid for twice: after an interruption, the same command resumes."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import stat
import sys
import threading
from pathlib import Path

import pytest
from bench_polling import most_in_an_hour
from clocks import Clock, FastTime
from conftest import leftovers
from crash import crash, crash_after, watch
from fake_circleci import HEADER, ORGANIZATIONS, PRIMARY, Answer, make_rows, problem, split

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
GONE = problem(404, "Usage export job does not exist.")


def state_file(output: Path) -> Path:
    return next(output.glob(".export-*/state.json"))


def read_state(output: Path) -> dict[str, object]:
    return json.loads(state_file(output).read_text())


def assert_one_report(fake, output: Path, result) -> None:
    """The run was resumed: one POST, the right report, nothing left behind."""
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    assert result.report.read_bytes() == fake.report()
    assert [*output.iterdir()] == [result.report]
    assert len(fake.requests("POST")) == 1


# --- What makes it the same export ---


@pytest.mark.parametrize(
    "arguments, variables, posts",
    [
        pytest.param([], {}, 1, id="the same settings"),
        pytest.param(["--end", "2026-09-29"], {}, 2, id="another window"),
        pytest.param([], {"PRIMARY_ORG_ID": list(ORGANIZATIONS)[1]}, 2, id="another primary"),
        pytest.param([], {"SHARED_ORG_IDS": PRIMARY}, 2, id="fewer organizations"),
        pytest.param(
            [], {"SHARED_ORG_IDS": ",".join([*ORGANIZATIONS][::-1])}, 1, id="another order"
        ),
        pytest.param(["--period", "2026-09"], {}, 1, id="the same window by --period"),
        pytest.param(["--plain"], {}, 1, id="the same export as plain CSV"),
    ],
)
def test_only_a_command_for_the_same_export_resumes_it(
    fake, run, clock, arguments, variables, posts
):
    crash_after(5, clock, run)
    assert run(*arguments, **variables).code == 0
    assert len(fake.requests("POST")) == posts


def test_another_base_url_is_another_export(fake, run, clock):
    crash_after(5, clock, run)
    assert run(CIRCLECI_BASE_URL=fake.url.replace("127.0.0.1", "localhost")).code == 0
    assert len(fake.requests("POST")) == 2


def test_a_dry_run_shows_that_the_next_run_resumes(fake, run, output):
    crash(run, output, "open merged.csv")
    (job_id,) = fake.jobs
    result = run("--dry-run")
    assert re.search(
        f"The next request would be:\n.* GET .*/usage_export_job/{job_id}$", result.err
    )
    assert_one_report(fake, output, run())


# --- An export whose end was in the future ---

CUT = ["--start", "2026-10-10", "--end", "2026-10-31"]


@pytest.mark.parametrize("at", ["open part-", "open merged.csv"], ids=["downloading", "merging"])
@pytest.mark.parametrize(
    "days, posts, last_day",
    [
        pytest.param(0, 1, "2026-10-24", id="at once"),
        pytest.param(6, 1, "2026-10-24", id="before that end has passed"),
        pytest.param(8, 2, "2026-10-31", id="after that end has passed"),
    ],
)
def test_a_window_cut_to_now_is_requested_again_once_it_has_passed(
    fake, run, clock, output, at, days, posts, last_day
):
    """The report has the name of the window that it covers. Once the whole window has passed, the
    shorter export is not enough."""
    crash(run, output, at, *CUT)
    Clock.sleep(clock, days * 86400)
    result = run(*CUT)
    assert result.code == 0 and result.report.read_bytes() == fake.report()
    assert result.report.name.endswith(f"_2026-10-10_{last_day}.csv")
    assert len(fake.requests("POST")) == posts and leftovers(output) == []
    assert ("Requesting the whole window" in result.err) == (posts == 2)
    assert json.loads(fake.requests("POST")[-1].body)["end"].startswith(last_day)


def test_job_id_never_requests_the_whole_window(fake, run, clock, output):
    crash(run, output, "open merged.csv", *CUT)
    (job_id,) = fake.jobs
    clock.sleep(8 * 86400)
    result = run("--job-id", job_id, *CUT)
    assert result.code == 0 and result.report.name.endswith(f"_{job_id}.csv")
    assert len(fake.requests("POST")) == 1 and leftovers(output) == []


# --- Damaged state ---


def fields(**values: object):
    """Replace these fields."""
    return lambda state: json.dumps({**state, **values})


def without(*names: str):
    return lambda state: json.dumps({key: state[key] for key in state if key not in names})


def only_id(text: str):
    """A string with <id> where the job ID belongs."""
    return lambda state: text.replace("<id>", state["job_id"])


DAMAGE = [
    pytest.param(fields(requested_at=float("nan")), id="NaN"),
    pytest.param(fields(requested_at=float("inf")), id="infinity"),
    pytest.param(fields(requested_at=float("-inf")), id="minus infinity"),
    pytest.param(fields(requested_at=1e300), id="1e300"),
    pytest.param(fields(requested_at=10**400), id="a number of 400 digits"),
    pytest.param(only_id(f'{{"job_id": "<id>", "requested_at": {"9" * 5000}}}'), id="5000 digits"),
    pytest.param(fields(requested_at=-5), id="a negative time"),
    pytest.param(fields(requested_at=0), id="time 0"),
    pytest.param(fields(requested_at="yesterday"), id="a time that is a string"),
    pytest.param(fields(requested_at=[1]), id="a time that is a list"),
    pytest.param(fields(requested_at=True), id="a time that is true"),
    *(pytest.param(fields(requested_at=at), id=f"time {at!r}") for at in ("", [], {}, False)),
    pytest.param(fields(requested_at=None), id="no time"),
    pytest.param(fields(polls=None), id="no polls"),
    pytest.param(fields(polls="many"), id="polls that are a string"),
    pytest.param(fields(polls={"1": 2}), id="polls that are an object"),
    pytest.param(
        fields(polls=[float("nan"), float("inf"), 1e300, 10**400, -1, None, "x", {}, [1]]),
        id="polls of every wrong kind",
    ),
    pytest.param(fields(polls=[1.0] * 100_000), id="100,000 polls"),
    pytest.param(fields(completed="yes"), id="completed is a string"),
    pytest.param(fields(completed=True), id="completed too early"),
    pytest.param(fields(end=7), id="an end that is a number"),
    pytest.param(fields(end=None), id="an end that is null"),
    pytest.param(fields(end="someday"), id="an end that is not a time"),
    pytest.param(fields(end="2026-09-99T99:99:99Z"), id="an end that does not exist"),
    pytest.param(fields(end="2026-00-30T23:59:59Z"), id="an end in month 0"),
    pytest.param(fields(end=":" * 20), id="an end of colons"),
    pytest.param(fields(report=["x"]), id="a report that is a list"),
    pytest.param(fields(report="all_orgs_gone.csv"), id="a report that does not exist"),
    pytest.param(fields(report="\0"), id="a report with a null character"),
    pytest.param(fields(report="x" * 100_000), id="a report with 100,000 characters"),
    pytest.param(fields(plain=[], report="all_orgs_x.csv"), id="plain is a list"),
    pytest.param(fields(folder="/", clock=1), id="unknown fields"),
    pytest.param(without("requested_at"), id="the time is missing"),
    pytest.param(only_id('{"job_id": "<id>"}'), id="only the job ID"),
    pytest.param(
        only_id('{"version": 1, "job_id": "<id>", "asked_at": 1, "parts": ["part-0"]}'),
        id="another version",
    ),
    pytest.param(only_id('{"JOB_ID" : "<id>"}'), id="job_id in capitals"),
    pytest.param(only_id('[{"job_id": "<id>"}]'), id="a list"),
    pytest.param(only_id('{"job_id": "<id>", "end": "2026'), id="cut off"),
    pytest.param(only_id("\ufeff" + '{"job_id": "<id>"}'), id="a BOM"),
    pytest.param(only_id('{"job_id": "<id>"}\0\0\0'), id="null characters at the end"),
    pytest.param(only_id('{"job_id": "<id>", "x": ' + "[" * 100_000), id="100,000 levels deep"),
    pytest.param(only_id('\udcff\udcfe{"job_id": "<id>"}'), id="not UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_state_keeps_the_job_id(fake, run, clock, output, damage):
    crash_after(5, clock, run)
    text = damage(read_state(output))
    state_file(output).write_bytes(text.encode("utf-8", "surrogateescape"))
    started = clock.now
    assert_one_report(fake, output, run())
    assert clock.now - started <= 120  # The job takes 20 s.


def test_a_job_id_in_capitals_is_kept(fake, run, clock, output):
    crash_after(5, clock, run)
    file, job_id = state_file(output), str(read_state(output)["job_id"])
    file.write_text(file.read_text().replace(job_id, job_id.upper()))
    assert_one_report(fake, output, run())


def test_a_job_id_that_is_only_in_the_draft_state_is_kept(fake, run, clock, output):
    crash_after(5, clock, run)
    file = state_file(output)
    file.rename(file.with_name("state.json.new"))
    assert_one_report(fake, output, run())


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="cut off"),
        pytest.param("[]", id="a list"),
        pytest.param('{"job_id": 1}', id="a number"),
        pytest.param('{"job_id": "../../x"}', id="a path"),
    ],
)
def test_without_a_job_id_the_export_is_requested_again(fake, run, clock, output, text):
    crash_after(5, clock, run)
    state_file(output).write_text(text)
    result = run()
    assert result.code == 0 and "CircleCI started export job" in result.err
    assert len(fake.requests("POST")) == 2 and leftovers(output) == []


OTHER_PART = gzip.compress(HEADER + make_rows(1)[0])  # complete, but not of this export
OTHER_NAME = f"0123456789ab-{len(OTHER_PART)}.csv.gz"


def replace_part(folder: Path, number: int) -> None:
    """As if the part had been downloaded from another link."""
    part = next(folder.glob(f"part-*{number}-of-*"))
    part.unlink()
    (folder / f"{part.name[:18]}{OTHER_NAME}").write_bytes(OTHER_PART)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_part_that_is_missing_is_downloaded(fake, run, output, number):
    crash(run, output, "open merged.csv")
    next(output.glob(f".export-*/part-*{number}-of-*")).unlink()
    assert_one_report(fake, output, run())
    assert len(fake.requests("GET", "store", "data_")) == 4


@pytest.mark.parametrize("number", [1, 2, 3])
def test_parts_from_different_links_are_not_mixed(fake, run, output, number):
    crash(run, output, "open merged.csv")
    replace_part(state_file(output).parent, number)
    assert_one_report(fake, output, run())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(f"part-0001-of-0003-{OTHER_NAME}", id="a part twice"),
        pytest.param(f"part-0004-of-0003-{OTHER_NAME}", id="one too many"),
        pytest.param(f"part-0001-of-0004-{OTHER_NAME}", id="a part of a four-part export"),
        pytest.param(f"part-0001-of-0001-{OTHER_NAME}", id="a complete export of one part"),
        pytest.param(f"part-0001-of-0003-{OTHER_NAME}.new", id="a draft"),
        pytest.param("merged.csv", id="a merged file"),
        pytest.param("merged.csv.new", id="the draft of a merged file"),
        pytest.param("part-0000.csv", id="a part of another version"),
    ],
)
def test_other_files_in_the_folder_do_not_change_the_report(fake, run, output, name):
    crash(run, output, "open merged.csv")
    (state_file(output).parent / name).write_bytes(OTHER_PART)
    assert_one_report(fake, output, run())


@pytest.mark.parametrize("name", ["../secret.csv", "secret.csv", "/secret.csv"])
def test_a_report_name_in_the_state_that_is_not_a_report_is_ignored(fake, run, output, name):
    crash(run, output, "rename merged.csv")
    secret = output.parent / "secret.csv"
    secret.write_text("secret")
    name = name if name[0] != "/" else str(secret)
    (output / "secret.csv").write_text("secret")
    state_file(output).write_text(json.dumps({**read_state(output), "report": name}))
    result = run()
    assert result.report.read_bytes() == fake.report() and len(fake.requests("POST")) == 1
    assert secret.read_text() == "secret"


def test_a_temporarily_unreadable_state_is_not_lost(fake, run, clock, output):
    crash_after(5, clock, run)
    state = state_file(output)
    kept = state.rename(state.with_name("kept"))
    state.mkdir()
    assert run().code == 75
    state.rmdir()
    kept.rename(state)
    assert_one_report(fake, output, run())


def test_a_part_that_is_damaged_on_disk_is_downloaded_again(fake, run, output):
    crash(run, output, "open merged.csv")
    part = next(output.glob(".export-*/part-0002-*"))
    part.write_bytes(part.read_bytes()[:-20])
    assert_one_report(fake, output, run())
    assert len(fake.requests("GET", "store", "data_")) == 4


def test_an_uncompressed_part_that_was_cut_on_disk_is_downloaded_again(fake, run, output):
    rows = make_rows(3)
    fake.parts = [[Answer(HEADER + row)] for row in rows]
    crash(run, output, "open merged.csv")
    next(output.glob(".export-*/part-0002-*")).write_bytes(HEADER)
    assert run().report.read_bytes() == HEADER + b"".join(rows)


def test_an_empty_part_is_complete(fake, run, output):
    """Even if CircleCI has forgotten the job."""
    row = make_rows(1)[0]
    fake.parts = [[Answer(HEADER + row)], [Answer(b"")]]
    crash(run, output, "open merged.csv")
    fake.plan("GET", *[GONE] * 30)
    assert run().report.read_bytes() == HEADER + row and len(fake.requests("POST")) == 1


def test_parts_of_an_earlier_export_are_removed_when_it_is_requested_again(
    fake, run, clock, output
):
    window = ("--start", "2026-10-10", "--end", "2026-10-31")
    crash(run, output, "open merged.csv", *window)
    earlier = {*output.glob(".export-*/part-*")}
    Clock.sleep(clock, 12 * 86400)
    crash(run, output, "open merged.csv", *window)
    parts = {*output.glob(".export-*/part-*")}
    assert len(fake.requests("POST")) == 2
    assert len(parts) == fake.part_count and not parts & earlier


def test_a_clock_that_was_wrong_at_the_post_does_not_delay_the_first_poll(fake, run, clock, output):
    crash_after(5, clock, run)
    clock.now -= 20 * 3600
    fake.clock = lambda: clock.now + 20 * 3600
    now = clock.now
    assert_one_report(fake, output, run())
    assert clock.now - now < 60


@POSIX
@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_a_lock_on_a_removed_file_does_not_count(fake, run, output, monkeypatch, replaced):
    """Otherwise, two runs could each hold a lock."""

    def remove_first(file, operation: int) -> None:
        os.unlink(file.name)
        if replaced:
            Path(file.name).touch()

    monkeypatch.setattr("fcntl.flock", remove_first)
    result = run()
    assert result.code == 1 and "Another run is working on this export" in result.last_line
    assert not fake.requests("POST")


def test_parts_without_a_state_are_not_used(fake, run, clock, output):
    crash(run, output, "open merged.csv")
    file = state_file(output)
    for part in file.parent.glob("part-*"):
        part.write_bytes(gzip.compress(HEADER + b"of another job\n"))
    file.unlink()
    result = run()
    assert result.code == 0 and result.report.read_bytes() == fake.report()
    assert len(fake.requests("POST")) == 2 and leftovers(output) == []


# --- What is done is not done again ---


def test_complete_parts_are_not_downloaded_again(fake, run, output):
    fake.parts = [
        [Answer(gzip.compress(HEADER + b"".join(rows)))] for rows in split(make_rows(9), 3)
    ]
    right = fake.parts[1]
    fake.parts[1] = [problem(404, "NoSuchKey")]
    assert run().code == 1
    fake.parts[1] = right
    result = run()
    assert result.code == 0 and result.report.read_bytes() == HEADER + b"".join(make_rows(9))
    served = [
        re.search(r"data_(\d)", seen.path)[1] for seen in fake.requests("GET", "store", "data_")
    ]
    assert sorted(served) == ["0", "1", "1", "2"] and len(fake.requests("POST")) == 1


def test_after_a_crash_in_the_merge_nothing_is_polled_or_downloaded(fake, run, output):
    crash(run, output, "write merged.csv")
    polls, served = len(fake.requests("GET")), len(fake.requests("GET", "store", ""))
    assert_one_report(fake, output, run())
    assert (len(fake.requests("GET")), len(fake.requests("GET", "store", ""))) == (polls, served)


def test_a_published_report_is_not_written_again(fake, run, output):
    crash(run, output, "remove part-")
    (report,) = output.glob("all_orgs_*")
    before = report.stat()
    result = run()
    assert result.report == report and report.stat().st_mtime_ns == before.st_mtime_ns
    assert_one_report(fake, output, result)


def test_a_report_that_was_renamed_after_a_crash_is_not_touched(fake, run, output):
    """It is still a second name of the merged file."""
    crash(run, output, "remove merged.csv")
    (report,) = output.glob("all_orgs_*")
    renamed = report.rename(output / "mine.csv")
    result = run()
    assert result.code == 0 and not result.report.samefile(renamed)
    assert renamed.read_bytes() == fake.report() == result.report.read_bytes()


def test_moving_the_report_right_after_its_path_is_printed_does_no_harm(
    fake, run, output, tmp_path
):
    def move(count: int, operation: str) -> None:
        if operation.startswith("remove part-"):
            for report in output.glob("all_orgs_*"):
                report.rename(tmp_path / "moved.csv")

    with watch(output, move):
        result = run()
    assert result.code == 0 and "Traceback" not in result.err
    assert (tmp_path / "moved.csv").read_bytes() == fake.report() and not result.report.exists()
    assert leftovers(output) == [] and len(fake.requests("POST")) == 1


# --- A job that CircleCI does not know ---


def test_a_job_that_is_gone_is_requested_again(fake, run, clock, output):
    crash_after(5, clock, run)
    fake.jobs.clear()
    result = run()
    assert result.code == 0 and "Requesting the export again" in result.err
    assert result.report.read_bytes() == fake.report()
    assert len(fake.requests("POST")) == 2 and leftovers(output) == []


def test_a_job_that_is_gone_is_not_said_to_be_kept(fake, run, clock, output):
    crash_after(5, clock, run)
    fake.jobs.clear()
    fake.plan("POST", problem(403, "No."))
    result = run()
    assert result.code == 1 and "kept" not in result.last_line and leftovers(output) == []


def test_a_job_that_circleci_never_finds_is_requested_again_once(fake, run):
    fake.plan("GET", *[GONE] * 40)
    result = run()
    assert result.code == 1 and "404" in result.err
    assert len(fake.requests("POST")) == 2


def test_a_token_that_lost_access_costs_no_second_export(fake, run, clock, output):
    crash_after(5, clock, run)
    organizations = dict(fake.organizations)
    del fake.organizations[PRIMARY]
    result = run()
    assert result.code == 1 and "no access to PRIMARY_ORG_ID" in result.err
    assert len(fake.requests("POST")) == 1 and read_state(output)["job_id"] in fake.jobs
    fake.organizations = organizations
    assert_one_report(fake, output, run())


def test_polls_of_an_export_that_is_requested_again_count_too(fake, run, clock):
    """They were spent on the same organization."""
    window = ["--start", "2026-10-24T00:00:00Z", "--end", "2026-10-24T12:05:00Z"]  # It is 12:00.
    fake.job_seconds = 1000
    crash_after(500, clock, run, *window)
    assert run(*window).code == 0 and len(fake.requests("POST")) == 2
    times = [seen.at for seen in fake.requests("GET")]
    assert len(times) > 10
    assert most_in_an_hour(times) <= 10


# --- --job-id ---


@pytest.mark.parametrize("at", ["open part-", "rename part-0003", "open merged.csv"])
def test_job_id_uses_and_removes_the_folder_of_the_interrupted_run(fake, run, output, at):
    crash(run, output, at)
    (job_id,) = fake.jobs
    complete = len(list(output.glob(".export-*/part-*.gz")))
    served = len(fake.requests("GET", "store", "data_"))
    result = run("--job-id", job_id, START_DATE=None, END_DATE=None)
    assert_one_report(fake, output, result)
    assert result.report.name.endswith(f"_{job_id}.csv")
    assert len(fake.requests("GET", "store", "data_")) - served == 3 - complete


def test_job_id_keeps_the_folders_of_other_exports(fake, run, clock, output):
    crash_after(5, clock, run)
    crash_after(5, clock, run, "--end", "2026-09-10")
    first, second = fake.jobs
    assert run("--job-id", first).code == 0
    (folder,) = output.glob(".export-*")
    assert second in (folder / "state.json").read_text()


def test_job_id_of_another_organization_keeps_the_folder_of_the_interrupted_run(
    fake, run, clock, output
):
    crash_after(5, clock, run)
    (job_id,) = fake.jobs
    fake.plan("GET", *[problem(404, "Usage export job does not exist.")] * 6)
    assert run("--job-id", job_id, PRIMARY_ORG_ID=list(ORGANIZATIONS)[1]).code == 1
    assert run().code == 0 and len(fake.requests("POST")) == 1 and leftovers(output) == []


# --- Two runs at once ---


@pytest.mark.parametrize("by_job_id", [False, True], ids=["the same command", "--job-id"])
def test_a_second_run_at_the_same_time_is_refused(fake, run, output, clock, by_job_id):
    """The second one exits with 1, so that no cron job repeats it. The first is not disturbed."""
    fake.job_seconds, waiting, leave = 40, threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        if threading.current_thread() is first:
            waiting.set()
            leave.wait(10)
        Clock.sleep(clock, seconds)

    clock.sleep = sleep
    codes = []
    first = threading.Thread(target=lambda: codes.append(run().code))
    first.start()
    assert waiting.wait(10)
    result = run("--job-id", next(iter(fake.jobs))) if by_job_id else run()
    leave.set()
    first.join(20)
    assert result.code == 1 and "Another run is working on this export" in result.err
    assert codes == [0] and len(fake.requests("POST")) == 1 and leftovers(output) == []


# --- File systems that cannot do everything ---


def fail_with(number: int):
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


NO_LOCKS = [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS]
NO_LINKS = [errno.ENOTSUP, errno.EPERM, errno.EMLINK]


@POSIX
@pytest.mark.parametrize("number", NO_LOCKS, ids=os.strerror)
def test_without_locks_there_is_a_notice(fake, run, output, monkeypatch, number):
    monkeypatch.setattr("fcntl.flock", fail_with(number))
    result = run()
    assert_one_report(fake, output, result)
    assert "notice: Cannot lock" in result.err and os.strerror(number) in result.err


@pytest.mark.parametrize("number", NO_LINKS, ids=os.strerror)
def test_without_hard_links_the_report_is_still_published(fake, run, output, monkeypatch, number):
    monkeypatch.setattr(os, "link", fail_with(number))
    result = run()
    assert_one_report(fake, output, result)
    assert "notice" not in result.err


@pytest.mark.parametrize("function", ["open", "fsync"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES], ids=os.strerror)
def test_a_folder_that_cannot_be_flushed_does_no_harm(
    fake, run, output, monkeypatch, function, number
):
    original = getattr(os, function)

    def fail_for_folders(target, *arguments):
        if stat.S_ISDIR(os.stat(target).st_mode):
            raise OSError(number, os.strerror(number))
        return original(target, *arguments)

    monkeypatch.setattr(os, function, fail_for_folders)
    result = run()
    assert_one_report(fake, output, result)
    assert "notice" not in result.err


@POSIX
@pytest.mark.parametrize("limit", [20_000, 200_000], ids=["downloading", "merging"])
def test_a_full_disk_keeps_the_export(fake, run, clock, output, tmp_path, limit):
    """A full disk, simulated by a limit: a part has about 50 kB, the report has 250 kB."""
    fast, rows = FastTime(1000), make_rows(500)
    fake.clock = fast.time
    fake.parts = [[Answer(gzip.compress(HEADER + b"".join(part), 0))] for part in split(rows, 5)]
    site = tmp_path / "sitecustomize.py"
    full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    site.write_text(full + Path(__file__).with_name("fast_time").joinpath(site.name).read_text())
    result = fast.run(fake, "--output-dir", output, PYTHONPATH=str(tmp_path))
    assert result.code == 75 and "File too large" in result.err and "Traceback" not in result.err
    assert not list(output.glob("all_orgs_*")) and not list(output.rglob("*.new"))
    assert "The export is kept in" in result.last_line
    served = len(fake.requests("GET", "store", "data_"))
    result = fast.run(fake, "--output-dir", output)
    assert result.code == 0 and result.report.read_bytes() == HEADER + b"".join(rows)
    assert len(fake.jobs) == 1 and leftovers(output) == []
    if limit > 100_000:
        assert len(fake.requests("GET", "store", "data_")) == served == 5


# --- What is on disk ---


def test_the_folder_holds_neither_the_token_nor_a_signed_url(fake, run, output):
    fake.parts = [[problem(404, "gone")]]
    assert run().code == 1
    state = read_state(output)
    assert state["job_id"] in fake.jobs
    for path in output.rglob("*"):
        if path.is_file():
            assert not re.search(rb"CCIPAT|http|signature|SIGNED", path.read_bytes())


@pytest.mark.parametrize(
    "answers, code",
    [
        pytest.param([problem(400, "No.")], 1, id="CircleCI refuses"),
        pytest.param([problem(429, "No.", **{"Retry-After": "9999"})] * 9, 75, id="the rate limit"),
        pytest.param([Answer(drop=True)] * 9, 1, id="an unknown outcome"),
    ],
)
def test_without_an_export_no_folder_is_left(fake, run, output, answers, code):
    fake.plan("POST", *answers)
    assert run().code == code
    assert leftovers(output) == []
