"""Settings: where they come from, and how a wrong one is refused before any request."""

from __future__ import annotations

import os
import re
import sys
from datetime import datetime

import pytest
from clocks import Result
from fake_circleci import ORGANIZATIONS, PRIMARY, TOKEN, Answer, in_json, problem

import usage_report

OTHER = list(ORGANIZATIONS)[1]

SEPTEMBER = "2026-09-01T00:00:00Z 2026-09-30T23:59:59Z"


def at(text: str) -> float:
    """Unix time of a UTC time such as 2026-10-24T12:00:00Z."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()


def start(value: str) -> list[str]:
    return ["--start", value]


def window(*flags: str) -> list[str]:
    return ["--start", flags[0], "--end", flags[1]]


def case(id: str, message: str, *arguments: str, **variables: str | None):
    return pytest.param(list(arguments), variables, message, id=id)


INVALID = [
    case(
        "no token",
        r"CIRCLE_TOKEN is not set in .*\.env\. Create a token .CCIPAT_",
        CIRCLE_TOKEN=None,
    ),
    case("token of spaces", "CIRCLE_TOKEN is not set in ", CIRCLE_TOKEN="  "),
    case(
        "placeholder",
        "CIRCLE_TOKEN is not set in ",
        CIRCLE_TOKEN=usage_report.PLACEHOLDER,
    ),
    case("token with a space", "CIRCLE_TOKEN must be a personal API token", CIRCLE_TOKEN="abc def"),
    case(
        "token not in ASCII", "CIRCLE_TOKEN must be a personal API token", CIRCLE_TOKEN="abc\u20ac"
    ),
    case(
        "primary",
        "PRIMARY_ORG_ID must be the UUID of .*, such as b9291e0d-.*; leave it empty",
        PRIMARY_ORG_ID="acme",
    ),
    case(
        "shared",
        "SHARED_ORG_IDS must be UUIDs of organizations, separated by commas, such as b9291e0d-",
        SHARED_ORG_IDS=f"{PRIMARY},x",
    ),
    case("job", "--job-id must be a UUID, such as b9291e0d-", "--job-id", "7"),
    case("no start", "START_DATE is not set. Use --period last-month, or --start", START_DATE=None),
    case("empty end", "END_DATE is not set. Use --period last-month, or --start", END_DATE=""),
    case("no such day", "START_DATE 2026-02-30 is not a valid date", START_DATE="2026-02-30"),
    case("another format", "START_DATE 01/09/2026 is not a valid date", START_DATE="01/09/2026"),
    case("no seconds", "--end 2026-09-30T12:00 is not a valid", "--end", "2026-09-30T12:00"),
    case("hour 24", "--start .* is not a valid date", *start("2026-09-01T24:00:00Z")),
    case("a single digit", "--start 2026-9-1 is not a valid date", *start("2026-9-1")),
    case("digits of another script", "is not a valid date", *start("\u0662026-09-01")),
    case(
        "start after end, both flags",
        "--start 2026-09-30 .*--end 2026-09-01: the start must be before the end",
        *window("2026-09-30", "2026-09-01"),
    ),
    case(
        "start after end, a variable and a flag",
        "START_DATE 2026-09-01 .*--end 2026-08-30: the start must be before the end",
        *["--end", "2026-08-30"],
    ),
    case(
        "start is end",
        "must be before the end",
        *window("2026-09-01T00:00:00Z", "2026-09-01T00:00:00Z"),
    ),
    case(
        "start in the future",
        "--start 2026-10-25 to --end 2026-10-30 starts in the future. Use --period",
        *window("2026-10-25", "2026-10-30"),
    ),
    case(
        "over 13 months ago",
        "--start 2025-09-23 .* is too old: usage goes back to 2025-09-24. Use --period",
        *window("2025-09-23", "2025-10-01"),
    ),
    case(
        "33 days",
        "--start 2026-08-01 .*--end 2026-09-02 is longer than 32 days",
        *window("2026-08-01", "2026-09-02"),
    ),
    case(
        "period month 13",
        "--period must be yesterday, last-7-days, this-month, last-month, or YYYY-MM, not 2026-13",
        *["--period", "2026-13"],
    ),
    case("unknown period", "must be yesterday, .* not last-year", "--period", "last-year"),
    case("period in the future", "has no complete day yet", "--period", "2026-11"),
    case("period too old", "--period 2025-0.*too old", "--period", "2025-09"),
    case(
        "period and end",
        "--period cannot be combined with --start or --end",
        *["--period", "yesterday", "--end", "2026-09-01"],
    ),
    case(
        "period and start",
        "--period cannot be combined with --start or --end",
        *["--period", "yesterday", "--start", "2026-09-01"],
    ),
    *(
        case(
            id,
            "CIRCLECI_BASE_URL must be an https:// URL.* such as https://circleci.com",
            **variables,
        )
        for id, variables in {
            "http": {"CIRCLECI_BASE_URL": "http://circleci.com"},
            "http to a name like loopback": {"CIRCLECI_BASE_URL": "http://127.0.0.1.example.com"},
            "http with a user": {"CIRCLECI_BASE_URL": "http://localhost@example.com"},
            "URL with a path": {"CIRCLECI_BASE_URL": "https://circleci.com/api/v2"},
            "URL with a query": {"CIRCLECI_BASE_URL": "https://circleci.com?a=b"},
            "URL without a scheme": {"CIRCLECI_BASE_URL": "circleci.com"},
            "URL with an invalid port": {"CIRCLECI_BASE_URL": "https://circleci.com:70000"},
            "URL with an empty label": {"CIRCLECI_BASE_URL": "https://a..b"},
            "URL with a line break": {"CIRCLECI_BASE_URL": "https://circleci.com\n.example.com"},
        }.items()
    ),
    case("date beside --job-id", "not a valid date", "--job-id", PRIMARY, *start("2026-02-31")),
    case("period beside --job-id", "--period must be", "--job-id", PRIMARY, "--period", "x"),
    case(
        "output is a device",
        "Cannot write to .*Use --output-dir with another folder, such as ./reports",
        *["--output-dir", os.devnull],
    ),
    case("output is a program", "Cannot write to ", "--output-dir", sys.executable),
    case("output with a name that is too long", "Cannot write to ", "--output-dir", "x" * 300),
    case("output inside a device", "Cannot write to ", "--output-dir", f"{os.devnull}/x"),
    case(
        "missing env file",
        "Cannot read .*missing.env: No such file.*use --env-file with another one",
        *["--env-file", "missing.env"],
    ),
    case("env file is a folder", "Cannot read ", "--env-file", "."),
]


@pytest.mark.parametrize("arguments, variables, message", INVALID)
def test_invalid_settings_exit_with_2_before_any_request(fake, run, arguments, variables, message):
    result = run(*arguments, **variables)
    assert result.code == 2
    assert re.search(message, result.err), result.err
    assert (result.out, fake.seen, result.err.count("\n")) == ("", [], 1)


@pytest.mark.parametrize("today", ["2026-10-24", "2026-03-01", "2027-01-01", "2028-02-29"])
@pytest.mark.parametrize(
    "arguments, variables",
    [
        pytest.param([], {"START_DATE": None}, id="no date"),
        pytest.param(start("01.02.2026"), {}, id="invalid date"),
        pytest.param(window("2026-01-02", "2026-01-01"), {}, id="start after end"),
        pytest.param(window("2031-01-01", "2031-01-02"), {}, id="in the future"),
        pytest.param(window("2020-01-01", "2020-01-02"), {}, id="too old"),
        pytest.param(window("2025-12-01", "2026-01-31"), {}, id="too long"),
    ],
)
def test_dates_in_messages_are_valid_today(run, clock, today, arguments, variables):
    """Each date in the advice works as a one-day window, and the last two as a window."""
    clock.now = at(f"{today}T12:00:00Z")
    message = run(*arguments, **variables).err.partition(" ")[2]
    given = {*arguments, *variables.values()}
    dates = [day for day in re.findall(r"\b\d{4}-\d\d-\d\d\b", message) if day not in given]
    assert dates, message
    for first, last in [*zip(dates, dates), (dates[-2:][0], dates[-1])]:
        assert run("--dry-run", *window(first, last)).code == 0, f"{message} {first} {last}"


@pytest.mark.parametrize("today", ["2026-10-24", "2026-03-01", "2027-01-01"])
@pytest.mark.parametrize(
    "wrong", ["last-year", "2020-01", "2031-01"], ids=["unknown", "too old", "in the future"]
)
def test_periods_in_messages_are_valid_today(run, clock, today, wrong):
    clock.now = at(f"{today}T12:00:00Z")
    result = run("--period", wrong)
    assert result.code == 2
    message = result.err.partition(" ")[2].replace(f"--period {wrong}", "").replace(wrong, "")
    advice = re.findall(r"\b(?:\d{4}-\d\d(?!-|\d)|yesterday|last-7-days|last-month)\b", message)
    dates = re.findall(r"\b\d{4}-\d\d-\d\d\b", message)
    assert advice or dates, message
    for period in advice:
        assert run("--dry-run", "--period", period).code == 0, message
    assert not dates or "--start" in message, f"a date is not a period: {message}"


@pytest.mark.parametrize(
    "arguments, variables",
    [
        pytest.param([], {"PRIMARY_ORG_ID": TOKEN}, id="PRIMARY_ORG_ID"),
        pytest.param([], {"SHARED_ORG_IDS": f"{PRIMARY},{TOKEN}"}, id="SHARED_ORG_IDS"),
        pytest.param([], {"CIRCLECI_BASE_URL": f"https://{TOKEN}@circleci.com"}, id="the URL"),
        pytest.param([], {"START_DATE": TOKEN}, id="START_DATE"),
        pytest.param(["--period", TOKEN], {}, id="--period"),
        pytest.param(["--job-id", TOKEN], {}, id="--job-id"),
        pytest.param([f"--token={TOKEN}"], {}, id="a flag that does not exist"),
        pytest.param([f"-t{TOKEN}", "--x"], {}, id="a short flag that does not exist"),
        pytest.param([f"--{TOKEN}"], {}, id="as a flag"),
    ],
)
def test_a_token_in_the_wrong_place_is_not_shown(run, arguments, variables):
    result = run(*arguments, **variables)
    assert result.code == 2 and TOKEN.lower() not in result.err.lower()


def test_an_env_file_that_is_not_utf8_is_refused(fake, run, tmp_path):
    (tmp_path / "utf16").write_text("CIRCLE_TOKEN=x", encoding="utf-16")
    result = run("--env-file", str(tmp_path / "utf16"))
    assert result.code == 2 and "it is not UTF-8" in result.err and fake.seen == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param(["last-month"], "Did you mean --period last-month?", id="a period"),
        pytest.param(["2026-09"], "Did you mean --period 2026-09?", id="a month"),
        pytest.param(["--last-7-days"], "Did you mean --period last-7-days?", id="as a flag"),
        pytest.param(["--sart", "2026-01-01"], "Did you mean --start?", id="a typo"),
        pytest.param(["--output", "x"], "Did you mean --output-dir?", id="an abbreviation"),
        pytest.param(["--out", "x"], "unknown argument --out. See --help.", id="no similar flag"),
        pytest.param(["extra"], "unknown argument. See --help.", id="anything else"),
        pytest.param(["--quiet", "--verbose"], "not allowed with", id="quiet and verbose"),
        pytest.param(["--start"], "--start: expected one argument", id="a flag without its value"),
    ],
)
def test_invalid_arguments_exit_with_2_and_say_why(fake, run, arguments, message):
    result = run(*arguments)
    assert result.code == 2 and message in result.last_line and fake.seen == []


# --- The window ---


def requested(run, *arguments, **variables) -> str:
    """Start and end that a run with these settings would request."""
    return in_request(run("--dry-run", *arguments, **variables))


def in_request(result: Result) -> str:
    """Start and end in what a dry run shows."""
    assert result.code == 0, result.err
    first, last = (re.search(rf'"{key}": "(.*)"', result.err)[1] for key in ("start", "end"))
    return f"{first} {last}"


@pytest.mark.parametrize(
    "today, period, expected",
    [
        ("2026-10-24", "yesterday", "2026-10-23T00:00:00Z 2026-10-23T23:59:59Z"),
        ("2026-10-24", "last-7-days", "2026-10-17T00:00:00Z 2026-10-23T23:59:59Z"),
        ("2026-10-24", "this-month", "2026-10-01T00:00:00Z 2026-10-23T23:59:59Z"),
        ("2026-10-02", "this-month", "2026-10-01T00:00:00Z 2026-10-01T23:59:59Z"),
        ("2026-10-24", "last-month", SEPTEMBER),
        ("2026-03-31", "last-month", "2026-02-01T00:00:00Z 2026-02-28T23:59:59Z"),
        ("2026-01-01", "last-month", "2025-12-01T00:00:00Z 2025-12-31T23:59:59Z"),
        ("2024-03-01", "yesterday", "2024-02-29T00:00:00Z 2024-02-29T23:59:59Z"),
        ("2026-10-24", "2026-10", "2026-10-01T00:00:00Z 2026-10-23T23:59:59Z"),
        ("2026-10-24", "2025-12", "2025-12-01T00:00:00Z 2025-12-31T23:59:59Z"),
    ],
)
def test_a_period_is_whole_utc_days_through_yesterday(fake, run, clock, today, period, expected):
    """And it overrides START_DATE and END_DATE, which the fixture sets."""
    clock.now = at(f"{today}T23:59:00Z")
    assert requested(run, "--period", period) == expected


def test_this_month_is_refused_on_the_first_day_of_the_month(fake, run, clock):
    clock.now = at("2026-10-01T08:00:00Z")
    result = run("--period", "this-month")
    assert result.code == 2 and "has no complete day yet. Use --period last-month" in result.err
    assert run("--dry-run", "--period", "last-month").code == 0


@pytest.mark.parametrize(
    "first, last, expected",
    [
        pytest.param(
            "2026-09-05", "2026-09-05", "2026-09-05T00:00:00Z 2026-09-05T23:59:59Z", id="a day"
        ),
        pytest.param(
            "2026-09-05T01:02:03Z",
            "2026-09-05T01:02:04Z",
            "2026-09-05T01:02:03Z 2026-09-05T01:02:04Z",
            id="a second",
        ),
        pytest.param(
            "2026-08-01", "2026-09-01", "2026-08-01T00:00:00Z 2026-09-01T23:59:59Z", id="32 days"
        ),
        pytest.param(
            "2026-08-01T00:00:00Z",
            "2026-09-02T00:00:00Z",
            "2026-08-01T00:00:00Z 2026-09-02T00:00:00Z",
            id="32 days to the second",
        ),
        pytest.param(
            "2025-09-24",
            "2025-09-30",
            "2025-09-24T00:00:00Z 2025-09-30T23:59:59Z",
            id="13 months ago",
        ),
    ],
)
def test_a_valid_window_is_requested_as_given(fake, run, first, last, expected):
    assert requested(run, *window(first, last)) == expected


@pytest.mark.parametrize(
    "arguments, variables, notice",
    [
        pytest.param(
            window("2026-10-01", "2030-01-01"), {}, "--end 2030-01-01 is in the", id="flag"
        ),
        pytest.param(
            start("2026-10-01"),
            {"END_DATE": "2026-10-24"},
            "END_DATE 2026-10-24 is in the",
            id="variable, today",
        ),
        pytest.param(
            window("2026-10-01", "2026-10-24T12:00:01Z"),
            {},
            "--end 2026-10-24T12:00:01Z is in the",
            id="a second from now",
        ),
    ],
)
def test_an_end_in_the_future_is_cut_to_one_minute_ago(fake, run, arguments, variables, notice):
    expected = "2026-10-01T00:00:00Z 2026-10-24T11:59:00Z"
    result = run("--dry-run", *arguments, **variables)
    assert in_request(result) == expected
    assert f"notice: {notice} future. Using 2026-10-24T11:59:00Z." in result.err


def test_an_end_that_is_now_is_not_cut(fake, run):
    end = "2026-10-24T12:00:00Z"
    assert requested(run, *window("2026-10-01", end)) == f"2026-10-01T00:00:00Z {end}"


@pytest.mark.parametrize(
    "now, arguments, days",
    [
        pytest.param(
            "2026-10-24T12:00:00Z",
            window("2026-10-01", "2026-10-23"),
            "",
            id="through yesterday, at noon",
        ),
        pytest.param(
            "2026-10-24T03:00:00Z",
            window("2026-10-01", "2026-10-23"),
            "2026-10-23",
            id="through yesterday, at night",
        ),
        pytest.param(
            "2026-10-24T03:00:00Z",
            ["--period", "yesterday"],
            "2026-10-23",
            id="yesterday, at night",
        ),
        pytest.param(
            "2026-10-24T12:00:00Z",
            window("2026-10-01", "2026-10-24"),
            "2026-10-24",
            id="through today",
        ),
        pytest.param(
            "2026-10-24T03:00:00Z",
            window("2026-10-01", "2026-10-24"),
            "2026-10-23",
            id="through today, at night",
        ),
        pytest.param(
            "2026-10-24T03:00:00Z",
            window("2026-10-24", "2026-10-24"),
            "2026-10-24",
            id="today alone, at night",
        ),
    ],
)
def test_a_notice_names_the_first_day_that_circleci_may_not_have_completed(
    run, clock, now, arguments, days
):
    clock.now = at(now)
    result = run("--dry-run", *arguments)
    notice = re.search("notice: Usage may be incomplete from (.*) on[.]", result.err)
    assert (notice[1] if notice else "") == days and result.code == 0


# --- Where settings come from ---


def test_a_flag_overrides_the_environment_which_overrides_the_env_file(fake, run, tmp_path):
    """The file next to the script has a BOM, spaces, quotes, and capitals in a UUID."""
    file = (
        "\ufeffCIRCLE_TOKEN = '%s'\nPRIMARY_ORG_ID=%s\nSTART_DATE=2026-09-01\nEND_DATE=2026-09-02\n"
    )
    (tmp_path / ".env").write_text(file % (TOKEN, PRIMARY.upper()), encoding="utf-8")
    unset = {"CIRCLE_TOKEN": "", "PRIMARY_ORG_ID": None, "START_DATE": " ", "END_DATE": None}
    start = "2026-09-01T00:00:00Z"
    assert requested(run, **unset) == f"{start} 2026-09-02T23:59:59Z"
    unset["END_DATE"] = " 2026-09-03 "
    assert requested(run, **unset) == f"{start} 2026-09-03T23:59:59Z"
    assert requested(run, "--end", "2026-09-04", **unset) == f"{start} 2026-09-04T23:59:59Z"


def test_env_file_names_another_file(fake, run, tmp_path):
    (tmp_path / ".env").write_text("END_DATE=2026-09-02\nSTART_DATE=2026-09-01")
    (tmp_path / "other").write_text("END_DATE=2026-09-05\nSTART_DATE=2026-09-04")
    flags = ["--env-file", str(tmp_path / "other")]
    found = requested(run, *flags, START_DATE=None, END_DATE=None)
    assert found == "2026-09-04T00:00:00Z 2026-09-05T23:59:59Z"


def test_a_message_names_the_variable_of_the_env_file(run, tmp_path):
    (tmp_path / ".env").write_text("END_DATE=soon")
    assert "END_DATE soon is not a valid date" in run(END_DATE=None).err


@pytest.mark.parametrize("in_file", [False, True], ids=["from the environment", "from .env"])
def test_a_401_says_where_the_token_comes_from(fake, run, tmp_path, in_file):
    (tmp_path / ".env").write_text("CIRCLE_TOKEN=wrong")
    result = run(CIRCLE_TOKEN=None if in_file else "wrong")
    source = str(tmp_path / ".env") if in_file else "the environment"
    assert result.code == 1
    assert f"CIRCLE_TOKEN in {source} is invalid or expired" in result.last_line


def test_a_dollar_sign_in_the_env_file_is_not_expanded(fake, run, tmp_path):
    fake.token = "abc${HOME}$x"
    (tmp_path / ".env").write_text(f"CIRCLE_TOKEN={fake.token}\n")
    assert run("--dry-run", CIRCLE_TOKEN=None).code == 0


@pytest.mark.parametrize(
    "lines, number",
    [
        pytest.param(f"SHARED_ORG_IDS={PRIMARY},\n  {OTHER}", 2, id="one ID on the second line"),
        pytest.param(f"SHARED_ORG_IDS=\n {PRIMARY}, {OTHER}", 2, id="two IDs on the second line"),
        pytest.param(f"SHARED_ORG_IDS=\n- {PRIMARY}\n- {OTHER}", 2, id="a YAML list"),
        pytest.param(f"SHARED_ORG_IDS: {PRIMARY}", 1, id="a colon"),
        pytest.param(f'SHARED_ORG_IDS="{PRIMARY}", "{OTHER}"', 1, id="two quoted values"),
        pytest.param(f"CIRCLE_TOKEN='{TOKEN}", 1, id="a quote that is not closed"),
        pytest.param(f"CIRCLE_TOKEN '{TOKEN}\n", 1, id="no equals sign"),
        pytest.param("START_DATE=2026-09-01\n\x1a", 2, id="a control character"),
    ],
)
@pytest.mark.parametrize("token", [None, TOKEN], ids=["no token in the environment", "a token"])
def test_an_env_file_with_an_invalid_line_is_refused(fake, run, tmp_path, lines, number, token):
    """Otherwise, a list of organizations could lose some of them."""
    (tmp_path / ".env").write_text(lines)
    result = run(CIRCLE_TOKEN=token)
    assert result.code == 2 and fake.seen == [] and TOKEN not in result.err
    assert f".env is invalid near line {number}. Put each setting on one" in result.last_line


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param("export END_DATE=2026-09-05", id="export"),
        pytest.param("# comment\r\n\r\nEND_DATE = '2026-09-05' # comment\r\n", id="CRLF, comments"),
        pytest.param("CIRCLE_TOKEN\nexport PATH\nEND_DATE=2026-09-05", id="names alone"),
        pytest.param(f'SHARED_ORG_IDS="\n{PRIMARY},\n"\nEND_DATE=2026-09-05', id="a quoted list"),
    ],
)
def test_an_env_file_in_any_usual_notation_is_read(fake, run, tmp_path, lines):
    (tmp_path / ".env").write_bytes(lines.encode())
    assert requested(run, END_DATE=None).endswith("2026-09-05T23:59:59Z")


def test_the_current_folder_does_not_matter(fake, run, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".env").write_text("CIRCLE_TOKEN=of-another-folder\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "CIRCLE_TOKEN is not set in " in run(CIRCLE_TOKEN=None).err
    result = run("--output-dir", "")
    assert result.report.parent == tmp_path / "usage_reports"


def test_a_base_url_may_have_capitals_and_end_in_a_slash(fake, run, monkeypatch):
    assert run("--dry-run", CIRCLECI_BASE_URL=fake.url.upper() + "/").code == 0
    monkeypatch.setenv("CIRCLECI_BASE_URL", "HTTPS://CircleCI.com/")
    settings = usage_report.load_settings(usage_report.parse_arguments([]))
    assert settings.base_url == "https://circleci.com"


# --- The question for PRIMARY_ORG_ID ---


@pytest.mark.parametrize("flags", [[], ["--quiet"]], ids=["default", "quiet"])
def test_without_primary_org_id_the_choices_are_listed_below_a_question(fake, run, flags):
    """Organizations without an ID are left out: the fake lists one, named Old."""
    result = run(*flags, PRIMARY_ORG_ID=None, START_DATE=None)
    assert result.code == 2 and result.out == ""
    question, titles, *rows = (line.split(" ", 1)[1] for line in result.err.splitlines())
    assert question.startswith("Which organization owns the plan? Set PRIMARY_ORG_ID to its ID")
    assert titles.split() == ["NAME", "SLUG", "ID"]
    expected = [f"{name} gh/{name} {id}" for id, name in ORGANIZATIONS.items()]
    assert [" ".join(row.split()) for row in rows] == expected
    assert [seen.path for seen in fake.seen] == ["/api/v2/me/collaborations"]


@pytest.mark.parametrize("width", [40, 60, 80])
def test_the_ids_to_choose_from_are_never_cut(fake, run, monkeypatch, width):
    monkeypatch.setattr(usage_report.Console, "width", lambda console: width)
    fake.organizations = {PRIMARY: "Acme " * 20}
    assert PRIMARY in run(PRIMARY_ORG_ID=None).err
    assert PRIMARY in run("--dry-run").err.partition("Dry run")[0]


def test_a_single_organization_is_still_offered_as_primary_org_id(fake, run):
    fake.organizations = {PRIMARY: "Acme"}
    result = run(PRIMARY_ORG_ID=None)
    assert result.code == 2 and PRIMARY in result.last_line
    assert "You have one organization. Set PRIMARY_ORG_ID to its ID" in result.err


@pytest.mark.parametrize(
    "answer, code, message",
    [
        pytest.param(in_json([]), 1, "has no organization", id="none"),
        pytest.param(in_json([{"id": None, "name": "x"}]), 1, "has no organization", id="no ID"),
        pytest.param(in_json([{"id": 7}]), 1, "has no organization", id="a number as ID"),
        pytest.param(in_json({"items": []}), 1, "unexpected data", id="an object"),
        pytest.param(in_json([1]), 1, "unexpected data", id="a list of numbers"),
        pytest.param(Answer(b"<html>"), 1, "unexpected data", id="HTML"),
        pytest.param(problem(401, "No."), 1, "failed with 401: No. CIRCLE_TOKEN", id="401"),
        pytest.param(problem(429, "Slow.", **{"Retry-After": "7"}), 2, "Retrying in 7 s", id="429"),
    ],
)
def test_errors_while_listing_choices_for_primary_org_id_are_reported(
    fake, run, answer, code, message
):
    fake.plan("collaborations", *[answer] * (6 if code == 1 else 1))
    result = run(PRIMARY_ORG_ID=None)
    assert result.code == code and message in result.err and "Traceback" not in result.err


# --- Help ---


def test_help_names_every_variable_and_flag(run):
    result = run("--help")
    assert result.code == 0
    flags = "--start --end --period --output-dir --env-file --plain --job-id --dry-run --quiet "
    flags += "--verbose --version -q -v -h"
    for name in [*usage_report.VARIABLES, *flags.split()]:
        assert re.search(rf"(?<![\w-]){name}\b", result.out), name
    assert max(map(len, result.out.splitlines())) <= 80


def test_version(run):
    assert run("--version").out == f"usage_report.py {usage_report.__version__}\n"
