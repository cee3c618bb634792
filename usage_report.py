#!/usr/bin/env python3
"""Write the CircleCI usage of all organizations on a plan to one CSV file.

A run
  1. checks the token,
  2. finds the organizations that share the plan,
  3. requests one export job for all of them and saves its ID,
  4. waits until CircleCI has completed the job, which can take up to 4 hours,
  5. downloads the parts, merges them, and prints the path of the report,
  6. shows a summary on stderr.

If a run is interrupted, the same command resumes it. But after midnight UTC,
--period yesterday and this-month mean new windows: use --job-id then.

exit codes:
  0    the report is complete, or the dry run is done
  1    failed: read the message before you run the command again
  2    a setting or an argument is invalid
  3    no usage in the window
  75   not finished: run the same command again
  130  interrupted by Ctrl-C: run the same command again
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import functools
import gzip
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import traceback
import uuid
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, NoReturn, TypeVar

if sys.version_info < (3, 9):
    sys.exit("usage_report.py needs Python 3.9 or newer.")

warnings.filterwarnings("ignore", module="urllib3")  # about the macOS SSL library
try:
    import requests
    import urllib3
    from dotenv import dotenv_values
    from dotenv.parser import parse_stream
    from requests.exceptions import ConnectTimeout, ProxyError, RequestException, SSLError, Timeout
except ImportError as missing:
    setup = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
    sys.exit(f"{missing}. Run this script with .venv/bin/python. Not set up yet? Run: {setup}")

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__version__ = "3.0.0"
T = TypeVar("T")

# --- Facts about the Usage API (from CircleCI's OpenAPI description unless noted otherwise) ---

# The longest window and the earliest start. Some of CircleCI's texts say 31 days and a year.
MAX_WINDOW_DAYS = 32
HISTORY_MONTHS = 13
MAX_REQUESTS = 10  # GETs an hour for each organization; as many POSTs
EXPORT_LIMIT = 4 * 3600  # seconds that an export may take
# Yesterday's usage is complete "typically 08:00-10:00 UTC" (CircleCI staff).
REFRESH_HOUR = 10
JOB_ID = re.compile(r"[A-Za-z0-9_-]+")  # today a Snowflake query ID, in UUID form
API_TIME = "%Y-%m-%dT%H:%M:%SZ"
CLOUD_URL = "https://circleci.com"
# The token is sent unencrypted only over loopback.
BASE_URL = re.compile(r"(https://[\w.-]+|http://(localhost|127\.0\.0\.1|\[::1\]))(:[0-9]+)?/?")

# --- This script's choices (times in seconds, sizes in bytes) ---

# The ages at which a job is checked in its first hour: MAX_REQUESTS of them, each 1.73 times the
# one before. So the end of a short job is noticed soon.
CHECK_AGES = (15, 26, 45, 78, 135, 233, 403, 697, 1207, 2089)
CHECK_INTERVAL = 3600 // MAX_REQUESTS  # after the first hour
MIN_WAIT = 3600  # No run gives up earlier, even if the job is old.
MARGIN = 15 * 60  # added to EXPORT_LIMIT and to MIN_WAIT
MAX_FAILED_CHECKS = 5  # in a row
MAX_EMPTY_RESPONSES = 3  # that say "completed" but have no links
RETRY_PAUSES = (1, 2, 4, 8, 16)
POST_PAUSE = 15  # before a POST without a clear response is retried
TIMEOUTS = (10, 60)  # to connect, and between two reads
BLOCK = 1 << 17
MAX_TEXT = 300  # characters shown of text from outside

SCRIPT_FOLDER = Path(__file__).resolve().parent
USER_AGENT = f"circleci-usage-report/{__version__}"
PLACEHOLDER = "your-personal-api-token"  # CIRCLE_TOKEN in .env.example
EXAMPLE_ID = "b9291e0d-a11e-41fb-8517-c545388b5953"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


# --- Errors: each class has one meaning and one exit code ---


class ReportError(Exception):
    """The run has failed. The text says what happened, why, and what to do next."""

    exit_code = 1
    advice = ""


class InvalidSetting(ReportError):
    """A setting or an argument is invalid."""

    exit_code = 2


class NothingToCollect(ReportError):
    """The export job failed, has no usage, or does not exist. The next run requests a new one."""


class NoUsage(NothingToCollect):
    """The export has no rows."""

    exit_code = 3


class NotFinished(ReportError):
    """Nothing is lost: the same command resumes the run."""

    exit_code = 75
    advice = "Run the same command again."


class TemporaryError(NotFinished):
    """A request failed, and a retry may help."""


class NoConnection(TemporaryError):
    """A request failed before it was sent."""


class RateLimited(TemporaryError):
    """CircleCI rejects requests for a while (429)."""

    def __init__(self, text: str, seconds: float) -> None:
        super().__init__(text)
        self.seconds = seconds


class UnexpectedResponse(TemporaryError):
    """A response is not what the API sends: a proxy may have sent it. Retried like any temporary
    error, but if that does not help, a rerun is unlikely to."""

    exit_code = 1
    advice = ""


class NotFound(ReportError):
    """404: an ID is wrong, or the token's owner cannot see it."""


class MayHaveStarted(ReportError):
    """A POST got no clear response. It may have started an export job."""

    advice = (
        "CircleCI may have started an export job. Running the command again may start another "
        "(limit: 10 an hour)."
    )


# --- Text and progress ---

log = logging.getLogger("usage_report")

# Log levels of the live line. On a terminal, the next message overwrites it. Elsewhere, LIVE is a
# line like any other, and TICK is not shown.
LIVE = logging.INFO + 1
TICK = logging.INFO - 1

PREFIXES = {logging.WARNING: "notice: ", logging.ERROR: "error: "}


class Console(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes messages to stderr: with a live line on a terminal, with UTC times elsewhere. Uses no
    escape codes, because old Windows consoles show them as text."""

    def __init__(self, level: int) -> None:
        super().__init__(sys.stderr)
        self.setLevel(level)
        self.terminal = self.stream.isatty()
        self.live_width = 0  # columns of the live line that is on the screen

    def emit(self, record: logging.LogRecord) -> None:
        text = PREFIXES.get(record.levelno, "") + record.getMessage()
        live = record.levelno in (LIVE, TICK)
        if self.terminal:
            if live:
                columns = os.get_terminal_size(self.stream.fileno()).columns or 80
                text = text[: columns - 1]
            overwrite = "\r" if self.live_width else ""
            line_end = "" if live else "\n"
            self.stream.write(overwrite + text.ljust(self.live_width) + line_end)
            self.live_width = len(text) if live else 0
        elif record.levelno != TICK:
            stamp = time.strftime(API_TIME, time.gmtime(record.created))
            self.stream.write(f"{stamp} {text}\n")
        self.flush()


class SecretFilter(logging.Filter):
    """Masks the token, and the query part of signed URLs, in every message."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self.token = token

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage().replace(self.token, "[token]")
        record.msg = re.sub(r"\?\S*=\S*", "?[removed]", text)
        record.args = ()
        return True


def clean(text: object) -> str:
    """Text from outside, on one line, without control characters, and not too long. It is cut
    between words, because half a token would escape SecretFilter."""
    line = textwrap.shorten(str(text), MAX_TEXT, placeholder="...", break_on_hyphens=False)
    return "".join(character for character in line if character.isprintable())


def format_duration(seconds: float) -> str:
    """Hours, minutes, and seconds, such as 0:06:00."""
    return str(timedelta(seconds=round(max(0, seconds))))


def pause(seconds: float, activity: str) -> None:
    """Sleep, with a countdown. Sleeps a second at a time, so that the wait ends on schedule even
    if the laptop slept."""
    end = time.time() + seconds
    level = LIVE
    left = seconds
    while left > 0:
        log.log(level, "%s in %s", activity, format_duration(left))
        level = TICK
        time.sleep(min(left, 1))
        left = end - time.time()


# --- Settings: a flag overrides the environment, which overrides .env ---

VARIABLES = {
    "CIRCLE_TOKEN": "personal API token, required",
    "PRIMARY_ORG_ID": "UUID of the organization that owns the plan, required",
    "START_DATE": "first day, unless --start or --period is used",
    "END_DATE": "last day, unless --end or --period is used",
    "SHARED_ORG_IDS": "comma-separated UUIDs; default: all organizations on the plan",
    "CIRCLECI_BASE_URL": f"default: {CLOUD_URL}",
}


class Window(NamedTuple):
    start: datetime  # UTC
    end: datetime  # UTC, inclusive


@dataclass(frozen=True)
class Settings:
    token: str
    token_source: str  # "the environment", or the path of .env
    primary_id: str | None  # an organization; if None, the run ends with a list to choose from
    shared_ids: list[str]  # organizations; if empty, CircleCI is asked for them
    base_url: str
    output: Path
    job_id: str | None  # of an export job that already exists
    window: Window | None  # None with a job ID

    @property
    def jobs_path(self) -> str:
        return f"/api/v2/organizations/{self.primary_id}/usage_export_job"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags. Exits with 0 after --help and --version, with 2 if a flag is invalid."""
    variables = [f"  {name:18} {meaning}" for name, meaning in VARIABLES.items()]
    parser = argparse.ArgumentParser(
        prog="usage_report.py",
        description=__doc__,
        epilog="\n".join(["environment variables, also read from .env:", *variables]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--period", help="YYYY-MM, last-month, this-month, last-week, or yesterday (UTC)")
    add("--start", help="first day, as YYYY-MM-DD or YYYY-MM-DDThh:mm:ssZ")
    add("--end", help="last day, in the same format")
    add("--output-dir", help="folder for reports; default: usage_reports next to the script")
    add("--env-file", help="settings file; default: .env next to the script")
    add("--raw", action="store_true", help="write the rows as CircleCI wrote them; no summary")
    add("--job-id", help="collect an export that already exists")
    add("--dry-run", action="store_true", help="show the request and stop before it is sent")
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-q", "--quiet", action="store_true", help="show only errors and the path")
    volume.add_argument("-v", "--verbose", action="store_true", help="show each API request")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser.parse_args(argv)


def load_settings(args: argparse.Namespace) -> Settings:
    """All settings, validated. Creates the output folder. Raises InvalidSetting."""
    env_file = Path(args.env_file or SCRIPT_FOLDER / ".env").absolute()
    in_file: dict[str, str] = {}
    if args.env_file or env_file.exists():
        in_file = read_env_file(env_file)
    environment = {name: os.environ.get(name, "").strip() for name in VARIABLES}
    values = {}
    for name in VARIABLES:
        values[name] = environment[name] or in_file.get(name, "").strip()
    token = values["CIRCLE_TOKEN"]
    token_source = "the environment" if environment["CIRCLE_TOKEN"] else str(env_file)
    printable_ascii = "[!-~]+"
    if token == PLACEHOLDER or not re.fullmatch(printable_ascii, token):
        hint = "Create a token (CCIPAT_...) in CircleCI: User Settings > Personal API Tokens."
        raise InvalidSetting(f"CIRCLE_TOKEN in {token_source} is missing or invalid. {hint}")
    primary_ids = parse_ids("PRIMARY_ORG_ID", values["PRIMARY_ORG_ID"])
    if len(primary_ids) > 1:
        raise InvalidSetting(f"PRIMARY_ORG_ID must be a single UUID such as {EXAMPLE_ID}.")
    base_url = values["CIRCLECI_BASE_URL"] or CLOUD_URL
    if not BASE_URL.fullmatch(base_url):
        hint = f"an https:// URL such as {CLOUD_URL}, without a path"
        raise InvalidSetting(f"CIRCLECI_BASE_URL must be {hint}.")
    if args.job_id and not JOB_ID.fullmatch(args.job_id):
        raise InvalidSetting(f"--job-id must be an ID such as {EXAMPLE_ID}.")
    return Settings(
        token=token,
        token_source=token_source,
        primary_id=primary_ids[0] if primary_ids else None,
        shared_ids=parse_ids("SHARED_ORG_IDS", values["SHARED_ORG_IDS"]),
        base_url=base_url.rstrip("/"),
        output=prepare_output_folder(args.output_dir),
        job_id=args.job_id or None,
        window=None if args.job_id else choose_window(args, values),
    )


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a .env file. Raises InvalidSetting if a line is not a setting: python-dotenv
    alone would skip the second line of a list of organizations, and only log it."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        hint = "Use a UTF-8 file, as in --env-file /etc/circleci.env."
        raise InvalidSetting(f"Cannot read {path}: {clean(error)}. {hint}") from None
    for binding in parse_stream(io.StringIO(text)):
        has_no_value = binding.key is not None and binding.value is None
        if binding.error or has_no_value:
            hint = f"Write NAME=value on one line, as in PRIMARY_ORG_ID={EXAMPLE_ID}."
            raise InvalidSetting(f"{path} is invalid near line {binding.original.line}. {hint}")
    values = dotenv_values(stream=io.StringIO(text), interpolate=False)
    return {name: value or "" for name, value in values.items()}


def parse_ids(name: str, value: str) -> list[str]:
    """The organization IDs in a variable, in canonical form."""
    texts = value.replace(",", " ").split()
    try:
        return [str(uuid.UUID(text)) for text in texts]
    except ValueError:
        hint = "Find them under Organization Settings > Overview."
        text = f"{name} takes UUIDs such as {EXAMPLE_ID}, not names or slugs. {hint}"
        raise InvalidSetting(text) from None


def prepare_output_folder(output_dir: str | None) -> Path:
    """The folder's absolute path. Creates it, and a file in it to see whether that works."""
    folder = Path(output_dir or SCRIPT_FOLDER / "usage_reports").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        if error.errno in DISK_FULL:
            raise  # not a setting: main() knows what to do
        hint = "Choose another folder, as in --output-dir reports."
        raise InvalidSetting(f"Cannot write to {folder}: {error.strerror}. {hint}") from None


def choose_window(args: argparse.Namespace, values: Mapping[str, str]) -> Window:
    """The window that the flags or variables ask for, its end cut to yesterday. Raises
    InvalidSetting, which suggests a window that is valid today."""
    now = datetime.fromtimestamp(time.time(), timezone.utc)
    try:
        if args.period:
            name = f"--period {args.period}"
            if args.start or args.end:
                raise ValueError(f"{name} cannot be combined with --start or --end.")
            start, end = period_days(args.period, now.date())
        else:
            name = "START_DATE to END_DATE (or --start to --end)"
            start = args.start or values["START_DATE"]
            end = args.end or values["END_DATE"]
        start_time = parse_time("START_DATE (or --start)", start, "T00:00:00Z")
        end_time = parse_time("END_DATE (or --end)", end, "T23:59:59Z")
        return cut_window(name, Window(start_time, end_time), now)
    except ValueError as error:
        first, last = period_days("last-month", now.date())
        hint = f"Try --period last-month, or --start {first} --end {last}."
        raise InvalidSetting(f"{error} {hint}") from None


def period_days(period: str, today: date) -> tuple[str, str]:
    """First and last UTC day of a --period, the last one cut to yesterday. Raises ValueError."""
    yesterday = today - timedelta(days=1)
    if period == "yesterday":
        return str(yesterday), str(yesterday)
    if period == "last-week":
        monday = today - timedelta(days=today.weekday() + 7)
        return str(monday), str(monday + timedelta(days=6))
    month = period
    if period == "this-month":
        month = f"{today:%Y-%m}"
    if period == "last-month":
        month = f"{today.replace(day=1) - timedelta(days=1):%Y-%m}"
    if not re.fullmatch("20[0-9][0-9]-(0[1-9]|1[0-2])", month):
        periods = "yesterday, last-week, last-month, this-month, or a month"
        raise ValueError(f"--period must be {periods} such as {yesterday:%Y-%m}.")
    first = date.fromisoformat(f"{month}-01")
    next_month = (first + timedelta(days=31)).replace(day=1)
    last = min(next_month - timedelta(days=1), yesterday)
    return str(first), str(last)


def parse_time(name: str, text: str, time_of_day: str) -> datetime:
    """A time in UTC; a plain date gets `time_of_day`. `name` tells where it is set. Raises
    ValueError."""
    if not text:
        raise ValueError(f"{name} is not set.")
    if "T" not in text:
        text += time_of_day
    try:
        moment = datetime.strptime(text, API_TIME)
    except ValueError:
        moment = None
    if moment is None or moment.strftime(API_TIME) != text:  # strptime also takes 2026-9-1.
        raise ValueError(f"{name} must be a date: YYYY-MM-DD or YYYY-MM-DDThh:mm:ssZ.")
    return moment.replace(tzinfo=timezone.utc)


def cut_window(name: str, window: Window, now: datetime) -> Window:
    """The window, its end cut to yesterday. `name` tells where it is set. Raises ValueError.

    CircleCI has the usage through the previous UTC day (its changelog)."""
    start, end = window
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    latest = today - timedelta(seconds=1)
    if start >= today:
        raise ValueError(f"{name} has no complete day yet.")
    if end > latest:
        log.warning("The window now ends on %s: CircleCI has no later usage", latest.date())
        end = latest
    if start >= end:
        raise ValueError(f"{name}: the start must be before the end.")
    if end - start > timedelta(days=MAX_WINDOW_DAYS):
        raise ValueError(f"{name} is longer than {MAX_WINDOW_DAYS} days.")
    months = (now.year - start.year) * 12 + now.month - start.month  # ignores days
    if months > HISTORY_MONTHS or (months == HISTORY_MONTHS and start.day < now.day):
        raise ValueError(f"{name} starts more than {HISTORY_MONTHS} months ago.")
    if end.date() == latest.date() and now.hour < REFRESH_HOUR:
        log.warning("Usage for %s is incomplete until about %d:00 UTC", end.date(), REFRESH_HOUR)
    return Window(start, end)


# --- Requests ---

# Raised when a response is not JSON, or its JSON is not what the API documents.
JSON_ERRORS = (AttributeError, KeyError, TypeError, ValueError)


def send(what: str, method: str, url: str, **options: Any) -> requests.Response:
    """Send one request. `what` names it in messages. Raises NoConnection if it was not sent,
    TemporaryError if there is no response, ReportError if a setting of the network is wrong."""
    error_class: type[ReportError]
    try:
        return requests.request(
            method,
            url,
            timeout=TIMEOUTS,
            allow_redirects=False,
            auth=lambda request: request,  # Otherwise, requests adds a login from ~/.netrc.
            proxies={"http": ""},  # none for http (loopback only): a proxy would see the token
            **options,
        )
    except ProxyError:
        error_class = NoConnection
        reason = "cannot use the proxy. Check HTTPS_PROXY."
    except SSLError:  # usually before the request is sent, but not always
        error_class = TemporaryError
        reason = "untrusted certificate. Behind a proxy, set REQUESTS_CA_BUNDLE."
    except ConnectTimeout:
        error_class = NoConnection
        reason = "connecting timed out. Check the network and HTTPS_PROXY."
    except Timeout:
        error_class = TemporaryError
        reason = "the response timed out."
    except ValueError:  # InvalidURL, which is a RequestException, too
        error_class = ReportError
        reason = "invalid URL. Check CIRCLECI_BASE_URL and HTTPS_PROXY."
    except RequestException as error:
        # The cause is a MaxRetryError if requests could not connect, and only then.
        could_not_connect = isinstance(error.args[0], urllib3.exceptions.MaxRetryError)
        error_class = NoConnection if could_not_connect else TemporaryError
        reason = "the connection failed or was lost. Check the network."
    except OSError:  # a plain one; those above are OSErrors, too
        error_class = ReportError
        reason = "the CA bundle is missing. Check REQUESTS_CA_BUNDLE."
    raise error_class(f"{what} failed: {reason}")


def status_error(response: requests.Response, text: str) -> ReportError:
    """The error to raise for a response with a bad status."""
    status = response.status_code
    if status == 429:
        return RateLimited(text, rate_limit_seconds(response))
    if status == 408 or status >= 500:
        return TemporaryError(text)
    if status == 404:
        return NotFound(text)
    return ReportError(text)


def rate_limit_seconds(response: requests.Response) -> float:
    """How long to wait after a 429: Retry-After (seconds or a date), else X-RateLimit-Reset or
    RateLimit-Reset (seconds; CircleCI's API developers' guide), else 6 minutes."""
    try:
        seconds = urllib3.Retry().get_retry_after(response.raw)  # parses Retry-After
    except urllib3.exceptions.InvalidHeader:
        seconds = None
    for name in ("X-RateLimit-Reset", "RateLimit-Reset"):
        value = response.headers.get(name, "")
        if seconds is None and value.isdecimal():
            seconds = int(value)
    if seconds is None:
        seconds = CHECK_INTERVAL
    return max(1, seconds)


def call_api(
    settings: Settings,
    method: str,
    path: str,
    parse: Callable[[Any], T],
    body: object = None,
) -> T:
    """Send one request with the token. Returns what `parse` makes of the JSON in the response.

    Raises NotFound, RateLimited, TemporaryError, or ReportError, as the status says, and
    UnexpectedResponse if there is no JSON or `parse` fails. Follows no redirects: the token goes
    only to the host of the base URL."""
    url = settings.base_url + path
    what = f"{method} {url}"
    headers = {"Circle-Token": settings.token, "User-Agent": USER_AGENT}
    response = send(what, method, url, headers=headers, json=body)
    status = response.status_code
    log.debug("%s: %d after %.1f s", what, status, response.elapsed.total_seconds())
    if not 200 <= status <= 299:
        problem = describe_problem(settings, method, response)
        raise status_error(response, f"{what} failed with {status}: {problem}")
    try:
        return parse(response.json())
    except JSON_ERRORS:
        text = f"{what} returned something other than the API's JSON."
        raise UnexpectedResponse(f"{text} Check for a proxy or a login page.") from None


def describe_problem(settings: Settings, method: str, response: requests.Response) -> str:
    """The API's own message on an error, and what to do next."""
    try:
        message = clean(response.json()["message"]).rstrip(".")
    except JSON_ERRORS:
        message = clean(response.reason or "no message")
    status = response.status_code
    advice = ""
    if (method, status) == ("POST", 400):
        advice = (
            "CircleCI may reject more than 31 days, a start more than a year ago, or an end in "
            "the future. Check the window and this computer's clock."
        )
    elif status == 401:
        advice = f"CIRCLE_TOKEN in {settings.token_source} is invalid or has expired: replace it."
    elif status == 403:
        advice = "The token's owner must be an organization admin."
    elif status == 404:
        ids = [settings.primary_id, *settings.shared_ids, settings.job_id]
        used = ", ".join(used_id for used_id in ids if used_id)
        advice = f"Check these IDs: {used}. The token's owner must be an organization admin."
    return f"{message}. {advice}".strip()


def retry(action: Callable[..., T], *arguments: Any) -> T:
    """What action(*arguments) returns. Retries it after a TemporaryError, up to five times."""
    for number, seconds in enumerate(RETRY_PAUSES, 1):
        try:
            return action(*arguments)
        except TemporaryError as error:
            if number == 1:
                log.warning("%s", error)
            wait = error.seconds if isinstance(error, RateLimited) else seconds
        pause(wait, f"Retry {number} of {len(RETRY_PAUSES)}")
    return action(*arguments)


# --- Organizations ---


def parse_owner(content: Any) -> str:
    """Name and login of the token's owner, where given."""
    names = [content.get("name"), content.get("login")]
    return clean(", ".join(name for name in names if name))


def parse_choices(content: Any) -> list[str]:
    """A line with ID, slug, and name for each organization that has an ID."""
    lines = []
    for entry in content:
        if entry["id"]:
            cells = [clean(entry[key]) for key in ("id", "slug", "name")]
            lines.append("  ".join(cells))
    return lines


def list_choices(settings: Settings) -> NoReturn:
    """Raise InvalidSetting with the organizations to choose PRIMARY_ORG_ID from."""
    choices = retry(call_api, settings, "GET", "/api/v2/me/collaborations", parse_choices)
    intro = "PRIMARY_ORG_ID is not set. Set it to the ID of the organization that owns the plan:"
    raise InvalidSetting("\n".join([intro, *choices]))


def parse_organizations(content: Any) -> dict[str, str]:
    """Names by ID."""
    names = {}
    if not isinstance(content["orgs"], list):
        raise TypeError  # An empty object would look like an empty list.
    for organization in content["orgs"]:
        organization_id = str(uuid.UUID(organization["id"]))
        names[organization_id] = clean(organization.get("name") or "")
    return names


def find_organizations(settings: Settings) -> dict[str, str]:
    """The names by ID of all organizations on the plan (or in SHARED_ORG_IDS), the primary first.

    The endpoint is undocumented (seen in public code). If it fails, the run ends, because a report
    on the primary alone could pass for the whole plan."""
    names = dict.fromkeys(settings.shared_ids, "")
    if not names:
        path = f"/private/orgs/{settings.primary_id}/plan/shares-for"
        try:
            names = retry(call_api, settings, "GET", path, parse_organizations)
        except ReportError as error:
            workaround = "Workaround: list the organization IDs in SHARED_ORG_IDS."
            error.args = (f"{error} {workaround}",)  # what str(error) returns
            raise  # the same error, because its class decides the exit code
        if not names:
            log.warning("The plan is not shared: the report covers only the primary organization")
    return {str(settings.primary_id): "", **names}


def show_request(settings: Settings, organizations: Mapping[str, str]) -> None:
    if settings.base_url != CLOUD_URL:
        log.warning("%s: the Usage API works in CircleCI Cloud only", settings.base_url)
    if settings.window is None:
        log.info("Collecting export job %s", settings.job_id)
        return
    start, end = settings.window
    log.info("Usage from %s to %s (UTC) for these organizations:", start.date(), end.date())
    for organization_id, name in organizations.items():
        log.info("%s  %s", organization_id, name)


# --- Files ---


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name once it is complete and flushed to disk, and is removed if the
    block fails. A draft left by a killed run is overwritten."""
    draft = path.with_name(f"{path.name}.new")
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make new names in a folder survive a power failure. Windows has no call for that."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


# --- The export job ---

# All that the next run must know is in the export's folder: job.json, with the job ID and the time
# of the request, and the complete parts. So that run skips the POST, asks for the links, downloads
# the missing parts, and starts the merge over. A folder without job.json has nothing to resume.

JOB_FILE = "job.json"
MERGED_FILE = "merged.csv"
NO_USAGE = "No usage in that window"


class Job(NamedTuple):
    job_id: str
    requested_at: float  # Unix seconds


def export_folder(settings: Settings, organizations: Iterable[str]) -> Path:
    """The hidden folder of this export. Each run with these organizations and this window finds it.
    (The window ends yesterday or earlier, so --period this-month has a new one every day.)"""
    if settings.job_id:
        key = [settings.job_id]
    else:
        ids = [str(settings.primary_id), *sorted(organizations)]
        key = [settings.base_url, *ids, str(settings.window)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return settings.output / f".export-{digest[:16]}"


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Create and lock the export's folder for this run, and remove it if there is nothing to resume
    afterward. Raises ReportError if another run has locked it."""
    folder.mkdir(exist_ok=True)
    flush_folder(folder.parent)
    lock_file = open(folder / "lock", "a")  # noqa: SIM115  (closed below)
    try:
        lock(lock_file)
    except (BlockingIOError, PermissionError):
        lock_file.close()
        raise ReportError("Another run is working on this export. Wait until it ends.") from None
    try:
        yield
    except NothingToCollect:
        (folder / JOB_FILE).unlink()  # so that the folder is removed below
        raise
    finally:
        lock_file.close()  # Windows cannot remove an open file.
        if not (folder / JOB_FILE).exists():
            shutil.rmtree(folder, ignore_errors=True)


def lock(file: IO[str]) -> None:
    """Lock a file until it is closed, or the process ends or is killed. Raises BlockingIOError or
    PermissionError if another process has locked it."""
    if sys.platform == "win32":
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def load_job(folder: Path) -> Job | None:
    """The job that an earlier run saved, if any. Raises ReportError if it cannot be read."""
    try:
        content = json.loads((folder / JOB_FILE).read_text("utf-8"))
        return Job(parse_job_id(content["job_id"]), float(content["requested_at"]))
    except FileNotFoundError:
        return None
    except JSON_ERRORS:
        text = f"Cannot read {JOB_FILE} in {folder}."
        raise ReportError(f"{text} Remove that folder to request the export again.") from None


def save_job(folder: Path, job: Job) -> None:
    with new_file(folder / JOB_FILE) as file:
        file.write(json.dumps(job._asdict()).encode())


def parse_job_id(text: Any) -> str:
    if not JOB_ID.fullmatch(text):
        raise ValueError
    return str(text)


def request_body(settings: Settings, organizations: Iterable[str]) -> dict[str, Any]:
    """What the POST sends. The API rejects any other key. Empty with a job ID: there is no POST."""
    if settings.window is None:
        return {}
    start, end = settings.window
    return {
        "start": start.strftime(API_TIME),
        "end": end.strftime(API_TIME),
        "shared_org_ids": list(organizations),
    }


def request_job(settings: Settings, body: dict[str, Any], folder: Path) -> Job:
    """Start an export job and save its ID. Both run in a worker thread, so that they can finish
    after Ctrl-C.

    A POST without a clear response (408, 5xx, none, or not the API's JSON) is retried only once: it
    may have started a job, and the API does not list jobs. If the retry fails, too, raises
    MayHaveStarted. A 429 does not count: after a wait, the POST is resent."""
    is_retry = False
    with ThreadPoolExecutor(1) as executor:
        while True:
            post = executor.submit(post_and_save, settings, body, folder)
            try:
                return post.result()
            except RateLimited as error:
                log.warning("%s", error)
                pause(error.seconds, "Retry")
            except ReportError as error:
                if is_retry:
                    raise MayHaveStarted(str(error)) from None  # by the first POST
                if not isinstance(error, MayHaveStarted):
                    raise
                is_retry = True
                log.warning("%s", error)
                pause(POST_PAUSE, "Second and final attempt")
            except KeyboardInterrupt:  # during the POST, which continues in its thread
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                log.warning("Waiting for CircleCI's response, so that the job ID is not lost")
                post.result()  # raises the POST's error if it failed
                raise


def post_and_save(settings: Settings, body: dict[str, Any], folder: Path) -> Job:
    """Send one POST. When this returns, the job ID is on disk."""

    def parse(content: Any) -> str:
        return parse_job_id(content["usage_export_job_id"])

    requested_at = time.time()
    try:
        job_id = call_api(settings, "POST", settings.jobs_path, parse, body)
    except (NoConnection, RateLimited):
        raise  # This POST did not start a job.
    except TemporaryError as error:
        raise MayHaveStarted(str(error)) from None
    job = Job(job_id, requested_at)
    try:
        save_job(folder, job)
    except OSError as error:
        text = f"Cannot save the ID of the export job: {error.strerror}."
        raise ReportError(f"{text} Run again with --job-id {job_id}.") from None
    log.info("CircleCI started export job %s", job_id)
    return job


# --- Waiting for the job ---


def next_check_age(age: int) -> int:
    """The age at which a job of this age is checked next (both in seconds since the request).

    The API allows 10 GETs an hour, and CHECK_AGES uses them up. So the next check is due an hour
    after the first, at 3615 seconds, and then there is one every 6 minutes."""
    for due in CHECK_AGES:
        if due > age:
            return due
    due = CHECK_AGES[0] + 3600
    while due <= age:
        due += CHECK_INTERVAL
    return due


def parse_job(content: Any) -> tuple[str, list[str]]:
    """State and download links of a job. Raises NothingToCollect if it failed."""
    state = clean(content["state"])
    links = [link.strip() for link in content.get("download_urls") or []]
    if state == "failed":
        reason = clean(content.get("error_reason") or "no reason given").rstrip(".")
        hint = "Try a shorter window or fewer organizations (SHARED_ORG_IDS)."
        raise NothingToCollect(f"The export job failed: {reason}. {hint}")
    return state, links


def wait_for_links(settings: Settings, job: Job) -> list[str]:
    """The job's download links, in order. There are none until it is completed.

    Raises NotFinished if it takes too long, NoUsage if it is completed without links,
    NothingToCollect if it failed or CircleCI does not know it, and the last error if checks fail
    repeatedly."""
    path = f"{settings.jobs_path}/{job.job_id}"
    give_up_at = max(job.requested_at + EXPORT_LIMIT, time.time() + MIN_WAIT) + MARGIN
    next_check = job.requested_at + CHECK_AGES[0]  # usually past in a resumed run: no pause
    state = "requested"
    empty_responses = 0
    failures: list[ReportError] = []  # in a row
    while next_check < give_up_at:
        pause(next_check - time.time(), f"Export job: {state}. Next check")
        # Set before the request, so that a slow response does not skip a check. Rounded, so that
        # waking a little early does not repeat one.
        age = round(time.time() - job.requested_at)
        next_check = job.requested_at + next_check_age(age)
        try:
            state, links = call_api(settings, "GET", path, parse_job)
        except RateLimited as error:
            log.warning("%s", error)
            next_check = time.time() + error.seconds  # instead of the scheduled one
        except (NotFound, TemporaryError) as error:
            log.warning("%s", error)
            failures.append(error)
            if len(failures) == MAX_FAILED_CHECKS:
                raise_last(failures)
        else:
            failures.clear()
            if state != "completed":
                continue
            if links:
                return links
            empty_responses += 1
            if empty_responses == MAX_EMPTY_RESPONSES:
                raise NoUsage(f"{NO_USAGE}: the export has no files. Check the dates.")
    raise NotFinished(f"Export job {job.job_id} is not finished (state: {state}).")


def raise_last(failures: Sequence[ReportError]) -> NoReturn:
    """Raise the last failure. If all are 404s, CircleCI does not know the job: there is nothing to
    collect."""
    last = failures[-1]
    if all(isinstance(error, NotFound) for error in failures):
        hint = "Without --job-id, the next run requests a new export."
        raise NothingToCollect(f"{last} {hint}")
    raise last


# --- Downloading the parts ---


def download_parts(links: Sequence[str], folder: Path) -> list[Path]:
    """The files of all parts, in order. Parts from an earlier run are reused. This relies on
    CircleCI listing a job's links in the same order each time."""
    paths = []
    for number, link in enumerate(links, 1):
        name = f"Part {number} of {len(links)}"
        path = folder / f"part-{number:04}"
        if not path.exists():
            log.log(LIVE, "%s: downloading", name)
            retry(download_part, name, link, path)
        paths.append(path)
    return paths


def download_part(name: str, link: str, path: Path) -> None:
    """Download one part as it is, compressed. Raises TemporaryError if a retry may help,
    NotFinished if the link has expired, ReportError for any other status.

    Links are signed and valid for 36 hours (measured by CircleCI's Terraform provider)."""
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    with send(name, "GET", link, headers=headers, stream=True) as response:
        status = response.status_code
        if status in (401, 403):
            raise NotFinished(f"{name}: the download link has expired.")
        if status != 200:
            raise status_error(response, f"{name}: the download failed with {status}.")
        response.raw.enforce_content_length = True  # urllib3 1.26 does not check the length
        try:
            with new_file(path) as file:
                for block in response.raw.stream(BLOCK, decode_content=False):
                    file.write(block)
                    log.log(TICK, "%s: %.1f MB", name, file.tell() / 1_000_000)
        except urllib3.exceptions.HTTPError:
            raise TemporaryError(f"{name}: the connection was lost.") from None


# --- Merging the parts: the header once, then every row of every part ---

# CircleCI writes a part in one of two dialects. The first byte of the part tells which. The other
# columns show how a cell with given text is written:
#
#            first byte   text x,y   text x"y   text x\y   missing value
#   quoted   a quote      "x,y"      "x""y"     "x\y"      "\N"
#   bare     any other    x\,y       x"y        x\\y       \N or \\N
#
# A bare \\N is taken as a missing value, although the text \N is written like that, too.
#
# The report is plain CSV (RFC 4180), where a missing value is an empty cell, and any cell may be
# quoted. So quoted parts keep their quotes, and bare parts get them where needed. (As a precaution,
# blocks of plain CSV in a bare part are accepted: see is_plain_csv().)
#
# Rows are converted in blocks that end where a row ends. In a typical block, emptying the missing
# values is all there is to do, and operations on the whole block do that 10 times faster than the
# csv module. Only the other blocks of a bare part go through the csv module.

BOM = b"\xef\xbb\xbf"
GZIP_MAGIC = b"\x1f\x8b"
BACKSLASH = b"\\"
MAX_ROW_LINES = 1000  # A quote that is never closed must not make the rest of a part one row.
MAX_NAMED_ROWS = 3  # how many rows with the wrong number of cells are named, per part
DAMAGED_GZIP = (zlib.error, EOFError, gzip.BadGzipFile)
COLUMN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_ ]*")
# "\N" or \N as a whole cell (with one backslash), plus the comma or line start before it.
QUOTED_MISSING = re.compile(rb'(?m)(^|,)"\\N"(?=,|\r?$)')
BARE_MISSING = re.compile(rb"(?m)(^|,)\\N(?=,|\r?$)")
csv.field_size_limit(1 << 30)  # The csv module refuses cells over 128 kB by default.


@contextlib.contextmanager
def open_part(name: str, path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The content of a part, gzipped or not. A part that the `with` block finds damaged or wrong is
    removed."""
    try:
        with open(path, "rb") as file:
            if file.peek(2).startswith(GZIP_MAGIC):
                yield gzip.GzipFile(fileobj=file)
            else:
                yield file
    except DAMAGED_GZIP:
        path.unlink()
        raise NotFinished(f"{name} is damaged. A rerun downloads only that part.") from None
    except ReportError:
        path.unlink()
        raise
    except csv.Error as error:  # such as a NUL byte, before Python 3.11
        path.unlink()
        text = f"{name} has a header or a row that is not CSV: {error}."
        raise ReportError(f"{text} --raw writes rows as they are.") from None


def merge_parts(parts: Sequence[Path], merged: Path, raw: bool) -> None:
    """Write the header and all rows of all parts to one file: as plain CSV or, if `raw`, as they
    are.

    Raises NoUsage if there are no rows, NotFinished for a damaged part, and ReportError for one
    that is not CSV or has different columns."""
    columns: list[str] = []
    has_rows = False
    with new_file(merged) as target:
        for number, path in enumerate(parts, 1):
            name = f"Part {number}"
            with open_part(name, path) as part:
                first_row = complete_row(part, part.readline()).removeprefix(BOM)
                if not first_row:
                    continue
                cells = parse_first_row(first_row, len(columns))
                if begins_with_header(name, cells, columns):
                    line_number = 2  # of the first row below the header
                    blocks = read_blocks(part)
                    if not columns:
                        columns = cells  # names, which need no conversion
                        target.write(first_row.removesuffix(b"\n") + b"\n")
                else:
                    line_number = 1
                    blocks = read_blocks(part, first_row)
                if not raw:
                    quoted = first_row.startswith(b'"')
                    blocks = convert_rows(name, blocks, line_number, quoted, len(columns))
                for block in blocks:
                    target.write(block)
                    has_rows = True
        if not has_rows:
            raise NoUsage(f"{NO_USAGE}: the export has no rows. Check the dates.")


def parse_first_row(row: bytes, width: int) -> list[str]:
    """The cells of the first row of a part, in either dialect. `width` is the number of columns, or
    0 if it is not known yet: then is_plain_csv() is false."""
    if not row.startswith(b'"'):
        row = convert_bare(row, width)
    return next(csv.reader(as_text_file(row)), [])


def begins_with_header(name: str, cells: Sequence[str], columns: Sequence[str]) -> bool:
    """Whether the first row of a part is a header. Raises ReportError if that header differs from
    the one of earlier parts (`columns`), or if the row is neither a header nor data."""
    hint = "The next run downloads that part again."
    is_header = len(cells) >= 2 and all(COLUMN_NAME.fullmatch(cell) for cell in cells)
    if is_header and columns and cells != columns:
        missing = clean(", ".join(set(columns) - set(cells)) or "none")
        added = clean(", ".join(set(cells) - set(columns)) or "none")
        text = f"{name}: the columns or their order differ from those of earlier parts"
        raise ReportError(f"{text} (missing: {missing}; new: {added}). {hint}")
    is_row = columns and len(cells) == len(columns)
    if not is_header and not is_row:
        text = f"{name} begins with neither a header nor a row. It may be a web page or JSON."
        raise ReportError(f"{text} {hint}")
    return is_header


def read_blocks(file: IO[bytes] | gzip.GzipFile, start: bytes = b"") -> Iterator[bytes]:
    """`start` and the rest of a file, in blocks that end where a row ends."""
    block = start + file.read(BLOCK)
    while block:
        block = complete_row(file, block + file.readline())
        if not block.endswith(b"\n"):
            block += b"\n"
        yield block
        block = file.read(BLOCK)


def complete_row(file: IO[bytes] | gzip.GzipFile, lines: bytes) -> bytes:
    """Lines, and those that follow in the file until the last row is complete: its quotes are
    closed, and (in the bare dialect) its line end is not escaped. A bare x"y looks like an open
    quote, too, and adds more rows than necessary, which is harmless."""
    for _ in range(MAX_ROW_LINES):
        escaped = lines.endswith((b"\\\n", b"\\\r\n"))
        within_quotes = lines.count(b'"') % 2 == 1
        if not escaped and not within_quotes:
            break
        lines += file.readline()
    return lines


def as_text_file(block: bytes) -> io.StringIO:
    """Rows for the csv module. Bytes that are not UTF-8 survive in them."""
    return io.StringIO(block.decode("utf-8", "surrogateescape"), newline="")


def convert_rows(
    name: str, blocks: Iterable[bytes], line_number: int, quoted: bool, width: int
) -> Iterator[bytes]:
    """The rows of a part as plain CSV, in blocks. `line_number` is that of the first row.

    Rows with more or fewer cells than the header are kept; notices name the first few."""
    irregular = 0
    for block in blocks:
        converted = convert_quoted(block) if quoted else convert_bare(block, width)
        for line, cells in find_irregular_rows(converted, width):
            irregular += 1
            if irregular <= MAX_NAMED_ROWS:
                text = "%s, line %d: %d cells instead of %d"
                log.warning(text, name, line_number + line, cells, width)
        line_number += block.count(b"\n")
        yield converted
    if irregular > MAX_NAMED_ROWS:
        log.warning("%s: %d irregular rows in total", name, irregular)


def convert_quoted(block: bytes) -> bytes:
    r"""Rows of the quoted dialect as plain CSV: "a","\N","b" becomes "a","","b"."""
    # A longer cell can hold the same four bytes: "\N""x" is the text \N"x, and "x""\N" is x"\N. If
    # the block may have such a cell, only whole cells are emptied.
    if rb'""\N' in block or rb'\N""' in block:
        return QUOTED_MISSING.sub(rb'\1""', block)
    return block.replace(rb'"\N"', b'""')


def convert_bare(block: bytes, width: int) -> bytes:
    r"""Rows of the bare dialect as plain CSV: a,\N,x\,y becomes a,,"x,y"."""
    simple = block
    # Each twice, because neighbors share a comma: ,\N,\N, becomes ,,\N, in the first pass.
    for missing in (rb",\\N,", rb",\\N,", rb",\N,", rb",\N,"):
        if BACKSLASH in simple:
            simple = simple.replace(missing, b",,")
    if BACKSLASH not in simple and b'"' not in simple:
        return simple
    return convert_bare_slowly(block, width)  # not `simple`: it may have lost text, as in a\,\\N,


def convert_bare_slowly(block: bytes, width: int) -> bytes:
    """The same for any rows of the bare dialect, with the csv module."""
    if is_plain_csv(block, width):
        if rb"\N" not in block:
            return block
        rows = csv.reader(as_text_file(block))  # leaves backslashes as they are
        missing = [r"\N", r"\\N"]
    else:
        # With an escapechar, the csv module reads \N as N. So empty those cells first. It reads \\N
        # as \N, which is emptied below.
        block = BARE_MISSING.sub(rb"\1", block)
        rows = csv.reader(as_text_file(block), quoting=csv.QUOTE_NONE, escapechar="\\")
        missing = [r"\N"]
    output = io.StringIO(newline="")
    if b"\r\n" in block:
        writer = csv.writer(output, lineterminator="\r\n")
    elif b"\r" in block:  # in a cell, which csv.writer would not quote
        writer = csv.writer(output, lineterminator="\n", quoting=csv.QUOTE_ALL)
    else:
        writer = csv.writer(output, lineterminator="\n")
    for cells in rows:
        writer.writerow(["" if cell in missing else cell for cell in cells])
    return output.getvalue().encode("utf-8", "surrogateescape")


def is_plain_csv(block: bytes, width: int) -> bool:
    """Whether a block of a bare part is plain CSV, with quotes where needed. Most programs write
    CSV that way, so CircleCI may switch to it, too."""
    has_quoted_cell = block.startswith(b'"') or b',"' in block or b'\n"' in block
    if not has_quoted_cell:
        return False
    try:
        for cells in csv.reader(as_text_file(block), strict=True):
            if len(cells) != width:
                return False
    except csv.Error:
        return False
    return True


def find_irregular_rows(block: bytes, width: int) -> Iterator[tuple[int, int]]:
    """The line (counted from 0) and the number of cells of each row in a block of plain CSV that
    does not have `width` cells."""
    # If each line has width - 1 separators, as usual, there is no such row. (This misses one that
    # lacks a cell and has the three characters "," in a name. The summary still counts it.)
    separator = b'","' if b'"' in block else b","
    if {line.count(separator) for line in block.splitlines()} == {width - 1}:
        return
    line = 0
    reader = csv.reader(as_text_file(block))
    for cells in reader:
        if len(cells) != width:
            yield line, len(cells)
        line = reader.line_num  # where the next row starts


# --- Summary, from the finished report ---

LABELS = ("ORGANIZATION_ID", "ORGANIZATION_NAME", "PROJECT_ID", "PROJECT_NAME")
TOTAL = "TOTAL_CREDITS"
# The monthly charge for an active user: 25,000 credits (CircleCI's billing FAQ). CircleCI books it
# to a single job run, the user's first of the month, so it says nothing about that run's project.
# TOTAL_CREDITS includes it.
SEATS = "USER_CREDITS"
NUMBER = re.compile(rb"-?[0-9]+(\.[0-9]+)?")
TABLE_LINE = "{:>15}{:>8}  {:20}{:>13}  {}"  # names come last, so their widths do not matter
BAR_WIDTH = 20
MAX_PROJECTS = 10


@dataclass
class TableRow:
    name: str = ""
    rows: int = 0  # rows of the report
    credits: Decimal = Decimal(0)


class Usage:
    """The totals of a report. Its cells are bytes, in which quotes are still doubled."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.organizations: dict[bytes, TableRow] = defaultdict(TableRow)  # by ID
        self.projects: dict[tuple[bytes, bytes], TableRow] = defaultdict(TableRow)  # by both IDs
        self.kinds = [TableRow(name) for name in columns if name.endswith("_CREDITS")]
        self.rows = 0
        self.irregular_rows = 0
        self.not_numbers = 0
        self.missing_columns = [name for name in (*LABELS, TOTAL) if name not in columns]
        places = []
        for name in (*LABELS, *[kind.name for kind in self.kinds]):
            # A missing column is at -1, where add() puts an empty cell.
            places.append(columns.index(name) if name in columns else -1)
        self.pick = itemgetter(*places)

    def add(self, cells: Sequence[bytes]) -> None:
        """Count a row of the report."""
        picked = self.pick([*cells, b""])
        organization_id, organization_name, project_id, project_name, *credits = picked
        organization = self.organizations[organization_id or organization_name]
        project = self.projects[organization_id, project_id or project_name]
        if organization.rows == 0:
            organization.name = cell_text(organization_name or organization_id)
        if project.rows == 0:
            project.name = f"{cell_text(project_name or project_id)} ({organization.name})"
        organization.rows += 1
        project.rows += 1
        for kind, cell in zip(self.kinds, credits):
            if cell in (b"0", b""):
                continue
            number = parse_credits(cell)
            if number is None:
                self.not_numbers += 1
                continue
            kind.rows += 1
            kind.credits += number
            if kind.name == TOTAL:
                organization.credits += number
                project.credits += number
            if kind.name == SEATS:
                project.credits -= number  # TOTAL_CREDITS includes them.


def cell_text(cell: bytes) -> str:
    return cell.replace(b'""', b'"').decode("utf-8", "replace")


@functools.lru_cache(10_000)
def parse_credits(cell: bytes) -> Decimal | None:
    """The exact number, or None if it is not one."""
    if not NUMBER.fullmatch(cell):
        return None
    return Decimal(cell.decode())


def split_rows(block: bytes, width: int) -> list[list[bytes]]:
    """The cells of all rows of a block of plain CSV, with quotes still doubled.

    Rows of bare cells are split at commas, rows of quoted cells at ",". If any other row is among
    them, the csv module reads the block, which takes three times as long."""
    rows = []
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    text = block.removesuffix(b"\n")
    if b'"' not in text:
        rows = [line.split(b",") for line in text.split(b"\n")]
    elif text.startswith(b'"') and text.endswith(b'"'):
        lines = text[1:-1].split(b'"\n"')
        rows = [line.split(b'","') for line in lines]
    widths = {len(cells) for cells in rows}
    if widths == {width} and all_are_doubled(text, rows, width):
        return rows
    rows = []
    for row in csv.reader(as_text_file(block)):
        cells = [cell.replace('"', '""') for cell in row]
        rows.append([cell.encode("utf-8", "surrogateescape") for cell in cells])
    return rows


def all_are_doubled(text: bytes, rows: Sequence[Sequence[bytes]], width: int) -> bool:
    """Whether all quotes in cells are doubled: then `text` was split in the right places. A cell
    with the text a","b is written "a"",""b". A split at "," leaves a single quote in each half."""
    quotes_in_cells = text.count(b'"') - 2 * width * len(rows)  # Each cell has 2 around it.
    if quotes_in_cells <= 0:
        return True
    contents = b",".join([b",".join(cells) for cells in rows])
    return 2 * contents.count(b'""') == quotes_in_cells


def count_usage(report: Path) -> Usage:
    """Add up a report in plain CSV. Finds columns by name. Raises csv.Error if it is not CSV."""
    with open(report, "rb") as file:
        columns = [name.upper() for name in parse_first_row(file.readline(), 0)]
        usage = Usage(columns)
        for block in read_blocks(file):
            for cells in split_rows(block, len(columns)):
                usage.rows += 1
                if len(cells) == len(columns):
                    usage.add(cells)
                else:
                    usage.irregular_rows += 1
    return usage


def show_table(
    title: str, table: Iterable[TableRow], limit: int | None = None, with_total: bool = False
) -> None:
    """Show table rows, the largest first, with their shares of the grand total."""
    ranked = sorted(table, key=lambda row: (-row.credits, row.name))
    total = TableRow("Total")
    for row in ranked:
        total.rows += row.rows
        total.credits += row.credits
    shown = ranked[:limit]
    if with_total:
        shown.append(total)
    log.info(TABLE_LINE.format("CREDITS", "SHARE", "", "ROWS", title))
    for row in shown:
        share = row.credits / (total.credits or 1)
        bar = "#" * round(share * BAR_WIDTH)
        if row is total:
            bar = ""
        credits = f"{row.credits.normalize():,f}"  # without zeros at the end
        name = clean(row.name)
        log.info(TABLE_LINE.format(credits, f"{share:.1%}", bar, f"{row.rows:,}", name))


def show_problems(usage: Usage) -> None:
    """Say what the summary does not count, if anything."""
    problems = [f"no column {name}" for name in usage.missing_columns]
    if usage.irregular_rows:
        problems.append(f"rows with the wrong number of cells: {usage.irregular_rows}")
    if usage.not_numbers:
        problems.append(f"credit cells that are not numbers: {usage.not_numbers}")
    if problems:
        log.warning("The report is complete, but its summary is not (%s)", ", ".join(problems))


def show_summary(report: Path, requested: Mapping[str, str], started: float) -> None:
    """Show the credits by organization, kind, and project, then the size of the report and the
    time since `started` (Unix seconds). `requested` has the organizations' names by ID."""
    usage = count_usage(report)
    if "ORGANIZATION_ID" not in usage.missing_columns:
        for organization_id, name in requested.items():
            unused = TableRow(f"{name or organization_id} (no usage)")
            usage.organizations.setdefault(organization_id.encode(), unused)
    has_total = TOTAL not in usage.missing_columns
    if has_total:
        log.info("")
        show_table("ORGANIZATION", usage.organizations.values(), with_total=True)
    kinds = [row for row in usage.kinds if row.credits]
    log.info("")
    show_table("KIND", [row for row in kinds if row.name != TOTAL])
    if has_total:
        log.info("")
        if SEATS in [row.name for row in kinds]:
            log.info("Credits by project, without %s (25,000 per active user per month):", SEATS)
        show_table("PROJECT", usage.projects.values(), MAX_PROJECTS)
    show_problems(usage)
    size = report.stat().st_size / 1_000_000
    duration = format_duration(time.time() - started)
    log.info("")
    log.info("%s rows, %.1f MB in %s", f"{usage.rows:,}", size, duration)


# --- The run ---


def find_or_request_job(settings: Settings, body: dict[str, Any], folder: Path) -> Job:
    """The job of an earlier run, or of --job-id, or a new one. Its ID is on disk."""
    job = load_job(folder)
    if job is not None:
        log.info("Resuming export job %s", job.job_id)
        return job
    for part in folder.glob("part-*"):  # left if a run was killed after it removed job.json
        part.unlink()
    if settings.job_id:
        # Its age is unknown. Assume 15 seconds, so that the first check is due at once.
        job = Job(settings.job_id, time.time() - CHECK_AGES[0])
        save_job(folder, job)
        return job
    return request_job(settings, body, folder)


def show_next_request(settings: Settings, body: dict[str, Any], folder: Path) -> None:
    """For a dry run: what the next run does about the export."""
    job = load_job(folder)
    job_id = job.job_id if job else settings.job_id
    if job_id:
        log.info("Dry run. The next request: GET %s/%s", settings.jobs_path, job_id)
    else:
        log.info("Dry run. The next request: POST %s", settings.jobs_path)
        log.info("%s", json.dumps(body))


def publish_report(merged: Path, settings: Settings) -> Path:
    """Give the merged file its final name, which no file has yet. Returns its path."""
    label = settings.job_id
    if settings.window:
        start, end = settings.window
        label = f"{start.date()}_{end.date()}"
    while True:
        report = settings.output / f"all_orgs_{datetime.now():%Y%m%d_%H%M%S}_{label}.csv"
        if not report.exists():
            break
        time.sleep(1)  # until the name changes
    os.rename(merged, report)
    flush_folder(settings.output)
    return report


def run(args: argparse.Namespace) -> None:
    """The steps of a run. Raises ReportError, or OSError for file errors."""
    started = time.time()
    settings = load_settings(args)
    log.filters = [SecretFilter(settings.token)]
    if settings.primary_id is None:
        list_choices(settings)
    owner = retry(call_api, settings, "GET", "/api/v2/me", parse_owner)
    log.info("Signed in as %s", owner)
    organizations = {}
    if not settings.job_id:
        organizations = find_organizations(settings)
    show_request(settings, organizations)
    body = request_body(settings, organizations)
    folder = export_folder(settings, organizations)
    if args.dry_run:
        show_next_request(settings, body, folder)
        return
    with hold_folder(folder):
        job = find_or_request_job(settings, body, folder)
        log.info("This can take up to 4 hours. If it is interrupted, the same command resumes it.")
        links = wait_for_links(settings, job)
        parts = download_parts(links, folder)
        log.log(LIVE, "Merging %d parts", len(parts))
        merge_parts(parts, folder / MERGED_FILE, args.raw)
        ctrl_c_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the path is printed
        report = publish_report(folder / MERGED_FILE, settings)
        (folder / JOB_FILE).unlink()  # so that hold_folder() removes the folder
    log.info("The report is complete:")
    sys.stdout.buffer.write(os.fsencode(f"{report}\n"))  # whatever the encoding of stdout
    sys.stdout.flush()
    if args.quiet or args.raw:
        return
    try:
        signal.signal(signal.SIGINT, ctrl_c_handler)
        show_summary(report, organizations, started)
    except KeyboardInterrupt:
        log.info("The summary was interrupted. The report is complete.")
    except Exception as error:
        log.warning("No summary: %s. The report is complete.", clean(error))


RESUME_HINT = "An export job that has started is kept: fix this, and run the same command again."


def main(argv: Sequence[str] | None = None) -> int:
    """Run once and turn failures into a message and an exit code."""
    args = parse_arguments(argv)
    level = TICK  # all but debug messages
    if args.verbose:
        level = logging.DEBUG
    if args.quiet:
        level = logging.ERROR
    log.handlers = [Console(level)]
    log.setLevel(logging.DEBUG)
    try:
        run(args)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        log.critical("Interrupted. Run the same command to resume.")
        return 130
    except ReportError as error:
        log.error("%s", f"{error} {error.advice}".strip())
        return error.exit_code
    except OSError as error:
        disk_full = error.errno in DISK_FULL
        log.error("%s. %s", clean(error), RESUME_HINT)
        return 75 if disk_full else 1
    except Exception as error:
        log.error("Unexpected error: %s. %s", clean(repr(error)), RESUME_HINT)
        log.debug("%s", traceback.format_exc())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
