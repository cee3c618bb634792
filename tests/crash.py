"""Crashes of a run in this process, and failures of file operations, at a chosen moment."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from clocks import Clock

Before = Callable[[int, str], None]


class Killed(BaseException):
    """Ends a run like kill -9: nothing in the script may handle it."""


class Disk:
    """Calls `before(number, operation)` before every operation that changes files in a folder, such
    as "write job.json.new". What `before` raises is what the run gets. Writes are cut in halves."""

    def __init__(self, folder: Path, before: Before) -> None:
        self.folder = str(folder)
        self.before = before
        self.operations: list[str] = []
        self.dead = False  # After a kill, a run changes nothing.

    def holds(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and str(path).startswith(self.folder)

    def change(self, verb: str, path: Any) -> None:
        if self.dead:
            raise Killed
        self.operations.append(f"{verb} {Path(path).name}")
        try:
            self.before(len(self.operations), self.operations[-1])
        except Killed:
            self.dead = True
            raise

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open"):
            return
        in_folder = self.holds(arguments[0])
        if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:
            in_folder = True  # shutil.rmtree: the path is relative to an open folder.
        reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if in_folder and not reads:
            self.change(event.replace("os.", ""), arguments[0])

    def fsync(self, handle: int) -> None:
        for path in (Path(self.folder), *Path(self.folder).rglob("*")):
            if os.path.samestat(path.stat(), os.fstat(handle)):
                self.change("fsync", path)

    def open(self, path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode != "wb" or not self.holds(path):
            return real_open(path, mode, *arguments, **options)
        file = RawFile(path, mode)
        file.disk = self
        return io.BufferedWriter(file)


class RawFile(io.FileIO):
    def write(self, data: Any) -> int:
        half = len(data) // 2
        for piece in (data[:half], data[half:]):
            self.disk.change("write", self.name)
            super().write(piece)
        return len(data)


real_open = open
active: list[Disk] = []
hooks: list[object] = []  # A hook stays until Python ends, so there is only one.


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    for disk in active:
        disk.audit(event, arguments)


@contextlib.contextmanager
def watch(folder: Path, before: Before = lambda number, operation: None) -> Iterator[Disk]:
    """While this lasts, the operations in the folder go through a Disk."""
    if not hooks:
        hooks.append(audit)
        sys.addaudithook(audit)
    disk = Disk(folder, before)
    files = mock.patch.multiple(builtins, open=disk.open), mock.patch.multiple(io, open=disk.open)
    with files[0], files[1], mock.patch.multiple(os, fsync=disk.fsync):
        active.append(disk)
        try:
            yield disk
        finally:
            active.remove(disk)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # as a new process has it


def crash(run: Callable[..., Any], output: Path, at: str, *arguments: str) -> None:
    """A run that is killed at the first operation that begins with this text."""

    def before(count: int, operation: str) -> None:
        if operation.startswith(at):
            raise Killed

    with watch(output, before) as disk, contextlib.suppress(Killed):
        run(*arguments)
    assert disk.dead, f"no operation is {at}: {disk.operations}"


def crash_after(seconds: float, clock: Clock, run: Callable[..., Any], *arguments: str) -> None:
    """A run that is killed while it waits, this many seconds from now."""
    end = clock.now + seconds

    def sleep(pause: float) -> None:
        Clock.sleep(clock, pause)
        if clock.now > end:
            raise Killed

    with contextlib.suppress(Killed), mock.patch.object(clock, "sleep", sleep):
        run(*arguments)
        raise AssertionError("the run ended before it could be killed")
