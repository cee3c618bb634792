"""Simulated time: one kind for this process, one for child processes."""

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
REAL_TIME, REAL_SLEEP = time.time, time.sleep  # before a test replaces them
NOW = 1792843200.0  # 2026-10-24T12:00:00Z


class Clock:
    """Replaces time.time and time.sleep: sleeping takes no time and moves the clock."""

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
    """What a run leaves: exit code, stdout, stderr."""

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
    """Time for child processes and the fake CircleCI: it runs `speed` times as fast."""

    def __init__(self, speed: float) -> None:
        self.started, self.speed = REAL_TIME(), speed

    def time(self) -> float:
        return self.started + (REAL_TIME() - self.started) * self.speed

    def start(
        self,
        fake: FakeCircleCI,
        *command: str | Path,
        stdout: int | IO[Any] = subprocess.PIPE,
        stderr: int | IO[Any] = subprocess.PIPE,
        prefix: tuple[str, ...] = (),
        **variables: str,
    ) -> subprocess.Popen[str]:
        """The real script as a child process, with settings for the fake and no others. `prefix`
        is a command that starts it."""
        month = time.gmtime(self.started - 28 * 86400)
        script = [sys.executable, PROJECT / "usage_report.py", "--env-file", os.devnull]
        return subprocess.Popen(
            [*prefix, *script, *command],
            stdout=stdout,
            stderr=stderr,
            encoding="utf-8",
            errors="surrogateescape",  # as in names of files
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(PROJECT / "tests" / "fast_time"),
                "FAST_TIME": f"{self.started} {self.speed}",
                "CIRCLE_TOKEN": TOKEN,
                "PRIMARY_ORG_ID": PRIMARY,
                "CIRCLECI_BASE_URL": fake.url,
                "START_DATE": time.strftime("%Y-%m-01", month),
                "END_DATE": time.strftime("%Y-%m-28", month),
                **variables,
            },
        )

    def run(self, fake: FakeCircleCI, *command: str | Path, **options: Any) -> Result:
        return wait_for_exit(self.start(fake, *command, **options))


def wait_for_exit(child: subprocess.Popen[str]) -> Result:
    out, err = child.communicate(timeout=60)
    return Result(child.returncode, out, err)
