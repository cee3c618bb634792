"""Two stand-ins for time: one for this process, one for child processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fake_circleci import PRIMARY, TOKEN, FakeCircleCI

PROJECT = Path(__file__).resolve().parent.parent
REAL_TIME, REAL_SLEEP = time.time, time.sleep  # from before a test stands in for them
NOW = 1792843200.0  # 2026-10-24T12:00:00Z


class Clock:
    """Stands in for time.time and time.sleep: sleeping takes no time and moves the clock."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now
        self.lock = threading.Lock()

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self.lock:
            self.now += seconds


@dataclass
class Result:
    """What a run left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> Path:
        return Path(self.out.rstrip("\n"))

    @property
    def last_line(self) -> str:
        return self.err.rstrip("\n").split("\n")[-1]


class FastTime:
    """Time for child processes and the fake CircleCI they talk to: `speed` seconds pass in one."""

    def __init__(self, speed: float) -> None:
        self.began, self.speed = REAL_TIME(), speed

    def time(self) -> float:
        return self.began + (REAL_TIME() - self.began) * self.speed

    def start(
        self,
        fake: FakeCircleCI,
        *command: str | Path,
        stdout: int | IO[str] = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        **variables: str,
    ) -> subprocess.Popen[str]:
        """The real script as a child process, with settings for the fake and no others."""
        begun = time.gmtime(self.began - 28 * 86400)
        return subprocess.Popen(
            [sys.executable, PROJECT / "usage_report.py", "--env-file", os.devnull, *command],
            stdout=stdout,
            stderr=stderr,
            text=True,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(PROJECT / "tests" / "fast_time"),
                "FAST_TIME": f"{self.began} {self.speed}",
                "CIRCLE_TOKEN": TOKEN,
                "PRIMARY_ORG_ID": PRIMARY,
                "CIRCLECI_BASE_URL": fake.url,
                "START_DATE": time.strftime("%Y-%m-01", begun),
                "END_DATE": time.strftime("%Y-%m-28", begun),
                **variables,
            },
        )

    def run(self, fake: FakeCircleCI, *command: str | Path, **options: Any) -> Result:
        return ended(self.start(fake, *command, **options))


def ended(child: subprocess.Popen[str]) -> Result:
    out, err = child.communicate(timeout=60)
    return Result(child.returncode, out, err)
