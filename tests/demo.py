"""Try it without an account: the real script against a CircleCI on this machine.

    python tests/demo.py

Starts the fake CircleCI on loopback with three organizations and an export job of half a minute, runs
usage_report.py on your terminal, and leaves the report in usage_reports/. Needs no .env and touches none.
Flags go on to the script, such as --verbose or --dry-run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

from fake_circleci import ORGANIZATIONS, PRIMARY, TOKEN, FakeCircleCI, make_rows

if __name__ == "__main__":
    fake = FakeCircleCI()
    fake.job_seconds = 30
    fake.part_count = 4
    (one, name), (other, other_name), _ = ORGANIZATIONS.items()
    since = (datetime.now(timezone.utc).replace(day=1, tzinfo=None) - timedelta(days=1)).replace(day=1)
    fake.usage = {one: make_rows(6000, one, name, since), other: make_rows(2500, other, other_name, since)}
    script = Path(__file__).resolve().parent.parent / "usage_report.py"
    settings = {
        "CIRCLE_TOKEN": TOKEN,
        "PRIMARY_ORG_ID": PRIMARY,
        "CIRCLECI_BASE_URL": fake.url,
        "SHARED_ORG_IDS": "",
    }
    command = [sys.executable, script, "--env-file", os.devnull, "--period", "last-month", *sys.argv[1:]]
    try:
        code = subprocess.run(command, env={**os.environ, **settings}).returncode
    except KeyboardInterrupt:
        code = 130
    raise SystemExit(code)
