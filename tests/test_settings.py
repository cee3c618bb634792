"""Settings: where they come from, and what each wrong one is answered with, before any request."""

from __future__ import annotations

import json
import os
import re

import pytest
from fake_circleci import ORGANIZATIONS, PRIMARY, TOKEN

import usage_report

FILE = "--env-file"


@pytest.mark.parametrize(
    "arguments, variables, said",
    [
        pytest.param([], {"CIRCLE_TOKEN": None}, r"CIRCLE_TOKEN is not set\..*like CIRCLE_TOKEN=", id="no token"),
        pytest.param([], {"CIRCLE_TOKEN": "  "}, "CIRCLE_TOKEN is not set", id="blank token"),
        pytest.param([], {"CIRCLE_TOKEN": usage_report.PLACEHOLDER}, "CIRCLE_TOKEN is not set", id="token of the example"),
        pytest.param([], {"CIRCLE_TOKEN": "abc def"}, "CIRCLE_TOKEN has a blank", id="token with a blank"),
        pytest.param([], {"CIRCLE_TOKEN": "abc\u20ac"}, "CIRCLE_TOKEN has a blank or a character", id="token that is no ASCII"),
        pytest.param([], {"PRIMARY_ORG_ID": "acme"}, "PRIMARY_ORG_ID is not a UUID.*like b9291e0d-", id="primary that is no UUID"),
        pytest.param([], {"SHARED_ORG_IDS": f"{PRIMARY},x"}, "SHARED_ORG_IDS .entry 2, between commas. is not a UUID like b9291e0d-", id="shared that is no UUID"),
        pytest.param(["--job-id", "7"], {}, "--job-id is not a UUID.*like", id="job that is no UUID"),
        pytest.param([], {"START_DATE": None}, r"START_DATE \(--start\) is not set.*--period last-month", id="no start"),
        pytest.param([], {"END_DATE": ""}, r"END_DATE \(--end\) is not set.*--end 2026", id="no end"),
        pytest.param([], {"START_DATE": "2026-02-30"}, "START_DATE.*'2026-02-30'.*no date like", id="a day that does not exist"),
        pytest.param([], {"START_DATE": "01/09/2026"}, "START_DATE.*no date like 2026-03-31", id="another form"),
        pytest.param(["--end", "2026-09-30T12:00"], {}, r"END_DATE \(--end\).*no date like", id="time without zone"),
        pytest.param(["--start", "2026-09-01T24:00:00Z"], {}, "no date like", id="hour 24"),
        pytest.param(["--start", "2026-9-1"], {}, "no date like", id="one digit"),
        pytest.param(["--start", "\u0662026-09-01"], {}, "no date like", id="digits of another script"),
        pytest.param(["--start", "2026-09-30", "--end", "2026-09-01"], {}, "2026-09-30 is not before.*2026-09-01", id="start after end"),
        pytest.param(["--start", "2026-09-01T00:00:00Z", "--end", "2026-09-01T00:00:00Z"], {}, "not before", id="start at end"),
        pytest.param(["--start", "2026-10-25", "--end", "2026-10-30"], {}, "is in the future", id="start in the future"),
        pytest.param(["--start", "2025-09-23", "--end", "2025-10-01"], {}, "too far back.*since 2025-09-24", id="over 13 months back"),
        pytest.param(["--start", "2026-08-01", "--end", "2026-09-02"], {}, "more than the 32 days", id="33 days"),
        pytest.param(["--period", "2026-13"], {}, "--period is '2026-13'.*month like 2026-03", id="month 13"),
        pytest.param(["--period", "last-year"], {}, "It takes yesterday, last-7-days", id="unknown period"),
        pytest.param(["--period", "2026-11"], {}, "no whole UTC day yet", id="period in the future"),
        pytest.param(["--period", "2025-09"], {}, "too far back", id="period too far back"),
        pytest.param(["--period", "yesterday", "--end", "2026-09-01"], {}, "--period goes without --start and --end", id="period with end"),
        pytest.param([], {"CIRCLECI_BASE_URL": "http://circleci.com"}, "CIRCLECI_BASE_URL.*like https://circleci.com", id="http"),
        pytest.param([], {"CIRCLECI_BASE_URL": "http://127.0.0.1.example.com"}, "CIRCLECI_BASE_URL", id="http to a name like loopback"),
        pytest.param([], {"CIRCLECI_BASE_URL": "http://localhost@example.com"}, "CIRCLECI_BASE_URL", id="http with a user"),
        pytest.param([], {"CIRCLECI_BASE_URL": "https://circleci.com/api/v2"}, "nothing behind it", id="URL with a path"),
        pytest.param([], {"CIRCLECI_BASE_URL": "circleci.com"}, "CIRCLECI_BASE_URL", id="URL without scheme"),
        pytest.param([], {"CIRCLECI_BASE_URL": "https://a..b"}, "CIRCLECI_BASE_URL", id="URL that names no host"),
        pytest.param(["--job-id", PRIMARY, "--start", "2026-02-31"], {}, "no date like", id="a wrong flag beside --job-id"),
        pytest.param(["--job-id", PRIMARY, "--period", "x"], {}, "--period is 'x'", id="a wrong period beside --job-id"),
        pytest.param(["--output-dir", os.devnull], {}, "output folder .* cannot be written.*like --output-dir", id="output is no folder"),
        pytest.param(["--output-dir", f"{os.devnull}/x"], {}, "cannot be written", id="output inside no folder"),
        pytest.param([FILE, "missing.env"], {}, "missing.env cannot be read.*No such file", id="env file that is missing"),
        pytest.param([FILE, "."], {}, "cannot be read", id="env file that is a folder"),
    ],
)  # fmt: skip
def test_refused_before_any_request(fake, run, arguments, variables, said):
    result = run(*arguments, **variables)
    assert result.code == 2
    assert re.search(said, result.err, re.DOTALL), result.err
    assert result.out == "" and fake.seen == [] and "Traceback" not in result.err


@pytest.mark.parametrize("name", ["PRIMARY_ORG_ID", "SHARED_ORG_IDS", "CIRCLECI_BASE_URL"])
def test_a_token_in_the_wrong_place_is_not_shown(run, name):
    value = f"https://{TOKEN}@circleci.com" if "URL" in name else TOKEN
    result = run(**{name: value})
    assert result.code == 2 and TOKEN.lower() not in result.err.lower()


def test_an_env_file_that_is_no_text(fake, run, tmp_path):
    (tmp_path / "utf16").write_text("CIRCLE_TOKEN=x", encoding="utf-16")
    result = run(FILE, str(tmp_path / "utf16"))
    assert result.code == 2 and "save it as UTF-8" in result.err and fake.seen == []


@pytest.mark.parametrize("arguments", [["--sart", "2026-01-01"], ["--quiet", "--verbose"], ["extra"]])
def test_unknown_arguments_are_refused(fake, run, arguments):
    result = run(*arguments)
    assert result.code == 2 and "usage:" in result.err and fake.seen == []


def test_a_long_window_is_answered_with_commands_that_cover_it(fake, run):
    result = run("--start", "2026-06-10T06:00:00Z", "--end", "2026-09-15")
    assert result.code == 2
    commands = [line.partition("python usage_report.py ")[2] for line in result.err.splitlines()[1:]]
    assert commands == [
        "--start 2026-06-10T06:00:00Z --end 2026-06-30T23:59:59Z",
        "--period 2026-07",
        "--period 2026-08",
        "--start 2026-09-01T00:00:00Z --end 2026-09-15T23:59:59Z",
    ]
    for command in commands:
        assert run("--dry-run", *command.split()).code == 0


@pytest.mark.parametrize(
    "start, end",
    [("2026-06-01", "2026-08-01T00:00:00Z"), ("2026-05-31T23:59:59Z", "2026-07-31"), ("2025-12-31", "2026-03-01")],
)
def test_no_command_for_a_long_window_is_refused(fake, run, start, end):
    lines = run("--start", start, "--end", end).err.splitlines()[1:]
    assert lines
    for line in lines:
        assert run("--dry-run", *line.partition("usage_report.py ")[2].split()).code == 0, line


def window(fake, run, *arguments, **variables):
    result = run(*arguments, **variables)
    assert result.code == 0, result.err
    body = json.loads(fake.requests("POST")[-1].body)
    return f"{body['start']} {body['end']}"


@pytest.mark.parametrize(
    "now, period, expected",
    [
        ("2026-10-24", "yesterday", "2026-10-23T00:00:00Z 2026-10-23T23:59:59Z"),
        ("2026-10-24", "last-7-days", "2026-10-17T00:00:00Z 2026-10-23T23:59:59Z"),
        ("2026-10-24", "this-month", "2026-10-01T00:00:00Z 2026-10-23T23:59:59Z"),
        ("2026-10-02", "this-month", "2026-10-01T00:00:00Z 2026-10-01T23:59:59Z"),
        ("2026-10-24", "last-month", "2026-09-01T00:00:00Z 2026-09-30T23:59:59Z"),
        ("2026-03-31", "last-month", "2026-02-01T00:00:00Z 2026-02-28T23:59:59Z"),
        ("2026-01-01", "last-month", "2025-12-01T00:00:00Z 2025-12-31T23:59:59Z"),
        ("2024-03-01", "yesterday", "2024-02-29T00:00:00Z 2024-02-29T23:59:59Z"),
        ("2026-10-24", "2026-10", "2026-10-01T00:00:00Z 2026-10-23T23:59:59Z"),
        ("2026-10-24", "2025-12", "2025-12-01T00:00:00Z 2025-12-31T23:59:59Z"),
    ],
)
def test_periods_are_whole_utc_days_until_yesterday(fake, run, clock, now, period, expected):
    clock.now = usage_report.parse_moment("", now, "T23:59:00Z").timestamp()
    assert window(fake, run, "--period", period) == expected  # and START_DATE, END_DATE are overridden


def test_the_first_of_a_month_has_no_this_month(fake, run, clock):
    clock.now = usage_report.parse_moment("", "2026-10-01", "T08:00:00Z").timestamp()
    result = run("--period", "this-month")
    assert result.code == 2 and "no whole UTC day yet. Try --period last-month" in result.err


@pytest.mark.parametrize(
    "start, end, expected",
    [
        ("2026-09-05", "2026-09-05", "2026-09-05T00:00:00Z 2026-09-05T23:59:59Z"),
        ("2026-09-05T01:02:03Z", "2026-09-05T01:02:04Z", "2026-09-05T01:02:03Z 2026-09-05T01:02:04Z"),
        ("2026-08-01", "2026-09-01", "2026-08-01T00:00:00Z 2026-09-01T23:59:59Z"),
        ("2025-09-24", "2025-09-30", "2025-09-24T00:00:00Z 2025-09-30T23:59:59Z"),
    ],
    ids=["a plain day", "moments", "32 days", "13 months back"],
)
def test_windows(fake, run, start, end, expected):
    assert window(fake, run, "--start", start, "--end", end) == expected


def test_an_end_in_the_future_is_cut_to_now_with_a_notice(fake, run):
    assert window(fake, run, "--start", "2026-10-01", "--end", "2030-01-01") == "2026-10-01T00:00:00Z 2026-10-24T12:00:00Z"
    result = run("--start", "2026-10-02", "--end", "2030-01-01")
    assert "2030-01-01 is in the future: the window ends now, 2026-10-24T12:" in result.err


def test_order_is_flag_then_environment_then_env_file(fake, run, tmp_path):
    file = "\ufeffCIRCLE_TOKEN = '%s'\nPRIMARY_ORG_ID=%s\nSTART_DATE=2026-09-01\nEND_DATE=2026-09-02\n"
    (tmp_path / ".env").write_text(file % (TOKEN, PRIMARY.upper()), encoding="utf-8")  # beside the script, with a BOM
    unset = {"CIRCLE_TOKEN": "", "PRIMARY_ORG_ID": None, "START_DATE": " ", "END_DATE": None}
    assert window(fake, run, **unset) == "2026-09-01T00:00:00Z 2026-09-02T23:59:59Z"
    unset["END_DATE"] = " 2026-09-03 "
    assert window(fake, run, **unset) == "2026-09-01T00:00:00Z 2026-09-03T23:59:59Z"
    assert window(fake, run, "--end", "2026-09-04", **unset) == "2026-09-01T00:00:00Z 2026-09-04T23:59:59Z"
    (tmp_path / "other").write_text("END_DATE=2026-09-05\nSTART_DATE=2026-09-04")
    given = {"START_DATE": None, "END_DATE": None}
    assert window(fake, run, FILE, str(tmp_path / "other"), **given) == "2026-09-04T00:00:00Z 2026-09-05T23:59:59Z"


def test_a_dollar_in_the_env_file_stands_for_itself(fake, run, tmp_path):
    fake.token = "abc${HOME}$x"
    (tmp_path / ".env").write_text(f"CIRCLE_TOKEN={fake.token}\n")
    assert run("--dry-run", CIRCLE_TOKEN=None).code == 0


def test_the_current_folder_does_not_matter(fake, run, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".env").write_text("CIRCLE_TOKEN=of-another-folder\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "CIRCLE_TOKEN is not set" in run(CIRCLE_TOKEN=None).err
    result = run("--output-dir", "")
    assert result.report.parent == tmp_path / "usage_reports"


def test_a_broken_line_in_the_env_file_is_named_by_number(run, tmp_path):
    (tmp_path / ".env").write_text("CIRCLE_TOKEN 'secret\n")
    result = run(CIRCLE_TOKEN=None)
    assert "line 1" in result.err and "secret" not in result.err and result.code == 2


def test_without_primary_the_organizations_to_choose_from_are_listed(fake, run):
    result = run(PRIMARY_ORG_ID=None, START_DATE=None)
    assert result.code == 2 and "PRIMARY_ORG_ID is not set" in result.err
    for id, name in ORGANIZATIONS.items():
        assert re.search(rf"{name} +gh/{name} +{id}", result.err)
    assert [one.path for one in fake.seen] == ["/api/v2/me/collaborations"]


def test_help_names_every_variable_and_flag(run):
    result = run("--help")
    assert result.code == 0
    names = "CIRCLE_TOKEN PRIMARY_ORG_ID START_DATE END_DATE SHARED_ORG_IDS CIRCLECI_BASE_URL --start --end --period --output-dir"
    for name in [*names.split(), "--env-file", "--job-id", "--dry-run", "--quiet", "--verbose", "--version"]:
        assert name in result.out
    assert max(map(len, result.out.splitlines())) < 120


def test_version(run):
    assert run("--version").out == f"usage_report.py {usage_report.__version__}\n"
