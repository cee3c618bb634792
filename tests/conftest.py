"""What the tests share: the fake CircleCI, a clock that stands in for time, and two ways to run the script."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import pytest

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import usage_report  # noqa: E402
from fake_circleci import PRIMARY, TOKEN, FakeCircleCI  # noqa: E402

VARIABLES = ("CIRCLE_TOKEN", "PRIMARY_ORG_ID", "START_DATE", "END_DATE", "SHARED_ORG_IDS", "CIRCLECI_BASE_URL")
NOW = 1792843200.0  # 2026-10-24T08:00:00Z
WINDOW = {"START_DATE": "2026-09-01", "END_DATE": "2026-09-30"}


class Clock:
    """Stands in for time.time and time.sleep: sleeping takes no time and moves the clock."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.lock = threading.Lock()

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self.lock:
            self.now += seconds


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def report(self) -> Path:
        return Path(self.out.rstrip("\n"))

    @property
    def last_line(self) -> str:
        return self.err.rstrip("\n").split("\n")[-1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(NOW)
    monkeypatch.setattr(time, "time", clock.time)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    return clock


@pytest.fixture
def fake(clock: Clock) -> Iterator[FakeCircleCI]:
    fake = FakeCircleCI(clock.time)
    yield fake
    fake.close()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "reports"


@pytest.fixture
def run(fake, output, tmp_path, monkeypatch, capsys):
    """run(*arguments, **variables) calls main in this process, in stood-in time. A variable that is
    given as None is not set."""
    monkeypatch.setattr(usage_report, "SCRIPT_FOLDER", tmp_path)  # no .env of this machine is read

    def run(*arguments: str, **variables: str | None) -> Result:
        given = {"CIRCLE_TOKEN": TOKEN, "PRIMARY_ORG_ID": PRIMARY, "CIRCLECI_BASE_URL": fake.url, **WINDOW, **variables}
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
            if given.get(name) is not None:
                monkeypatch.setenv(name, given[name])
        try:
            code = usage_report.main(["--output-dir", str(output), *arguments])
        except SystemExit as exit:
            code = exit.code
        return Result(code, *capsys.readouterr())

    return run


def leftovers(output: Path) -> list[str]:
    """Names in the output folder that are no report."""
    return sorted(path.name for path in output.iterdir() if not path.name.startswith("all_orgs_")) if output.exists() else []
