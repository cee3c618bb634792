"""Polling: as soon as possible, and never more than 10 GETs in any 60 minutes."""

from __future__ import annotations

import random

import pytest
from bench_polling import measure_all, most_in_an_hour
from clocks import NOW, Clock
from crash import Killed, crash_after
from fake_circleci import PRIMARY, Answer, in_json, problem

import usage_report

HEADERS = ["seconds", "date", "reset", "none"]


def get_times(fake) -> list[float]:
    """Seconds after the POST."""
    (post,) = fake.requests("POST")
    return [seen.at - post.at for seen in fake.requests("GET")]


# --- The schedule ---


def test_the_report_is_as_early_as_the_limits_allow():
    rows = measure_all(16)
    shares = [row.overshoot / row.job_seconds for row in rows]
    assert max(shares) <= 0.78
    assert sum(shares) / len(shares) <= 0.32
    assert max(row.overshoot for row in rows if row.job_seconds > 3600) <= 365
    assert max(row.most_in_an_hour for row in rows) <= 10


def test_polls_start_at_15_s_slow_down_by_a_constant_factor_then_come_every_6_minutes(fake, run):
    fake.job_seconds = 4 * 3600
    assert run().code == 0
    times = get_times(fake)
    expected = [15, 26, 45, 78, 135, 233, 404, 699, 1211, 2097, 3630]
    assert times[:11] == pytest.approx(expected, abs=2)
    assert {round(b - a) for a, b in zip(times[10:], times[11:])} <= {361, 362, 363}


@pytest.mark.parametrize(
    "requested_at, polls, due",
    [
        pytest.param(1e6, [], 15, id="the first"),
        pytest.param(1e6, [1e6 + 15], 26, id="the second"),
        pytest.param(1e6, [1e6 + 2000], 3462, id="one late poll"),
        pytest.param(1e6, [1e6 + 3500], 3976, id="6 minutes after the first hour"),
        pytest.param(1e6, [1e6 + 9000], 9361, id="every 6 minutes after an hour"),
        pytest.param(1e6, [1e6 - 500], 15, id="a poll of an earlier job"),
        pytest.param(1e6, [1e6 + n for n in range(10)], 3615, id="no GET is left"),
        pytest.param(1e6, [1e6 + n for n in range(9)], 15, id="one GET is left"),
        pytest.param(None, [], -1e6, id="a job of unknown age is polled at once"),
        pytest.param(None, [1e6], 11, id="a job of unknown age, the second"),
    ],
)  # fmt: skip
def test_next_poll(requested_at, polls, due):
    assert usage_report.next_poll(requested_at, polls) - 1e6 == pytest.approx(due, abs=1)


@pytest.mark.parametrize("seed", range(4))
def test_no_more_than_10_gets_in_an_hour_whatever_happens(fake, run, clock, seed, monkeypatch):
    """Trouble and crashes at random. Still one POST, and the report in the end."""
    dice = random.Random(seed)
    fake.job_seconds = 15 * (4 * 3600 / 15) ** dice.random()
    trouble = [Answer(drop=True), problem(500, "Oops."), Answer(b"<html>"), problem(404, "No.")]

    def sleep(seconds: float) -> None:
        Clock.sleep(clock, seconds)
        if dice.random() < 0.002:
            raise Killed

    monkeypatch.setattr(clock, "sleep", sleep)
    for _ in range(60):
        fake.planned["GET"] = [dice.choice(trouble) for _ in range(dice.randrange(4))]
        try:
            code = run("--quiet").code
        except Killed:
            code = -9
        if code == 0:
            break
        assert code in (75, -9)
        Clock.sleep(clock, dice.choice([0, 5, 300]))
    assert code == 0
    assert most_in_an_hour([seen.at for seen in fake.requests("GET")]) <= 10
    assert len(fake.requests("POST")) == 1


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param([problem(500, "Oops.")], id="500"),
        pytest.param([problem(408, "Slow.")], id="408"),
        pytest.param([problem(404, "Not found.")], id="404"),
        pytest.param([Answer(drop=True)], id="no answer"),
        pytest.param([Answer(b"<html>")], id="HTML"),
        pytest.param([in_json({"state": 7})], id="a state that is a number"),
        pytest.param([problem(500, "Oops.")] * 5, id="500 five times"),
    ],
)
def test_a_failed_get_is_followed_by_the_next_scheduled_one(fake, run, answers):
    fake.plan("GET", *answers)
    fake.job_seconds = 100
    assert run().code == 0
    schedule = [15, 26, 45, 78, 135, 233]
    times = get_times(fake)
    assert times == pytest.approx(schedule[: len(times)], abs=2)
    assert len(times) == max(5, len(answers) + 1)


def test_six_failed_gets_exit_with_75_and_keep_the_export(fake, run):
    fake.plan("GET", *[problem(503, "Busy.")] * 6)
    result = run()
    assert result.code == 75 and "503" in result.last_line
    assert "The export is kept in" in result.last_line
    fake.plan("me", problem(401, "No."))
    assert "kept" not in run().last_line
    fake.plan("GET", *[problem(503, "Busy.")] * 6)
    result = run()
    assert result.code == 75 and "The export is kept in" in result.last_line
    assert run().code == 0 and len(fake.requests("POST")) == 1


def test_failures_that_are_not_in_a_row_do_not_add_up(fake, run):
    """Only six in a row end the run."""
    processing = in_json({"state": "processing", "download_urls": None})
    fake.plan("GET", *[problem(503, "Busy."), problem(503, "Busy."), processing] * 5)
    assert run().code == 0


# --- The rate limit ---


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_rate_limit_used_up_by_others_is_waited_out(fake, run, clock, method, header):
    fake.throttle_header, fake.job_seconds = header, 1
    fake.spent[method, PRIMARY] = [clock.now - 1800 + n for n in range(10)]
    result = run()
    assert result.code == 0, result.err
    assert "429: Rate limit exceeded" in result.err
    longest = 1800 + 450 if header == "none" else 1835
    assert 1790 <= clock.now - NOW <= longest
    assert len(fake.jobs) == 1


@pytest.mark.parametrize("header", HEADERS)
def test_a_429_while_polling_is_waited_out(fake, run, clock, header):
    """Two other exports take 4 of the 10 GETs."""
    fake.throttle_header, fake.job_seconds = header, 3000
    fake.spent["GET", PRIMARY] = [clock.now + n for n in range(4)]
    assert run().code == 0
    assert get_times(fake)[-1] <= 4050
    assert len(fake.requests("POST")) == 1


@pytest.mark.parametrize(
    "headers, seconds",
    [
        pytest.param({"Retry-After": "120"}, 120, id="seconds"),
        pytest.param({"Retry-After": "0"}, 0, id="0 seconds"),
        pytest.param({"Retry-After": "Sat, 24 Oct 2026 12:05:00 GMT"}, 300, id="an HTTP date"),
        pytest.param({"Retry-After": "Sat, 24 Oct 2026 11:00:00 GMT"}, 0, id="a date in the past"),
        pytest.param({"Retry-After": "5", "X-RateLimit-Reset": "77"}, 5, id="Retry-After wins"),
        pytest.param({"Retry-After": "soon", "X-RateLimit-Reset": "77"}, 77, id="not a time"),
        pytest.param({"Retry-After": "", "X-RateLimit-Reset": "77"}, 77, id="empty"),
        pytest.param({"X-RateLimit-Reset": "77"}, 77, id="X-RateLimit-Reset"),
        pytest.param({"X-RateLimit-Reset": "soon"}, 361.5, id="X-RateLimit-Reset is not a number"),
        pytest.param({"X-RateLimit-Reset": "-5"}, 361.5, id="X-RateLimit-Reset is negative"),
        pytest.param(
            {"Retry-After": "\u00b2", "X-RateLimit-Reset": "\u00b2"}, 361.5, id="superscript"
        ),
        pytest.param({}, 361.5, id="nothing: a tenth of the hour"),
    ],
)
def test_how_long_to_wait_after_a_429(clock, headers, seconds):
    assert usage_report.rate_limit_seconds(headers) == seconds


@pytest.mark.parametrize("kind", ["me", "POST", "GET"])
@pytest.mark.parametrize("digits", [9, 40, 9_999])
def test_a_rate_limit_of_years_exits_with_75(fake, run, clock, kind, digits):
    fake.plan(kind, problem(429, "No.", **{"Retry-After": "9" * digits}))
    result = run()
    assert result.code == 75 and "Traceback" not in result.err
    assert clock.now - NOW <= usage_report.PATIENCE + 3600
    assert len(fake.jobs) <= 1


def test_a_rate_limit_that_never_ends_exits_with_75(fake, run, output):
    fake.plan("POST", *[problem(429, "No.", **{"Retry-After": "3000"})] * 20)
    result = run()
    assert result.code == 75 and "429: No" in result.err and not fake.jobs


def test_a_429_is_not_a_failure(fake, run):
    """Six failures in a row end the run. Nine 429s do not."""
    fake.plan("GET", *[problem(429, "No.", **{"Retry-After": "7"})] * 9)
    assert run().code == 0


@pytest.mark.parametrize(
    "between",
    [
        pytest.param([problem(429, "No.", **{"Retry-After": "3600"})], id="429"),
        pytest.param([problem(500, "Oops.")] * 5, id="500 five times"),
    ],
)
def test_the_run_gives_up_on_an_endless_job_whatever_comes_between_polls(fake, run, clock, between):
    fake.job_seconds = 1e9
    fake.limits["GET"] = 10**9
    waiting = in_json({"state": "processing", "download_urls": None})
    fake.plan("GET", *([*between, waiting] * 300))
    assert run().code == 75 and clock.now - NOW < 6 * 3600


def test_the_wait_for_a_429_is_shown(fake, run):
    fake.plan("POST", problem(429, "Later.", **{"Retry-After": "754"}))
    assert "Retrying in 12 min 34 s" in run().err


# --- Clocks ---


def jump(clock: Clock, monkeypatch: pytest.MonkeyPatch, at: float, seconds: float) -> None:
    """Shift this computer's clock once the wait has lasted `at` seconds. CircleCI's stays right."""

    def sleep(pause: float) -> None:
        Clock.sleep(clock, pause)
        if clock.now > NOW + at:
            monkeypatch.setattr(clock, "time", lambda: clock.now + seconds)

    monkeypatch.setattr(clock, "sleep", sleep)


@pytest.mark.parametrize("seconds", [-3 * 3600, 3 * 3600], ids=["back", "forward"])
@pytest.mark.parametrize("at, job_seconds", [(5, 2000), (100, 2000), (1000, 2000), (5000, 6000)])
def test_a_clock_change_of_three_hours_delays_a_poll_by_one_interval_at_most(
    fake, run, clock, monkeypatch, seconds, at, job_seconds
):
    """If the clock is set forward, the script cannot know that the last hour is not over, and
    CircleCI may answer 429."""
    fake.job_seconds = job_seconds
    jump(clock, monkeypatch, at, seconds)
    result = run("--quiet")
    assert result.code == 0, result.err
    times = get_times(fake)
    interval = 361.5
    before = [time for time in times if time <= at]
    after = [time for time in times if time > at]
    planned = usage_report.next_poll(0.001, before)
    assert after[0] <= planned + interval + 5
    if seconds < 0:
        assert most_in_an_hour(times) <= 10
    longest = max([b - a for a, b in zip(times, times[1:])] + [0])
    assert longest <= 1535 + interval  # the longest interval of the schedule, and one more


def test_a_laptop_that_slept_polls_on_waking(fake, run, clock, monkeypatch):
    fake.job_seconds = 1000
    asleep = []

    def sleep(seconds: float) -> None:
        if clock.now > NOW + 300 and not asleep:
            asleep.append(clock.now)
            Clock.sleep(clock, 7200)
        Clock.sleep(clock, seconds)

    monkeypatch.setattr(clock, "sleep", sleep)
    assert run().code == 0
    assert fake.requests("GET")[-1].at - asleep[0] - 7200 <= 2


def test_sleeping_takes_as_long_as_planned_if_the_clock_is_set_back(clock, monkeypatch):
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        Clock.sleep(clock, seconds - (3600 if len(slept) == 5 else 0))

    monkeypatch.setattr(clock, "sleep", sleep)
    usage_report.sleep(60, "Waiting: {}".format)
    assert 58 <= sum(slept) <= 62


def test_after_the_clock_is_set_back_a_resumed_run_waits_an_hour_at_most(fake, run, clock):
    """Polls in the future count as polls of this moment, so they cost an hour at most."""
    fake.job_seconds = 900
    crash_after(300, clock, run)
    offset = 3 * 3600
    fake.clock = lambda: clock.now + offset  # CircleCI's clock is not set back.
    clock.now -= offset
    resumed = clock.now
    assert run().code == 0
    assert clock.now - resumed <= 3600 + 362
    assert most_in_an_hour([seen.at for seen in fake.requests("GET")]) <= 10


# --- Resumed runs ---


def test_a_resumed_run_counts_from_the_post_and_polls_at_once(fake, run, clock):
    fake.job_seconds = 500
    crash_after(60, clock, run)
    Clock.sleep(clock, 1000)
    resumed = clock.now
    result = run()
    assert result.code == 0 and "Resuming export job" in result.err
    assert fake.requests("GET")[-1].at - resumed < 1
    assert len(fake.requests("POST")) == 1


def test_a_job_of_unknown_age_is_polled_every_6_minutes_after_an_hour(fake, run, clock, output):
    fake.job_seconds = 4 * 3600
    crash_after(5, clock, run)
    (job_id,) = fake.jobs
    (state,) = output.glob(".export-*/state.json")
    state.write_text(f'{{"job_id": "{job_id}"}}')
    assert run().code == 0
    times = get_times(fake)
    assert len(times) > 30 and {round(b - a) for a, b in zip(times[11:], times[12:])} == {362}


def test_polls_of_killed_runs_count_too(fake, run, clock):
    """14 runs, each killed after 200 s, share the allowance of an hour."""
    fake.job_seconds = 3000
    for _ in range(14):
        crash_after(200, clock, run)
    times = [seen.at for seen in fake.requests("GET")]
    assert len(times) >= 9 and most_in_an_hour(times) <= 10
    assert run().code == 0
    assert most_in_an_hour([seen.at for seen in fake.requests("GET")]) <= 10


@pytest.mark.parametrize(
    "answers, code",
    [
        pytest.param([], 0, id="links"),
        pytest.param([problem(500, "Oops.")] * 3, 0, id="500 first"),
        pytest.param([problem(429, "No.", **{"Retry-After": "7"})] * 3, 0, id="429 first"),
        pytest.param(None, 3, id="no links"),
    ],
)
def test_a_job_older_than_4_hours_still_gets_its_polls(fake, run, clock, answers, code):
    """The 4 hours are over, but failures, limits, and late links still get their time."""
    fake.plan("GET", problem(401, "Invalid token provided."))
    assert run().code == 1
    Clock.sleep(clock, 6 * 3600)
    fake.plan("GET", *(answers or []))
    if answers is None:
        next(iter(fake.jobs.values())).empty_answers = 3
    assert run().code == code
    assert len(fake.requests("POST")) == 1


def test_new_links_are_requested_at_once(fake, run, clock, output):
    """A completed job only needs links that have not expired."""
    fake.parts = [[problem(404, "gone")]]
    fake.job_seconds = 300
    assert run().code == 1
    fake.parts = None
    resumed = clock.now
    assert run().code == 0
    assert fake.requests("GET")[-1].at - resumed < 1
