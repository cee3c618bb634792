"""Settings: where they come from, and how the script refuses an invalid one."""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import datetime

import pytest
from fake_circleci import ORGANIZATIONS, PRIMARY, TOKEN, problem

import usage_report

OTHER = list(ORGANIZATIONS)[1]
YESTERDAY = "2026-10-23"  # of the simulated time


def at(text: str) -> float:
    """Unix time of a UTC time such as 2026-10-24T12:00:00Z."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()


def window(start: str, end: str) -> list[str]:
    return ["--start", start, "--end", end]


def whole_days(first: str, last: str) -> str:
    return f"{first}T00:00:00Z {last}T23:59:59Z"


def requested(fake, run, *arguments: str, **variables: str | None) -> str:
    """Start and end in the POST of a run with these settings. The fake refuses the POST."""
    fake.plan("POST", problem(400, "No."))
    result = run(*arguments, **variables)
    assert result.code == 1, result.err
    body = json.loads(fake.requests("POST")[-1].body)
    return f"{body['start']} {body['end']}"


# --- Invalid settings ---

AN_ID = "[0-9a-f]{8}-[0-9a-f]{4}-"
DATES = "--start [0-9]{4}-[0-9]{2}-[0-9]{2} --end [0-9]{4}-"
INVALID_TOKENS = [None, " ", f"{TOKEN} x", "a\nb", "\u20ac", usage_report.PLACEHOLDER]
INVALID_IDS = ["acme", "gh/acme", PRIMARY[:-1], f"{PRIMARY},acme", TOKEN]
INVALID_JOB_IDS = [f"../{PRIMARY}", "\u00e9", "a\n", f"{TOKEN}="]
INVALID_DATES = [
    *[None, "2026-02-29", "01/09/2026", "2026-9-1", "2026-09-01 12:00:00Z", TOKEN],
    *["2026-09-01T12:00:00", "2026-09-01T12:00:00+02:00", "2026-09-01T24:00:00Z"],
]
INVALID_WINDOWS = [
    (" before ", "2026-09-30", "2026-09-01"),
    (" before ", "2026-09-01T00:00:00Z", "2026-09-01T00:00:00Z"),
    (" before ", "2026-10-23T23:59:59Z", "2026-10-24"),
    (" 32 days", "2026-08-01", "2026-09-02T00:00:01Z"),
    (" 13 months ", "2025-09-23", "2025-10-01"),
    (" 13 months ", "2025-08-25", "2025-09-01"),
    (" no complete day ", "2026-10-24", "2026-10-24"),
    (" no complete day ", "2026-10-25", "2026-10-30"),
]
INVALID_PERIODS = ["last-year", "2026-13", "2026-09-01", "2026-11", "2025-09", TOKEN]
INVALID_URLS = [
    *["http://circleci.com", "circleci.com", f"https://{TOKEN}@circleci.com"],
    *["http://127.0.0.1.example.com", "http://localhost:80@example.com"],
    *["https://circleci.com\n.example.com", "https://circleci.com/api"],
]
INVALID_FOLDERS = [os.devnull, f"{__file__}/reports", "x" * 300]
if sys.platform == "linux":
    INVALID_FOLDERS.append("/proc")  # It exists, and nobody can write to it.


def case(message: str, *arguments: str, **variables: str | None):
    """What the message must hold (a name and a valid value), and the settings, which are its ID."""
    settings = [f"{name}={value}" for name, value in variables.items()]
    return pytest.param(message, arguments, variables, id=" ".join([*arguments, *settings])[:60])


INVALID = [
    *[case("CIRCLE_TOKEN.*CCIPAT_", CIRCLE_TOKEN=token) for token in INVALID_TOKENS],
    *[case(f"PRIMARY_ORG_ID.*{AN_ID}", PRIMARY_ORG_ID=text) for text in INVALID_IDS],
    case(f"PRIMARY_ORG_ID.*{AN_ID}", PRIMARY_ORG_ID=f"{PRIMARY},{OTHER}"),
    *[case(f"SHARED_ORG_IDS.*{AN_ID}", SHARED_ORG_IDS=text) for text in INVALID_IDS[-2:]],
    *[case(f"--job-id.*{AN_ID}", "--job-id", text) for text in INVALID_JOB_IDS],
    *[case(f"START_DATE.*{DATES}", START_DATE=text) for text in INVALID_DATES],
    case(f"END_DATE.*{DATES}", END_DATE=None),
    case(f"--end.*{DATES}", "--end", "2026-09-31"),
    *[case(f"--end.*{message}.*{DATES}", *window(*days)) for message, *days in INVALID_WINDOWS],
    *[case(f"--period.*{DATES}", "--period", text) for text in INVALID_PERIODS],
    case("--period.*--end", "--period", "yesterday", "--end", "2026-09-01"),
    case("--period.*--start", "--period", "2026-09", "--start", "2026-09-01"),
    *[case("CIRCLECI_BASE_URL.*https://c", CIRCLECI_BASE_URL=url) for url in INVALID_URLS],
    *[case("--output-dir [a-z]", "--output-dir", path) for path in INVALID_FOLDERS],
    case("missing.env.*--env-file /", "--env-file", "missing.env"),
    case("--sart", "--sart", "2026-09-01"),
    case("--verbose", "--quiet", "--verbose"),
]


@pytest.mark.parametrize("message, arguments, variables", INVALID)
def test_an_invalid_setting_exits_with_2(fake, run, monkeypatch, message, arguments, variables):
    """Before any request, and without showing a token that is in the wrong place."""
    monkeypatch.setattr(usage_report.log, "filters", [])  # without those of earlier runs
    result = run(*arguments, **variables)
    assert (result.code, result.out, fake.seen) == (2, "", [])
    assert re.search(message, result.last_line), result.err
    assert TOKEN not in result.err


@pytest.mark.parametrize("today", ["2027-01-01", "2028-02-29"])
@pytest.mark.parametrize("setting", [["--start", "1/9/2026"], ["--period", "2031-01"]])
def test_the_dates_and_the_period_in_a_message_work_today(run, clock, today, setting):
    clock.now = at(f"{today}T00:30:00Z")
    message = run(*setting).last_line
    dates = re.search("--start ([0-9-]+) --end ([0-9-]+)", message).groups()
    assert run("--dry-run", *window(*dates)).code == 0
    period = re.search("Try --period ([a-z-]+)", message)[1]
    assert run("--dry-run", "--period", period).code == 0


# --- The window ---


@pytest.mark.parametrize(
    "today, period, first, last",
    [
        pytest.param("2024-03-01", "yesterday", "2024-02-29", "2024-02-29", id="a leap day"),
        pytest.param("2026-10-25", "last-week", "2026-10-12", "2026-10-18", id="on a Sunday"),
        pytest.param("2026-10-26", "last-week", "2026-10-19", "2026-10-25", id="on a Monday"),
        pytest.param("2026-01-02", "last-week", "2025-12-22", "2025-12-28", id="over New Year"),
        pytest.param("2024-03-31", "last-month", "2024-02-01", "2024-02-29", id="a leap year"),
        pytest.param("2026-01-01", "last-month", "2025-12-01", "2025-12-31", id="in January"),
        pytest.param("2026-10-24", "this-month", "2026-10-01", "2026-10-23", id="this month"),
        pytest.param("2026-10-24", "2026-10", "2026-10-01", "2026-10-23", id="a month that is cut"),
        pytest.param("2026-10-01", "2026-09", "2026-09-01", "2026-09-30", id="a whole month"),
    ],
)
def test_a_period_is_whole_utc_days_through_yesterday(fake, run, clock, today, period, first, last):
    """START_DATE and END_DATE are set, too: the flag overrides them."""
    clock.now = at(f"{today}T23:59:00Z")
    assert requested(fake, run, "--period", period) == whole_days(first, last)


def test_this_month_is_refused_on_its_first_day(run, clock):
    clock.now = at("2026-10-01T08:00:00Z")
    result = run("--period", "this-month")
    assert result.code == 2
    assert "--period this-month has no complete day" in result.last_line


A_DAY = whole_days("2026-09-05", "2026-09-05")
A_MONTH = whole_days("2026-08-01", "2026-09-01")
CUT = whole_days("2026-10-01", YESTERDAY)


@pytest.mark.parametrize(
    "start, end, expected",
    [
        pytest.param("2026-09-05", "2026-09-05", A_DAY, id="a day"),
        pytest.param("2026-08-01", "2026-09-01", A_MONTH, id="32 days"),
        pytest.param("2026-08-01T00:00:00Z", "2026-09-02T00:00:00Z", None, id="32 days, as times"),
        pytest.param("2026-09-05T01:02:03Z", "2026-09-05T01:02:04Z", None, id="a second"),
        pytest.param("2025-09-24T00:00:00Z", "2025-09-30T00:00:00Z", None, id="13 months ago"),
        pytest.param("2026-10-01T00:00:00Z", "2026-10-23T23:59:59Z", None, id="until yesterday"),
        pytest.param("2026-10-01", "2026-10-24", CUT, id="today is cut"),
        pytest.param("2026-10-01", "2026-10-24T00:00:00Z", CUT, id="midnight is cut"),
        pytest.param("2026-10-01", "2030-01-01", CUT, id="the future is cut"),
    ],
)
def test_a_window_is_whole_days_or_sent_as_given(fake, run, start, end, expected):
    assert requested(fake, run, *window(start, end)) == (expected or f"{start} {end}")


@pytest.mark.parametrize(
    "now, arguments, expected",
    [
        pytest.param("12:00:00", window("2026-10-01", YESTERDAY), [], id="none at noon"),
        pytest.param("10:00:00", window("2026-10-01", YESTERDAY), [], id="none at 10:00"),
        pytest.param("09:59:59", window("2026-10-01", YESTERDAY), ["early"], id="before 10:00"),
        pytest.param("12:00:00", window("2026-10-01", "2026-10-24"), ["cut"], id="today"),
        pytest.param("03:00:00", window("2026-10-01", "2026-10-24"), ["cut", "early"], id="both"),
        pytest.param("12:00:00", ["--period", "this-month"], [], id="a period is not cut"),
    ],
)
def test_a_notice_says_that_usage_is_not_complete(run, clock, now, arguments, expected):
    clock.now = at(f"2026-10-24T{now}Z")
    notices = re.findall("notice: (.*2026-10-.*)", run("--dry-run", *arguments).err)
    assert ["early" if " 10:00 " in notice else "cut" for notice in notices] == expected


# --- Where settings come from ---


@pytest.mark.parametrize(
    "arguments, variable, last_day",
    [
        pytest.param([], None, "2026-09-02", id="the file alone"),
        pytest.param([], " ", "2026-09-02", id="an empty variable is not set"),
        pytest.param(["--end", ""], None, "2026-09-02", id="an empty flag is not set"),
        pytest.param([], " 2026-09-03 ", "2026-09-03", id="a variable"),
        pytest.param(["--end", "2026-09-04"], "2026-09-03", "2026-09-04", id="a flag"),
    ],
)
def test_a_flag_overrides_a_variable_which_overrides_the_env_file(
    fake, run, tmp_path, arguments, variable, last_day
):
    settings = {"CIRCLE_TOKEN": TOKEN, "PRIMARY_ORG_ID": PRIMARY, "START_DATE": "2026-09-01"}
    lines = [f"{name}={value}" for name, value in settings.items()]
    (tmp_path / ".env").write_text("\n".join([*lines, "END_DATE=2026-09-02"]))
    found = requested(fake, run, *arguments, **dict.fromkeys(settings), END_DATE=variable)
    assert found == whole_days("2026-09-01", last_day)


def test_env_file_replaces_the_file_next_to_the_script(fake, run, tmp_path):
    (tmp_path / ".env").write_text("START_DATE=2026-09-02")
    (tmp_path / "other").write_text("END_DATE=2026-09-05")
    arguments = ["--env-file", str(tmp_path / "other")]
    found = requested(fake, run, *arguments, END_DATE=None)
    assert found == whole_days("2026-09-01", "2026-09-05")
    assert run(*arguments, START_DATE=None, END_DATE=None).code == 2


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"export END_DATE=2026-09-05", id="export"),
        pytest.param(b"\xef\xbb\xbfEND_DATE=2026-09-05\n", id="a BOM"),
        pytest.param(b"# a\r\n\r\nEND_DATE=2026-09-05\r\nX=y\r\n", id="CRLF"),
        pytest.param(b"END_DATE = '2026-09-05' # the last day\n", id="quotes and a comment"),
    ],
)
def test_the_usual_notations_of_an_env_file_are_read(fake, run, tmp_path, content):
    (tmp_path / ".env").write_bytes(content)
    assert requested(fake, run, END_DATE=None) == whole_days("2026-09-01", "2026-09-05")


def test_a_dollar_sign_in_the_env_file_is_not_expanded(fake, run, tmp_path):
    fake.token = "abc${HOME}$x"
    (tmp_path / ".env").write_text(f"CIRCLE_TOKEN={fake.token}\n")
    assert run("--dry-run", CIRCLE_TOKEN=None).code == 0


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(f"SHARED_ORG_IDS={PRIMARY},\n  {OTHER}".encode(), id="two lines"),
        pytest.param(f"SHARED_ORG_IDS=\n- {PRIMARY}\n- {OTHER}".encode(), id="a YAML list"),
        pytest.param(f'SHARED_ORG_IDS="{PRIMARY}", "{OTHER}"'.encode(), id="two quoted values"),
        pytest.param(f"X=1\nCIRCLE_TOKEN='{TOKEN}".encode(), id="an open quote"),
        pytest.param(f"CIRCLE_TOKEN {TOKEN}".encode(), id="no equals sign"),
        pytest.param("X=gr\u00fcn".encode("cp1252"), id="another encoding"),
    ],
)
def test_an_env_file_with_anything_else_is_refused(fake, run, tmp_path, content):
    (tmp_path / ".env").write_bytes(content)
    result = run()
    assert (result.code, result.out, fake.seen) == (2, "", [])
    assert str(tmp_path / ".env") in result.last_line
    assert TOKEN not in result.err


def test_the_current_folder_does_not_matter(run, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".env").write_text("not a setting")
    monkeypatch.chdir(elsewhere)
    result = run("--output-dir", "")
    assert result.report.parent == tmp_path / "usage_reports"


def test_another_base_url_may_end_in_a_slash_and_gets_a_notice(fake, run):
    result = run("--dry-run", "--verbose", CIRCLECI_BASE_URL=f"{fake.url}/")
    assert re.search(f"notice: .*{fake.url}.* CircleCI Cloud only", result.err)
    assert f"{fake.url}/api/v2/me" in result.err


# --- PRIMARY_ORG_ID is missing ---


@pytest.mark.parametrize("flag", ["--verbose", "--quiet"])
def test_without_primary_org_id_the_organizations_are_listed(fake, run, flag):
    """One has no ID and cannot be chosen: the fake names it Old."""
    fake.organizations = {PRIMARY: "Acme", OTHER: "B\x1b[31m\nC"}
    result = run(flag, PRIMARY_ORG_ID=None)
    assert (result.code, result.out) == (2, "")
    assert [seen.path for seen in fake.seen] == ["/api/v2/me/collaborations"]
    question, first, second = result.err.partition("error: ")[2].splitlines()
    assert "PRIMARY_ORG_ID" in question
    assert first.split() == [PRIMARY, "gh/Acme", "Acme"]
    assert OTHER in second and second.isprintable()


def test_help_names_every_variable_and_flag(run):
    result = run("--help")
    names = "--start --end --period --output-dir --env-file --raw --job-id --dry-run --quiet -q "
    names += "--verbose -v --version --help -h CIRCLE_TOKEN PRIMARY_ORG_ID START_DATE END_DATE "
    names += "SHARED_ORG_IDS CIRCLECI_BASE_URL"
    for name in names.split():
        assert re.search(rf"(?<![\w-]){name}\b", result.out), name
    assert (result.code, result.err) == (0, "")
    assert run("--version").out == f"usage_report.py {usage_report.__version__}\n"
