#!/usr/bin/env python3
"""Write the CircleCI usage of all organizations on a plan to one CSV file.

A run signs in, finds the organizations that share the plan, requests one export
for all of them, waits for it, downloads its parts, merges them, publishes the
report, prints its path to stdout, and shows a summary on stderr.

Exports are scarce (10 an hour) and take up to 4 hours, so the job ID is saved
to disk at once. If a run is interrupted, run the same command to resume.

Exit codes: 0 succeeded; 1 failed; 2 invalid setting; 3 no usage in the window;
75 not finished, run the same command again; 130, 143, or 129 interrupted by
Ctrl-C, SIGTERM, or SIGHUP.
"""

from __future__ import annotations  # SyntaxError? usage_report.py needs Python 3.9 or newer.

import os
import signal
import sys

SIGNALS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]
# Signals that are ignored at the start (nohup does that) stay ignored.
SIGNALS = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
if __name__ == "__main__":  # The imports below take a while. Ctrl-C must not show a traceback.
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: os._exit(128 + number))

import shlex

SETUP = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt"
SETUP = f"Run: cd {shlex.quote(os.path.dirname(os.path.abspath(__file__)))} && {SETUP}"
if sys.version_info < (3, 9):
    sys.exit(f"usage_report.py needs Python 3.9 or newer. Install a newer Python first. {SETUP}")

import argparse
import calendar
import concurrent.futures
import contextlib
import csv
import difflib
import errno
import gzip
import hashlib
import io
import json
import logging
import re
import time
import traceback
import uuid
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from functools import lru_cache, partial
from itertools import chain, count, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from unicodedata import combining, east_asian_width

warnings.filterwarnings("ignore", module="urllib3")  # It warns about macOS Python's old SSL.

try:
    import requests
    import urllib3
    from dotenv.parser import parse_stream
    from requests.adapters import HTTPAdapter
    from urllib3.exceptions import HTTPError, InvalidHeader
except ImportError as error:
    sys.exit(f"{error}. Use .venv/bin/python to run this script. Not set up yet? {SETUP}")

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__version__ = "2.1.0"
T = TypeVar("T")

# --- Facts about the Usage API (from CircleCI's OpenAPI description unless noted otherwise) ---

MAX_WINDOW_DAYS = 32
HISTORY_MONTHS = 13
GETS_PER_HOUR = 10  # per organization; POSTs have the same limit
QUERY_LIMIT = 4 * 3600  # seconds an export may take
# Usage is refreshed "daily, through the previous day" (CircleCI's changelog). The hour is a guess.
REFRESH_HOURS = 6  # after midnight UTC
ID_PATTERN = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
ISO = "%Y-%m-%dT%H:%M:%SZ"  # times in UTC
LINK_PATTERN = r"https?://[A-Za-z0-9.-]+(:[0-9]+)?/[!-~]*"

# --- This script's choices (in seconds, bytes, or characters) ---

HOUR = 3600 + 15  # an hour on CircleCI's clock, with a margin for network delays
PATIENCE = QUERY_LIMIT + 15 * 60
FIRST_POLL = 15
POLL_INTERVAL = HOUR / GETS_PER_HOUR  # after the first hour
RETRY_PAUSES = (1, 2, 4, 8, 16)
TIMEOUTS = (10, 60)  # to connect, and between two reads
ANSWER_SECONDS = 120  # for an API response, or the headers of a download
ANSWER_BYTES = 10_000_000
READ_BYTES, READ_SECONDS = 60_000, 60  # A download slower than 1 kB/s is aborted.
PARALLEL_DOWNLOADS = 6
BLOCK = 1 << 20
MAX_PART = 10_000_000_000  # as downloaded; real parts have up to 350 MB of CSV
MAX_ROW = 1 << 20
MAX_TEXT = 300  # characters shown of external text
MAX_LISTED = 10  # organizations or projects

FAILED, INVALID, NO_USAGE, UNFINISHED = 1, 2, 3, 75  # exit codes
TEMPORARY = {408, 429, *range(500, 1000)}  # HTTP statuses after which a retry may help
PLACEHOLDER = "your-personal-api-token"  # CIRCLE_TOKEN in .env.example
SCRIPT_FOLDER = Path(__file__).resolve().parent
csv.field_size_limit(MAX_ROW)


# --- Errors ---


class ReportError(Exception):
    """Ends the run. Its text says what happened, why, and what to do next. `sent`: the request may
    have reached the server. `wait`: seconds until the rate limit allows the next request."""

    def __init__(
        self, text: str, code: int = FAILED, *, status: int = 0, sent: bool = True, wait: Any = None
    ) -> None:
        super().__init__(text)
        self.code, self.status, self.sent, self.wait = code, status, sent, wait


class RetryableError(ReportError):
    """A retry may help."""


class NothingToCollect(ReportError):
    """The export failed, has no usage, or does not exist."""


def require(valid: object, text: str) -> None:
    """Raise ReportError for an invalid setting unless `valid` is true."""
    if not valid:
        raise ReportError(text, INVALID)


# --- Text for users ---

SECRETS: set[str] = set()  # the token, once it is known


def redact(text: str) -> str:
    """Mask the token, the query part of URLs, and control characters other than newlines."""
    for secret in SECRETS:
        text = text.replace(secret, "[token]")
    query = r"(?i)(\?(?=[^\s?]*=)|(?:signature|credential|token|sig)=)\S+"
    text = re.sub(query, r"\1[removed]", text)
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def clean(text: object) -> str:
    """External text on one line, redacted and cut to MAX_TEXT characters."""
    line = redact(" ".join(str(text).split()))
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 1] + "\u2026"


def format_duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_size(size: float) -> str:
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB") if size >= 1e5 else (1e3, "kB")
    return f"{size / unit:,.1f} {name}"


def display_width(text: str) -> int:
    """Columns on a terminal: two for East Asian characters and emoji, none for accents."""
    return sum(1 + (east_asian_width(c) in "WF") for c in text if not combining(c))


def fit(text: str, width: int, right: bool = False) -> str:
    """The text, shortened or padded to a width in columns."""
    while display_width(text) > max(width, 1):
        text = text[:-2] + "\u2026"
    padding = " " * (width - display_width(text))
    return padding + text if right else text + padding


def format_table(rows: Sequence[Sequence[str]], name_columns: int, width: int) -> str:
    """Aligned text. Names come first: they are left-aligned, and shortened to fit."""
    widths = [max(map(display_width, column)) for column in zip(*rows)]
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths[:name_columns]) > 12:
        widths[widths.index(max(widths[:name_columns]))] -= 1
    right = [column >= name_columns for column in range(len(widths))]
    return "\n".join("  ".join(map(fit, row, widths, right)).rstrip() for row in rows)


# --- Console: progress, notices, and errors on stderr ---

log = logging.getLogger("usage_report")
LOG_WIDTH = 1000  # columns, where there is no terminal
LIVE, STEP = 15, 16  # log levels of the live line; LIVE is shown only on a terminal
TABLE = 21  # log level of a table, which begins with column titles
STYLES = {LIVE: ("2", ""), STEP: ("2", ""), TABLE: ("1", "")}  # color code and prefix by level
STYLES.update({logging.WARNING: ("", "notice: "), logging.ERROR: ("31", "error: ")})


class Console(logging.Handler):
    """Writes to stderr: with color and a live line on a terminal, with UTC timestamps elsewhere."""

    def __init__(self, quiet: bool, verbose: bool) -> None:
        super().__init__(logging.ERROR if quiet else logging.DEBUG if verbose else LIVE)
        self.stream = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  (2>&- leaves no stderr)
        # Old consoles show escape codes as text.
        escapes = sys.platform != "win32" or "WT_SESSION" in os.environ
        self.terminal = escapes and self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.color = self.terminal and not os.environ.get("NO_COLOR")
        self.live = False  # whether a live line is on the screen

    def width(self) -> int:
        """Columns of the terminal; LOG_WIDTH if stderr is not one (stdout may be captured)."""
        with contextlib.suppress(OSError):
            if self.terminal:
                return os.get_terminal_size(self.stream.fileno()).columns or 80
        return LOG_WIDTH

    def emit(self, record: logging.LogRecord) -> None:
        if self.terminal or record.levelno != LIVE:
            with contextlib.suppress(OSError, ValueError):  # A broken stderr is no reason to fail.
                self.stream.write(self.render(record.levelno, record.getMessage()))
                self.stream.flush()

    def render(self, level: int, text: str) -> str:
        """What to write for a message, with secrets and control characters masked."""
        erase = "\r\x1b[K" if self.live else ""
        self.live = self.terminal and level in (LIVE, STEP)
        code, prefix = STYLES.get(level, ("", ""))
        first, *rest = redact(prefix + text).split("\n")
        first = fit(first, self.width() - 1).rstrip() if self.live else first
        first = f"\x1b[{code}m{first}\x1b[m" if code and self.color else first
        if self.live:
            return f"\r{first}\x1b[K"
        gap = "\n" if self.terminal and level == TABLE else ""
        stamp = "" if self.terminal else time.strftime(f"{ISO} ", time.gmtime(time.time()))
        return erase + gap + "".join(f"{stamp}{line}\n" for line in [first, *rest])


# --- Signals ---

AGAIN = "Run the same command again."
COLLECT = "CircleCI keeps working on the export. Run the same command to collect it."
MAY_HAVE_STARTED = "CircleCI may have started an export. Run again only if you can afford another."


@dataclass
class Interruption:
    """Ctrl-C, SIGTERM, and SIGHUP end the process at once, with a message. What the next run needs
    is already on disk. No exception is raised, because a library could swallow it."""

    console: Console
    folder: Path | None = None  # of the export, once this run has locked it
    advice: str = AGAIN  # after an interruption or a failure
    held: bool = False  # whether signals have to wait
    received: int = 0  # the first signal
    succeeded: bool = False  # whether the report is published and its path is printed

    def handle(self, number: int, frame: object) -> None:
        self.received = self.received or number
        if not self.held:
            self.exit()

    def exit(self) -> None:
        self.held = True  # Further signals change nothing.
        if self.succeeded:
            os._exit(0)
        if self.folder:
            tidy_folder(self.folder)
        with contextlib.suppress(OSError):  # skip logging: the interrupted code may hold its locks
            line = self.console.render(logging.CRITICAL, f"Interrupted. {self.advice}")
            os.write(self.console.stream.fileno(), line.encode())
        os._exit(128 + self.received)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Delay signals until the block is done."""
        self.held = True
        try:
            yield
        finally:
            self.held = False
            if self.received:
                self.exit()


# --- Settings: a flag, else the environment, else .env ---

PERIODS = "yesterday, last-7-days, this-month, last-month, or YYYY-MM"
PERIOD_PATTERN = "yesterday|last-7-days|this-month|last-month|20[0-9]{2}-(0[1-9]|1[0-2])"
EXAMPLE = "b9291e0d-a11e-41fb-8517-c545388b5953"
OWNER_ID = f"{EXAMPLE}; leave it empty to list your organizations"
ID_LIST_PATTERN = rf"({ID_PATTERN}|\s|,)*"
HTTPS_PATTERN = r"https://[a-z0-9-]{1,63}(\.[a-z0-9-]{1,63})*"
LOOPBACK_PATTERN = r"http://(localhost|127(\.[0-9]{1,3}){3}|\[::1\])"
URL_PATTERN = rf"({HTTPS_PATTERN}|{LOOPBACK_PATTERN})(:[1-6]?[0-9]{{1,4}})?/?"
VARIABLES = {  # pattern, description, and example
    "CIRCLE_TOKEN": ("[!-~]+", "a personal API token", "CCIPAT_..."),
    "PRIMARY_ORG_ID": (ID_PATTERN, "the UUID of the organization that owns the plan", OWNER_ID),
    "START_DATE": (".*", "the first day, unless --start or --period is used", ""),
    "END_DATE": (".*", "the last day, unless --end or --period is used", ""),
    "SHARED_ORG_IDS": (ID_LIST_PATTERN, "UUIDs of organizations, separated by commas", EXAMPLE),
    "CIRCLECI_BASE_URL": (URL_PATTERN, "an https:// URL without a path", "https://circleci.com"),
}


class Settings(NamedTuple):
    token: str
    token_source: str  # "the environment" or the path of .env
    base_url: str
    output: Path
    primary: str  # organization ID; empty: list the choices
    shared: list[str]  # organization IDs; empty: ask the API
    job_id: str  # of an existing export; empty: request one
    start: str = ""  # in ISO format, which sorts by time; empty with a job ID
    end: str = ""  # as requested from CircleCI: not in the future
    wanted_end: str = ""  # as set, even if it is in the future

    @property
    def jobs_path(self) -> str:
        """The URL path of the organization's export jobs."""
        return f"/api/v2/organizations/{self.primary}/usage_export_job"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags. Exits with 0 after --help and --version, with 2 if a flag is invalid."""
    texts = [f"  {name}: {text}" for name, (_, text, _) in VARIABLES.items()]
    parser = argparse.ArgumentParser(
        prog="usage_report.py",
        usage="%(prog)s [flags]",
        description=__doc__,
        epilog="\n".join(["Settings, from the environment or .env:", *texts]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flag, text in (
        ("--start", "YYYY-MM-DD or YYYY-MM-DDThh:mm:ssZ, in UTC"),
        ("--end", "same format; a date includes the whole day"),
        ("--period", f"{PERIODS} (whole UTC days)"),
        ("--output-dir", "folder for reports; default: usage_reports next to the script"),
        ("--env-file", "settings file; default: .env next to the script"),
        ("--job-id", "collect an existing export instead of requesting one"),
    ):
        parser.add_argument(flag, type=str.strip, default="", help=text)
    parser.add_argument("--plain", action="store_true", help="write plain CSV, for spreadsheets")
    parser.add_argument("--dry-run", action="store_true", help="show the request and stop")
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-q", "--quiet", action="store_true", help="print only the path, or errors")
    volume.add_argument("-v", "--verbose", action="store_true", help="show each API request, too")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # Values are not shown: one may be a misplaced token.
        flag, word = unknown[0].partition("=")[0], unknown[0].lstrip("-")
        shown = f" {flag}" if re.fullmatch("--[a-z0-9-]+", flag) else ""
        flags = ["--" + name.replace("_", "-") for name in vars(args)]
        similar = difflib.get_close_matches(flag, flags, 1, 0.8)
        similar = [f"--period {word}"] if re.fullmatch(PERIOD_PATTERN, word) else similar
        hint = f"Did you mean {similar[0]}?" if similar else "See --help."
        parser.error(f"unknown argument{shown}. {hint}")
    return args


def read_variables(path: str) -> tuple[dict[str, str], str]:
    """The values of VARIABLES, and where the token comes from. An empty path means .env."""
    env_file, content = Path(path or SCRIPT_FOLDER / ".env").absolute(), ""
    in_file: dict[str | None, str | None] = {}
    try:
        if path or env_file.exists():
            content = env_file.read_text("utf-8-sig")  # Some editors write a BOM.
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "it is not UTF-8")
        hint = "Check the file, or use --env-file with another one."
        raise ReportError(f"Cannot read {env_file}: {reason}. {hint}", INVALID) from None
    hint = "Put each setting on one line, such as CIRCLE_TOKEN=CCIPAT_..."
    for entry in parse_stream(io.StringIO(content)):
        # Otherwise, a list of organizations on two lines would lose those on the second line.
        is_setting = entry.value is not None or re.fullmatch(r"\w*", entry.key or "")
        valid = is_setting and not entry.error
        require(valid, f"{env_file} is invalid near line {entry.original.line}. {hint}")
        in_file[entry.key] = entry.value
    values = {name: os.environ.get(name, "").strip() for name in VARIABLES}
    source = "the environment" if values["CIRCLE_TOKEN"] else str(env_file)
    values = {name: value or (in_file.get(name) or "").strip() for name, value in values.items()}
    return values, source


def load_settings(args: argparse.Namespace) -> Settings:
    """All settings, validated; creates the output folder. Raises ReportError or OSError."""
    values, source = read_variables(args.env_file)
    token, job_id = values["CIRCLE_TOKEN"], args.job_id.lower()
    hint = "Create a token (CCIPAT_...) in CircleCI under User Settings > Personal API Tokens."
    require(token not in ("", PLACEHOLDER), f"CIRCLE_TOKEN is not set in {source}. {hint}")
    SECRETS.add(token)
    for name, (pattern, text, example) in VARIABLES.items():
        valid = re.fullmatch(f"({pattern})?", values[name], re.IGNORECASE | re.DOTALL)
        require(valid, f"{name} must be {text}, such as {example}.")  # The value may be a token.
    id_valid = re.fullmatch(f"({ID_PATTERN})?", job_id)
    require(id_valid, f"--job-id must be a UUID, such as {EXAMPLE}.")
    output = Path(args.output_dir or SCRIPT_FOLDER / "usage_reports").absolute()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
    writable = os.path.isdir(output) and os.access(output, os.W_OK | os.X_OK)
    hint = "Use --output-dir with another folder, such as ./reports."
    require(writable, f"Cannot write to {output}. {hint}")
    primary = values["PRIMARY_ORG_ID"].lower()
    base_url = (values["CIRCLECI_BASE_URL"] or "https://circleci.com").lower().rstrip("/")
    shared = re.findall(ID_PATTERN, values["SHARED_ORG_IDS"].lower())
    window: tuple[str, ...] = ()
    if args.start or args.end or args.period or (primary and not job_id):
        window = choose_window(args, values)  # with --job-id, only to validate the flags
    window = () if job_id else window
    return Settings(token, source, base_url, output, primary, shared, job_id, *window)


def shift_month(day: date, months: int) -> date:
    """The same day that many months later (earlier if negative), or that month's last day."""
    year, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    return date(year, month + 1, min(day.day, calendar.monthrange(year, month + 1)[1]))


def period_days(period: str, today: date) -> tuple[date, date]:
    """First and last day of a --period: whole UTC days, none later than yesterday."""
    valid = re.fullmatch(PERIOD_PATTERN, period)
    require(valid, f"--period must be {PERIODS}, not {clean(period)}.")
    yesterday, days = today - timedelta(days=1), {"yesterday": 1, "last-7-days": 7}
    if period in days:
        return today - timedelta(days[period]), yesterday
    months = {"this-month": f"{today:%Y-%m}", "last-month": f"{shift_month(today, -1):%Y-%m}"}
    first = date.fromisoformat(f"{months.get(period, period)}-01")
    last = min(yesterday, shift_month(first, 1) - timedelta(days=1))
    require(first <= last, f"--period {period} has no complete day yet. Use --period last-month.")
    return first, last


def parse_time(name: str, value: str, time_of_day: str, hint: str) -> datetime:
    """A time in UTC; a plain date gets `time_of_day`. `hint`: a window that is valid today."""
    require(value, f"{name} is not set. {hint}")
    text = value if "T" in value else value + time_of_day
    with contextlib.suppress(ValueError):
        moment = datetime.strptime(text, ISO).replace(tzinfo=timezone.utc)
        if moment.strftime(ISO) == text:  # strptime also accepts 2026-9-1.
            return moment
    text = f"{name} {clean(value)} is not a valid date (YYYY-MM-DD or YYYY-MM-DDThh:mm:ssZ)."
    raise ReportError(f"{text} {hint}", INVALID)


def choose_window(args: argparse.Namespace, values: Mapping[str, str]) -> tuple[str, ...]:
    """Start, end, and wanted end: of --period, or as set. A future end becomes one minute ago."""
    now = datetime.fromtimestamp(int(time.time()), timezone.utc)
    days = period_days("last-month", now.date())
    hint = f"Use --period last-month, or --start {days[0]} --end {days[1]}."
    start, end = args.start or values["START_DATE"], args.end or values["END_DATE"]
    start_name = "--start" if args.start else "START_DATE"
    end_name = "--end" if args.end else "END_DATE"
    given = f"{start_name} {start} to {end_name} {end}"
    if args.period:
        alone = not args.start and not args.end
        require(alone, f"--period cannot be combined with --start or --end. {hint}")
        start, end = map(str, period_days(args.period, now.date()))
        given = f"--period {args.period}"
    first = parse_time(start_name, start, "T00:00:00Z", hint)
    wanted_end = parse_time(end_name, end, "T23:59:59Z", hint)
    last = wanted_end if wanted_end <= now else now - timedelta(minutes=1)
    oldest, limit = shift_month(now.date(), -HISTORY_MONTHS), timedelta(days=MAX_WINDOW_DAYS)
    require(first < wanted_end, f"{given}: the start must be before the end. {hint}")
    require(first < last, f"{given} starts in the future. {hint}")
    require(first.date() >= oldest, f"{given} is too old: usage goes back to {oldest}. {hint}")
    require(last - first <= limit, f"{given} is longer than {MAX_WINDOW_DAYS} days. {hint}")
    if last < wanted_end:
        log.warning("%s %s is in the future. Using %s.", end_name, end, last.strftime(ISO))
    return tuple(moment.strftime(ISO) for moment in (first, last, wanted_end))


# --- Requests: sent in one place, with limits on time and size ---

# Runs calls that a server can stall. The caller times out; the thread may keep running.
WORKERS = concurrent.futures.ThreadPoolExecutor(100)

# A pattern in the exception, whether the request may have been sent, and the text for the user. A
# request counts as not sent only if there was no connection.
FAILURES = (
    ("Connection (aborted|broken)|^ContentDecoding", True, "connection lost or invalid response"),
    ("^TimeoutError|Read timed out", True, "the response timed out"),
    ("CA certificate bundle", False, "CA bundle not found. Check REQUESTS_CA_BUNDLE"),
    ("for SOCKS", False, "SOCKS support is missing. Set HTTPS_PROXY to an http:// proxy"),
    ("ProxyError.*(NewConn|NameRes|Tunnel)", False, "cannot use the proxy. Check HTTPS_PROXY"),
    ("CERTIFICATE_VERIFY", False, "untrusted certificate. Behind a proxy, set REQUESTS_CA_BUNDLE"),
    ("NameResolution|getaddrinfo", False, "host not found. Check the network"),
    ("NewConnection.*refused", False, "the port is closed. Check CIRCLECI_BASE_URL"),
    ("ConnectTimeout", False, "connecting timed out. Check the network and HTTPS_PROXY"),
    ("NewConnectionError", False, "cannot connect. Check the network"),
    ("", True, "connection lost or invalid response"),
)


def with_timeout(what: str, seconds: float, action: Callable[..., T], *arguments: Any) -> T:
    """What action(*arguments) returns. Raises RetryableError if it fails or takes too long. Omits
    the text of the exception, which can contain a signed URL."""
    try:
        return WORKERS.submit(action, *arguments).result(seconds)
    # http.client raises ValueError for a malformed response.
    except (OSError, HTTPError, concurrent.futures.TimeoutError, ValueError) as error:
        text = f"{type(error).__name__} {error!r} {error}"
        sent, reason = next(row[1:] for row in FAILURES if re.search(row[0], text))
        raise RetryableError(f"{what} failed: {reason}.", UNFINISHED, sent=sent) from None


def send(url: str, token: str = "", body: object = None) -> requests.Response:
    """Send a GET, or a POST if there is a body. Returns the response, with its content unread.
    Uses an adapter, because a session stores cookies, reads ~/.netrc, and parses redirects. Here,
    the session only reads the proxy and CA settings."""
    headers = {"User-Agent": f"circleci-usage-report/{__version__}", "Accept-Encoding": "identity"}
    if token:
        headers["Circle-Token"] = token
    session = requests.Session()
    session.trust_env = url.startswith("https")  # Without TLS, a proxy would see the token.
    options = session.merge_environment_settings(url, {}, True, None, None)
    method = "POST" if body else "GET"
    request = requests.Request(method, url, headers=headers, json=body).prepare()
    return HTTPAdapter().send(request, timeout=TIMEOUTS, **options)  # type: ignore[arg-type]


def rate_limit_seconds(headers: Mapping[str, str]) -> float:
    """How long to wait after a 429: Retry-After, else X-RateLimit-Reset (both from CircleCI's API
    developers' guide), else a tenth of an hour."""
    with contextlib.suppress(InvalidHeader, ValueError, OverflowError):
        return urllib3.Retry().parse_retry_after(headers.get("Retry-After", "")[:40])
    reset = headers.get("X-RateLimit-Reset", "")
    return float(reset) if re.fullmatch("[0-9]{1,5}", reset) else POLL_INTERVAL


def sleep(seconds: float, describe: Callable[[str], str]) -> None:
    """Sleep and show describe(time left). Sleeps at most 1 s at a time, so that time spent
    suspended counts, and setting the clock back adds no delay."""
    while seconds > 0:
        log.log(LIVE, "%s", describe(format_duration(seconds)))
        started, pause = time.time(), min(seconds, 1)
        time.sleep(pause)
        seconds -= max(pause, time.time() - started)


def retry(action: Callable[[], T], pauses: Sequence[float] = RETRY_PAUSES) -> T:
    """What action() returns. Calls it again after each RetryableError until the pauses or PATIENCE
    are used up. Then raises the last error, without its status unless all errors had the same one.
    Waiting for the rate limit does not use up a pause."""
    failures, waited = 0, 0.0
    statuses = set()
    while True:
        try:
            return action()
        except RetryableError as error:
            pause = max(pauses[min(failures, len(pauses) - 1)], error.wait or 0)
            waited += pause
            failures += error.wait is None
            statuses.add(error.status)
            if failures > len(pauses) or waited > PATIENCE:
                if len(statuses) == 1:
                    raise
                # One 404 among other errors does not prove that a job is gone.
                raise RetryableError(str(error), error.code) from None
            when = f" in {format_duration(pause)}" if error.wait is not None else ""
            log.warning("%s Retrying%s.", error, when)
        sleep(pause, "Retrying in {}".format)


def next_step(settings: Settings, status: int) -> str:
    """What to do about an HTTP error; "" if there is nothing special."""
    optional = {"SHARED_ORG_IDS": settings.shared, "--job-id": settings.job_id}
    used = ["PRIMARY_ORG_ID", *(name for name, value in optional.items() if value)]
    steps = {
        400: f"Use at most {MAX_WINDOW_DAYS} days within the last {HISTORY_MONTHS} months.",
        401: f"CIRCLE_TOKEN in {settings.token_source} is invalid or expired. Replace it.",
        403: "Use the token of an organization admin.",
        404: f"Check {' and '.join(used)}. The owner of CIRCLE_TOKEN must have access.",
    }
    return steps.get(status, "")


def call_api(settings: Settings, path: str, parse: Callable[[Any], T], body: object = None) -> T:
    """Send a GET, or a POST if there is a body. Returns parse(JSON of the response). The token goes
    only to the host of base_url. Raises RetryableError (also for unexpected data) or ReportError
    with the HTTP status."""
    url, started = settings.base_url + path, time.time()
    what = f"{'POST' if body else 'GET'} {url}"

    def exchange() -> tuple[requests.Response, bytearray]:
        content = bytearray()
        with send(url, settings.token, body) as response:
            for block in response.iter_content(1 << 14):
                content += block
                if len(content) > ANSWER_BYTES:
                    raise RetryableError(f"{what}: the response is too large.", UNFINISHED)
            return response, content

    response, content = with_timeout(what, ANSWER_SECONDS, exchange)
    status = response.status_code
    log.debug("%s: %d after %.1f s", what, status, time.time() - started)
    answer = None
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(content)
    if 200 <= status < 300:
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            return parse(answer)
        raise RetryableError(f"{what} returned unexpected data. Check for a proxy or login page.")
    message = answer.get("message") if isinstance(answer, dict) else None
    message = clean(message or response.reason or "no message").rstrip(".")
    text = f"{what} failed with {status}: {message}. {next_step(settings, status)}".strip()
    if status in TEMPORARY:
        wait = rate_limit_seconds(response.headers) if status == 429 else None
        raise RetryableError(text, UNFINISHED, sent=status != 429, wait=wait)
    raise ReportError(text, status=status)


def get(settings: Settings, path: str, parse: Callable[[Any], T]) -> T:
    """What call_api() returns for a GET, with retries."""
    return retry(partial(call_api, settings, path, parse))


# --- Organizations ---

ID_TITLE = "ID".ljust(len(EXAMPLE))  # as wide as the IDs below it, which are never shortened


def list_collaborations(settings: Settings) -> list[list[str]]:
    """Name, slug, and ID of each of the token owner's organizations. Skips those without an ID."""

    def parse(answer: Any) -> list[list[str]]:
        keys = ("name", "slug", "id")
        rows = [[clean(entry.get(key) or "-") for key in keys] for entry in answer]
        return [row for row in rows if re.fullmatch(ID_PATTERN, row[2].lower())]

    return get(settings, "/api/v2/me/collaborations", parse)


def primary_question(settings: Settings, width: int) -> str:
    """The text that asks for PRIMARY_ORG_ID and lists the organizations to choose from."""
    rows = list_collaborations(settings)
    if not rows:
        raise ReportError("The owner of CIRCLE_TOKEN has no organizations. Use another token.")
    table = format_table([["NAME", "SLUG", ID_TITLE], *rows], 2, width)
    several = len(rows) > 1
    question = "Which organization owns the plan?" if several else "You have one organization."
    return f"{question} Set PRIMARY_ORG_ID to its ID and run the same command again.\n{table}"


def find_organizations(settings: Settings) -> dict[str, str]:
    """Names by ID of the organizations to report on, the primary first. Raises ReportError for an
    unclear response, because a report on the primary alone could look complete."""

    def parse(answer: Any) -> dict[str, str]:
        if not isinstance(answer["orgs"], list):
            raise TypeError
        return {str(uuid.UUID(org["id"])): clean(org.get("name") or "") for org in answer["orgs"]}

    found = dict.fromkeys(settings.shared, "")
    if not found:
        try:  # an undocumented endpoint, seen in public code
            found = get(settings, f"/private/orgs/{settings.primary}/plan/shares-for", parse)
        except ReportError as error:
            text = f"{error} Workaround: set SHARED_ORG_IDS to the organizations' IDs."
            raise ReportError(text, error.code) from None
        if not found:
            log.info("The plan is not shared. The report covers only the primary organization.")
    return {settings.primary: "", **found}


# --- Files ---

MERGED, STATE, LOCK = "merged.csv", "state.json", "lock"


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A draft file that gets its final name once it is complete and flushed to disk."""
    draft = path.with_name(path.name + ".new")
    try:
        with open(draft, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make a new file name survive a power failure, if the system can do that (Windows cannot)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


# --- The export job: its folder, its state on disk, and its request ---


@dataclass
class Export:
    """An export job. Until the report is published, these values are kept in a hidden folder, next
    to the parts, without the token and without signed URLs."""

    folder: Path
    job_id: str = ""  # "" if there is no job yet
    end: str = ""  # as requested; "" if not known
    requested_at: float | None = None  # Unix seconds; None if not known
    polls: list[float] = field(default_factory=list)  # Unix seconds of this and earlier jobs' GETs
    completed: bool = False  # whether CircleCI has returned download links
    report: str = ""  # the report's name, recorded before it is published
    plain: bool = False  # whether that report is plain CSV

    def save(self) -> None:
        record = {key: value for key, value in vars(self).items() if key != "folder"}
        with new_file(self.folder / STATE) as file:
            file.write(json.dumps(record).encode())

    def age(self) -> str:
        """How long ago the job was requested, as text; "" if not known."""
        if self.requested_at is None:
            return ""
        return f" ({format_duration(time.time() - self.requested_at)})"


def load_export(folder: Path) -> Export:
    """The export of an earlier run, if any. If a value is invalid, only the job ID is used."""
    found = None
    for name in (STATE + ".new", STATE):  # The draft counts if a run was killed while saving it.
        with contextlib.suppress(FileNotFoundError):
            text = (folder / name).read_text("utf-8", errors="replace")
            found = re.search(rf'(?i)"job_id"\s*:\s*"({ID_PATTERN})"', text) or found
    if not found:
        return Export(folder)
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        export = Export(folder, **{**json.loads(found.string), "job_id": found[1].lower()})
        times = [*export.polls, 1 if export.requested_at is None else export.requested_at]
        valid = all(type(at) in (int, float) and 0 < at < time.time() + 86400 for at in times)
        if export.end != "":
            datetime.strptime(export.end, ISO)
        if valid and re.fullmatch(r"(all_orgs_[\w-]{1,200}\.csv)?", export.report):
            return export
    return Export(folder, found[1].lower())


def find_folder(settings: Settings, organizations: Iterable[str]) -> Path:
    """The export's hidden folder. With --job-id, that of the run that requested the job, if any."""
    if settings.job_id:
        for folder in settings.output.glob(".export-*"):
            with contextlib.suppress(OSError):
                if load_export(folder).job_id == settings.job_id:
                    return folder
    key = [settings.base_url, settings.primary, settings.job_id, settings.start]
    text = " ".join([*key, settings.wanted_end, *sorted(organizations)])
    return settings.output / f".export-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def open_folder(folder: Path, interruption: Interruption) -> Iterator[None]:
    """Lock an export's folder for this run. If the run fails without an export, remove it."""
    folder.mkdir(exist_ok=True)
    with open(folder / LOCK, "a+b") as file:
        try:
            if sys.platform == "win32":
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                raise BlockingIOError  # Another run has just removed the folder.
        except (BlockingIOError, PermissionError, FileNotFoundError):
            text = "Another run is working on this export. Wait for it to finish."
            raise ReportError(text) from None
        except OSError as error:
            log.warning("Cannot lock %s (%s). Do not start another run.", file.name, error.strerror)
        interruption.folder = folder
        try:
            yield
        except NothingToCollect:
            interruption.advice = AGAIN
            remove_folder(folder)
            raise
        except BaseException:
            tidy_folder(folder)
            raise
    if sys.platform == "win32":  # Windows cannot remove an open file.
        tidy_folder(folder)


def tidy_folder(folder: Path) -> None:
    """Remove an export's folder if it is readable and holds no export."""
    with contextlib.suppress(OSError):
        if not load_export(folder).job_id:
            remove_folder(folder)


def remove_folder(folder: Path) -> None:
    """Remove an export's folder: the data first, then the state, and the lock last."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: (path.name == LOCK, path.name)):
            path.unlink()
        folder.rmdir()


def resume_export(folder: Path, settings: Settings) -> Export:
    """The export of an earlier run, or of --job-id. If it has no job ID, it must be requested."""
    export = load_export(folder)
    if not export.job_id:
        return Export(folder, settings.job_id)
    if settings.end == settings.wanted_end and "" < export.end < settings.end:
        log.warning("The earlier export ends at %s. Requesting the whole window.", export.end)
        return Export(folder)
    log.info("Resuming export job %s from an earlier run.", export.job_id)
    return export


def request_export(
    settings: Settings, body: Mapping[str, Any], folder: Path, interruption: Interruption
) -> Export:
    """Start an export job and save its ID. A POST with an unknown outcome may have started one, and
    the API does not list exports. So the POST is repeated at most once, except after a 429."""
    interruption.advice = AGAIN
    unsent = Export(folder, end=body["end"], polls=load_export(folder).polls)
    for path in folder.glob("part-*"):  # of the earlier job
        path.unlink()
    unsent.save()  # If the disk is full, fail before an export is spent.

    def post() -> Export:
        with interruption.hold():
            requested_at = time.time()
            try:
                job_id = call_api(settings, settings.jobs_path, parse_job_id, body)
            except RetryableError as error:
                if error.sent:
                    interruption.advice = MAY_HAVE_STARTED
                raise
            interruption.advice = f"Use --job-id {job_id} to collect the export."
            export = replace(unsent, job_id=job_id, requested_at=requested_at)
            export.save()
            interruption.advice = COLLECT
        log.info("CircleCI started export job %s.", export.job_id)
        return export

    return retry(post, pauses=(16,))


def parse_job_id(answer: Any) -> str:
    return str(uuid.UUID(answer["usage_export_job_id"]))


# --- Waiting for the job ---

# In a geometric series, the last wait is at most a fixed share of any job's length. GET n is due
# FIRST_POLL * GROWTH**n after the POST, and GET 10 is due an hour after GET 0.
GROWTH: float = (HOUR / FIRST_POLL + 1) ** (1 / GETS_PER_HOUR)


def next_poll(requested_at: float | None, polls: Sequence[float], completed: bool = False) -> float:
    """When (Unix seconds) the next GET is due: in a geometric series for an hour, then every 6
    minutes. For new links and the first GET of a job of unknown age: as soon as allowed."""
    allowed = polls[-GETS_PER_HOUR] + HOUR if len(polls) >= GETS_PER_HOUR else 0
    if completed or not (requested_at or polls):
        return allowed
    start = requested_at or polls[0] - FIRST_POLL
    elapsed = polls[-1] - start if polls else 0
    geometric, regular = elapsed * GROWTH, max(elapsed, HOUR) + POLL_INTERVAL
    return max(start + max(FIRST_POLL, min(geometric, regular)), allowed)


def parse_job(answer: Any) -> tuple[str, list[str]]:
    """The state and download links of a job. Raises NothingToCollect if it failed."""
    state, links = clean(answer["state"]), answer.get("download_urls") or []
    if not all(re.fullmatch(LINK_PATTERN, link) for link in links):
        raise ValueError
    if state == "failed":
        reason = clean(answer.get("error_reason") or "no reason given").rstrip(".")
        hint = "Try a shorter window (--start, --end) or fewer organizations (SHARED_ORG_IDS)."
        raise NothingToCollect(f"The export failed: {reason}. {hint}")
    return state, links


def poll_job(settings: Settings, export: Export, state: str) -> tuple[str, list[str]]:
    """Send the next GET when it is due. A 404 is retryable, because the job may be very new."""
    now = time.time()
    # How many seconds the clock has been set back since the last request.
    set_back = max([now, *export.polls, export.requested_at or now]) - now
    export.polls = [at - set_back for at in export.polls]
    export.requested_at = export.requested_at and export.requested_at - set_back
    due = next_poll(export.requested_at, export.polls, export.completed)
    sleep(due - now, lambda left: f"Export: {state}{export.age()}. Next check in {left}")
    export.polls.append(time.time())
    export.save()  # before the GET, which counts even if this run is killed before the response
    try:
        return call_api(settings, f"{settings.jobs_path}/{export.job_id}", parse_job)
    except ReportError as error:
        if error.status == 404:
            raise RetryableError(str(error), status=404) from None
        raise
    finally:
        export.polls[-1] = max(due, time.time())  # the latest time CircleCI could have counted it


def wait_for_links(settings: Settings, export: Export) -> list[str]:
    """The download links of the completed job. Raises ReportError if it takes too long or fails."""
    state, empty_answers, now = "requested", 0, time.time()
    seconds_left = max(PATIENCE - (now - (export.requested_at or now)), HOUR)
    while seconds_left > 0:
        started = time.time()
        state, links = retry(partial(poll_job, settings, export, state))
        # If the clock jumps, that counts as an hour at most.
        seconds_left -= min(max(time.time() - started, 0), HOUR)
        log.log(STEP, "Export: %s%s", state, export.age())
        export.completed = state == "completed" and bool(links)
        if export.completed:
            export.save()
            return links
        empty_answers += state == "completed"
        if empty_answers == 3:  # Links can come late (CircleCI support), or there is no usage.
            raise NothingToCollect("The export has no files: no usage in this window.", NO_USAGE)
        if state not in ("created", "processing", "completed"):
            log.warning("The export job has an unknown state: %s. Waiting.", state)
    raise ReportError(f"Export job {export.job_id} is not finished (state: {state}).", UNFINISHED)


# --- Reading parts and rows, whatever their dialect ---

BOM, GZIP = b"\xef\xbb\xbf", b"\x1f\x8b"  # first bytes of a file
DAMAGED_GZIP = (zlib.error, EOFError, gzip.BadGzipFile)
COLUMN_NAME = re.compile(r"\w+( \w+)*", re.ASCII)
ROW_START = re.compile(rb'(\xef\xbb\xbf)?["\\\w][^\x00-\x08\x0e-\x1f]*,')
QUOTED_CELL = re.compile(r'(?:^|(?<!\\),)"')
ESCAPED_CELL = re.compile(r"([^\\,]*(?:\\.[^\\,]*)*),", re.DOTALL)
ESCAPE = re.compile(r"\\(.)", re.DOTALL)


def decompress(file: Any) -> Any:
    """The content without its gzip layers: the file's own, and one that the server may add."""
    for _ in range(2):
        if file.peek(2)[:2] == GZIP:
            file = gzip.GzipFile(fileobj=file, mode="rb")
    return file


def read_lines(file: Any, first: bytes = b"") -> Iterator[str]:
    """`first` and the lines of a binary file, as text. Splits a line that is too long."""
    lines = chain([first] if first else [], iter(partial(file.readline, MAX_ROW), b""))
    return (line.decode("utf-8", "replace") for line in lines)


def read_rows(lines: Iterator[str], columns: int = 0, limit: int = 0) -> Iterator[list[str]]:
    """The cells of each row, or only the first `limit` and the last; a missing value is empty.

    If a cell begins with a quote, the row is quoted: "" is a quote, a backslash is a backslash,
    and \\N is a missing value. In others, \\x is x, and \\N or \\\\N is a missing value. (Seen in
    real exports, which resemble Snowflake's unloads.) Raises csv.Error."""
    for line in lines:
        content = line.removesuffix("\n").removesuffix("\r")
        if not content:
            continue
        quoted = content[0] == '"' or ('"' in content and bool(QUOTED_CELL.search(content)))
        if quoted:
            text, separator = content[1:-1], '","'
            separators = text.count(separator)
            usual = content[0] == content[-1] == '"' and content.count('"') == 2 * separators + 2
        else:  # Backslash and NUL stand for an escaped comma, which does not separate cells.
            text, separator = content.replace("\\,", "\\\0"), ","
            separators = text.count(separator)
            usual = content[-1] != "\\" and "\\\\," not in content
        if usual and limit and separators == columns - 1:  # several times faster
            cells = text.split(separator, limit)
            cells[limit] = text.rpartition(separator)[2]
        else:
            cells = text.split(separator) if usual else split_row(line, lines, quoted)
            if columns not in (0, len(cells)):
                raise csv.Error(f"a row has {len(cells)} cells, but the header has {columns}")
            cells = [*cells[:limit], cells[-1]] if limit else cells
        if "\\" in "".join(cells):  # A single search is faster.
            cells = [unescape(cell, quoted) if "\\" in cell else cell for cell in cells]
        yield cells


@lru_cache(1 << 8)
def unescape(cell: str, quoted: bool) -> str:
    """A cell without its escapes; empty if the value is missing."""
    if cell == r"\N" or (cell == r"\\N" and not quoted):
        return ""
    return cell if quoted else ESCAPE.sub(r"\1", cell.replace("\\\0", "\\,"))


def split_row(line: str, more: Iterator[str], quoted: bool) -> list[str]:
    """The cells of any row; backslashes stay. Takes more lines if a quote or an escape is open."""
    if quoted:
        return next(csv.reader(chain([line], more), strict=True))
    lines, size = [line], len(line)
    while True:
        content = lines[-1].removesuffix("\n").removesuffix("\r")
        if (len(content) - len(content.rstrip("\\"))) % 2 == 0:
            break
        lines.append(next(more, ""))
        size += len(lines[-1])
        if not lines[-1] or size > MAX_ROW:
            raise csv.Error("a row ends with a backslash or is too long")
    content = "".join([*lines[:-1], content])
    return ESCAPED_CELL.findall(content + ",")


def parse_line(line: bytes) -> tuple[str, ...]:
    """The cells of a line, or () if it is not a row."""
    with contextlib.suppress(csv.Error):
        return tuple(next(read_rows(iter([line.decode("utf-8-sig", "replace")])), ()))
    return ()


# --- Downloading the parts, which stay compressed; each is verified when it arrives ---


@dataclass
class Part:
    number: int
    link: str  # signed
    path: Path  # of its file, without size and suffix
    received: int = 0  # bytes
    length: int | None = None  # bytes; None if not known


def stored_parts(folder: Path) -> dict[str, Path]:
    """The complete parts on disk, in order, by the stem of their names. A name includes the size in
    bytes: a file of another size is damaged."""
    found = {}
    for path in sorted(folder.glob("part-*.csv.gz")):
        stem, _, size = path.name.partition(".")[0].rpartition("-")
        if size == str(path.stat().st_size):
            found[stem] = path
    return found


def part_stems(total: int, digest: str) -> list[str]:
    return [f"part-{number:04}-of-{total:04}-{digest}" for number in range(1, total + 1)]


def collect_parts(settings: Settings, export: Export) -> list[Path]:
    """The complete parts in order. Those from an earlier run are not downloaded again."""
    found = stored_parts(export.folder)
    digest = next(iter(found), "").rpartition("-")[2]
    if found and list(found) == part_stems(len(found), digest):
        return list(found.values())
    for _ in range(3):
        links = wait_for_links(settings, export)
        # Without signatures, so that new links give the same names.
        paths = "\n".join(link.partition("?")[0] for link in links)
        stems = part_stems(len(links), hashlib.sha256(paths.encode()).hexdigest()[:12])
        parts = list(map(Part, count(1), links, map(export.folder.joinpath, stems)))
        if download_parts(parts):
            found = stored_parts(export.folder)
            return [found[stem] for stem in stems]
        log.warning("The download links have expired. Asking CircleCI for new links.")
    raise ReportError("Downloads still fail with new links. Check the network and HTTPS_PROXY.")


def download_parts(parts: Sequence[Part]) -> bool:
    """Download the missing parts, a few at a time. Tries them all, keeps what is complete, and
    raises the first error. Returns whether all links were still valid."""
    folder = parts[0].path.parent
    stored = stored_parts(folder)
    missing = [part for part in parts if part.path.name not in stored]
    pool = concurrent.futures.ThreadPoolExecutor(PARALLEL_DOWNLOADS)
    jobs = [pool.submit(retry, partial(download_part, part)) for part in missing]
    running = set(jobs)
    while running:
        running = concurrent.futures.wait(running, timeout=0.2).not_done
        size = format_size(sum(part.received for part in missing))
        if all(part.length is not None for part in missing):
            size += f" of {format_size(sum(part.length or 0 for part in missing))}"
        complete = len(stored_parts(folder))
        level = LIVE if running else logging.INFO
        log.log(level, "Downloaded %s, %d of %d parts complete.", size, complete, len(parts))
    links_valid = [job.result() for job in jobs]  # Raises the first error.
    return all(links_valid)


def download_part(part: Part) -> bool:
    """Download and verify a part: length and gzip CRC-32. Returns False if its link has expired."""
    part.received, name = 0, f"Part {part.number}"
    response = with_timeout(name, ANSWER_SECONDS, send, part.link)
    status = response.status_code
    if status in (401, 403):  # CircleCI's links expire after 36 hours.
        return False
    if status in TEMPORARY:
        raise RetryableError(f"{name} failed with {status}.", UNFINISHED)
    if status != 200:
        raise ReportError(f"{name} failed with {status}. The report needs every part.")
    response.raw.enforce_content_length = True  # urllib3 1.26 does not do this by default.
    part.length = response.raw.length_remaining
    read = partial(with_timeout, name, READ_SECONDS, response.raw.read, READ_BYTES)
    with new_file(part.path) as file:
        for block in iter(read, b""):
            if not part.received and not block.startswith(GZIP):
                check_start(name, block)  # now, because a web page may never end
            part.received += file.write(block)
            if part.received > MAX_PART:
                raise RetryableError(f"{name} is too large.")
        file.seek(0)
        try:
            content = decompress(file)
            check_start(name, content.readline(MAX_ROW))
            while content.read(BLOCK):
                pass
        except DAMAGED_GZIP:
            raise RetryableError(f"{name} is damaged: invalid gzip data.") from None
        compressed = content is not file
        if not compressed and part.length is None and not response.raw.chunked:
            raise RetryableError(f"{name} may be incomplete: the server did not send its size.")
    os.replace(part.path, f"{part.path}-{part.received}.csv.gz")
    flush_folder(part.path.parent)
    log.debug("%s is complete: %d bytes", name, part.received)
    return True


def check_start(name: str, start: bytes) -> None:
    """Raise RetryableError unless a part is empty or starts like a CSV."""
    if start and not ROW_START.match(start):
        text = "is not a CSV file. The server may have sent a web page or JSON."
        raise RetryableError(f"{name} {text}")


# --- Merging: the header once, then every row of every part ---


def merge_parts(parts: Sequence[Path], target: Path, plain: bool) -> None:
    """Write a file with the bytes of every row, or with plain CSV. Raises ReportError if a part
    does not fit the first one, NothingToCollect if all are empty."""
    header = b""
    with new_file(target) as merged:
        for number, path in enumerate(parts, 1):
            try:
                with open(path, "rb") as file:
                    header = merge_part(decompress(file), header, merged, plain)
            except ValueError as error:
                for suspect in {parts[0], path}:
                    suspect.unlink()  # so that the next run downloads it again
                raise ReportError(f"Part {number} {error}.") from None
            except csv.Error as error:
                hint = "Run without --plain to get the rows as CircleCI wrote them."
                raise ReportError(f"Part {number}: {error}. {hint}") from None
            except DAMAGED_GZIP:
                path.unlink()
                raise ReportError(f"Part {number} was damaged on disk.", UNFINISHED) from None
    if not header:
        raise NothingToCollect("The export has no rows: no usage in this window.", NO_USAGE)


def merge_part(content: Any, header: bytes, merged: BinaryIO, plain: bool) -> bytes:
    """Write one part. Returns the header line, which is empty until a part has one. Raises
    ValueError if the first line is neither a header nor a fitting row, csv.Error for a bad row."""
    line = content.readline(MAX_ROW)
    line = line.removeprefix(BOM) if header or plain else line
    if line in (b"", BOM):
        return header
    cells, columns = parse_line(line), parse_line(header)
    common = set(cells) & set(columns)
    if not header:
        if len(cells) < 2 or not all(map(COLUMN_NAME.fullmatch, cells)):
            raise ValueError("is not a usage export: it has no column names")
        header = line
    elif cells == columns:
        line = b""  # The header is written once.
    elif len(common) > 1 or len(cells) != len(columns):  # another header, or not a row
        changes = [f"without {name}" for name in columns if name not in common]
        changes += [f"with {name}" for name in cells if name not in common]
        text = clean(", ".join(changes)) or "in a different order"
        raise ValueError(f"does not match part 1 ({len(cells)} and {len(columns)} columns): {text}")
    if plain:
        text_file = io.TextIOWrapper(merged, "utf-8", newline="")
        csv.writer(text_file).writerows(read_rows(read_lines(content, line), len(cells)))
        text_file.detach()
        return header
    for block in chain([line], iter(partial(content.read, BLOCK), b"")):
        merged.write(block)
    if block and not block.endswith(b"\n"):
        merged.write(b"\r\n" if header.endswith(b"\r\n") else b"\n")
    return header


def publish_report(export: Export, label: str, plain: bool) -> Path:
    """Move the merged file into place atomically, under a free name. Returns its path."""
    times = map(time.localtime, count(time.time()))
    names = (time.strftime(f"all_orgs_%Y%m%d_%H%M%S_{label}.csv", moment) for moment in times)
    report = next(path for path in map(export.folder.with_name, names) if not path.exists())
    export.report, export.plain = report.name, plain
    export.save()  # so that the next run recognizes the report if this one is killed
    try:
        os.link(export.folder / MERGED, report)
    except FileExistsError:  # Another run has just taken the name.
        return publish_report(export, label, plain)
    except OSError:  # no hard links on this file system
        os.rename(export.folder / MERGED, report)
    flush_folder(report.parent)
    return report


# --- Summary, from the finished report ---

COUNTED = ["ORGANIZATION_ID", "ORGANIZATION_NAME", "PROJECT_ID", "PROJECT_NAME", "TOTAL_CREDITS"]
CREDITS = re.compile(r"(-?[0-9]{1,12}(\.[0-9]{1,9})?)?")  # so that sums are exact
Key = tuple[str, ...]  # () for the total, (organization ID,), or (organization ID, project ID)
Usage = dict[Key, tuple[int, Decimal, str]]  # rows, credits, and name


def count_usage(report: Path, plain: bool) -> Usage:
    """Count rows and credits. Raises ValueError or csv.Error if that cannot be done exactly."""
    usage: Usage = {(): (0, Decimal(), "")}
    with open(report, "rb") as file:
        columns = parse_line(file.readline(MAX_ROW))
        missing = [name for name in COUNTED if name not in columns]
        if missing:
            raise ValueError(f"there is no column {', '.join(missing)}")
        indexes = [columns.index(name) for name in COUNTED]
        last = len(columns) - 1
        limit = 1 + max(index for index in indexes if index < last)
        pick = itemgetter(*(-1 if index == last else index for index in indexes))
        lines = read_lines(file)
        rows = csv.reader(lines, strict=True) if plain else read_rows(lines, len(columns), limit)
        # Many rows share these cells. Counting duplicates first is faster.
        for chunk in iter(lambda: Counter(map(pick, islice(rows, 1 << 16))), Counter()):
            for row, times in chunk.items():
                organization_id, organization, project_id, project, credits = row
                if not CREDITS.fullmatch(credits):
                    raise ValueError(f"{clean(credits)} is not a valid number of credits")
                key, used = (organization_id.lower(), project_id), Decimal(credits or 0) * times
                for depth, name in enumerate(("", organization, project)):
                    row_count, total, _ = usage.get(key[:depth], (0, Decimal(), ""))
                    usage[key[:depth]] = row_count + times, total + used, name
    return usage


def show_summary(
    report: Path, plain: bool, organizations: Mapping[str, str], width: int, started: float
) -> None:
    """Show the organizations, the projects with the most credits, and the totals."""
    usage = count_usage(report, plain)
    names = {key: clean(name or "".join(key[-1:])) or "-" for key, (_, _, name) in usage.items()}
    names.update({(key,): name for key, name in organizations.items() if name})
    bar = 20 if 80 <= width < LOG_WIDTH else 0  # only on a terminal that has room
    tables: list[list[list[str]]] = [[], [], []]  # the total, organizations, projects
    for key, (number, total, _) in sorted(usage.items(), key=lambda item: (-item[1][1], item[0])):
        share = total / usage[()][1] if usage[()][1] else Decimal()
        labels = [names[key[:depth]] for depth in range(len(key), 0, -1)]
        figures = [f"{number:,}", f"{total.normalize():,f}", f"{share:.1%}"]
        tables[len(key)].append([*labels, *figures, ("#" * round(bar * share)).ljust(bar)])
    (overall,), by_organization, projects = tables
    unused = [name or key for key, name in organizations.items() if (key,) not in usage]
    by_organization += [[name, "no usage", "", "", ""] for name in unused]
    titles = ["ROWS", "CREDITS", "SHARE"]
    rows = [["ORGANIZATION", *titles, ""], *by_organization, ["Total", *overall[:3], ""]]
    log.log(TABLE, "%s", format_table(rows, 1, width))
    rows = [["TOP PROJECTS", "ORGANIZATION", *titles], *(row[:5] for row in projects[:MAX_LISTED])]
    log.log(TABLE, "%s", format_table(rows, 2, width))
    size, duration = format_size(report.stat().st_size), format_duration(time.time() - started)
    log.info("%s row%s, %s, %s", overall[0], "s" * (overall[0] != "1"), size, duration)


# --- The run ---


def show_request(settings: Settings, organizations: Mapping[str, str], width: int) -> None:
    if settings.job_id:
        log.info("Collecting export job %s.", settings.job_id)
        return
    first, last = settings.start[:10], settings.end[:10]
    total = f"{len(organizations)} organization{'s' * (len(organizations) > 1)}"
    log.info("Usage from %s to %s (UTC), %s", first, last, total)
    rows = [[name or "-", key] for key, name in organizations.items()][:MAX_LISTED]
    log.log(TABLE, "%s", format_table([["ORGANIZATION", ID_TITLE], *rows], 1, width))
    if len(organizations) > MAX_LISTED:
        log.info("... and %d more", len(organizations) - MAX_LISTED)
    first_incomplete = time.strftime("%Y-%m-%d", time.gmtime(time.time() - REFRESH_HOURS * 3600))
    if first_incomplete <= last:
        log.warning("Usage may be incomplete from %s on.", max(first, first_incomplete))


def obtain_parts(
    settings: Settings, export: Export, request: Callable[[], Export]
) -> tuple[Export, list[Path]]:
    """The export and its complete parts. Requests a missing job again, once (not with --job-id)."""
    export = export if export.job_id else request()
    log.info("This can take up to 4 hours. Ctrl-C is safe: run the same command to resume.")
    try:
        return export, collect_parts(settings, export)
    except ReportError as error:
        # With --job-id, the folder of the run that requested the job stays.
        if error.status != 404 or (settings.job_id and export.requested_at):
            raise
        if settings.primary not in (row[2].lower() for row in list_collaborations(settings)):
            raise ReportError(f"{error} CIRCLE_TOKEN has no access to PRIMARY_ORG_ID.") from None
        if settings.job_id:
            raise NothingToCollect(str(error)) from None
    log.warning("CircleCI cannot find export job %s. Requesting the export again.", export.job_id)
    export = request()
    return export, collect_parts(settings, export)


def run(args: argparse.Namespace, console: Console, interruption: Interruption) -> int:
    """The steps of a run. Returns the exit code. Raises ReportError or OSError."""
    started, settings = time.time(), load_settings(args)
    if not settings.primary:
        log.critical("%s", primary_question(settings, console.width()))
        return INVALID
    name, login = get(settings, "/api/v2/me", lambda me: (me.get("name"), me["login"].strip()))
    log.info("Signed in as %s (%s).", clean(name or "-"), clean(login))
    organizations = {} if settings.job_id else find_organizations(settings)
    show_request(settings, organizations, console.width())
    body = {"start": settings.start, "end": settings.end, "shared_org_ids": list(organizations)}
    folder = find_folder(settings, organizations)
    if args.dry_run:
        job_id = resume_export(folder, settings).job_id
        post = f"POST {settings.jobs_path}\n{json.dumps(body, indent=2)}"
        text = f"GET {settings.jobs_path}/{job_id}" if job_id else post
        log.info("Dry run. The next request would be:\n%s", text)
        return 0
    with open_folder(folder, interruption):
        export = resume_export(folder, settings)
        interruption.advice = COLLECT if export.job_id else AGAIN
        report = settings.output / export.report  # Without a name, this is the folder.
        if not report.is_file() or export.plain != args.plain:  # not published yet in this format
            request = partial(request_export, settings, body, folder, interruption)
            export, parts = obtain_parts(settings, export, request)
            merge_parts(parts, folder / MERGED, args.plain)
            days = f"{settings.start[:10]}_{(export.end or settings.end)[:10]}"
            report = publish_report(export, settings.job_id or days, args.plain)
        with interruption.hold():
            if sys.stdout:  # 1>&- leaves no stdout.
                sys.stdout.buffer.write(os.fsencode(f"{report}\n"))  # whatever stdout's encoding
                sys.stdout.flush()
            interruption.succeeded = True
            remove_folder(folder)
    if not args.quiet:
        try:
            show_summary(report, args.plain, organizations, console.width(), started)
        except Exception as error:  # The report is published anyway.
            log.warning("No summary: %s. The report is complete.", clean(error))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run once. Turns failures into a message and an exit code. (argparse exits by itself.)"""
    args = parse_arguments(argv)
    console = Console(args.quiet and not args.dry_run, args.verbose)
    log.setLevel(logging.DEBUG)
    log.handlers = [console]
    interruption = Interruption(console)
    if __name__ == "__main__":
        for number in SIGNALS:
            signal.signal(number, interruption.handle)
    try:
        return run(args, console, interruption)
    except ReportError as error:
        code, text = error.code, str(error)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        code, text = UNFINISHED, f"{error.strerror or clean(error)}{where}. Fix that first."
    except Exception as error:
        code, text = FAILED, f"Unexpected error: {clean(repr(error))}. Use --verbose for details."
        log.debug("%s", traceback.format_exc())
    if interruption.advice == COLLECT:
        text += f" The export is kept in {interruption.folder}. Run the same command to resume."
    elif interruption.advice != AGAIN:  # --job-id is needed, or a repetition could cost an export.
        code, text = FAILED, f"{text} {interruption.advice}"
    elif code == UNFINISHED:
        text += f" {AGAIN}"
    log.error("%s", text)
    return code


if __name__ == "__main__":
    os._exit(main())  # does not wait for stalled threads
