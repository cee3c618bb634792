"""Polling: as soon as possible, and never more than 10 GETs in any hour."""

from __future__ import annotations

import random

import pytest
from bench_polling import measure_all, most_in_an_hour
from clocks import Clock
from fake_circleci import PRIMARY, Answer, problem

import usage_report


def test_the_report_is_as_early_as_the_limits_allow():
    rows = measure_all()
    shares = [row.overshoot / row.job_seconds for row in rows]
    assert max(shares) <= 0.78
    assert sum(shares) / len(shares) <= 0.32
    assert max(row.overshoot for row in rows if row.job_seconds > 3600) <= 365
    assert max(row.most_in_an_hour for row in rows) <= 10


def schedule(until: float) -> list[float]:
    polls: list[float] = []
    while not polls or polls[-1] < until:
        polls.append(usage_report.next_poll(0.0, polls))
        assert polls[-1] >= usage_report.limit_allows(polls[:-1]) - 1e-6
    return polls


def test_the_schedule_begins_at_15_s_grows_by_a_constant_and_ends_every_6_minutes():
    polls = schedule(4 * 3600)
    assert [round(at) for at in polls[:11]] == [15, 26, 45, 78, 135, 233, 404, 699, 1211, 2097, 3630]
    assert {round(b - a) for a, b in zip(polls[10:], polls[11:])} == {362}


@pytest.mark.parametrize(
    "polls, due",
    [
        pytest.param([], 15, id="the first"),
        pytest.param([2000.0], 3462.5, id="after one late look, by growth"),
        pytest.param([3500.0], 3976.5, id="growth never reaches beyond the hour and 6 minutes"),
        pytest.param([-500.0], 15, id="a GET of an earlier job does not hasten the first"),
    ],
)
def test_next_poll(polls, due):
    assert usage_report.next_poll(0.0, polls) == pytest.approx(due, abs=1)


def test_limit_allows():
    polls = [3000.0 + n for n in range(10)]
    assert usage_report.limit_allows(polls) == 6615
    assert usage_report.limit_allows(polls[1:]) == 0


@pytest.mark.parametrize("seed", range(8))
def test_no_more_than_10_gets_in_any_hour_whatever_happens(fake, run, clock, seed, monkeypatch):
    """Trouble, interruptions and resumed runs, at random; still one POST, and the report in the end."""
    dice = random.Random(seed)
    fake.job_seconds = 15 * (4 * 3600 / 15) ** dice.random()
    trouble = [Answer(drop=True), problem(500, "Oops."), Answer(b"<html>")]

    def sleep(seconds: float) -> None:
        Clock.sleep(clock, seconds)
        if dice.random() < 0.002:
            raise KeyboardInterrupt

    monkeypatch.setattr(clock, "sleep", sleep)
    for _ in range(60):
        fake.planned["GET"] = [dice.choice(trouble) for _ in range(dice.randrange(4))]
        code = run().code
        if code == 0:
            break
        assert code in (1, 75, 130)
        Clock.sleep(clock, dice.choice([0, 5, 300]))
    assert code == 0
    assert most_in_an_hour([one.at for one in fake.requests("GET")]) <= 10
    assert len(fake.requests("POST")) == 1


@pytest.mark.parametrize("header", ["seconds", "date", "reset", "none"])
def test_a_budget_that_others_used_up_is_waited_for(fake, run, clock, header):
    fake.throttle_header, fake.job_seconds = header, 1
    fake.spent["GET", PRIMARY] = [clock.now - 1800 + n for n in range(10)]
    began = clock.now
    result = run()
    assert result.code == 0, result.err
    assert "429: Rate limit exceeded" in result.err and "Waiting 0:" in result.err
    assert 1800 <= clock.now - began <= (1830 if header != "none" else 1800 + 380)


@pytest.mark.parametrize("header", ["seconds", "date", "reset", "none"])
def test_posts_that_others_used_up_are_waited_for(fake, run, clock, header):
    fake.throttle_header = header
    fake.spent["POST", PRIMARY] = [clock.now - 1800 + n for n in range(10)]
    assert run().code == 0
    assert len(fake.jobs) == 1


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({"Retry-After": "120"}, 120),
        ({"Retry-After": "Sat, 24 Oct 2026 12:05:00 GMT"}, 300),
        ({"Retry-After": "soon", "X-RateLimit-Reset": "77"}, 77),
        ({"X-RateLimit-Reset": "77"}, 77),
        ({"X-RateLimit-Reset": "soon"}, 361.5),
        ({"Retry-After": "\u00b2", "X-RateLimit-Reset": "\u00b2"}, 361.5),
        ({"Retry-After": "9" * 30}, usage_report.PATIENCE + 1),
        ({}, 361.5),
    ],
)
def test_how_long_a_429_asks_to_wait(clock, headers, seconds):
    assert usage_report.limit_seconds(headers) == seconds


def test_a_rate_limit_that_never_ends_is_not_finished(fake, run):
    fake.limits["POST"] = 0
    fake.plan("POST", *[problem(429, "No.", **{"Retry-After": "3000"})] * 9)
    result = run()
    assert result.code == 75 and "429: No" in result.err


def test_a_machine_that_slept_through_the_wait_polls_on_waking(fake, run, clock, monkeypatch):
    fake.job_seconds = 1000
    asleep = []

    def sleep(seconds: float) -> None:
        if clock.now > 1792843200 + 300 and not asleep:
            asleep.append(clock.now)
            Clock.sleep(clock, 7200)
        Clock.sleep(clock, seconds)

    monkeypatch.setattr(clock, "sleep", sleep)
    assert run().code == 0
    assert fake.requests("GET")[-1].at - asleep[0] - 7200 <= 2


def test_a_clock_that_is_set_back_does_not_prolong_the_wait(clock, monkeypatch):
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        Clock.sleep(clock, seconds - (3600 if len(slept) == 5 else 0))

    monkeypatch.setattr(clock, "sleep", sleep)
    usage_report.pause(60)
    assert sum(slept) <= 61


def test_a_resumed_run_counts_from_the_post_and_polls_at_once(fake, run, clock, monkeypatch):
    fake.job_seconds = 500

    def sleep(seconds: float) -> None:
        Clock.sleep(clock, seconds)
        if clock.now > 1792843200 + 60:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(clock, "sleep", sleep)
        assert run().code == 130
    Clock.sleep(clock, 1000)
    resumed = clock.now
    result = run()
    assert result.code == 0 and "Going on with export job" in result.err
    assert fake.requests("GET")[-1].at - resumed < 1
    assert len(fake.requests("POST")) == 1


@pytest.mark.parametrize(
    "answers, code",
    [([], 0), ([problem(500, "Oops.")] * 3, 0), ([problem(429, "No.", **{"Retry-After": "7"})] * 3, 0), (None, 3)],
    ids=["links", "trouble first", "429 first", "no links"],
)
def test_an_old_job_that_is_completed_is_collected_all_the_same(fake, run, clock, answers, code):
    """Its 4 hours are over, but not the patience with trouble, limits and late links."""
    fake.plan("GET", problem(401, "Invalid token provided."))
    assert run().code == 1
    Clock.sleep(clock, 6 * 3600)
    fake.plan("GET", *(answers or []))
    if answers is None:
        next(iter(fake.jobs.values())).empty_answers = 3
    assert run().code == code
    assert len(fake.requests("POST")) == 1
