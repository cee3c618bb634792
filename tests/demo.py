"""Try it without an account: the real script against a fake CircleCI on this computer.

    python tests/demo.py

Takes half a minute. Reads no .env file. The reports go to a temporary folder, which is kept if the
demo succeeds. With flags, such as --dry-run or --verbose, it runs the script once with them.
"""

# ruff: noqa: E402  (signals are handled before the imports, which take a moment)
from __future__ import annotations

import os
import signal
import sys

names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP.
SIGNALS = [getattr(signal, name) for name in names if hasattr(signal, name)]
for signal_number in SIGNALS:  # The imports take a moment.
    signal.signal(signal_number, lambda number, frame: os._exit(128 + number))

import contextlib
import re
import shutil
import subprocess
import tempfile
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NoReturn

from fake_circleci import ORGANIZATIONS, PRIMARY, TOKEN, FakeCircleCI, make_rows

SCRIPT = Path(__file__).resolve().parent.parent / "usage_report.py"


class Stopped(BaseException):
    """A signal has arrived."""


def stop(number: int, frame: object) -> NoReturn:
    for signal_number in SIGNALS:  # One is enough.
        signal.signal(signal_number, signal.SIG_IGN)
    raise Stopped(number)


def start_fake() -> FakeCircleCI:
    """Three organizations, one of them without usage, and an export that takes 20 seconds."""
    fake = FakeCircleCI()
    fake.job_seconds, fake.part_count = 20, 4
    this_month = datetime.now(timezone.utc).replace(day=1, tzinfo=None)
    last_month = (this_month - timedelta(days=1)).replace(day=1)
    first, second, _ = ORGANIZATIONS.items()
    fake.usage = {
        first[0]: make_rows(6000, *first, last_month),
        second[0]: make_rows(2500, *second, last_month),
    }
    return fake


def run_script(fake: FakeCircleCI, folder: str, *flags: str) -> int:
    """Run the script on this terminal. Returns its exit code.

    In a session of its own, so that Ctrl-C reaches the demo alone. The script would promise to
    resume, but the fake CircleCI ends with the demo."""
    print("\n$ python usage_report.py", *flags, flush=True)
    settings = {"CIRCLE_TOKEN": TOKEN, "PRIMARY_ORG_ID": PRIMARY, "CIRCLECI_BASE_URL": fake.url}
    child = subprocess.Popen(
        [sys.executable, SCRIPT, "--env-file", os.devnull, "--output-dir", folder, *flags],
        env={**os.environ, **settings, "SHARED_ORG_IDS": ""},
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows
    )
    try:
        return child.wait()
    finally:
        child.kill()
        child.wait()


def sample(report: Path) -> str:
    """The start of the first row that has a name with a comma. IDs are replaced by an ellipsis."""
    with report.open(encoding="utf-8") as lines:
        line = next(line for line in lines if "Research" in line)
    return re.sub("[0-9a-f]{4}[0-9a-f-]{32}", "\u2026", line)[:60] + "\u2026"


def run_demo(folder: str) -> int:
    """The demo without flags. Returns the exit code."""
    with contextlib.closing(start_fake()) as fake:
        code = run_script(fake, folder, "--period", "last-month")
        job_id = next(iter(fake.jobs), "")
        code = code or run_script(fake, folder, "--quiet", "--plain", "--job-id", job_id)
    if code == 0:
        raw, plain = sorted(Path(folder).glob("*.csv"), key=lambda path: job_id in path.name)
        print(f"\nA row of the first report, as CircleCI wrote it:\n{sample(raw)}")
        print(f"The same row of the second report, which is plain CSV:\n{sample(plain)}")
        print("\nNext: open the second report in a spreadsheet, and see Quick start in README.md.")
        print(f"When you are done, remove {folder}")
    return code


def main(flags: list[str]) -> int:
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    folder, code = tempfile.mkdtemp(prefix="usage-report-demo-"), 1
    try:
        for signal_number in SIGNALS:
            signal.signal(signal_number, stop)
        if flags:
            with contextlib.closing(start_fake()) as fake:
                code = run_script(fake, folder, "--period", "last-month", *flags)
        else:
            code = run_demo(folder)
    except Stopped as stopped:
        code = 128 + stopped.args[0]
        erase = "\r\x1b[K" if sys.stderr.isatty() and os.name != "nt" else "\n"
        print(f"{erase}Demo stopped. Its temporary folder is removed.", file=sys.stderr)
    finally:
        if code or not os.listdir(folder):
            shutil.rmtree(folder, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
