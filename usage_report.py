#!/usr/bin/env python3
"""Write one CSV of CircleCI usage for every organization on a plan.

A run signs in, finds the organizations that share the plan, requests ONE export for all of them,
waits for it within the API's limits, downloads its parts, merges them, publishes the report, prints
its path to stdout, and shows a summary on stderr.

Exports are scarce: 10 an hour, and each can take up to 4 hours. So the job ID is saved to disk
before anything else happens. After any interruption, run the same command to resume.

Exit codes: 0 the report is published; 1 failed; 2 invalid setting; 3 no usage in the window;
75 not finished, run the same command again; 130, 143, 129 interrupted by Ctrl-C, SIGTERM, SIGHUP.
"""

from __future__ import annotations  # SyntaxError? usage_report.py needs Python 3.9 or newer.

import os
import shlex
import signal
import sys
from typing import Any

SETUP = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt"
SETUP = f"Run: cd {shlex.quote(os.path.dirname(os.path.abspath(__file__)))} && {SETUP}"
if sys.version_info < (3, 9):
    sys.exit(f"usage_report.py needs Python 3.9 or newer. Install a newer Python first. {SETUP}")


def catch_signals(handler: Any) -> None:
    """Handle Ctrl-C, SIGTERM, and SIGHUP, except those that are ignored, as under nohup."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP.
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


if __name__ == "__main__":  # The imports below take a while. Ctrl-C must not show a traceback.
    catch_signals(lambda number, frame: os._exit(128 + number))

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
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn, TypeVar

warnings.filterwarnings("ignore", module="urllib3")  # It warns about macOS Python's old SSL.

try:
    import dotenv
    import requests
    import urllib3
    from requests.adapters import HTTPAdapter
except ImportError as error:
    sys.exit(f"{error}. Use .venv/bin/python to run this script. Not set up yet? {SETUP}")

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__version__ = "2.0.0"
T = TypeVar("T")

# --- Facts about the Usage API (from CircleCI's OpenAPI description unless noted otherwise) ---

MAX_WINDOW_DAYS = 32
HISTORY_MONTHS = 13
GETS_PER_HOUR = 10  # per organization; POSTs have the same limit
QUERY_LIMIT = 4 * 3600  # seconds an export may take
# Usage is refreshed "daily, through the previous day" (CircleCI's changelog). The hour is a guess.
REFRESH_HOURS = 6  # after midnight UTC
UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
LINK_EXPIRED = (401, 403)  # HTTP statuses of a signed link that is over 36 hours old
LINK = r"https?://[A-Za-z0-9.-]+(:[0-9]+)?/[!-~]*"

# --- Choices of this script (in seconds, bytes, or characters) ---

HOUR = 3600 + 15  # an hour on CircleCI's clock, with a margin for network delays
PATIENCE = QUERY_LIMIT + 15 * 60
FIRST_POLL = 15
RETRY_PAUSES = (1, 2, 4, 8, 16)
TIMEOUTS = (10, 60)  # to connect, and between two reads
ANSWER_SECONDS = 120  # for an API response, or the headers of a download
ANSWER_BYTES = 10_000_000
READ_BYTES, READ_SECONDS = 60_000, 60  # A download slower than 1 kB/s is aborted.
PARALLEL_DOWNLOADS = 6
BLOCK = 1 << 20
MAX_ROW = 1 << 20
MAX_TEXT = 300  # characters shown of external text
MAX_LISTED = 10  # organizations or projects

FAILED, INVALID, NO_USAGE, UNFINISHED = 1, 2, 3, 75  # exit codes
csv.field_size_limit(MAX_ROW)
PLACEHOLDER = "your-personal-api-token"  # CIRCLE_TOKEN in .env.example
SCRIPT_FOLDER = Path(__file__).resolve().parent


# --- Errors ---


class ReportError(Exception):
    """Ends the run. The text says what happened, why, and what to do next."""

    def __init__(self, text: str, code: int = FAILED, status: int = 0) -> None:
        super().__init__(text)
        self.code, self.status = code, status  # the exit code; the HTTP status, if it matters


class RetryableError(ReportError):
    """A retry may help. `sent`: the request may have reached the server. `wait`: seconds until
    the rate limit allows the next request; None if this is not about the rate limit."""

    def __init__(self, text: str, code: int, sent: bool = True, wait: float | None = None) -> None:
        super().__init__(text, code)
        self.sent, self.wait = sent, wait


class NothingToCollect(ReportError):
    """The export failed, has no usage, or does not exist."""


# --- Text for people ---

SECRETS: set[str] = set()  # the token, once it is known


def redact(text: str) -> str:
    """The text without the token and without the query part of URLs."""
    for secret in SECRETS - {""}:
        text = text.replace(secret, "[token]")
    text = re.sub(r"\?[^\s?]*=\S*", "?[removed]", text)
    return re.sub(r"(?i)((?:signature|credential|token|sig)=)[^\s&]+", r"\1[removed]", text)


def clean(text: object) -> str:
    """External text on one line, without secrets or control characters, cut short."""
    words = " ".join(redact(str(text))[: 4 * MAX_TEXT].split())
    words = words if len(words) <= MAX_TEXT else words[: MAX_TEXT - 1] + "\u2026"
    return "".join(c if c.isprintable() else "?" for c in words)


def format_duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_size(size: float) -> str:
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB") if size >= 1e5 else (1e3, "kB")
    return f"{size / unit:,.1f} {name}"


def display_width(text: str) -> int:
    """Columns on a terminal: two for East Asian characters and emoji, none for accents."""
    wide = [unicodedata.east_asian_width(c) in "WF" for c in text if not unicodedata.combining(c)]
    return len(wide) + sum(wide)


def fit(text: str, width: int, right: bool = False) -> str:
    """The text shortened or padded to a width in columns."""
    if display_width(text) > width:
        while text and display_width(text) > width - 1:
            text = text[:-1]
        text += "\u2026"
    padding = " " * (width - display_width(text))
    return padding + text if right else text + padding


def format_table(rows: Sequence[Sequence[str]], names: int, width: int) -> str:
    """Aligned text. The first `names` columns are names: left-aligned, shortened if need be."""
    widths = [max(map(display_width, column)) for column in zip(*rows)]
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths[:names]) > 12:
        widths[widths.index(max(widths[:names]))] -= 1
    cells = [[fit(c, w, n >= names) for n, (c, w) in enumerate(zip(row, widths))] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


# --- Console: everything people see on stderr ---

log = logging.getLogger("usage_report")
LOG_WIDTH = 1000  # columns, where there is no terminal
LIVE, STEP = 15, 16  # log levels for a terminal's live line; elsewhere, STEP gets its own line
TABLE = 21  # log level of a table, which begins with column titles
STYLES = {LIVE: ("2", ""), STEP: ("2", ""), TABLE: ("1", "")}  # color code and prefix by level
STYLES.update({logging.WARNING: ("", "notice: "), logging.ERROR: ("31", "error: ")})


class Console(logging.Handler):
    """Writes to stderr: on a terminal with color and a live line, elsewhere with UTC timestamps."""

    def __init__(self, quiet: bool, verbose: bool) -> None:
        super().__init__(logging.ERROR if quiet else logging.DEBUG if verbose else LIVE)
        self.stream = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  (2>&- leaves no stderr)
        escapes = sys.platform != "win32" or "WT_SESSION" in os.environ  # Old consoles print them.
        self.terminal = escapes and self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.color = self.terminal and not os.environ.get("NO_COLOR")
        self.live = False  # A live line is on the screen.

    @property
    def width(self) -> int:
        """Columns of stderr's terminal (stdout may be captured); LOG_WIDTH if it is none."""
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
        """What to write for a message: no secrets, no control characters."""
        text = "".join(c if c.isprintable() or c == "\n" else "?" for c in redact(text))
        erase = "\r\x1b[K" if self.live else ""
        self.live = self.terminal and level in (LIVE, STEP)
        code, prefix = STYLES.get(level, ("", ""))
        first, *rest = (prefix + text).split("\n")
        first = fit(first, self.width - 1).rstrip() if self.live else first
        first = f"\x1b[{code}m{first}\x1b[m" if code and self.color else first
        if self.live:
            return f"\r{first}\x1b[K"
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime(time.time()))
        gap = "\n" if self.terminal and level == TABLE else ""
        stamp = "" if self.terminal else stamp
        return erase + gap + "".join(f"{stamp}{line}\n" for line in [first, *rest])


# --- Signals ---


class Interruption:
    """Ctrl-C, SIGTERM, and SIGHUP end the process at once, like kill -9, but with a message and the
    right exit code. What the next run needs is on disk at any moment. So nothing has to be unwound,
    and there is no exception that a library could swallow."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.folder: Path | None = None  # of the export, once this run has locked it
        self.held = False  # Signals have to wait.
        self.received = 0  # the first signal
        self.succeeded = False  # The report is published and its path is printed.
        self.advice = "Run the same command to start again."

    def handle(self, number: int, frame: object = None) -> None:
        self.received = self.received or number
        if not self.held:
            self.end()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Delay signals until the block is done."""
        self.held = True
        try:
            yield
        except Exception as error:
            if self.received:  # What happened would be lost: the run ends here.
                log.error("%s", error)
            raise
        finally:
            self.held = False
            if self.received:
                self.end()

    def end(self) -> NoReturn:
        catch_signals(signal.SIG_IGN)
        if self.succeeded:
            os._exit(0)
        text = self.advice
        with contextlib.suppress(OSError):
            if self.folder and holds_export(self.folder):
                text = "CircleCI keeps working on the export. Run the same command to collect it."
            elif self.folder:
                remove_folder(self.folder)
        with contextlib.suppress(OSError):  # skip logging: the interrupted code may hold its locks
            line = self.console.render(logging.CRITICAL, f"Interrupted. {text}")
            os.write(self.console.stream.fileno(), line.encode())
        os._exit(128 + self.received)


# --- Settings: a flag, else the environment, else .env ---

VARIABLES = ["CIRCLE_TOKEN", "PRIMARY_ORG_ID", "START_DATE", "END_DATE", "SHARED_ORG_IDS"]
VARIABLES += ["CIRCLECI_BASE_URL"]
PERIODS = ["yesterday", "last-7-days", "this-month", "last-month"]
HELP = """\
settings, from the environment or from .env next to the script:
  CIRCLE_TOKEN          personal API token, required
  PRIMARY_ORG_ID        UUID of the organization that owns the plan, required;
                        leave it empty to list your organizations
  START_DATE, END_DATE  the time window, unless set by flags
  SHARED_ORG_IDS        comma-separated UUIDs of the organizations to include,
                        instead of asking CircleCI who shares the plan
  CIRCLECI_BASE_URL     default: https://circleci.com

exit codes: 0 done, 1 failed, 2 invalid setting, 3 no usage, 75 not finished,
130/143/129 interrupted; after 75 or an interruption, run the same command
to resume
"""


class Setting(NamedTuple):
    value: str
    name: str  # the flag or variable, for messages
    source: str = ""  # of a variable: "the environment" or a path


class Window(NamedTuple):
    start: datetime
    end: datetime  # as requested from CircleCI: not in the future
    wanted_end: datetime  # as the user gave it


class Settings(NamedTuple):
    token: Setting
    base_url: str
    output: Path
    primary: str  # organization ID; empty: list the choices
    shared: list[str]  # organization IDs; empty: ask the API
    job_id: str  # of an existing export; empty: request one
    window: Window | None  # None with a job ID or without a primary


def invalid(text: str) -> ReportError:
    return ReportError(text, INVALID)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags. Exits with 0 after --help and --version, with 2 if a flag is invalid."""
    parser = argparse.ArgumentParser(
        prog="usage_report.py",
        description="Write one CSV of CircleCI usage for every organization on a plan.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flag, metavar, text in (
        ("--start", "WHEN", "YYYY-MM-DD or YYYY-MM-DDThh:mm:ssZ, in UTC"),
        ("--end", "WHEN", "same format; a date includes the whole day"),
        ("--period", "PERIOD", f"{', '.join(PERIODS)}, or YYYY-MM (whole UTC days)"),
        ("--output-dir", "DIR", "default: usage_reports next to the script"),
        ("--env-file", "FILE", "default: .env next to the script"),
        ("--job-id", "UUID", "collect an existing export instead of requesting one"),
    ):
        parser.add_argument(flag, metavar=metavar, type=str.strip, default="", help=text)
    parser.add_argument("--plain", action="store_true", help="write plain CSV, for spreadsheets")
    parser.add_argument("--dry-run", action="store_true", help="show the request and stop")
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    volume.add_argument("-v", "--verbose", action="store_true", help="show every request")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].lstrip("-")
        flags = ["--" + name.replace("_", "-") for name in vars(args)]
        similar = difflib.get_close_matches("--" + word, flags, n=1) or ["--help"]
        if word in PERIODS or re.fullmatch("[0-9]{4}-[0-9]{2}", word):
            similar = [f"--period {word}"]
        # Values are not shown: one may be a misplaced token.
        flag = " " + clean(unknown[0].split("=")[0]) if unknown[0].startswith("-") else ""
        parser.error(f"unknown argument{flag}. Did you mean {similar[0]}?")
    return args


def load_settings(args: argparse.Namespace, values: Mapping[str, Setting]) -> Settings:
    """All settings, validated. Raises ReportError for the first invalid one."""
    token = values["CIRCLE_TOKEN"]
    if token.value in ("", PLACEHOLDER) or not re.fullmatch("[!-~]+", token.value):
        problem = "is not set" if token.value in ("", PLACEHOLDER) else "has an invalid character"
        how = "In CircleCI > User Settings > Personal API Tokens, create a token such as CCIPAT_..."
        raise invalid(f"CIRCLE_TOKEN {problem}. {how}, then set CIRCLE_TOKEN in {token.source}.")
    job_id = check_uuid("--job-id", args.job_id, "Copy it from the run that requested it.")
    where = "Leave PRIMARY_ORG_ID empty to list your organizations."
    primary = check_uuid("PRIMARY_ORG_ID", values["PRIMARY_ORG_ID"].value, where)
    entries = enumerate(values["SHARED_ORG_IDS"].value.split(","), 1)
    shared = [check_uuid(f"Entry {n} of SHARED_ORG_IDS", text, where) for n, text in entries]
    base_url = check_base_url(values["CIRCLECI_BASE_URL"].value or "https://circleci.com")
    output = check_output(Path(args.output_dir or SCRIPT_FOLDER / "usage_reports").absolute())
    window = None
    if args.start or args.end or args.period or (primary and not job_id):
        window = choose_window(args.period, values["START_DATE"], values["END_DATE"])
    window = None if job_id else window
    return Settings(token, base_url, output, primary, list(filter(None, shared)), job_id, window)


def read_variables(args: argparse.Namespace) -> dict[str, Setting]:
    """The variables by name, overridden by --start and --end, not validated yet."""
    env_file = Path(args.env_file or SCRIPT_FOLDER / ".env").absolute()
    in_file: Mapping[str, str | None] = {}
    if args.env_file or env_file.exists():
        try:
            # utf-8-sig: some editors write a BOM. No interpolation: a $ in a token is just a $.
            text = env_file.read_text("utf-8-sig")
            in_file = dotenv.dotenv_values(stream=io.StringIO(text), interpolate=False)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8; save it as UTF-8"
            hint = "Copy .env.example to .env, or correct --env-file."
            raise invalid(f"Cannot read {env_file}: {reason}. {hint}") from None
    found = {}
    for name in VARIABLES:
        from_environment = os.environ.get(name, "").strip()
        source = "the environment" if from_environment else str(env_file)
        found[name] = Setting(from_environment or (in_file.get(name) or "").strip(), name, source)
    if args.start:
        found["START_DATE"] = Setting(args.start, "--start")
    if args.end:
        found["END_DATE"] = Setting(args.end, "--end")
    return found


def check_uuid(name: str, text: str, where: str) -> str:
    """The UUID in lower case, or "". The text is not shown: it may be a misplaced token."""
    text = text.strip().lower()
    if text and not re.fullmatch(UUID, text):
        example = "b9291e0d-a11e-41fb-8517-c545388b5953"
        raise invalid(f"{name} must be a UUID, such as {example}. {where}")
    return text


def check_base_url(url: str) -> str:
    secure = r"https://([a-z0-9-]{1,63}(\.[a-z0-9-]{1,63})*|\[[0-9a-f:]+\])"
    loopback = r"http://(localhost|127(\.[0-9]{1,3}){3}|\[::1\])"
    if not re.fullmatch(rf"({secure}|{loopback})(:[1-6]?[0-9]{{1,4}})?/?", url.lower()):
        text = "CIRCLECI_BASE_URL must be https:// and a host name, such as https://circleci.com"
        raise invalid(f"{text} (http:// works only for localhost).")
    return url.lower().rstrip("/")


def check_output(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):  # a full disk or quota
            raise
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        hint = "Use --output-dir with another folder, such as --output-dir reports"
        raise invalid(f"Cannot write to the output folder {folder}. {hint}")
    return folder


def utc_now() -> datetime:
    return datetime.fromtimestamp(int(time.time()), timezone.utc)


def iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def months_back(day: date, months: int) -> date:
    """The same day of an earlier month, or that month's last day."""
    year, month = divmod(day.year * 12 + day.month - 1 - months, 12)
    return date(year, month + 1, min(day.day, calendar.monthrange(year, month + 1)[1]))


def period_days(period: str, today: date) -> tuple[date, date]:
    """First and last day of a --period: whole UTC days, none later than yesterday."""
    yesterday, first = today - timedelta(days=1), today.replace(day=1)
    month = months_back(first, 1)
    if period in ("yesterday", "last-7-days"):
        return (yesterday if period == "yesterday" else today - timedelta(days=7)), yesterday
    if period == "last-month":
        first = month
    elif re.fullmatch("[1-9][0-9]{3}-(0[1-9]|1[0-2])", period):
        first = date(int(period[:4]), int(period[5:]), 1)
    elif period != "this-month":
        choices = f"{', '.join(PERIODS)}, or a month such as {month:%Y-%m}"
        raise invalid(f"--period must be {choices}, not {clean(period)}.")
    last = min(yesterday, first.replace(day=calendar.monthrange(first.year, first.month)[1]))
    if first > last:
        raise invalid(f"--period {period} has no complete day yet. Use last-month.")
    return first, last


def choose_window(period: str, start: Setting, end: Setting) -> Window:
    """The window of --period, or else from start to end. Cuts an end that is in the future."""
    now = utc_now()
    days = period_days("last-month", now.date())
    if period:
        if "--start" in start or "--end" in end:
            text = "--period cannot be combined with --start or --end."
            raise invalid(f"{text} Use --period, or --start and --end.")
        start, end = (Setting(str(day), "--period") for day in period_days(period, now.date()))
    first, wanted_end = parse_time(start, "T00:00:00Z", days), parse_time(end, "T23:59:59Z", days)
    last = now - timedelta(minutes=1) if wanted_end > now else wanted_end
    oldest, yesterday = months_back(now.date(), HISTORY_MONTHS), now.date() - timedelta(days=1)
    given = f"--period {period}" if period else f"{start.name} {start.value}"
    both, example = f"{given} to {end.name} {end.value}", "{} to {}".format(*days)
    if first >= wanted_end:
        raise invalid(f"{both}: the start must be before the end, such as {example}.")
    if first >= last:
        raise invalid(f"{given} is in the future. Use {yesterday} or earlier.")
    if first.date() < oldest:
        choice = f"{months_back(oldest, -1):%Y-%m}" if period else oldest
        limit = f"CircleCI keeps {HISTORY_MONTHS} months of usage"
        raise invalid(f"{given} is too old: {limit}. Use {choice} or later.")
    if last - first > timedelta(days=MAX_WINDOW_DAYS):
        raise invalid(
            f"{both}: an export covers at most {MAX_WINDOW_DAYS} days, such as {example}."
        )
    if last < wanted_end:
        log.warning("%s %s is in the future. Using %s.", end.name, end.value, iso(last))
    return Window(first, last, wanted_end)


def parse_time(setting: Setting, time_of_day: str, days: tuple[date, date]) -> datetime:
    """A time in UTC; a plain date gets `time_of_day`. `days` is an example window."""
    name, value = setting.name, setting.value
    if not value:
        hint = f"Use --period last-month, or --start {days[0]} --end {days[1]}"
        raise invalid(f"{name} is not set. {hint}")
    with contextlib.suppress(ValueError):
        if re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}:[0-9]{2}Z)?", value):
            text = value if "T" in value else value + time_of_day
            return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    example = f"Use a UTC date such as {days[0]} or {days[0]}T00:00:00Z."
    raise invalid(f"{name} {clean(value)} is not a valid date. {example}")


# --- Requests: sent in one place, with limits on time and size ---

# Calls that a server can stall run here: the caller times out, and the thread stays behind.
WORKERS = concurrent.futures.ThreadPoolExecutor(100)

# What the exception says, whether the request may have been sent, and what to tell the user. It
# counts as not sent only if there was no connection yet.
FAILURES = (
    ("^TimeoutError|Read timed out", True, "no complete response in time"),
    ("CA certificate bundle", False, "CA bundle not found. Check REQUESTS_CA_BUNDLE"),
    ("for SOCKS", False, "SOCKS support is missing. Set HTTPS_PROXY to an http:// proxy"),
    ("ProxyError.*(NewConn|NameRes|Tunnel)", False, "cannot use the proxy. Check HTTPS_PROXY"),
    ("CERTIFICATE_VERIFY", False, "untrusted certificate. Behind a proxy, set REQUESTS_CA_BUNDLE"),
    ("NameResolution|getaddrinfo", False, "host not found. Check the network"),
    ("NewConnection.*refused", False, "the port is closed. Check CIRCLECI_BASE_URL"),
    ("ConnectTimeout", False, "connecting timed out. Check the network and HTTPS_PROXY"),
    ("NewConnectionError", False, "cannot connect. Check the network"),
    ("too large", True, "the response is too large"),
    ("", True, "connection lost"),
)
NETWORK_ERRORS = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    concurrent.futures.TimeoutError,
    ValueError,  # from http.client, if a response is malformed
)


def in_time(call: Callable[[], T], seconds: float) -> T:
    """What call() returns or raises. Raises concurrent.futures.TimeoutError if it takes longer."""
    return WORKERS.submit(call).result(seconds)


def explain_failure(error: BaseException) -> tuple[bool, str]:
    """Whether the request may have been sent, and why it failed. The exception's own text is not
    shown, because it can contain a signed URL."""
    text = f"{type(error).__name__} {error!r} {error}"
    detail = re.search(r"\[Errno -?\d+\] ([\w ]+)", text)
    sent, reason = next(row[1:] for row in FAILURES if re.search(row[0], text))
    return sent, f"{reason}. Details: {detail[1]}" if detail else reason


def send(method: str, url: str, token: str = "", body: object = None) -> requests.Response:
    """Send a request and return the response, its body unread. Uses an adapter, because a session
    keeps cookies, reads ~/.netrc, and parses the target of every redirect."""
    headers = {"User-Agent": f"circleci-usage-report/{__version__}", "Accept-Encoding": "identity"}
    if token:
        headers["Circle-Token"] = token
    session = requests.Session()
    session.trust_env = url.startswith("https")  # Without TLS, a proxy would see the token.
    settings = session.merge_environment_settings(url, {}, True, None, None)
    request = requests.Request(method, url, headers=headers, json=body).prepare()
    return HTTPAdapter().send(request, timeout=TIMEOUTS, **settings)  # type: ignore[arg-type]


def rate_limit_seconds(headers: Mapping[str, str]) -> float:
    """How long to wait after a 429: Retry-After, else X-RateLimit-Reset (both from CircleCI's API
    developers' guide), else a tenth of an hour."""
    with contextlib.suppress(urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        seconds = urllib3.Retry().parse_retry_after(headers.get("Retry-After", "")[:40])
        return min(seconds, PATIENCE + 1)
    reset = headers.get("X-RateLimit-Reset", "")
    return float(reset) if re.fullmatch("[0-9]{1,5}", reset) else HOUR / GETS_PER_HOUR


class Clock:
    """Unix time that never runs backward: setting back the computer's clock delays nothing."""

    def __init__(self) -> None:
        self.latest, self.set_back = 0.0, 0.0

    def now(self) -> float:
        wall = time.time()
        self.set_back += max(0.0, self.latest - wall)
        self.latest = wall
        return wall + self.set_back

    def sleep(self, seconds: float, show: Callable[[float], None]) -> None:
        """Sleep, calling show(seconds left) every second. Sleeps in slices, because time.sleep does
        not count the time a laptop is asleep."""
        due = self.now() + seconds
        left = seconds
        while left > 0:
            show(left)
            time.sleep(min(left, 1))
            left = due - self.now()


def retry(action: Callable[[], T], repeat_sent: bool = True) -> T:
    """What action() returns. After a RetryableError, tries up to 5 more times with growing pauses;
    waits for the rate limit up to PATIENCE. Raises the last error. Unless `repeat_sent`, an action
    is not repeated if its request may have been sent."""
    tries, failures, waited = 0, 0, 0.0
    while True:
        try:
            return action()
        except RetryableError as error:
            tries, failures = tries + 1, failures + (error.wait is None)
            pause = max(RETRY_PAUSES[min(tries, len(RETRY_PAUSES)) - 1], error.wait or 0)
            waited += pause
            final = failures > len(RETRY_PAUSES) or waited > PATIENCE
            if final or (error.sent and not repeat_sent):
                raise
            log.warning("%s Retrying in %s.", error, format_duration(pause))
        Clock().sleep(pause, lambda left: log.log(LIVE, "Retrying in %s", format_duration(left)))


class Api:
    """CircleCI's API. The token goes to the host of base_url and nowhere else."""

    def __init__(self, settings: Settings) -> None:
        self.base_url, self.token = settings.base_url, settings.token.value
        self.exports = f"/api/v2/organizations/{settings.primary}/usage_export_job"
        used = ["PRIMARY_ORG_ID"] + ["SHARED_ORG_IDS"] * bool(settings.shared)
        used += ["--job-id"] * bool(settings.job_id)
        limits = f"at most {MAX_WINDOW_DAYS} days and start at most {HISTORY_MONTHS} months ago"
        source = settings.token.source
        self.next_steps = {
            400: f"The window must cover {limits}.",
            401: f"CIRCLE_TOKEN in {source} is invalid or expired. Create a new one.",
            403: "Use the token of an organization admin.",
            404: f"Check {' and '.join(used)}. The owner of CIRCLE_TOKEN must have access.",
        }

    def request(self, method: str, path: str, body: object = None) -> Any:
        """The JSON of the response. Raises RetryableError, or ReportError with the HTTP status."""
        what, url, started = f"{method} {path}", self.base_url + path, time.time()

        def exchange() -> tuple[requests.Response, bytes]:
            content = bytearray()
            with contextlib.closing(send(method, url, self.token, body)) as response:
                for block in response.iter_content(1 << 14):
                    content += block
                    if len(content) > ANSWER_BYTES:
                        raise requests.RequestException("too large")
            return response, bytes(content)

        try:
            response, content = in_time(exchange, ANSWER_SECONDS)
        except (OSError, *NETWORK_ERRORS) as error:  # OSError: a CA bundle that does not exist
            sent, reason = explain_failure(error)
            text = f"{what} failed: {reason}. Server: {self.base_url}."
            raise RetryableError(text, UNFINISHED, sent) from None
        log.debug("%s: %d after %.1f s", what, response.status_code, time.time() - started)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        self.check(response, what, answer)
        return answer

    def check(self, response: requests.Response, what: str, answer: object) -> None:
        """Raises the error for a response other than JSON with a 2xx status."""
        status = response.status_code
        message = answer.get("message") if isinstance(answer, dict) else None
        message = clean(message or response.reason or "no message").rstrip(".")
        text = f"{what} failed with {status}: {message}."
        if status == 429:
            wait = rate_limit_seconds(response.headers)
            raise RetryableError(text, UNFINISHED, sent=False, wait=wait)
        if status == 408 or status >= 500:
            raise RetryableError(text, UNFINISHED)
        if not 200 <= status < 300:
            raise ReportError(f"{text} {self.next_steps.get(status, '')}".strip(), status=status)
        if answer is None:
            text = f"{what} did not return JSON. Check for a proxy or login page in between."
            raise RetryableError(text, FAILED)


# --- Organizations ---


def signed_in_user(api: Api) -> str:
    me = retry(lambda: api.request("GET", "/api/v2/me"))
    if not isinstance(me, dict) or not me.get("login"):
        raise ReportError(f"GET /api/v2/me returned no user. Check the server: {api.base_url}")
    return f"{clean(me.get('name') or '-')} ({clean(me['login'])})"


def list_collaborations(api: Api) -> list[list[str]]:
    """Name, slug, and ID of each of the token owner's organizations. Skips those without an ID."""
    path = "/api/v2/me/collaborations"
    found = retry(lambda: api.request("GET", path))
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ReportError(f"GET {path} did not return a list. Check the server: {api.base_url}")
    rows = [[clean(entry.get(key) or "-") for key in ("name", "slug", "id")] for entry in found]
    return [row for row in rows if re.fullmatch(UUID, row[2].lower())]


def primary_question(api: Api, width: int) -> str:
    """Asks for PRIMARY_ORG_ID and lists the choices."""
    rows = list_collaborations(api)
    if not rows:
        raise ReportError("The owner of CIRCLE_TOKEN has no organizations. Use another token.")
    question = (
        "Which organization owns the plan?" if len(rows) > 1 else "There is one organization."
    )
    question += " Set PRIMARY_ORG_ID to its ID and run the same command again."
    return question + "\n" + format_table([["NAME", "SLUG", "ID"], *rows], 3, width)


def find_organizations(api: Api, settings: Settings) -> dict[str, str]:
    """Name by ID of every organization on the plan, the primary first. An unclear response is
    an error, because a report on the primary alone could look complete."""
    path = f"/private/orgs/{settings.primary}/plan/shares-for"  # undocumented; seen in public code
    found = dict.fromkeys(settings.shared, "")
    if not found and not settings.job_id:
        workaround = "Workaround: set SHARED_ORG_IDS to the IDs of the organizations."
        try:
            listed = retry(lambda: api.request("GET", path))["orgs"]
            found = {entry["id"].lower(): clean(entry.get("name") or "") for entry in listed}
            if not isinstance(listed, list) or not all(re.fullmatch(UUID, key) for key in found):
                raise TypeError
        except (AttributeError, KeyError, TypeError):
            raise ReportError(f"GET {path} did not list organizations. {workaround}") from None
        except ReportError as error:
            raise ReportError(f"{error} {workaround}", error.code) from None
        if not found:
            log.info("The plan is not shared. The report covers only the primary organization.")
    return {settings.primary: "", **found}


# --- Files and the export's folder ---

STATE, MERGED = "state.json", "merged.csv"


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its final name once it is complete and flushed to disk."""
    draft = path.with_name(path.name + ".new")
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make a new file name survive a power failure, if the system can do that (Windows cannot)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def acquire_lock(file: BinaryIO, path: Path) -> bool:
    """False if another run holds the lock. The lock ends when the process does."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Not ours if another run has just removed the folder.
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return False
    except OSError as error:
        log.warning("Cannot lock %s (%s). Do not start a parallel run.", path, error.strerror)
        return True


@contextlib.contextmanager
def open_folder(folder: Path, interruption: Interruption) -> Iterator[None]:
    """Lock an export's folder for this run. Removes it if it holds no export at the end."""
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "a+b") as file:
        if not acquire_lock(file, folder / "lock"):
            text = f"Another run is working on this export (lock: {folder / 'lock'})."
            raise ReportError(f"{text} Wait until it ends.")
        interruption.folder = folder
        try:
            yield
        except NothingToCollect:
            remove_folder(folder)
            raise
        finally:
            if not holds_export(folder):
                remove_folder(folder)
    if sys.platform == "win32" and not holds_export(folder):
        remove_folder(folder)  # Windows cannot remove an open file.


def holds_export(folder: Path) -> bool:
    try:
        return load_export(folder) is not None
    except OSError:  # not readable now, but it may hold one
        return True


def remove_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        remove_files(folder)
        (folder / "lock").unlink()
        folder.rmdir()


def remove_files(folder: Path) -> None:
    """Remove all files but the lock, and the state last: it tells the next run about the rest."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == STATE):
        if path.name != "lock":
            path.unlink()


# --- The export job and its state on disk ---


@dataclass
class Export:
    """An export job. Until the report is published, these values (state.json) and the parts are
    kept in a hidden folder, without the token and without signed URLs."""

    folder: Path
    job_id: str
    end: str = ""  # as requested; "" if not known
    requested_at: float | None = None  # unix seconds; None if not known
    polls: list[float] = field(default_factory=list)  # unix seconds of the organization's last GETs
    completed: bool = False  # CircleCI has reported "completed".
    report: str = ""  # the report's name, recorded before it is published
    plain: bool = False  # whether that report is plain CSV

    def save(self) -> None:
        record = {key: value for key, value in vars(self).items() if key != "folder"}
        with new_file(self.folder / STATE) as file:
            file.write(json.dumps(record).encode())

    def published_report(self, plain: bool) -> Path | None:
        """The report, if an earlier run has published it."""
        report = self.folder.parent / self.report
        return report if self.report and self.plain == plain and report.exists() else None

    def age(self, now: float) -> float | None:
        """Seconds since the POST; None if not known."""
        return now - self.requested_at if self.requested_at else None


def load_export(folder: Path) -> Export | None:
    """The export of an earlier run. Its job ID is used even if nothing else is readable."""
    for name in (STATE, STATE + ".new"):  # the draft, if a run was killed just after the POST
        with contextlib.suppress(FileNotFoundError):
            text = (folder / name).read_text("utf-8", errors="replace")
            found = re.search(rf'(?i)"job_id"\s*:\s*"({UUID})"', text)
            if found:
                return read_state(folder, found[1].lower(), text)
    return None


def read_state(folder: Path, job_id: str, text: str) -> Export:
    """The values of a state file; if any is damaged or from another version, only the job ID."""
    now = time.time()
    try:
        export = Export(folder, **{**json.loads(text), "job_id": job_id})
        times = [*export.polls, export.requested_at or now]
        valid = all(type(at) in (int, float) and 0 < at < now + 86400 for at in times)  # no NaN
        valid = valid and bool(re.fullmatch("([0-9-]{10}T[0-9:]{8}Z)?", export.end))
        if not valid or not re.fullmatch(r"(all_orgs_[\w-]+\.csv)?", export.report):
            raise ValueError
    except (TypeError, ValueError, RecursionError):
        return Export(folder, job_id)
    # A clock that was set back in the meantime must not delay the next poll.
    export.polls = sorted(min(at, now) for at in export.polls)[-GETS_PER_HOUR:]
    export.requested_at = min(export.requested_at, now) if export.requested_at else None
    return export


def find_folder(settings: Settings, organizations: Iterable[str]) -> Path:
    """The export's hidden folder. With --job-id, the folder of the run that requested it."""
    if settings.job_id:
        for folder in settings.output.glob(".export-*"):
            with contextlib.suppress(OSError):
                export = load_export(folder)
                if export and export.job_id == settings.job_id:
                    return folder
    key = [settings.base_url, settings.primary, settings.job_id]
    if settings.window:
        key += [iso(settings.window.start), iso(settings.window.wanted_end), *sorted(organizations)]
    return settings.output / f".export-{hashlib.sha256(' '.join(key).encode()).hexdigest()[:16]}"


def resume_export(folder: Path, settings: Settings) -> Export | None:
    """The export of an earlier run, or of --job-id. None if a new one must be requested."""
    export, window = load_export(folder), settings.window
    if not export:
        return Export(folder, settings.job_id) if settings.job_id else None
    if window and window.end == window.wanted_end and "" < export.end < iso(window.end):
        log.warning("The earlier export ends at %s. Requesting the whole window.", export.end)
        return None
    log.info("Resuming export job %s from an earlier run.", export.job_id)
    return export


MAY_HAVE_STARTED = "CircleCI may have started an export. Run again only if you can spend another."


def read_job_id(answer: Any) -> str:
    job_id = answer.get("usage_export_job_id") if isinstance(answer, dict) else None
    if not isinstance(job_id, str) or not re.fullmatch(UUID, job_id.lower()):
        raise RetryableError("The POST returned no valid job ID.", FAILED)
    return job_id.lower()


def request_export(
    api: Api, body: Mapping[str, Any], folder: Path, interruption: Interruption
) -> Export:
    """A new export job, its ID on disk. A POST with an unknown outcome may have started an export,
    and the API does not list exports. So it is sent at most once more."""
    earlier = load_export(folder)
    polls = earlier.polls if earlier else []  # They count toward the rate limit.
    remove_files(folder)
    with new_file(folder / STATE) as file:
        file.write(b"{}")  # A full disk fails here, before anything is spent.

    def post() -> Export:
        with interruption.hold():
            requested_at = time.time()
            try:
                job_id = read_job_id(api.request("POST", api.exports, body))
            except RetryableError as error:
                interruption.advice = MAY_HAVE_STARTED if error.sent else interruption.advice
                raise
            export = Export(folder, job_id, body["end"], requested_at, polls)
            try:
                export.save()
            except OSError as error:
                text = f"Cannot record the export job: {error.strerror}. Fix that and run the"
                raise ReportError(f"{text} same command with --job-id {job_id}") from None
        log.info("CircleCI started export job %s.", job_id)
        return export

    try:
        return retry(post, repeat_sent=False)
    except RetryableError as error:
        if not error.sent:
            raise
        log.warning("%s It may have started an export. Sending the request once more.", error)
        Clock().sleep(RETRY_PAUSES[-1], lambda left: None)
    try:
        return retry(post, repeat_sent=False)
    except RetryableError as error:
        raise ReportError(f"{error} {MAY_HAVE_STARTED}") from None


# --- Waiting for the job ---

# When a job's length is unknown, a geometric series makes the most of 10 GETs an hour: the delay is
# the same share of the job's length, whether short or long. GET n is due FIRST_POLL * GROWTH**n
# after the POST, and GET 10 an hour after GET 0. So FIRST_POLL * GROWTH**10 = FIRST_POLL + HOUR.
GROWTH: float = (HOUR / FIRST_POLL + 1) ** (1 / GETS_PER_HOUR)
POLL_INTERVAL = HOUR / GETS_PER_HOUR  # after the first hour


def next_poll(requested_at: float | None, polls: Sequence[float], now: float) -> float:
    """When (unix seconds) the next GET is due: in a geometric series for an hour, then every 6
    minutes, never more than GETS_PER_HOUR in an hour. A job of unknown age is polled at once."""
    start = requested_at or (polls[0] if polls else now) - FIRST_POLL
    elapsed = polls[-1] - start if polls else 0
    due = start + max(FIRST_POLL, min(elapsed * GROWTH, max(elapsed, HOUR) + POLL_INTERVAL))
    return max(due, earliest_poll(polls))


def earliest_poll(polls: Sequence[float]) -> float:
    """When (unix seconds) the rate limit allows the next GET."""
    return polls[-GETS_PER_HOUR] + HOUR if len(polls) >= GETS_PER_HOUR else 0


def poll_job(api: Api, export: Export, clock: Clock) -> tuple[str, list[str], str]:
    """One GET: the job's state, download links, and reason. Raises what Api.request raises."""
    export.polls = [*export.polls, clock.now()][-GETS_PER_HOUR:]
    export.save()  # before the GET, which counts even if this run is killed before the response
    try:
        answer = api.request("GET", f"{api.exports}/{export.job_id}")
    finally:
        export.polls[-1] = clock.now()  # the latest time CircleCI can have counted it
    try:
        state, links = answer["state"], answer.get("download_urls") or []
        valid = isinstance(state, str) and isinstance(links, list)
        valid = valid and all(re.fullmatch(LINK, link) for link in links)
    except (AttributeError, KeyError, TypeError):
        valid = False
    if not valid:
        text = "CircleCI returned no job state, or a download link that is not a URL."
        raise RetryableError(text, FAILED)
    export.completed = state == "completed"
    return clean(state), links, clean(answer.get("error_reason") or "no reason given").rstrip(".")


def wait_for_links(api: Api, export: Export) -> list[str]:
    """The download links of the job once it is completed. Raises ReportError if that takes longer
    than the query limit plus a margin, NothingToCollect, or what Api.request raises."""
    clock, state, failures, empty, not_before = Clock(), "requested", 0, 0, 0.0
    # Counted in planned seconds, so a clock that jumps does not use it up.
    patience = max(PATIENCE - (export.age(clock.now()) or 0), HOUR)
    links_only = export.completed
    while True:
        due = next_poll(export.requested_at, export.polls, clock.now())
        due = max(earliest_poll(export.polls) if links_only else due, not_before)
        patience -= max(0.0, due - clock.now())
        if patience < 0:
            when = time.strftime("%H:%M %Z", time.localtime(due))
            text = f"Export job {export.job_id} is still {state}. Run again after {when}."
            raise ReportError(text, UNFINISHED)
        clock.sleep(due - clock.now(), partial(show_wait, export, state, clock))
        links_only = False
        try:
            state, links, reason = poll_job(api, export, clock)
        except ReportError as error:
            wait = error.wait if isinstance(error, RetryableError) else None
            failures += wait is None
            # A 404 may mean that the job is very new.
            retryable = isinstance(error, RetryableError) or error.status == 404
            if not retryable or failures > len(RETRY_PAUSES):
                raise
            not_before = clock.now() + (wait or 0)
            log.warning(
                "%s Checking again%s.", error, f" in {format_duration(wait)}" if wait else ""
            )
            continue
        failures = 0
        age = export.age(clock.now())
        log.log(STEP, "Export: %s%s", state, f" after {format_duration(age)}" if age else "")
        if links and state == "completed":
            return links
        empty += state == "completed"
        check_state(state, reason, empty)


def check_state(state: str, reason: str, empty: int) -> None:
    """Raises NothingToCollect if waiting is pointless. `empty`: how often links were missing."""
    if state == "failed":
        hint = "Try a shorter window (--start, --end) or fewer organizations (SHARED_ORG_IDS)."
        raise NothingToCollect(f"The export failed: {reason}. {hint}")
    if empty == 3:  # Links can come late (CircleCI support), or there is no usage.
        raise NothingToCollect("The export has no files: no usage in this window.", NO_USAGE)
    if state not in ("created", "processing", "completed"):
        log.warning("The export job has an unknown state: %s. Waiting.", state)


def show_wait(export: Export, state: str, clock: Clock, left: float) -> None:
    used = sum(at > clock.now() - 3600 for at in export.polls)
    age = export.age(clock.now())
    after = f", {format_duration(age)}" if age else ""
    text = "Export: %s%s. Next check in %s (%d/%d used this hour)"
    log.log(LIVE, text, state, after, format_duration(left), used, GETS_PER_HOUR)


# --- Downloading the parts, which stay compressed and are verified as they arrive ---


@dataclass
class Part:
    name: str  # in messages
    link: str  # signed
    stem: Path  # of its file
    received: int = 0  # bytes
    length: int | None = None  # bytes; None if not known


class Body(io.RawIOBase):
    """A response's body as a file. What is read from it is also written to `copy`."""

    def __init__(self, response: requests.Response, part: Part, copy: BinaryIO) -> None:
        super().__init__()
        self.raw, self.part, self.copy = response.raw, part, copy
        self.raw.enforce_content_length = True  # urllib3 1.26 needs to be told.

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = partial(self.raw.read, len(buffer), decode_content=False)
        block = in_time(read, READ_SECONDS * max(1, len(buffer) / READ_BYTES))
        self.copy.write(block)
        self.part.received += len(block)
        buffer[: len(block)] = block
        return len(block)


def part_stems(total: int, digest: str) -> list[str]:
    return [f"part-{n:04}-of-{total:04}-{digest}" for n in range(1, total + 1)]


def plan_parts(folder: Path, links: Sequence[str]) -> list[Part]:
    """The parts of an export. Their file names stay the same when the links are signed again."""
    paths = "\n".join(link.partition("?")[0] for link in links)
    stems = part_stems(len(links), hashlib.sha256(paths.encode()).hexdigest()[:12])
    return [
        Part(f"Part {n} of {len(links)}", link, folder / stem)
        for n, (link, stem) in enumerate(zip(links, stems), 1)
    ]


def downloaded_parts(folder: Path) -> dict[str, Path]:
    """The parts on disk, in order, by the stem of their names. A name ends with the size: a file of
    another size is damaged and is ignored."""
    found = {}
    for path in sorted(folder.glob("part-*.csv.gz")):
        stem, _, size = path.name.partition(".")[0].rpartition("-")
        if size == str(path.stat().st_size):
            found[stem] = path
    return found


def collect_parts(api: Api, export: Export) -> list[Path]:
    """The complete parts in order. Those from an earlier run are not downloaded again."""
    found = downloaded_parts(export.folder)
    digests = {stem.rpartition("-")[2] for stem in found}
    if found and list(found) in [part_stems(len(found), digest) for digest in digests]:
        return list(found.values())
    for _ in range(3):
        parts = plan_parts(export.folder, wait_for_links(api, export))
        export.save()
        try:
            download_parts([part for part in parts if part.stem.name not in found], len(parts))
            found = downloaded_parts(export.folder)
            return [found[part.stem.name] for part in parts]
        except ReportError as error:
            if error.status not in LINK_EXPIRED:
                raise
            log.warning("%s Asking CircleCI for new links.", error)
            found = downloaded_parts(export.folder)
    raise ReportError("Downloads fail with new links, too. Check the network and HTTPS_PROXY.")


def download_parts(missing: Sequence[Part], total: int) -> None:
    """Download parts, a few at a time. Tries them all, keeps what is complete, and then raises the
    first error; an error about an expired link only if there is no other."""
    pool = concurrent.futures.ThreadPoolExecutor(PARALLEL_DOWNLOADS)
    jobs = [pool.submit(retry, partial(download_part, part)) for part in missing]
    running = set(jobs)
    while running:
        size = format_size(sum(part.received for part in missing))
        lengths = [part.length for part in missing if part.length is not None]
        size += f" of {format_size(sum(lengths))}" if len(lengths) == len(missing) else ""
        complete = total - len(running)
        log.log(LIVE, "Downloading: %s, %d of %d parts complete", size, complete, total)
        running = concurrent.futures.wait(running, timeout=0.2).not_done
    pool.shutdown()
    errors = [error for error in (job.exception() for job in jobs) if error]
    if errors:
        log.info("%d of %d parts are complete and kept.", total - len(errors), total)
        raise min(errors, key=lambda error: getattr(error, "status", 0) in LINK_EXPIRED)
    size = format_size(sum(part.received for part in missing))
    log.info("Downloaded %d part%s, %s.", len(missing), "s" * (len(missing) != 1), size)


def download_part(part: Part) -> None:
    """Download and verify a part: its length, its gzip CRC-32, its first line. Raises
    RetryableError, or ReportError with status 401 or 403 if the link has expired."""
    part.received = 0
    try:
        response = in_time(partial(send, "GET", part.link), ANSWER_SECONDS)
        try:
            check_download(response.status_code, part.name)
            part.length = response.raw.length_remaining
            with new_file(part.stem) as file:
                body = io.BufferedReader(Body(response, part, file), READ_BYTES)
                verify_part(part, response, body)
            os.replace(part.stem, f"{part.stem}-{part.received}.csv.gz")
            flush_folder(part.stem.parent)
        finally:
            WORKERS.submit(response.close)  # close() would wait for a stuck read.
    except (zlib.error, EOFError, gzip.BadGzipFile):
        raise RetryableError(f"{part.name} is damaged: invalid gzip data.", FAILED) from None
    except NETWORK_ERRORS as error:
        text = f"{part.name} failed: {explain_failure(error)[1]}."
        raise RetryableError(text, UNFINISHED) from None
    log.debug("%s is complete: %s", part.name, format_size(part.received))


def verify_part(part: Part, response: requests.Response, body: Any) -> None:
    """Read the body to its end. Raises RetryableError if it is not a CSV or may be cut off."""
    rows = decompress(body)
    first = rows.readline(MAX_ROW)
    if first and not looks_like_row(first):
        text = f"{part.name} is not a CSV. It may be a web page or an error message."
        raise RetryableError(text, FAILED)
    chunked = response.headers.get("Transfer-Encoding", "").lower() == "chunked"
    if rows is body and part.length is None and not chunked:
        text = f"{part.name} is uncompressed and has no length, so its end cannot be verified."
        raise RetryableError(text, FAILED)
    while rows.read(BLOCK):
        pass


def check_download(status: int, name: str) -> None:
    """Raises the error for a status other than 200."""
    text = f"{name} failed with {status}"
    if status in LINK_EXPIRED:
        raise ReportError(f"{text}: the link has expired.", status=status)
    if status in (408, 429) or status >= 500:
        raise RetryableError(f"{text}.", UNFINISHED)
    if status != 200:
        raise ReportError(f"{text}. The report needs every part.")


# --- Reading parts and rows, whatever their dialect ---

BOM = b"\xef\xbb\xbf"
GZIP_MAGIC = b"\x1f\x8b"
COLUMN_NAME = re.compile(r"\w+( \w+)*", re.ASCII)
ESCAPE = re.compile(r"\\(.)", re.DOTALL)
ESCAPED_CELL = re.compile(r"([^\\,]*(?:\\.[^\\,]*)*),", re.DOTALL)


def decompress(file: Any) -> Any:
    """The decompressed content: undoes the file's own gzip, and one the store may have added."""
    for _ in range(2):
        if file.peek(2)[:2] == GZIP_MAGIC:
            file = gzip.GzipFile(fileobj=file, mode="rb")
    return file


def looks_like_row(line: bytes) -> bool:
    """False for HTML, JSON, a message, or another compression. The merge checks more closely."""
    text = line[len(BOM) :] if line.startswith(BOM) else line
    likely = b"," in text and re.match(rb'["\\\w]', text)
    return bool(likely) and not re.search(rb"[\x00-\x08\x0e-\x1f]", text)


def is_quoted(row: str) -> bool:
    """Whether a cell begins with a quote."""
    return '"' in row and re.search(r'(?:^|(?<!\\),)"', row) is not None


def parse_row(row: str) -> list[str]:
    """The cells of a row of an export; a missing value is an empty cell.

    If a cell begins with a quote, the row is quoted: "" is a quote, a backslash is a backslash,
    and \\N is missing. In other rows, \\x is x, and \\N or \\\\N is missing. (From real exports and
    from Snowflake's unloads, which they resemble.) Raises csv.Error."""
    row = row[:-1] if row.endswith("\n") else row
    row = row[:-1] if row.endswith("\r") else row
    if is_quoted(row):
        return ["" if cell == r"\N" else cell for cell in next(csv.reader([row], strict=True))]
    cells = ESCAPED_CELL.findall(row + ",") if r"\," in row else row.split(",")
    missing = (r"\N", r"\\N")
    return [
        cell if "\\" not in cell else "" if cell in missing else ESCAPE.sub(r"\1", cell)
        for cell in cells
    ]


def read_rows(file: Any, first: bytes = b"") -> Iterator[list[str]]:
    """The cells of each row of `first` and the rest of the file. A row ends with its line, unless a
    quote or an escape is open. Raises csv.Error."""
    text = io.TextIOWrapper(file, "utf-8", "replace", newline="\n")
    lines = chain([first.decode("utf-8", "replace")], iter(partial(text.readline, MAX_ROW), ""))
    row: list[str] = []
    size, quotes, quoted = 0, 0, False
    for line in lines:
        quoted = quoted if row else is_quoted(line)
        row.append(line)
        size, quotes = size + len(line), quotes + line.count('"')
        if size >= MAX_ROW:
            raise csv.Error("a row is too long, or a quote is never closed")
        content = line.rstrip("\r\n")
        escapes = len(content) - len(content.rstrip("\\"))
        if (quotes if quoted else escapes) % 2:
            continue  # A quote or an escape is open.
        if len(row) > 1 or content:
            yield parse_row("".join(row))
        row, size, quotes = [], 0, 0
    if size:
        raise csv.Error("the last row is incomplete")


# --- Merging: the header once, then every row of every part ---


def merge_parts(parts: Sequence[Path], report: BinaryIO, plain: bool) -> None:
    """Write the bytes of every row, or plain CSV. Raises ReportError if a part does not fit the
    first one, NothingToCollect if all are empty."""
    header = b""
    for number, path in enumerate(parts, 1):
        try:
            with open(path, "rb") as file:
                header = merge_part(decompress(file), number, header, report, plain)
        except (ReportError, csv.Error) as error:
            text = f"Part {number} is not a valid CSV: {error}."
            if plain and isinstance(error, csv.Error):
                hint = "To get the rows as CircleCI wrote them, run again without --plain."
                raise ReportError(f"{text} {hint}") from None
            for suspect in {parts[0], path}:
                suspect.unlink()  # so that the next run downloads it again
            raise error if isinstance(error, ReportError) else ReportError(text) from None
        except (zlib.error, EOFError, gzip.BadGzipFile):
            path.unlink()
            text = f"Part {number} was damaged on disk and is removed. The next run downloads it."
            raise ReportError(text, UNFINISHED) from None
    if not header:
        raise NothingToCollect("The export has no rows: no usage in this window.", NO_USAGE)


def merge_part(rows: Any, number: int, header: bytes, report: BinaryIO, plain: bool) -> bytes:
    """Write one part. Returns the header line, which is empty until a part has one."""
    line = rows.readline(MAX_ROW)
    bom = BOM if line.startswith(BOM) else b""
    line = line[len(bom) :]
    if not line:
        return header
    cells = parse_row(line.decode("utf-8", "replace"))
    if not header:
        if len(cells) < 2 or not all(map(COLUMN_NAME.fullmatch, cells)):
            raise ReportError(f"Part {number} is not a usage export: it has no column names.")
        header = line
        report.write(b"" if plain else bom)
    else:
        columns = parse_row(header.decode())
        line = b"" if cells == columns else check_first_row(line, cells, columns, number)
    if plain:
        copy_plain(read_rows(rows, line), report, len(cells))
    else:
        last = line or b"\n"
        for block in chain([line], iter(partial(rows.read, BLOCK), b"")):
            report.write(block)
            last = block or last
        if not last.endswith(b"\n"):
            report.write(b"\r\n" if header.endswith(b"\r\n") else b"\n")
    return header


def check_first_row(line: bytes, cells: list[str], columns: list[str], number: int) -> bytes:
    """The first line of a later part, if it is a row. Raises ReportError if it is another header,
    or does not fit the columns."""
    found, wanted = set(cells), set(columns)
    mostly_names = 2 * len(found & wanted) > len(columns)
    if len(cells) > 1 and (mostly_names or all(map(COLUMN_NAME.fullmatch, cells))):
        changes = [f"without {name}" for name in columns if name not in found]
        changes += [f"with {name}" for name in cells if name not in wanted]
        text = clean(", ".join(changes)) or "in a different order"
        raise ReportError(f"Part {number} has different columns than part 1: {text}.")
    if len(cells) != len(columns):
        text = f"its first line has {len(cells)} cells, not {len(columns)}"
        raise ReportError(f"Part {number} does not match part 1: {text}.")
    return line


def copy_plain(rows: Iterable[list[str]], report: BinaryIO, columns: int) -> None:
    """Write plain CSV (RFC 4180). Raises csv.Error if a row does not fit the header."""
    text = io.TextIOWrapper(report, "utf-8", newline="")
    writer = csv.writer(text)
    for row in rows:
        if len(row) != columns:
            raise csv.Error(f"a row has {len(row)} cells, but the header has {columns}")
        writer.writerow(row)
    text.detach()


def publish_report(export: Export, label: str, plain: bool) -> Path:
    """Move the merged file into place atomically, never over another file. Returns its path."""
    merged, output, moment = export.folder / MERGED, export.folder.parent, time.time()
    while True:
        stamp = time.strftime("%Y%m%d_%H%M%S", time.localtime(moment))
        report = output / f"all_orgs_{stamp}_{label}.csv"
        moment += 1
        if report.exists():
            continue
        export.report, export.plain = report.name, plain
        export.save()  # so that the next run recognizes the report if this one is killed
        try:
            os.link(merged, report)
        except FileExistsError:
            continue
        except OSError:  # no hard links on this file system
            os.rename(merged, report)
        flush_folder(output)
        return report


# --- Summary, from the finished report ---

COUNTED = ["ORGANIZATION_ID", "ORGANIZATION_NAME", "PROJECT_ID", "PROJECT_NAME", "TOTAL_CREDITS"]
Key = tuple[str, ...]  # (), (organization ID,), or (organization ID, project ID)


@dataclass
class Usage:
    """Rows and credits: total, by organization, and by project."""

    rows: Counter[Key] = field(default_factory=Counter)
    credits: dict[Key, Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    names: dict[Key, str] = field(default_factory=dict)

    def add(self, cells: Sequence[str], times: int = 1) -> None:
        """Count rows that have these COUNTED cells. Raises ValueError for invalid credits."""
        organization_id, organization, project_id, project, credits = cells
        organization_id, used = organization_id.lower(), times * parse_credits(credits)
        for key in ((), (organization_id,), (organization_id, project_id)):
            self.rows[key] += times
            self.credits[key] += used
        self.names[(organization_id,)] = organization
        self.names[(organization_id, project_id)] = project


@lru_cache(1 << 16)
def parse_credits(text: str) -> Decimal:
    if not re.fullmatch(r"(-?[0-9]{1,12}(\.[0-9]{1,9})?)?", text):  # so that sums are exact
        raise ValueError(f"{clean(text)} is not a valid number of credits")
    return Decimal(text or 0)


def quick_pattern(quote: bytes, cell: bytes) -> re.Pattern[bytes]:
    """Matches a row in today's column order: the first five columns, and the credits at the end.
    Skipping what is in between makes this several times faster than the csv module."""
    uuid, credits = quote + b"[0-9a-fA-F-]{36}" + quote, quote + rb"(?:[0-9.]*|\\\\?N)" + quote
    first = b",".join([uuid, cell, cell, uuid, cell])
    return re.compile(rb"(?m)^(" + first + rb"),.*(?<!\\),(" + credits + rb")\r?$")


QUICK_COLUMNS = [*COUNTED[:2], "ORGANIZATION_CREATED_DATE", *COUNTED[2:4]]
QUICK_QUOTED = quick_pattern(b'"', rb'"[^"\n]*"')
QUICK_BARE = quick_pattern(b"", rb'[^",\\\n]*(?:\\,[^",\\\n]*)*')


def count_usage(report: Path, plain: bool) -> Usage:
    """Raises ValueError or csv.Error if the usage cannot be counted exactly."""
    with open(report, "rb") as file:
        first = file.readline(MAX_ROW)
        columns = parse_row(first.decode("utf-8-sig", "replace"))
        missing = [name for name in COUNTED if name not in columns]
        if missing:
            raise ValueError(f"the report has no column {', '.join(missing)}")
        if not plain and columns[:5] == QUICK_COLUMNS and columns[-1] == COUNTED[-1]:
            with contextlib.suppress(ValueError):
                return count_quickly(file, len(columns))
        file.seek(len(first))
        rows: Iterator[list[str]] = read_rows(file)
        if plain:
            rows = csv.reader(io.TextIOWrapper(file, "utf-8", newline=""), strict=True)
        usage, indexes = Usage(), [columns.index(name) for name in COUNTED]
        for row in rows:
            if len(row) != len(columns):
                raise ValueError("a row does not fit the header")
            usage.add([row[index] for index in indexes])
        return usage


def count_quickly(file: BinaryIO, columns: int) -> Usage:
    """Raises ValueError unless the number of separators and quotes shows that each line is a row,
    and that no cell contains a separator or a quote."""
    usage = Usage()
    parse = lru_cache(1 << 16)(lambda raw: parse_row(raw.decode("utf-8", "replace")))
    for block in iter(lambda: file.read(BLOCK) + file.readline(MAX_ROW), b""):
        quoted = block.startswith(b'"')
        rows = (QUICK_QUOTED if quoted else QUICK_BARE).findall(block)
        separators, quotes = block.count(b'","' if quoted else b","), block.count(b'"')
        if not quoted:
            escaped = block.count(b"\\,")
            separators -= escaped - block.count(b"\\\\,") if escaped else 0
        found = (block.count(b"\n"), separators, quotes)
        if found != (len(rows), (columns - 1) * len(rows), 2 * columns * len(rows) * quoted):
            raise ValueError
        for (cells, credits), times in Counter(rows).items():
            organization_id, organization, _, project_id, project = parse(cells)
            usage.add((organization_id, organization, project_id, project, *parse(credits)), times)
    return usage


def format_summary(usage: Usage, organizations: Mapping[str, str], width: int) -> list[str]:
    """A table of the organizations, and one of the projects with the most credits."""
    names = {key: clean(name) for key, name in usage.names.items()}
    names.update({(key,): name for key, name in organizations.items() if name})
    bar = 20 if 80 <= width < LOG_WIDTH else 0

    def figures(key: Key, bar: int = 0) -> list[str]:
        credits, total = usage.credits[key], usage.credits[()]
        share = credits / total if total else Decimal()
        cells = [f"{usage.rows[key]:,}", f"{credits.normalize():,f}", f"{share:.1%}"]
        return cells + [("#" * round(bar * share)).ljust(bar)] if bar else cells

    keys = sorted(usage.names, key=lambda key: (-usage.credits[key], names[key], key))
    rows = [["ORGANIZATION", "ROWS", "CREDITS", "SHARE", ""]]
    rows += [[names[key] or key[0], *figures(key, bar)] for key in keys if len(key) == 1]
    unused = [key for key in organizations if (key,) not in usage.rows]
    rows += [[organizations[key] or key, "no usage", "", "", ""] for key in unused]
    rows.append(["Total", *figures((), bar)])
    projects = [["PROJECT", "ORGANIZATION", "ROWS", "CREDITS", "SHARE"]]
    for key in [key for key in keys if len(key) == 2][:MAX_LISTED]:
        projects.append([names[key] or "-", names[key[:1]] or key[0], *figures(key)])
    return [format_table(rows, 1, width), format_table(projects, 2, width)]


# --- The run ---


def show_request(settings: Settings, organizations: Mapping[str, str], width: int) -> None:
    if not settings.window:
        log.info("Collecting export job %s.", settings.job_id)
        return
    first, last = settings.window.start.date(), settings.window.end.date()
    count = f"{len(organizations)} organization{'s' * (len(organizations) > 1)}"
    log.info("Usage from %s to %s (UTC), %s", first, last, count)
    rows = [["ORGANIZATION", "ID"], *([name or "-", key] for key, name in organizations.items())]
    log.log(TABLE, "%s", format_table(rows[: MAX_LISTED + 1], 2, width))
    if len(organizations) > MAX_LISTED:
        log.info("... and %d more", len(organizations) - MAX_LISTED)
    incomplete = max(first, (utc_now() - timedelta(hours=REFRESH_HOURS)).date())
    if incomplete <= last:
        days = f"{incomplete} to {last}" if incomplete < last else last
        log.warning("CircleCI may not have complete usage for %s yet.", days)


def obtain_parts(
    api: Api, settings: Settings, export: Export | None, request: Callable[[], Export]
) -> tuple[Export, list[Path]]:
    """The export and its complete parts. If the job does not exist, it is requested again, once."""
    export = export or request()
    log.info("This can take up to 4 hours. Ctrl-C is safe: run the same command to resume.")
    try:
        return export, collect_parts(api, export)
    except ReportError as error:
        if error.status != 404:
            raise
        if settings.primary not in (row[2].lower() for row in list_collaborations(api)):
            text = f"{error} The token has no access to organization {settings.primary}."
            raise ReportError(text) from None
        if settings.job_id:  # The folder of the run that requested the job stays.
            raise (ReportError if export.requested_at else NothingToCollect)(str(error)) from None
    log.warning("CircleCI cannot find export job %s. Requesting the export again.", export.job_id)
    export = request()
    return export, collect_parts(api, export)


def run(args: argparse.Namespace, console: Console, interruption: Interruption) -> int:
    """The steps of a run. Returns the exit code. Raises ReportError or OSError."""
    started, variables = time.time(), read_variables(args)
    SECRETS.add(variables["CIRCLE_TOKEN"].value)
    settings = load_settings(args, variables)
    api = Api(settings)
    if not settings.primary:
        log.critical("%s", primary_question(api, console.width))
        return INVALID
    log.info("Signed in as %s.", signed_in_user(api))
    organizations = find_organizations(api, settings)
    show_request(settings, organizations, console.width)
    body: dict[str, Any] = {}
    if settings.window:
        start, end, _ = map(iso, settings.window)
        body = {"start": start, "end": end, "shared_org_ids": list(organizations)}
    if args.dry_run:
        post = f"POST {api.exports}\n{json.dumps(body, indent=2)}"
        text = f"GET {api.exports}/{settings.job_id}" if settings.job_id else post
        log.info("Dry run. The next request would be:\n%s", text)
        return 0
    folder = find_folder(settings, organizations)
    with open_folder(folder, interruption):
        export = resume_export(folder, settings)
        report = export.published_report(args.plain) if export else None
        if not report:
            request = partial(request_export, api, body, folder, interruption)
            export, parts = obtain_parts(api, settings, export, request)
            with new_file(folder / MERGED) as file:
                merge_parts(parts, file, args.plain)
            days = f"{body['start'][:10]}_{(export.end or body['end'])[:10]}" if body else ""
            report = publish_report(export, days or settings.job_id, args.plain)
        with interruption.hold():
            print_path(report)
            interruption.succeeded = True
            remove_folder(folder)
    if not args.quiet:
        shown = organizations if settings.window else {}
        show_summary(report, args.plain, shown, console.width, started)
    return 0


def print_path(report: Path) -> None:
    """Print the path to stdout as its raw bytes, whatever the encoding of stdout."""
    if sys.stdout:  # 1>&- leaves no stdout.
        sys.stdout.buffer.write(os.fsencode(f"{report}\n"))
        sys.stdout.flush()


def show_summary(
    report: Path, plain: bool, organizations: Mapping[str, str], width: int, started: float
) -> None:
    """The report is published, so whatever goes wrong here is a notice."""
    try:
        usage = count_usage(report, plain)
        for table in format_summary(usage, organizations, width):
            log.log(TABLE, "%s", table)
        size, duration = format_size(report.stat().st_size), format_duration(time.time() - started)
        log.info("%s rows, %s, %s", f"{usage.rows[()]:,}", size, duration)
    except Exception as error:
        log.warning("No summary: %s. The report is complete.", clean(error))


def main(argv: Sequence[str] | None = None) -> int:
    """Run once. Turns failures into a message and an exit code. (argparse exits by itself.)"""
    args = parse_arguments(argv)
    console = Console(args.quiet and not args.dry_run, args.verbose)
    log.setLevel(logging.DEBUG)
    log.handlers = logging.getLogger("dotenv").handlers = [console]
    interruption = Interruption(console)
    if __name__ == "__main__":
        catch_signals(interruption.handle)
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
    if interruption.folder and holds_export(interruption.folder):
        text += f" The export is kept in {interruption.folder}. Run the same command to resume."
    elif code == UNFINISHED:
        text += " Run the same command again."
    log.error("%s", text)
    return code


if __name__ == "__main__":
    os._exit(main())
