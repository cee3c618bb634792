"""The whole run against a shell pipeline on the same files: time, memory, and a slow store.

    python tests/bench_merge.py

The run is the real script, from its start to the report with its summary. The pipeline is
`curl | gunzip > out; curl | gunzip | tail -n +2 >> out; ...`. Both fetch from one store on loopback and
alternate; times are medians of 5. Needs Linux, curl, gunzip and tail, and about 2 GB of disk.
"""

from __future__ import annotations

import contextlib
import filecmp
import gzip
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from clocks import FastTime
from fake_circleci import HEADER, ORGANIZATIONS, Answer, FakeCircleCI, Job, make_rows

ROUNDS = 5


def megabytes_of_rows(size: int) -> bytes:
    rows = b"".join(row for one, name in ORGANIZATIONS.items() for row in make_rows(8000, one, name))
    return HEADER + rows * (size * 1_000_000 // len(rows)) + rows[: rows.index(b"\n", size * 1_000_000 % len(rows)) + 1]


def run(fake: FakeCircleCI, folder: Path) -> tuple[float, int, Path]:
    """Seconds, peak memory in bytes, and the report of one run of the script. Its waits are shortened."""
    fast = FastTime(5000)
    fake.clock, began, peak = fast.time, time.perf_counter(), 0
    child = fast.start(fake, "--output-dir", folder)
    while child.poll() is None:
        with contextlib.suppress(OSError, IndexError, ValueError):  # it may just have ended
            peak = int(Path(f"/proc/{child.pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
        time.sleep(0.005)
    took = time.perf_counter() - began
    out, err = child.communicate()
    assert child.returncode == 0 and "100.0%" in err, err
    return took, peak, Path(out.strip())


def pipeline(fake: FakeCircleCI, folder: Path, parts: int) -> tuple[float, Path]:
    """Seconds, and the file that the pipeline made."""
    fake.clock = time.time
    fake.jobs["pipeline"] = Job("", {}, 0, 0)
    urls = [f"{fake.store_url}/pipeline/data_{n}.csv.gz?expires=9999999999&signature=x" for n in range(parts)]
    out = folder / "pipeline.csv"
    commands = [f"curl -s '{url}' | gunzip {'| tail -n +2 >>' if n else '>'} '{out}'" for n, url in enumerate(urls)]
    began = time.perf_counter()
    subprocess.run("; ".join(commands), shell=True, check=True)
    return time.perf_counter() - began, out


def compare(parts: int, size: int, rounds: int = ROUNDS, **slow: float) -> tuple[float, float, int]:
    """Medians in seconds of the run and the pipeline, and the run's peak memory in bytes."""
    body = gzip.compress(megabytes_of_rows(size), 6)
    fake = FakeCircleCI()
    fake.job_seconds = 0
    fake.parts = [[Answer(body, **slow)] for _ in range(parts)]  # type: ignore[arg-type]
    ours, theirs, peaks = [], [], []
    with tempfile.TemporaryDirectory() as name:
        for _ in range(rounds):
            took, peak, report = run(fake, Path(name))
            ours.append(took)
            peaks.append(peak)
            took, reference = pipeline(fake, Path(name), parts)
            theirs.append(took)
            assert filecmp.cmp(report, reference, shallow=False)
            report.unlink()
            reference.unlink()
    fake.close()
    return statistics.median(ours), statistics.median(theirs), max(peaks)


if __name__ == "__main__":
    print("                              run   pipeline   ratio   peak memory")
    for label, parts, size, options in (
        ("4 parts,  40 MB", 4, 10, {}),
        ("4 parts, 400 MB", 4, 100, {}),
        ("6 parts, 600 kB/s each", 6, 6, {"rounds": 1, "bytes_a_write": 6000, "pause": 0.01}),
    ):
        ours, theirs, peak = compare(parts, size, **options)  # type: ignore[arg-type]
        print(f"{label:24} {ours:6.2f} s {theirs:8.2f} s {ours / theirs:7.2f} {peak / 1e6:10.0f} MB")
