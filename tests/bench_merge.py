"""A whole run against a shell pipeline on the same files: time, memory, and disk.

    python tests/bench_merge.py
    python tests/bench_merge.py --large    # 8 parts of 350 MB: one minute more, 7 GB of disk

The run is the real script, from its start to the printed path ("published") and to its end with
the summary. The pipeline is `curl | gunzip > out; curl | gunzip | tail -n +2 >> out; ...`. Both
fetch from one store on loopback and alternate. Times are medians of 3 (--large: one run), and
ratios are to the pipeline. Disk is the peak size of the output folder, next to what is needed: the
report and the compressed parts. The rows resemble a real export (600 bytes, compressed to a fifth).
Takes a minute and a half on 2 cores, and needs Linux, curl, gunzip, tail, and 1 GB of disk.
"""

from __future__ import annotations

import contextlib
import filecmp
import gzip
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from clocks import FastTime
from fake_circleci import HEADERS, ORGANIZATIONS, Answer, FakeCircleCI, Job, make_rows

ROUNDS = 3
MB = 1_000_000


@dataclass
class Measured:
    """Seconds and bytes of one run."""

    published: float
    ended: float
    memory: int
    disk: int
    report: Path


@lru_cache
def some_rows(dialect: str) -> bytes:
    return b"".join(
        row
        for organization_id, name in ORGANIZATIONS.items()
        for row in make_rows(8000, organization_id, name, dialect=dialect)
    )


def make_part(size: int, dialect: str) -> bytes:
    """A part of about this many bytes, not compressed."""
    rows = some_rows(dialect)
    rows *= size // len(rows) + 1
    return HEADERS[dialect] + rows[: rows.index(b"\n", size) + 1]


def disk_usage(folder: Path) -> int:
    """Bytes of all files. A file that has two names counts once."""
    sizes = {}
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(os.path.join(path, name))
                sizes[found.st_ino] = found.st_size
    return sum(sizes.values())


def run(fake: FakeCircleCI, folder: Path, *flags: str) -> Measured:
    """One run of the script, without the waits of a real export."""
    fast = FastTime(5000)
    fake.clock, started, memory, disk = fast.time, time.perf_counter(), 0, 0
    child = fast.start(fake, "--output-dir", folder, *flags)
    assert child.stdout and child.stderr
    printed: list[tuple[float, str]] = []
    err: list[str] = []
    readers = [
        threading.Thread(
            target=lambda: printed.extend((time.perf_counter(), line) for line in child.stdout)
        ),
        threading.Thread(target=lambda: err.append(child.stderr.read())),
    ]
    for reader in readers:
        reader.start()
    while child.poll() is None:
        with contextlib.suppress(OSError, IndexError, ValueError):  # It may just have ended.
            status = Path(f"/proc/{child.pid}/status").read_text()
            memory = int(status.split("VmHWM:")[1].split()[0]) * 1024
        disk = max(disk, disk_usage(folder))
        time.sleep(0.01)
    ended = time.perf_counter()
    for reader in readers:
        reader.join()
    assert child.returncode == 0 and "Total" in err[0], err
    ((published, line),) = printed
    return Measured(published - started, ended - started, memory, disk, Path(line.strip()))


def pipeline(fake: FakeCircleCI, folder: Path, parts: int) -> tuple[float, Path]:
    """Seconds, and the file that the pipeline wrote."""
    fake.clock = time.time
    fake.jobs["pipeline"] = Job("", {}, 0, 0)
    store, out = f"{fake.store_url}/pipeline", folder / "pipeline.csv"
    commands = [
        f"curl -s '{store}/data_{n}.csv.gz?expires=9999999999&signature=x' | gunzip "
        f"{'| tail -n +2 >>' if n else '>'} '{out}'"
        for n in range(parts)
    ]
    started = time.perf_counter()
    subprocess.run("; ".join(commands), shell=True, check=True)
    return time.perf_counter() - started, out


def compare(
    label: str,
    dialect: str,
    parts: int,
    size: int,
    rounds: int = ROUNDS,
    flags: tuple[str, ...] = (),
    **slow: float,
) -> None:
    """Print a line of the table. `size` is in bytes, of the whole report."""
    body = gzip.compress(make_part(size // parts, dialect), 6)
    fake = FakeCircleCI()
    fake.job_seconds = 0
    fake.parts = [[Answer(body, **slow)] for _ in range(parts)]  # type: ignore[arg-type]
    runs, pipelines = [], []
    with tempfile.TemporaryDirectory() as name:
        for _ in range(rounds):
            measured = run(fake, Path(name), *flags)
            seconds, reference = pipeline(fake, Path(name), parts)
            assert flags or filecmp.cmp(measured.report, reference, shallow=False)
            report_size = measured.report.stat().st_size
            measured.report.unlink()
            reference.unlink()
            runs.append(measured)
            pipelines.append(seconds)
    fake.close()
    theirs = statistics.median(pipelines)
    published = statistics.median(done.published for done in runs)
    ended = statistics.median(done.ended for done in runs)
    memory, disk = max(done.memory for done in runs), max(done.disk for done in runs)
    needed = report_size + parts * len(body)
    print(
        f"{label:26} {theirs:6.2f} s {published:6.2f} s {published / theirs:5.2f} "
        f"{ended:6.2f} s {ended / theirs:5.2f} {memory / MB:4.0f} MB "
        f"{disk / MB:6.1f} of {needed / MB:5.1f} MB",
        flush=True,
    )


if __name__ == "__main__":
    print(
        f"{'':26} {'pipeline':>8} {'published':>14} {'with summary':>14} {'memory':>7} {'disk':>18}"
    )
    compare("escaped, 4 parts,  40 MB", "escaped", 4, 40 * MB)
    compare("quoted,  4 parts,  40 MB", "quoted", 4, 40 * MB)
    compare("escaped, 4 parts, 400 MB", "escaped", 4, 400 * MB)
    compare("quoted,  4 parts, 400 MB", "quoted", 4, 400 * MB)
    if "--large" in sys.argv:
        compare("escaped, 8 x 350 MB", "escaped", 8, 2800 * MB, rounds=1)
    compare("escaped, --plain,  40 MB", "escaped", 4, 40 * MB, flags=("--plain",))
    compare("quoted,  --plain,  40 MB", "quoted", 4, 40 * MB, flags=("--plain",))
    compare(
        "slow store, 6 x 600 kB/s",
        "escaped",
        6,
        18 * MB,
        rounds=1,
        write_size=6000,
        pause=0.01,
    )
