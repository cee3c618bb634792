"""How late the report is, for export jobs from 15 seconds to 4 hours.

    python tests/bench_polling.py

Runs the real script against the fake CircleCI in simulated time, and prints a table: job length,
time from its completion to the report (overshoot), and the number of GETs.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from typing import NamedTuple
from unittest import mock

from clocks import PROJECT, Clock
from fake_circleci import PRIMARY, TOKEN, FakeCircleCI

sys.path.insert(0, str(PROJECT))

import usage_report  # noqa: E402


class Row(NamedTuple):
    job_seconds: float
    overshoot: float  # seconds
    gets: int
    most_in_an_hour: int

    @property
    def share(self) -> float:
        """The overshoot as a share of the job's length."""
        return self.overshoot / self.job_seconds


def most_in_an_hour(moments: list[float]) -> int:
    return max(sum(at <= other < at + 3600 for other in moments) for at in moments)


def measure(job_seconds: float) -> Row:
    clock = Clock()
    fake = FakeCircleCI(clock.time)
    fake.job_seconds = job_seconds
    settings = {"CIRCLE_TOKEN": TOKEN, "PRIMARY_ORG_ID": PRIMARY, "CIRCLECI_BASE_URL": fake.url}
    arguments = ["--env-file", os.devnull, "--quiet", "--period", "2026-09"]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, settings),
        mock.patch.multiple(time, time=clock.time, sleep=clock.sleep),
        contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())),
    ):
        code = usage_report.main([*arguments, "--output-dir", folder])
    fake.close()
    assert code == 0
    (job,) = fake.jobs.values()
    gets = [seen.at for seen in fake.requests("GET")]
    completed_at = job.created_at + job_seconds
    return Row(job_seconds, clock.now - completed_at, len(gets), most_in_an_hour(gets))


def measure_all(count: int = 48) -> list[Row]:
    """Job lengths evenly spaced on a log scale from 15 s to 4 h."""
    return [measure(15 * (4 * 3600 / 15) ** (n / (count - 1))) for n in range(count)]


if __name__ == "__main__":
    rows = measure_all()
    print("  job length   overshoot   share   GETs   most in an hour")
    for row in rows:
        times = f"{row.job_seconds:10.0f} s {row.overshoot:9.0f} s"
        print(f"{times} {row.share:7.2f} {row.gets:6} {row.most_in_an_hour:9}")
    shares = [row.share for row in rows]
    late = max(row.overshoot for row in rows if row.job_seconds > 3600)
    mean = sum(shares) / len(shares)
    print(f"overshoot as a share of the job's length: worst {max(shares):.2f}, mean {mean:.2f}")
    print(f"overshoot of jobs over an hour: at most {late:.0f} s")
