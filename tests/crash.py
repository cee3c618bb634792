"""Crashes of a run in this process, and failures of file operations, at a chosen moment."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clocks import Clock

import usage_report


class Killed(BaseException):
    """Ends a run like kill -9: nothing in the script may handle it."""


class Disk:
    """Calls `before(number, operation)` before every operation that changes files in a folder. An
    operation is a string such as "write state.json.new". What `before` raises is what the run gets.
    A write counts twice, for its first half and for the rest."""

    def __init__(self, folder: Path, before: Callable[[int, str], None]) -> None:
        self.folder, self.before = str(folder), before
        self.operations: list[str] = []
        self.dead = False
        self.lock = threading.RLock()

    def change(self, verb: str, path: Any) -> None:
        text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        if not str(text).startswith(self.folder):
            return
        with self.lock:
            if self.dead:
                raise Killed
            self.operations.append(f"{verb} {Path(text).name}")
            try:
                self.before(len(self.operations), self.operations[-1])
            except Killed:
                self.dead = True
                raise

    def read(self) -> None:
        if self.dead:  # After a kill, a run does nothing at all.
            raise Killed

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        changes = {"os.mkdir": 0, "os.rmdir": 0, "os.remove": 0, "os.rename": 0, "os.link": 1}
        if event in changes:
            self.change(event[3:], arguments[changes[event]])
        elif event == "open" and isinstance(arguments[2], int):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR)
            self.change("open", arguments[0]) if writes else self.read()
        elif event in ("os.listdir", "os.scandir"):
            self.read()

    def fsync(self, handle: int) -> None:
        for path in (Path(self.folder), *Path(self.folder).rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # Another thread may rename it now.
                if os.path.samestat(path.stat(), os.fstat(handle)):
                    self.change("fsync", path)
                    break


class RawFile(io.FileIO):
    disk: Disk

    def write(self, data: Any) -> int:
        half = len(data) // 2
        for piece in (data[:half], data[half:]):
            self.disk.change("write", self.name)
            super().write(piece)
        return len(data)


active: list[Disk] = []


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    for disk in active:
        disk.audit(event, arguments)


hooks: list[object] = []  # A hook stays until Python ends, so there is only one.


@contextlib.contextmanager
def watch(
    folder: Path, before: Callable[[int, str], None] = lambda n, what: None
) -> Iterator[Disk]:
    """While this lasts, the script's operations in the folder go through a Disk."""
    if not hooks:
        hooks.append(audit)
        sys.addaudithook(audit)
    disk, fsync = Disk(folder, before), os.fsync
    raw = type("RawFile", (RawFile,), {"disk": disk})

    def open_file(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode == "w+b":
            return io.BufferedRandom(raw(path, mode))
        return open(path, mode, *arguments, **options)

    usage_report.open = open_file  # type: ignore[attr-defined]
    os.fsync = disk.fsync
    active.append(disk)
    try:
        yield disk
    finally:
        active.remove(disk)
        os.fsync = fsync
        del usage_report.open  # type: ignore[attr-defined]


def kill_before(number: int) -> Callable[[int, str], None]:
    def before(count: int, operation: str) -> None:
        if count == number:
            raise Killed

    return before


def kill_before_first(wanted: str) -> Callable[[int, str], None]:
    """Kill at the first operation that begins with this text."""

    def before(count: int, operation: str) -> None:
        if operation.startswith(wanted):
            raise Killed

    return before


def crash(
    run: Callable[..., Any], output: Path, at: str, *arguments: str, **variables: str
) -> None:
    """A run that is killed at the first operation that begins with this text."""
    with watch(output, kill_before_first(at)) as disk, contextlib.suppress(Killed):
        run(*arguments, **variables)
    assert disk.dead, f"no operation is {at}: {disk.operations}"


def crash_after(
    seconds: float, clock: Clock, run: Callable[..., Any], *arguments: str, **variables: str
) -> None:
    """A run that is killed while it waits, this many seconds from now."""
    end = clock.now + seconds

    def sleep(pause: float) -> None:
        Clock.sleep(clock, pause)
        if clock.now > end:
            raise Killed

    clock.sleep = sleep  # type: ignore[method-assign]
    try:
        run(*arguments, **variables)
    except Killed:
        return
    finally:
        del clock.sleep  # type: ignore[method-assign]
    raise AssertionError("the run ended before it could be killed")
