"""What the tests share: the fake CircleCI, simulated time, and a way to run the script."""

from __future__ import annotations

import csv
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clocks import PROJECT, Clock, FastTime, Result
from fake_circleci import PRIMARY, TOKEN, Answer, FakeCircleCI

sys.path.insert(0, str(PROJECT))

import usage_report  # noqa: E402

# Under nohup or in the background of a shell, child processes would ignore these signals.
if sys.platform != "win32":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)

WINDOW = {"START_DATE": "2026-09-01", "END_DATE": "2026-09-30"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", lambda: clock.time())
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.sleep(seconds))
    return clock


def serve(time: Callable[[], float]) -> Iterator[FakeCircleCI]:
    fake = FakeCircleCI(time)
    yield fake
    threading.Thread(target=fake.close).start()  # Hundreds of tests need not wait for that.


@pytest.fixture
def fake(clock: Clock) -> Iterator[FakeCircleCI]:
    yield from serve(clock.time)


@pytest.fixture
def fast() -> FastTime:
    return FastTime(500)


@pytest.fixture
def fast_fake(fast: FastTime) -> Iterator[FakeCircleCI]:
    yield from serve(fast.time)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "reports"


@pytest.fixture
def run(
    fake: FakeCircleCI,
    output: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Result]:
    """run(*arguments, **variables) calls main() in this process, in simulated time, with settings
    for the fake CircleCI. A variable given as None is not set."""
    monkeypatch.setattr(usage_report, "SCRIPT_FOLDER", tmp_path)  # so that no real .env is read
    monkeypatch.setattr(usage_report.log, "propagate", False)  # pytest's copy takes half the time
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str, **variables: str | None) -> Result:
        settings = {
            "CIRCLE_TOKEN": TOKEN,
            "PRIMARY_ORG_ID": PRIMARY,
            "CIRCLECI_BASE_URL": fake.url,
            **WINDOW,
            **variables,
        }
        for name in usage_report.VARIABLES:
            monkeypatch.delenv(name, raising=False)
            if settings.get(name) is not None:
                monkeypatch.setenv(name, settings[name])
        usage_report.log.filters.clear()  # of an earlier run, which would hide a leak
        capsys.readouterr()  # what a crashed run has left
        handler = signal.getsignal(signal.SIGINT)
        try:
            code = usage_report.main(["--output-dir", str(output), *arguments])
        except SystemExit as exit:
            code = exit.code
        finally:
            signal.signal(signal.SIGINT, handler)  # A run ignores Ctrl-C while it publishes.
        return Result(code, *capsys.readouterr())

    return run


def read_report(path: Path) -> list[list[str]]:
    """The cells of a report, as every CSV program reads it."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file, strict=True))


def always(answer: Answer) -> list[Answer]:
    """More of the same answer than a run can ask for."""
    return [answer] * 30


def leftovers(output: Path) -> list[str]:
    """Names in the output folder that are not reports."""
    paths = output.iterdir() if output.exists() else []
    return sorted(path.name for path in paths if not path.name.startswith("all_orgs_"))
