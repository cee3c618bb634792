"""Waiting for the job: as early as possible, and never more than 10 GETs in an hour."""

from __future__ import annotations

import pytest
from bench_polling import measure, most_in_an_hour
from clocks import NOW, Clock
from conftest import always, leftovers
from crash import crash_after
from fake_circleci import Answer, in_json, problem

from usage_report import next_check_age

SCHEDULE = [15, 26, 45, 78, 135, 233, 403, 697, 1207, 2089, 3615]  # then every 6 minutes
HTML = Answer(b"<html>Log in</html>", headers={"Content-Type": "text/html"})
BUSY = problem(503, "Busy.")
UNKNOWN = problem(404, "Usage export job does not exist.")


def get_times(fake) -> list[float]:
    """Seconds from the POST to each GET."""
    (post,) = fake.requests("POST")
    return [seen.at - post.at for seen in fake.requests("GET")]


@pytest.mark.parametrize(
    "age, due",
    [
        pytest.param(0, 15, id="the first at 15 s"),
        pytest.param(30, 45, id="between two"),
        pytest.param(2100, 3615, id="ten last an hour"),
        pytest.param(3615, 3975, id="6 minutes after that"),
        pytest.param(14415, 14775, id="after the query limit"),
        pytest.param(864_000, 864_015, id="a job that is ten days old"),
    ],
)
def test_the_next_check_depends_on_the_age_alone(age, due):
    assert next_check_age(age) == pytest.approx(due, abs=1)


def test_the_checks_of_a_job_of_4_hours_follow_the_schedule(fake, run):
    fake.job_seconds = 4 * 3600
    assert run().code == 0
    times = get_times(fake)
    assert times[:11] == pytest.approx(SCHEDULE, abs=2)
    assert {round(later - at) for at, later in zip(times[10:], times[11:])} == {360}
    assert most_in_an_hour(times) == 10


def test_the_report_is_as_early_as_ten_checks_an_hour_allow():
    """For the lengths of bench_polling.py, without its runs."""
    shares = []
    for number in range(48):
        length = 15 * 960 ** (number / 47)
        checked = 15.0
        while checked < length - 0.001:
            checked = next_check_age(checked)
        shares.append(checked / length - 1)
    assert max(shares) <= 0.72
    assert sum(shares) / len(shares) <= 0.255
    assert measure(5000).overshoot == pytest.approx(55, abs=2)


@pytest.mark.parametrize(
    "age, following", [(50, [78, 135]), (5000, [5055, 5415])], ids=["50 s", "5000 s"]
)
def test_a_resumed_run_checks_at_once_and_goes_on_from_there(fake, run, clock, age, following):
    fake.job_seconds = following[-1] - 9
    crash_after(5, clock, run)
    Clock.sleep(clock, NOW + age - clock.now)
    assert run().code == 0
    assert get_times(fake) == pytest.approx([age, *following], abs=2)


def test_a_laptop_that_slept_checks_on_waking(fake, run, clock, monkeypatch):
    fake.job_seconds = 1000
    woke = []

    def sleep(seconds: float) -> None:
        if clock.now > NOW + 300 and not woke:
            Clock.sleep(clock, 7200)
            woke.append(clock.now)
        Clock.sleep(clock, seconds)

    monkeypatch.setattr(clock, "sleep", sleep)
    assert run().code == 0
    assert fake.requests("GET")[-1].at - woke[0] <= 2


@pytest.mark.parametrize("state", ["created", "processing", "queued", ""])
def test_a_job_that_is_not_completed_is_waited_for(fake, run, state):
    fake.odd_states = [state] * 4
    assert run().code == 0
    assert len(get_times(fake)) == 5


@pytest.mark.parametrize(
    "empty_answers, code, checks",
    [
        pytest.param(1, 0, 2, id="links in the second answer"),
        pytest.param(2, 0, 3, id="links in the third answer"),
        pytest.param(3, 3, 3, id="no usage"),
    ],
)
def test_completed_without_links_may_be_early(fake, run, output, empty_answers, code, checks):
    fake.job_seconds = 1
    fake.empty_answers = empty_answers
    result = run()
    assert (result.code, len(get_times(fake))) == (code, checks)
    assert leftovers(output) == []


def test_a_failed_job_shows_the_reason_and_what_to_try(fake, run, output):
    fake.job_fails = "result set over 100 MB"
    result = run()
    assert result.code == 1 and result.out == "" and leftovers(output) == []
    for shown in (fake.job_fails, "shorter window", "fewer organizations"):
        assert shown in result.last_line


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param([UNKNOWN], id="404"),
        pytest.param([Answer(drop=True)], id="no answer"),
        pytest.param([HTML], id="HTML"),
        pytest.param([in_json(["completed"])], id="JSON of another shape"),
        pytest.param([BUSY, UNKNOWN, HTML, BUSY], id="four in a row"),
    ],
)
def test_a_failed_check_is_followed_by_the_next_scheduled_one(fake, run, answers):
    fake.plan("GET", *answers)
    fake.job_seconds = 100
    assert run().code == 0
    assert get_times(fake) == pytest.approx(SCHEDULE[:5], abs=2)


@pytest.mark.parametrize(
    "answers, code, kept",
    [
        pytest.param([BUSY] * 5, 75, True, id="503"),
        pytest.param([UNKNOWN] * 4 + [BUSY], 75, True, id="404, then 503"),
        pytest.param([UNKNOWN] * 5, 1, False, id="404"),
    ],
)
def test_five_failures_in_a_row_end_the_run(fake, run, output, answers, code, kept):
    fake.plan("GET", *answers)
    result = run()
    assert (result.code, result.out, len(get_times(fake))) == (code, "", 5)
    assert bool(leftovers(output)) == kept
    assert run().code == 0
    assert len(fake.requests("POST")) == (1 if kept else 2)


def test_failures_that_are_not_in_a_row_do_not_add_up(fake, run):
    processing = in_json({"state": "processing", "download_urls": ["https://early.invalid"]})
    fake.plan("GET", *[BUSY, BUSY, processing] * 4)
    assert run().code == 0


@pytest.mark.parametrize(
    "headers, seconds",
    [
        pytest.param({"Retry-After": "120"}, 120, id="seconds"),
        pytest.param({"Retry-After": "Sat, 24 Oct 2026 12:05:15 GMT"}, 300, id="a date"),
        pytest.param({"Retry-After": "Sat, 24 Oct 2026 11:00:00 GMT"}, 0, id="a date in the past"),
        pytest.param({"X-RateLimit-Reset": "77"}, 77, id="X-RateLimit-Reset"),
        pytest.param({"RateLimit-Reset": "77"}, 77, id="RateLimit-Reset"),
        pytest.param({"Retry-After": "50", "X-RateLimit-Reset": "77"}, 50, id="Retry-After wins"),
        pytest.param({"Retry-After": "soon", "X-RateLimit-Reset": "\xb2"}, 360, id="garbage"),
        pytest.param({}, 360, id="no header"),
    ],
)
def test_a_429_waits_as_long_as_circleci_says(fake, run, headers, seconds):
    fake.job_seconds = 1
    fake.plan("GET", problem(429, "Slow down.", **headers))
    result = run()
    first, second = get_times(fake)
    assert result.code == 0 and "429" in result.err and "Slow down" in result.err
    assert second - first == pytest.approx(seconds, abs=1)


@pytest.mark.parametrize(
    "age, shortest, longest",
    [
        pytest.param(0, 4, 4.5, id="4 hours and a margin"),
        pytest.param(30, 1, 1.5, id="an hour from now for an old job"),
    ],
)
def test_an_endless_job_is_left_for_another_run(fake, run, clock, output, age, shortest, longest):
    fake.job_seconds = 1e9
    crash_after(5, clock, run)
    Clock.sleep(clock, age * 3600)
    started = clock.now
    result = run()
    assert result.code == 75 and "not finished" in result.last_line
    assert shortest * 3600 <= clock.now - started <= longest * 3600
    assert leftovers(output) != [] and len(fake.requests("POST")) == 1


def test_a_rate_limit_without_end_is_left_for_another_run(fake, run, clock):
    """Until then, each 429 is waited for: it is no failure."""
    fake.plan("GET", *always(problem(429, "No.", **{"Retry-After": "1000"})))
    assert run().code == 75
    assert 4 * 3600 - 1000 <= clock.now - NOW <= 4.5 * 3600
