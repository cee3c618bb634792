#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = [
#   'requests>=2.33,<3; python_version >= "3.10"',
#   'requests>=2.32.5,<3; python_version < "3.10"',
#   'python-dotenv>=1.2.2,<2; python_version >= "3.10"',
#   'python-dotenv>=1.2.1,<2; python_version < "3.10"',
# ]
# ///
"""One CSV of CircleCI usage for every organization on a plan.

The run: check the settings; ask who the token belongs to; list the organizations that share the plan;
ask for ONE export of them all; wait for it within the API's limits; download its parts; merge them;
put the report in place; show a summary (stderr) and print the report's path (stdout).

An export is scarce: 10 an hour, up to 4 hours of work each. So its job ID is on disk before anything
else happens, and whatever interrupts the run, the same command goes on where it stopped.

Exit codes: 0 the report is written; 1 the API, the export or a download failed for good; 2 a setting or
argument is wrong; 3 no usage in that window; 75 not finished, run the same command again; 130 and 143
interrupted by Ctrl-C or SIGTERM, run the same command again.
"""

from __future__ import annotations

import argparse
import calendar
import contextlib
import csv
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

warnings.filterwarnings("ignore", module="urllib3")  # the Python of macOS has an old SSL, and says so in every run

import dotenv
import requests
import urllib3

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__version__ = "1.0.0"
T = TypeVar("T")

# --- Facts of CircleCI's Usage API (source: its OpenAPI description, unless another is named) ---

MAX_WINDOW = timedelta(days=32)
HISTORY_MONTHS = 13
QUERY_LIMIT = 4 * 3600  # seconds that an export may take
GETS_AN_HOUR = 10  # for each organization; the same holds for POSTs

# --- Choices made here: seconds and bytes ---

LIMIT_HOUR = 3600 + 15  # an hour as CircleCI's clock sees it: requests spend time on the way
PATIENCE = QUERY_LIMIT + 15 * 60
RETRY_PAUSES = (1, 2, 4, 8, 16)
TIMEOUTS = (10, 60)  # to connect, and between two reads
PARALLEL_DOWNLOADS = 6
BLOCK = 1 << 20

SCRIPT_FOLDER = Path(__file__).resolve().parent
PLACEHOLDER = "your-personal-api-token"  # what .env.example has for CIRCLE_TOKEN
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
BOM = b"\xef\xbb\xbf"
GZIP_MAGIC = b"\x1f"  # the first of its two bytes: no CSV begins with it


# --- What can go wrong ---


class ReportError(Exception):
    """The run ends. The text says what happened and what to do next, `code` is the exit code."""

    code = 1


class SettingsError(ReportError):
    code = 2


class NoUsage(ReportError):
    code = 3


class NotFinished(ReportError):
    code = 75


class NotFound(ReportError):
    """404 from the API: it knows no such job, or no such organization."""


class LinkExpired(ReportError):
    """The store refuses a signed link. The job gives fresh ones."""


class Transient(ReportError):
    """Worth another try. `lost`: the request went out, and what came of it is not known."""

    def __init__(self, text: str, code: int = ReportError.code, lost: bool = False) -> None:
        super().__init__(text)
        self.code, self.lost = code, lost


class RateLimited(NotFinished):
    """The limit is used up, for so many seconds."""

    def __init__(self, text: str, seconds: float) -> None:
        super().__init__(text)
        self.seconds = seconds


# --- What people see: stderr, through logging ---

log = logging.getLogger("usage_report")


def live(text: str, kind: str = "tick") -> None:
    """Redraw a terminal's one live line. Elsewhere a "tick" is dropped and a "poll" becomes a line."""
    log.info("%s", text, extra={"live": kind})


class Console(logging.Handler):
    """Writes to stderr; never the token, the query of a signed URL, or a control character."""

    def __init__(self, quiet: bool, verbose: bool) -> None:
        super().__init__(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)
        self.stream = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  (2>&- leaves no stderr)
        self.terminal = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.secret = ""
        self.drawn = 0  # width of the live line

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        text = text.replace(self.secret, "[token]") if self.secret else text
        text = re.sub(r"(?i)(https?://[^\s?]+)\?\S*", r"\1?[signature]", text)
        text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
        kind = getattr(record, "live", "")
        if kind and self.terminal:
            self.draw(text)
        elif kind != "tick":
            self.draw("")
            begin = {logging.ERROR: "error: ", logging.WARNING: "notice: "}.get(record.levelno, "")
            clock = "" if self.terminal else time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime(time.time()))
            self.stream.write("".join(f"{clock}{line}\n" for line in (begin + text).split("\n")))
        self.stream.flush()

    def draw(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]
        if text or self.drawn:
            self.stream.write("\r" + text.ljust(self.drawn) + ("" if text else "\r"))
        self.drawn = len(text)


def span(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds))))


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def table(rows: Sequence[Sequence[str]], sides: str) -> str:
    """Rows as aligned text; `sides` has < or > for each column."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths)).rstrip() for row in rows)


# --- Settings: flag, then environment, then .env ---


class Window(NamedTuple):
    start: datetime
    end: datetime  # as CircleCI is asked for it: not in the future
    asked_end: datetime  # as the user asks for it: the same whenever the command is run


class Settings(NamedTuple):
    token: str
    base_url: str
    output: Path
    primary: str  # empty: the organizations to choose from are listed
    shared: list[str]  # empty: the API is asked for them
    job_id: str
    window: Window | None  # None with job_id


HELP = """\
settings (from the environment, or from .env beside the script):
  CIRCLE_TOKEN          personal API token, required
  PRIMARY_ORG_ID        UUID of the organization that holds the plan, required;
                        where it is empty, the choices are listed
  START_DATE, END_DATE  the window, where no flag gives it
  SHARED_ORG_IDS        comma-separated UUIDs: report these organizations, do
                        not ask CircleCI which ones share the plan
  CIRCLECI_BASE_URL     default https://circleci.com

examples:
  python usage_report.py --period last-month
  python usage_report.py --start 2026-03-01 --end 2026-03-15T11:59:59Z
  python usage_report.py --period yesterday --dry-run
  python usage_report.py --job-id e8235eed-f121-4ae3-9c72-2719d6572818
  csv=$(python usage_report.py --quiet --period last-month)

exit codes: 0 done, 1 failed, 2 wrong setting, 3 no usage, 75 not finished,
130 and 143 interrupted; after 75, 130 and 143 the same command goes on"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="usage_report.py",
        description="Write one CSV of CircleCI usage for every organization on a plan.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    text, switch = partial(parser.add_argument, type=str.strip, default=""), parser.add_argument
    text("--start", metavar="WHEN", help="YYYY-MM-DD or YYYY-MM-DDThh:mm:ssZ, in UTC")
    text("--end", metavar="WHEN", help="the same; a plain date means its last second")
    text("--period", help="yesterday, last-7-days, this-month, last-month or YYYY-MM: whole UTC days")
    text("--output-dir", metavar="DIR", help="for the report (default: usage_reports beside the script)")
    text("--env-file", metavar="FILE", help="read the settings here (default: .env beside the script)")
    text("--job-id", metavar="UUID", help="collect an export that exists already, ask for no new one")
    switch("--dry-run", action="store_true", help="show organizations, window and request, then stop")
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-q", "--quiet", action="store_true", help="nothing on stderr unless the run fails")
    volume.add_argument("-v", "--verbose", action="store_true", help="show every request")
    switch("--version", action="version", version=f"%(prog)s {__version__}")
    return parser.parse_args(argv)


def load_settings(args: argparse.Namespace) -> Settings:
    """All settings, checked. Raises SettingsError at the first that is wrong."""
    env_file = Path(args.env_file or SCRIPT_FOLDER / ".env").absolute()
    values = read_env_file(env_file) if args.env_file or env_file.exists() else {}

    def setting(name: str) -> str:
        return (os.environ.get(name) or "").strip() or (values.get(name) or "").strip()

    token = setting("CIRCLE_TOKEN")
    if token in ("", PLACEHOLDER) or not re.fullmatch(r"[!-~]+", token):
        trouble = "is not set" if token in ("", PLACEHOLDER) else "has a blank or a character that no token has"
        raise SettingsError(
            f"CIRCLE_TOKEN {trouble}. Make a personal API token (CircleCI > User Settings > Personal API Tokens) "
            f"and put it into {env_file} (the environment goes before it), like CIRCLE_TOKEN=CCIPAT_..."
        )
    base_url = check_base_url(setting("CIRCLECI_BASE_URL") or "https://circleci.com")
    output = check_output(Path(args.output_dir or SCRIPT_FOLDER / "usage_reports").absolute())
    primary = check_uuid("PRIMARY_ORG_ID", setting("PRIMARY_ORG_ID"))
    listed = enumerate(setting("SHARED_ORG_IDS").split(","), 1)
    shared = [check_uuid(f"SHARED_ORG_IDS (entry {n}, between commas)", one) for n, one in listed if one.strip()]
    job_id = check_uuid("--job-id", args.job_id)
    window = None
    if primary and (not job_id or args.start or args.end or args.period):
        window = choose_window(args, setting("START_DATE"), setting("END_DATE"))
    return Settings(token, base_url, output, primary, shared, job_id, None if job_id else window)


def read_env_file(path: Path) -> Mapping[str, str | None]:
    try:
        # utf-8-sig: some editors begin a file with a BOM. Not interpolated: a $ is part of its value.
        return dotenv.dotenv_values(stream=io.StringIO(path.read_text("utf-8-sig")), interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "save it as UTF-8"
        raise SettingsError(f"The settings file {path} cannot be read ({reason}). --env-file names another.") from None


def check_uuid(name: str, text: str) -> str:
    text = text.strip().lower()
    if text and not UUID.fullmatch(text):
        # Not shown: it may be a token in the wrong place.
        raise SettingsError(
            f"{name} is not a UUID like b9291e0d-a11e-41fb-8517-c545388b5953. A run with PRIMARY_ORG_ID empty lists "
            "the IDs of organizations."
        )
    return text


def check_base_url(url: str) -> str:
    secure = r"https://([a-z0-9-]{1,63}(\.[a-z0-9-]{1,63})*|\[[0-9a-f:]+\])"
    loopback = r"http://(localhost|127(\.[0-9]{1,3}){3}|\[::1\])"
    url = url.lower()
    if not re.fullmatch(rf"({secure}|{loopback})(:[0-9]{{1,5}})?/?", url):
        raise SettingsError(
            "CIRCLECI_BASE_URL has a wrong value. A right one is https:// and a host, with nothing behind it, like "
            "https://circleci.com (http is for this machine alone, like http://127.0.0.1:8080)."
        )
    return url.rstrip("/")


def check_output(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SettingsError(
            f"The output folder {folder} cannot be written ({error.strerror}). Name another, like --output-dir reports."
        ) from None
    return folder


def period_days(period: str, today: date) -> tuple[date, date]:
    """The first and the last whole UTC day of a --period; the last is yesterday at the latest."""
    yesterday, month = today - timedelta(days=1), today.replace(day=1)
    periods = {
        "yesterday": (yesterday, yesterday),
        "last-7-days": (today - timedelta(days=7), yesterday),
        "this-month": (month, yesterday),
        "last-month": (months_back(month, 1), month - timedelta(days=1)),
    }
    if re.fullmatch(r"[1-9][0-9]{3}-(0[1-9]|1[0-2])", period):
        first = date(int(period[:4]), int(period[5:]), 1)
        periods[period] = first, min(month_end(first), yesterday)
    if period not in periods:
        raise SettingsError(f"--period is {period!r}. It takes {', '.join(periods)} or a month like 2026-03.")
    first, last = periods[period]
    if first > last:
        raise SettingsError(f"--period {period} has no whole UTC day yet. Try --period last-month.")
    return first, last


def month_end(day: date) -> date:
    return day.replace(day=calendar.monthrange(day.year, day.month)[1])


def months_back(day: date, months: int) -> date:
    """The same day of an earlier month, or that month's last."""
    index = day.year * 12 + day.month - 1 - months
    first = date(index // 12, index % 12 + 1, 1)
    return first.replace(day=min(day.day, month_end(first).day))


def choose_window(args: argparse.Namespace, start_text: str, end_text: str) -> Window:
    """The window by flag, or else from START_DATE and END_DATE."""
    now = datetime.fromtimestamp(int(time.time()), timezone.utc)
    if args.period and (args.start or args.end):
        raise SettingsError("--period goes without --start and --end: give either, like --period 2026-03.")
    if args.period:
        start_text, end_text = map(str, period_days(args.period, now.date()))
    return check_window(args.start or start_text, args.end or end_text, now)


def check_window(start_text: str, end_text: str, now: datetime) -> Window:
    start = parse_moment("START_DATE (--start)", start_text, "T00:00:00Z")
    asked_end = parse_moment("END_DATE (--end)", end_text, "T23:59:59Z")
    what = f"START_DATE (--start) {start_text}"
    oldest = months_back(now.date(), HISTORY_MONTHS)
    if start >= asked_end:
        raise SettingsError(f"{what} is not before END_DATE (--end) {end_text}, as in 2026-03-01 and 2026-03-31.")
    if start > now:
        raise SettingsError(f"{what} is in the future: there is no usage yet. A right value is {now.date()} or before.")
    if start.date() < oldest:
        raise SettingsError(f"{what} is too far back: CircleCI keeps {HISTORY_MONTHS} months, that is since {oldest}.")
    end = min(asked_end, now)
    if end < asked_end:
        log.warning("END_DATE (--end) %s is in the future: the window ends now, %s.", end_text, iso(end))
    if end - start > MAX_WINDOW:
        raise SettingsError(
            f"START_DATE {iso(start)} to END_DATE {iso(end)} is more than the {MAX_WINDOW.days} days of one export. "
            "These commands cover it, one report each:\n" + "\n".join(monthly_commands(start, end))
        )
    return Window(start, end, asked_end)


def parse_moment(name: str, text: str, time_of_day: str) -> datetime:
    """A moment in UTC. A plain date gets the time of day."""
    if not text:
        raise SettingsError(f"{name} is not set. Try --period last-month, or --start 2026-03-01 --end 2026-03-31.")
    with contextlib.suppress(ValueError):
        if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}:[0-9]{2}Z)?", text):
            full = text if "T" in text else text + time_of_day
            return datetime.strptime(full, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    raise SettingsError(f"{name} is {text!r}, which is no date like 2026-03-31 or 2026-03-31T23:59:59Z (UTC).")


def iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def monthly_commands(start: datetime, end: datetime) -> Iterator[str]:
    """Commands that cover a long window, a calendar month each."""
    while start < end:
        last = parse_moment("", str(month_end((start + timedelta(seconds=1)).date())), "T23:59:59Z")
        whole = start.day == 1 and start.time() == datetime.min.time() and last <= end
        flags = f"--period {start:%Y-%m}" if whole else f"--start {iso(start)} --end {iso(min(last, end))}"
        yield f"  python usage_report.py {flags}"
        start = last + timedelta(seconds=1)


# --- Talking to servers ---


def send(method: str, url: str, token: str = "", **options: Any) -> requests.Response:
    """One request, in a session of its own: no cookie is kept, and no connection that dies unseen in the
    minutes between two polls. No redirect is followed: it would take the token to another host."""
    headers = {"User-Agent": f"circleci-usage-report/{__version__}", "Accept-Encoding": "identity"}
    if token:
        headers["Circle-Token"] = token
    with requests.Session() as session:
        session.trust_env = url.startswith("https")  # without TLS, a proxy would see the token
        session.auth = lambda request: request  # with no auth at all, requests looks into ~/.netrc
        return session.request(method, url, headers=headers, timeout=TIMEOUTS, allow_redirects=False, **options)


def describe(error: Exception) -> str:
    """Why there is no answer, without the exception's own text: that can hold a signed URL."""
    timeouts = (requests.Timeout, urllib3.exceptions.TimeoutError)
    if any(isinstance(one, timeouts) for one in (error, *error.args)):  # requests wraps what urllib3 raises
        return "no answer in time"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "its certificate is not trusted (behind a company proxy, set REQUESTS_CA_BUNDLE)"
    return "no connection, or it broke off"


def pause(seconds: float, tick: Callable[[float], None] = lambda left: None) -> None:
    """Sleep, calling tick(seconds left) every second. In slices and by the wall clock, because a laptop
    that sleeps stops time.sleep too; so many slices at most, because a wall clock can be set back."""
    until = time.time() + seconds
    for _ in range(math.ceil(seconds) + 1):
        left = until - time.time()
        if left <= 0:
            break
        tick(left)
        time.sleep(min(left, 1))


def patiently(attempt: Callable[[], T], pauses: Sequence[float] = RETRY_PAUSES) -> T:
    """What attempt() returns. Transient trouble is tried again after growing pauses; a rate limit is waited
    out, however often, for PATIENCE at most. Raises the last trouble."""
    failures, limits, waited = 0, 0, 0.0
    while True:
        try:
            return attempt()
        except RateLimited as error:
            seconds = max(error.seconds, RETRY_PAUSES[min(limits, len(RETRY_PAUSES) - 1)])
            limits, waited = limits + 1, waited + seconds
            if waited > PATIENCE:
                raise
            log.warning("%s Waiting %s.", error, span(seconds))
        except Transient as error:
            if failures == len(pauses):
                raise
            seconds = pauses[failures]
            failures += 1
            log.warning("%s Trying again in %d s.", error, seconds)
        pause(seconds, lambda left: live(f"Trying again in {span(left)}"))


def to_its_end(work: Callable[[], T]) -> T:
    """What work() returns, in a thread of its own: Ctrl-C is held back until it is done."""
    job, interrupt = ThreadPoolExecutor(1).submit(work), None
    while not job.done():
        try:
            wait([job])
        except KeyboardInterrupt as held:
            interrupt = held
            log.warning("Waiting for CircleCI's answer first, so that no export is lost.")
    if interrupt:
        raise interrupt
    return job.result()


class Api:
    """CircleCI's API. The token goes to base_url and nowhere else: no redirect is followed."""

    HINTS = {
        401: "Is CIRCLE_TOKEN right (the environment goes before .env)? If so, make a new personal API token.",
        403: "The owner of CIRCLE_TOKEN has no access to PRIMARY_ORG_ID: ask an admin, or use an admin's token.",
        404: "Are PRIMARY_ORG_ID, SHARED_ORG_IDS and --job-id right, and may the owner of CIRCLE_TOKEN see them?",
    }

    def __init__(self, base_url: str, token: str) -> None:
        self.base_url, self.token = base_url, token

    def request(self, method: str, path: str, body: object = None) -> Any:
        """The JSON of one answer. Raises Transient, RateLimited, NotFound, or ReportError for a plain no."""
        what, began = f"{method} {path}", time.time()
        try:
            answer = send(method, self.base_url + path, self.token, json=body)
        except requests.RequestException as error:
            reasons = [getattr(cause, "reason", None) for cause in error.args]
            unsent = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)
            lost = not any(isinstance(reason, unsent) for reason in reasons)
            raise Transient(f"{what}: {describe(error)} ({self.base_url}).", NotFinished.code, lost) from None
        status = answer.status_code
        log.debug("%s: %d after %.1f s", what, status, time.time() - began)
        try:
            content = answer.json()
        except ValueError:
            content = None
        message = content.get("message") if isinstance(content, dict) else None
        said = f"{what} was answered {status}: {str(message or answer.reason or 'no message').rstrip('.')}."
        if status == 429:
            raise RateLimited(said, limit_seconds(answer.headers))
        if status == 408 or status >= 500:
            raise Transient(said)
        if not 200 <= status < 300:
            raise (NotFound if status == 404 else ReportError)(f"{said} {self.HINTS.get(status, '')}".rstrip())
        if content is None:
            text = f"{what} was answered {status} without JSON: is a proxy or login page between?"
            raise Transient(text, lost=True)
        return content


def limit_seconds(headers: Mapping[str, str]) -> float:
    """How long a 429 asks to wait: Retry-After (seconds or an HTTP date), else X-RateLimit-Reset (source:
    CircleCI's API developers' guide), else a tenth of the hour."""
    with contextlib.suppress(urllib3.exceptions.InvalidHeader):
        return min(urllib3.Retry().parse_retry_after(headers.get("Retry-After", "")), PATIENCE + 1)
    reset = headers.get("X-RateLimit-Reset", "")
    return float(reset) if re.fullmatch("[0-9]{1,5}", reset) else LIMIT_HOUR / GETS_AN_HOUR


# --- Who asks, and for which organizations ---


def token_owner(api: Api) -> str:
    me = patiently(partial(api.request, "GET", "/api/v2/me"))
    if not isinstance(me, dict) or not me.get("login"):
        raise ReportError(f"GET /api/v2/me names no user. Is CIRCLECI_BASE_URL right? It is {api.base_url}.")
    return f"{me.get('name') or 'somebody without a name'} ({me['login']})"


def organizations_to_choose(api: Api) -> str:
    """A table to copy PRIMARY_ORG_ID from."""
    found = patiently(partial(api.request, "GET", "/api/v2/me/collaborations"))
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ReportError("GET /api/v2/me/collaborations is no list of organizations. Is CIRCLECI_BASE_URL right?")
    columns = ("name", "slug", "id")
    return table([["NAME", "SLUG", "ID"], *([str(one.get(c) or "-") for c in columns] for one in found)], "<<<")


def organizations_on_plan(api: Api, settings: Settings) -> dict[str, str]:
    """Name by ID of every organization on the plan, the primary first. An answer that is not understood
    is a ReportError: a report of the primary alone would pass for the whole."""
    path = f"/private/orgs/{settings.primary}/plan/shares-for"  # undocumented (source: public code)
    found = dict.fromkeys(settings.shared, "")
    if not found:
        way_round = "The way round: name the organizations in SHARED_ORG_IDS, comma-separated."
        try:
            listed = patiently(partial(api.request, "GET", path))["orgs"]
            found = {one["id"].lower(): str(one.get("name") or "") for one in listed}
            if not isinstance(listed, list) or not all(map(UUID.fullmatch, found)):
                raise TypeError
        except (AttributeError, KeyError, TypeError):
            raise ReportError(f"GET {path} has no list of organizations that can be read. {way_round}") from None
        except ReportError as error:
            error.args = (f"{error} {way_round}",)
            raise
        if not found:
            log.info("The plan is not shared: the report covers the primary organization alone.")
    return {settings.primary: "", **found}


# --- The export job, and what is on disk of it ---


@dataclass
class Export:
    """One export, in a hidden folder from the POST until its report stands: these fields (state.json),
    the parts, and a lock. Neither the token nor a signed URL is among them."""

    folder: Path = Path()
    job_id: str = ""  # empty: not asked for yet
    asked_at: float = 0.0  # unix seconds of the POST
    polls: list[float] = field(default_factory=list)  # unix seconds of the last GETs
    parts: list[str] = field(default_factory=list)  # file names in order, once it is completed
    label: str = ""  # how the report's name ends

    @contextlib.contextmanager
    def opened(self, folder: Path) -> Iterator[None]:
        """Hold the folder for this run alone, and take up what an earlier one left there. It goes when there
        is no job to come back to. Raises NotFinished if another run holds it."""
        self.folder = folder
        with hold_lock(folder / "lock"):
            self.load()
            try:
                yield
            except NoUsage:
                self.forget()
                raise
            finally:
                if not self.job_id:
                    self.forget()
                    remove_folder(folder)
        if sys.platform == "win32" and not self.job_id:  # which removes no file that is open
            remove_folder(folder)

    def load(self) -> None:
        try:
            record = json.loads((self.folder / "state.json").read_text("utf-8"))
            now = time.time()  # a clock that was set back must not hold up the next poll
            self.job_id, self.label = str(record["job_id"]), str(record["label"])
            self.asked_at = min(float(record["asked_at"]), now)
            self.polls = [min(float(at), now) for at in record["polls"]]
            self.parts = [str(name) for name in record["parts"]]
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError):
            log.warning("%s is damaged, so the export is asked for anew.", self.folder / "state.json")
            self.forget()

    def save(self) -> None:
        """Write the fields so that a crash leaves the old ones or the new ones."""
        draft = self.folder / "state.new"
        with open(draft, "w", encoding="utf-8") as file:
            json.dump({key: value for key, value in vars(self).items() if key != "folder"}, file)
            flush(file)
        os.replace(draft, self.folder / "state.json")
        flush_folder(self.folder)

    def forget(self) -> None:
        """Start over, but for the GETs: they count for the organization, whatever the job."""
        last = ["state.json", "merged.csv"]  # in this order: a run that is killed on the way leaves what tells the next
        for path in sorted(self.folder.glob("*"), key=lambda path: last.index(path.name) if path.name in last else -1):
            if path.name != "lock":
                path.unlink()
        self.job_id, self.asked_at, self.parts, self.label = "", 0.0, [], ""

    def complete_parts(self) -> list[Path]:
        """The parts in order if all are here, else nothing."""
        paths = [self.folder / name for name in self.parts]
        return paths if all(path.exists() for path in paths) else []


def flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Let a rename in the folder survive a power cut (Windows opens no folder)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def hold_lock(path: Path) -> io.BufferedRandom:
    """The locked file. The lock ends when it is closed, or with the process, however that ends."""
    path.parent.mkdir(exist_ok=True)
    file = open(path, "a+b")  # noqa: SIM115  (the caller closes it)
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # no other run has just now removed it
            return file
    except (BlockingIOError, PermissionError, FileNotFoundError):
        pass
    file.close()
    raise NotFinished(f"Another run is at work on this export. Let it finish. (It holds {path}.)")


def remove_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / "lock").unlink()
        folder.rmdir()


def export_request(settings: Settings, organizations: Iterable[str]) -> tuple[str, dict[str, Any]]:
    """Path and body of the POST. The body is empty with --job-id, which asks for no export."""
    path = f"/api/v2/organizations/{settings.primary}/usage_export_job"
    if not settings.window:
        return path, {}
    start, end, _ = settings.window
    return path, {"start": iso(start), "end": iso(end), "shared_org_ids": list(organizations)}


def export_folder(settings: Settings, organizations: Iterable[str]) -> Path:
    """Another plan, window or set of organizations is another export, in another folder."""
    asked = [settings.base_url, settings.primary, settings.job_id]
    if settings.window:
        asked += [iso(settings.window.start), iso(settings.window.asked_end), *sorted(organizations)]
    return settings.output / f".export-{hashlib.sha256(' '.join(asked).encode()).hexdigest()[:16]}"


def ask_for_export(api: Api, path: str, request: Mapping[str, Any], export: Export) -> None:
    """The POST, and its job ID on disk; Ctrl-C does not part the two. After a lost answer it is sent once more
    and no oftener: each may have made an export, and the API lists none of them."""
    export.forget()
    export.label = f"{request['start'][:10]}_{request['end'][:10]}"
    export.save()  # a disk without room fails here, before anything is spent
    lost_before = False

    def attempt() -> None:
        nonlocal lost_before
        asked_at = time.time()
        try:
            answer = api.request("POST", path, request)
            if not isinstance(answer, dict) or not isinstance(answer.get("usage_export_job_id"), str):
                raise Transient(f"POST {path} was answered without a usage_export_job_id.", lost=True)
        except Transient as error:
            if error.lost and lost_before:
                raise NotFinished(f"{error} Whether CircleCI makes the export is not known. Run again later.") from None
            lost_before = lost_before or error.lost
            raise
        export.job_id, export.asked_at = answer["usage_export_job_id"], asked_at
        try:
            export.save()
        except OSError as error:
            job_id, export.job_id = export.job_id, ""
            raise NotFinished(f"{error.strerror}: tell the next run the job ID, by --job-id {job_id}.") from None

    patiently(partial(to_its_end, attempt))
    log.info("CircleCI works on export job %s.", export.job_id)


# --- Waiting for the job ---

FIRST_POLL = 15.0
# The best use of 10 GETs an hour for a job of unknown length is a geometric series: the report is late by
# the same share of the job's length, short or long. GET k comes GROWTH**k * 15 s after the POST, and
# GET 10 must come an hour after GET 0. So 15 * GROWTH**10 = 15 + an hour: GROWTH is about 1.73.
GROWTH: float = (LIMIT_HOUR / FIRST_POLL + 1) ** (1 / GETS_AN_HOUR)
EVERY = LIMIT_HOUR / GETS_AN_HOUR
POLL_RETRY_PAUSES = (15, 30, 60, 120, 240)  # longer than others, because each try is one of the hour's GETs


def next_poll(asked_at: float, polls: Sequence[float]) -> float:
    """When (unix seconds) the GET that follows those in `polls` is due: in a geometric series for an hour,
    then every 6 minutes."""
    if not polls:
        return asked_at + FIRST_POLL
    elapsed = polls[-1] - asked_at
    return asked_at + max(FIRST_POLL, min(elapsed * GROWTH, max(elapsed, LIMIT_HOUR) + EVERY))


def limit_allows(polls: Sequence[float]) -> float:
    """From when on (unix seconds) there is room in the hour for one more GET."""
    return polls[-GETS_AN_HOUR] + LIMIT_HOUR if len(polls) >= GETS_AN_HOUR else 0.0


def await_links(api: Api, path: str, export: Export) -> list[str]:
    """The download_urls of the completed job. Raises NotFinished if it takes over its time, NoUsage if it
    has none, ReportError if it failed, and what Api.request raises."""
    state, empty = "requested", 0

    def check() -> tuple[str, list[str], str]:
        nonlocal empty
        pause(limit_allows(export.polls) - time.time(), partial(show_wait, export, state))
        export.polls = [*export.polls, time.time()][-GETS_AN_HOUR:]
        export.save()  # before the GET, which counts even if this run does not live to see the answer
        answer = read_job(api.request("GET", path))
        export.polls[-1] = time.time()  # as late as CircleCI can have counted it
        live(f"Export job {answer[0]} after {span(time.time() - export.asked_at)}.", kind="poll")
        if answer[0] == "completed" and not answer[1]:
            empty += 1
            if empty == 3:
                raise NoUsage("The export is completed and has no files: there is no usage in this window.")
            # The links can come later than the state (source: CircleCI support).
            raise Transient("The export is completed, but its files are not there yet.")
        return answer

    # With parts it is completed, and only needs fresh links.
    due = time.time() if export.parts else next_poll(export.asked_at, export.polls)
    while True:
        pause(due - time.time(), partial(show_wait, export, state))
        state, urls, reason = patiently(check, POLL_RETRY_PAUSES)
        if state == "completed":
            return urls
        if state == "failed":
            export.forget()
            raise ReportError(
                f"CircleCI could not make the export: {reason}. What helps: a shorter window (--start, --end), or "
                "fewer organizations (SHARED_ORG_IDS)."
            )
        if state not in ("created", "processing"):
            log.warning("The state %r of export job %s is not known here. Waiting on.", state, export.job_id)
        due = max(next_poll(export.asked_at, export.polls), limit_allows(export.polls))
        if due > export.asked_at + PATIENCE:
            clock = time.strftime("%H:%M", time.localtime(due))
            raise NotFinished(f"Export job {export.job_id} is not finished ({state}). Check again after {clock}.")


def read_job(answer: Any) -> tuple[str, list[str], str]:
    """State, download_urls and error_reason of a job."""
    try:
        state, urls, reason = answer["state"], answer.get("download_urls") or [], answer.get("error_reason")
        if isinstance(state, str) and isinstance(urls, list) and all(isinstance(u, str) and u.isascii() for u in urls):
            return state, urls, reason or "no reason given"
    except (AttributeError, KeyError, TypeError):
        pass
    raise Transient("The export job's answer has no state that can be read, or odd download_urls.")


def show_wait(export: Export, state: str, left: float) -> None:
    used = sum(at > time.time() - 3600 for at in export.polls)
    live(
        f"Export {state}, {span(time.time() - export.asked_at)}. Next check in {span(left)}, "
        f"{used} of {GETS_AN_HOUR} this hour used."
    )


# --- Downloading the parts ---


def part_name(number: int, url: str) -> str:
    """A file name that stays the same when the link is signed anew."""
    return f"part-{number:04d}-{hashlib.sha256(url.partition('?')[0].encode()).hexdigest()[:12]}.csv"


def download_parts(urls: Sequence[str], export: Export) -> None:
    """Fetch the parts that are not here yet. All are tried, and what came through is kept; then the first
    trouble is raised: OSError, ReportError, or LinkExpired if there is no other."""
    export.parts = [part_name(number, url) for number, url in enumerate(urls)]
    export.save()
    received = dict.fromkeys(export.parts, 0)  # bytes on the wire

    def fetch(number: int) -> None:
        target, what = export.folder / export.parts[number], f"Part {number + 1} of {len(urls)}"
        patiently(partial(download_part, urls[number], target, what, received))
        log.debug("%s is complete: %s.", what, megabytes(received[target.name]))

    missing = [number for number, name in enumerate(export.parts) if not (export.folder / name).exists()]
    pool = ThreadPoolExecutor(PARALLEL_DOWNLOADS)
    try:
        jobs = [pool.submit(fetch, number) for number in missing]
        while waiting := wait(jobs, timeout=0.2).not_done:
            size = megabytes(sum(received.values()))
            live(f"Downloading: {len(urls) - len(waiting)} of {len(urls)} parts, {size}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for a thread that sits in a read
    troubles = [trouble for trouble in (job.exception() for job in jobs) if trouble]
    if troubles:
        raise min(troubles, key=lambda trouble: isinstance(trouble, LinkExpired))
    log.info("Downloaded parts: %d, %s.", len(missing), megabytes(sum(received.values())))


def download_part(url: str, target: Path, what: str, received: dict[str, int]) -> None:
    """Write one part as plain CSV under its name, if all of it came and is sound; count the bytes received.
    Raises Transient, LinkExpired, or ReportError for what trying again cannot mend."""
    draft, received[target.name] = target.with_suffix(".new"), 0

    def body() -> Iterator[bytes]:
        answer.raw.enforce_content_length = True  # as urllib3 2 does; 1.26 does not
        while chunk := answer.raw.read(BLOCK // 4, decode_content=False):
            received[target.name] += len(chunk)
            yield chunk

    try:
        with send("GET", url, stream=True) as answer:
            status = answer.status_code
            if status in (401, 403):
                raise LinkExpired(f"{what} was answered {status}: the link has expired.")
            if status in (408, 429) or status >= 500:
                raise Transient(f"{what} was answered {status}.")
            if status != 200:
                raise ReportError(f"{what} was answered {status}: without it there is no report.")
            with open(draft, "w+b") as file:
                # Twice: the part's own gzip, and one that the store may put around it (Content-Encoding).
                for plain in gunzip(gunzip(body())):
                    file.write(plain)
                flush(file)
                file.seek(0)
                if re.match(rb"(\xef\xbb\xbf)?\s*[<{]", file.read(BLOCK)):
                    raise Transient(f"{what} is a web page or a message, and no CSV.")
    except zlib.error:
        raise Transient(f"{what} is damaged: its gzip stream does not end well.") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise Transient(f"{what} did not come through: {describe(error)}.", NotFinished.code) from None
    os.replace(draft, target)


def gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The bytes without one layer of gzip, if there is one. zlib checks the CRC-32 and length of every
    member. Raises zlib.error for a stream that is damaged, breaks off, or is followed by something else."""
    head = next(chunks, b"")
    chunks = itertools.chain([head], chunks)
    if not head.startswith(GZIP_MAGIC):
        yield from chunks
        return
    member = None
    for chunk in chunks:
        while chunk:
            member = member or zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
            if plain := member.decompress(chunk, BLOCK):  # no more at once, however far it expands
                yield plain
            chunk = member.unconsumed_tail
            if member.eof:
                chunk, member = member.unused_data, None
    if member:
        raise zlib.error("breaks off")


# --- Merging: the header once, then the bytes of every row as they came ---


def merge(parts: Iterable[Path], target: Path) -> Tally:
    """Write the parts, in order, into one file, and count what is written. Raises ReportError for a part
    with other columns, NoUsage if no part has any bytes."""
    tally = None
    target.unlink(missing_ok=True)  # not overwritten: it may be the other name of a report in its place
    with open(target, "wb") as report:
        for number, part in enumerate(parts, 1):
            with open(part, "rb") as source:
                bom = BOM if source.read(len(BOM)) == BOM else b""
                source.seek(len(bom))
                first = source.readline()
                if not first:
                    continue
                if tally is None:
                    tally = Tally(cells(first))
                    line_end = b"\r\n" if first.endswith(b"\r\n") else b"\n"
                    report.write(bom + first.rstrip(b"\r\n") + line_end)
                elif cells(first) != tally.header:
                    check_first_row(first, tally.header, number)
                    source.seek(len(bom))
                while block := source.read(BLOCK):
                    block += source.readline()
                    if not block.endswith(b"\n"):
                        block += line_end
                    report.write(block)
                    tally.count(block)
        flush(report)
    if tally is None:
        raise NoUsage("The export is completed and its files are empty: there is no usage in this window.")
    return tally


def cells(line: bytes) -> list[str]:
    """The cells of a row, quoted or escaped with a backslash."""
    return next(csv.reader([line.decode("utf-8", "replace").rstrip("\r\n")], escapechar="\\"), [])


def check_first_row(line: bytes, header: Sequence[str], number: int) -> None:
    """Raises ReportError if the line is another header, or no row at all. A row has UUIDs and numbers."""
    row = cells(line)
    names = all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_ ]*", cell) for cell in row) and len(row) == len(header)
    if names or 2 * sum(cell in header for cell in row) > len(header):
        missing = [f"without {name}" for name in header if name not in row]
        added = [f"with {name}" for name in row if name not in header]
        raise ReportError(f"Part {number} has other columns: {', '.join(missing + added) or 'in another order'}.")
    goes_on = b'"' in line or line.rstrip(b"\r\n").endswith(b"\\")  # in the next line
    if len(row) != len(header) and not goes_on:
        raise ReportError(f"Part {number} begins with a row of {len(row)} cells, where the header has {len(header)}.")


# --- Summary ---

# A row as CircleCI writes it today: an ID first, credits last, no quotes. What stands between need not be
# looked at, and finding these two is several times as fast as the csv module, which reads all others.
PLAIN_ROW = re.compile(rb"(?m)^([0-9a-fA-F-]{36}),.*,([0-9.]*|\\\\?N)\r?$")
NO_VALUE = (b"", rb"\\N", rb"\N", b"N")  # the last is what the csv module leaves of \N


class Tally:
    """Job runs and credits by organization ID, counted from blocks of whole lines."""

    def __init__(self, header: list[str]) -> None:
        self.header = header
        self.runs: Counter[str] = Counter()
        self.credits: dict[str, Decimal] = defaultdict(Decimal)
        self.open_row = b""  # the begin of a row with a quoted line break, which goes on in the next block
        self.problem = ""  # why there is no counting
        names = [name.strip().upper() for name in header]
        if {"ORGANIZATION_ID", "TOTAL_CREDITS"} <= set(names):
            self.places = names.index("ORGANIZATION_ID"), names.index("TOTAL_CREDITS")
        else:
            self.problem = "the columns ORGANIZATION_ID and TOTAL_CREDITS are not both there"

    def count(self, block: bytes) -> None:
        if self.problem:
            return
        try:
            for (organization, credits), runs in Counter(self.rows(block)).items():
                one, used = organization.decode().lower(), Decimal(0 if credits in NO_VALUE else credits.decode())
                if not used.is_finite():
                    raise ValueError
                self.runs[one] += runs
                self.credits[one] += used * runs
        except (ArithmeticError, ValueError, csv.Error):
            self.problem = "a row does not fit the header"

    def rows(self, block: bytes) -> Iterable[tuple[bytes, bytes]]:
        """Organization ID and credits of every row that ends in the block."""
        if not self.open_row and b'"' not in block and self.places == (0, len(self.header) - 1):
            found = PLAIN_ROW.findall(block)
            if len(found) == block.count(b"\n"):
                return found
        return self.rows_by_csv(io.BytesIO(self.open_row + block).readlines())

    def rows_by_csv(self, lines: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        reader = csv.reader((line.decode("utf-8", "replace") for line in lines), escapechar="\\", strict=True)
        self.open_row = b""
        ended = 0
        while ended < len(lines):
            try:
                row = next(reader)
            except csv.Error:
                if reader.line_num < len(lines):
                    raise
                self.open_row = b"".join(lines[ended:])
                return
            ended = reader.line_num
            if row:
                if len(row) != len(self.header):
                    raise ValueError
                yield row[self.places[0]].encode(), row[self.places[1]].encode()


def summary(tally: Tally, organizations: Mapping[str, str]) -> str:
    """A table of job runs, credits and share: each organization on the plan, any other, and all."""
    if tally.problem or tally.open_row:
        return f"No summary: {tally.problem or 'a quoted cell is never closed'}. The report is complete all the same."
    names = {**dict.fromkeys(tally.runs, ""), **organizations}
    total = sum(tally.credits.values(), Decimal())

    def share(credits: Decimal) -> str:
        return f"{credits / total:.1%}" if total else "-"

    rows = [["ORGANIZATION", "JOB RUNS", "CREDITS", "SHARE"]]
    for one in sorted(names, key=lambda one: (-tally.credits[one], names[one])):
        runs, credits = tally.runs[one], tally.credits[one]
        figures = [f"{runs:,}", f"{credits:,f}", share(credits)] if runs else ["no usage", "", ""]
        rows.append([names[one] or one, *figures])
    rows.append(["all", f"{sum(tally.runs.values()):,}", f"{total:,f}", share(total)])
    return table(rows, "<>>>")


# --- The run ---


def obtain_parts(api: Api, path: str, request: Mapping[str, Any], export: Export) -> list[Path]:
    """The complete parts, of the export under way or else of a new one. An export that CircleCI no longer
    knows is asked for anew, once."""
    may_ask, expired = bool(request), 0  # a --job-id comes without a request
    while not (parts := export.complete_parts()):
        if not export.job_id:
            ask_for_export(api, path, request, export)
        try:
            download_parts(await_links(api, f"{path}/{quote(export.job_id, safe='')}", export), export)
        except NotFound as error:
            export.forget()
            if not may_ask:
                raise
            may_ask = False
            log.warning("%s The export is asked for anew.", error)
        except LinkExpired as error:
            expired += 1
            if expired == 3:
                raise
            log.warning("%s Asking the job for fresh links.", error)
    return parts


def place(merged: Path, output: Path, label: str) -> Path:
    """Give the merged file its name in the output folder: whole, at once, and over no other file."""
    moment = time.time()
    while True:
        report = output / f"all_orgs_{time.strftime('%Y%m%d_%H%M%S', time.localtime(moment))}_{label}.csv"
        moment += 1
        if report.exists():
            continue
        try:
            os.link(merged, report)
        except FileExistsError:
            continue
        except OSError:  # a file system without hard links
            os.rename(merged, report)
        flush_folder(output)
        return report


def placed_before(merged: Path, output: Path) -> Path | None:
    """The report of an earlier run that was stopped before it could clean up: both are names of one file."""
    reports = output.glob("all_orgs_*.csv") if merged.exists() else []
    return next((report for report in reports if report.samefile(merged)), None)


def produce(
    api: Api, path: str, request: Mapping[str, Any], export: Export, settings: Settings, names: Mapping[str, str]
) -> Path:
    """Ask, wait, download, merge, put in place and sum up. Returns the report's path."""
    if export.job_id:
        log.info("Going on with export job %s of an earlier run.", export.job_id)
    elif settings.job_id:  # its age is not known, and it may well be completed: look at once
        export.job_id = export.label = settings.job_id
        export.asked_at = time.time() - FIRST_POLL
    merged = export.folder / "merged.csv"
    report = placed_before(merged, settings.output)
    if report is None:
        tally = merge(obtain_parts(api, path, request, export), merged)
        report = place(merged, settings.output, export.label)
        log.info("%s", summary(tally, names))
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Run once. Returns the exit code; argparse itself exits for --help, --version and unknown flags."""
    began = time.time()
    args = parse_arguments(argv)
    console = Console(args.quiet, args.verbose)
    log.setLevel(logging.DEBUG)
    log.handlers = logging.getLogger("dotenv").handlers = [console]
    export = Export()  # out here, because what is known of it decides what an interrupted run says
    try:
        settings = load_settings(args)
        console.secret = settings.token
        api = Api(settings.base_url, settings.token)
        if not settings.primary:
            choices = organizations_to_choose(api)
            raise SettingsError(f"PRIMARY_ORG_ID is not set. Copy it from the organization with the plan:\n{choices}")
        log.info("The token belongs to %s.", token_owner(api))
        organizations = organizations_on_plan(api, settings)
        rows = [(name or "-", one) for one, name in organizations.items()]
        log.info("%s", table([("ORGANIZATION", "ID"), *rows], "<<"))
        path, request = export_request(settings, organizations)
        if args.dry_run:
            shown = f"POST {path}\n{json.dumps(request, indent=2)}" if request else f"GET {path}/{settings.job_id}"
            log.info("Dry run: nothing was asked for. The request would be\n%s", shown)
            return 0
        with export.opened(export_folder(settings, organizations)):
            report = produce(api, path, request, export, settings, organizations)
            print(report, flush=True)
            export.forget()  # last: if the path cannot be printed, the next run finds the report and prints it
        log.info("The report has %s and took %s.", megabytes(report.stat().st_size), span(time.time() - began))
        return 0
    except ReportError as error:
        code = error.code
        log.error("%s", error)
    except KeyboardInterrupt as interrupt:
        code = interrupt.args[0] if interrupt.args else 130
        log.error("Interrupted%s.", "" if export.job_id else " before an export was asked for")
    except OSError as error:
        code = NotFinished.code
        where = error.filename or "the output folder"
        log.error("%s: %s. Mend that, then run the same command again.", error.strerror or error, where)
    if export.job_id:
        log.error(
            "Export job %s is not lost: it goes on at CircleCI, and the same command collects it, as does --job-id. "
            "(To ask for a new one instead, remove %s.)", export.job_id, export.folder
        )
    return code


def terminate(signal_number: int, frame: object) -> None:
    """SIGTERM is handled like Ctrl-C, but for the exit code."""
    raise KeyboardInterrupt(128 + signal_number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may not fit its encoding
    exit_code = main()
    os._exit(exit_code)  # not SystemExit, which waits for a download thread that sits in a read
