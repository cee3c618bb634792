"""What the tests share: the fake CircleCI, stood-in time, and a way to run the script in this process."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from clocks import PROJECT, Clock, FastTime, Result
from fake_circleci import PRIMARY, TOKEN, FakeCircleCI

sys.path.insert(0, str(PROJECT))

import usage_report  # noqa: E402

VARIABLES = ("CIRCLE_TOKEN", "PRIMARY_ORG_ID", "START_DATE", "END_DATE", "SHARED_ORG_IDS", "CIRCLECI_BASE_URL")
WINDOW = {"START_DATE": "2026-09-01", "END_DATE": "2026-09-30"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", lambda: clock.time())
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.sleep(seconds))
    return clock


@pytest.fixture
def fake(clock: Clock) -> Iterator[FakeCircleCI]:
    with closing(FakeCircleCI(clock.time)) as fake:
        yield fake


@pytest.fixture
def fast() -> FastTime:
    return FastTime(500)


@pytest.fixture
def fast_fake(fast: FastTime) -> Iterator[FakeCircleCI]:
    with closing(FakeCircleCI(fast.time)) as fake:
        yield fake


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
