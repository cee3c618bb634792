"""Try it without an account: the real script against a fake CircleCI on this computer.

    python tests/demo.py

Takes less than half a minute and reads no .env file. The report goes to usage_reports/demo/, next
to real reports but not among them. The next demo replaces it.
"""

# ruff: noqa: E402  (Ctrl-C must not show a traceback of the imports)
from __future__ import annotations

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import shutil
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

from fake_circleci import COLUMNS, PRIMARY, TOKEN, Cell, FakeCircleCI, make_runs

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import usage_report

FOLDER = PROJECT / "usage_reports" / "demo"
JOB_SECONDS = 12  # The script checks an export after 15 seconds.
# Names and numbers of job runs. The last name is "Acme Tokyo" in Japanese.
ORGANIZATIONS = {"Acme": 6000, "Acme Research, Inc.": 2500, "\u30a2\u30af\u30e1\u6771\u4eac": 0}
OPEN_COMMANDS = {"darwin": "open", "win32": "explorer"}

USER = COLUMNS.index("PIPELINE_TRIGGER_USER_ID")
SECONDS = COLUMNS.index("JOB_RUN_SECONDS")
SEATS = COLUMNS.index("USER_CREDITS")
TOTAL = COLUMNS.index("TOTAL_CREDITS")


def add_seat(runs: list[list[Cell]]) -> None:
    """Charge for an active user on a single job run, as CircleCI does."""
    by_users = [run for run in runs if run[USER] and run[SECONDS]]
    shortest = min(by_users, key=lambda run: run[SECONDS])
    shortest[SEATS] += 25_000
    shortest[TOTAL] += 25_000


def start_fake() -> FakeCircleCI:
    """A fake CircleCI with the usage of last month."""
    now = datetime.now(timezone.utc).replace(tzinfo=None)
    this_month = now.replace(day=1, hour=0, minute=0, second=0)
    last_month = (this_month - timedelta(days=1)).replace(day=1)
    fake = FakeCircleCI()
    fake.job_seconds = JOB_SECONDS
    fake.organizations = dict(zip(fake.organizations, ORGANIZATIONS))
    fake.usage = {}
    for organization_id, name in fake.organizations.items():
        runs = make_runs(ORGANIZATIONS[name], organization_id, name, last_month)
        fake.usage[organization_id] = list(runs)
    add_seat(fake.usage[PRIMARY])
    return fake


def run_script(fake: FakeCircleCI) -> int:
    """Run the script with settings for the fake and no others. Returns its exit code."""
    for name in usage_report.VARIABLES:
        os.environ.pop(name, None)
    os.environ["CIRCLE_TOKEN"] = TOKEN
    os.environ["PRIMARY_ORG_ID"] = PRIMARY
    os.environ["CIRCLECI_BASE_URL"] = fake.url
    usage_report.SCRIPT_FOLDER = FOLDER  # so that your .env is not read
    print("$ python usage_report.py --period last-month", flush=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return usage_report.main(["--period", "last-month", "--output-dir", str(FOLDER)])


def main() -> int:
    shutil.rmtree(FOLDER, ignore_errors=True)
    code = run_script(start_fake())
    if code != 0:
        shutil.rmtree(FOLDER, ignore_errors=True)
        print("The demo keeps nothing. Its next run starts over.")
        return code
    report = next(FOLDER.glob("*.csv"))
    print("\nThis was a demo with made-up usage. To open its report in a spreadsheet, run:")
    print(f'{OPEN_COMMANDS.get(sys.platform, "xdg-open")} "{report}"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
