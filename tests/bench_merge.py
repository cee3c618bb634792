"""A whole run against a shell pipeline on the same files: seconds, memory, and disk.

    python tests/bench_merge.py            # 400 MB in 4 parts
    python tests/bench_merge.py --small    # 40 MB, for a quick look
    python tests/bench_merge.py --large    # also 8 parts of 350 MB, once: 7 GB of disk

The run is the real script, from its start to the printed path ("published") and to its end, after
the summary. The pipeline is `curl | gunzip > out; curl | gunzip | tail -n +2 >> out; ...; sync`.
Both fetch from one store on loopback and alternate. Times are medians of 3, ratios are to the
pipeline. DuckDB, if installed, converts the same files without a download. Disk is the largest
size of the output folder, next to the report and the parts. Needs Linux, curl, and 2 GB of disk.
"""

import contextlib
import csv
import gzip
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import NamedTuple

from clocks import FastTime
from fake_circleci import COLUMNS, PRIMARY, Answer, FakeCircleCI, Job, as_text, make_runs, write_row

try:
    import duckdb
except ImportError:
    duckdb = None

MB = 1_000_000
MAX_MEMORY = 70 * MB
BRANCH = COLUMNS.index("VCS_BRANCH")
MISSING = {"quoted": r"\N", "bare": r"\\N"}
TABLE_LINE = "{:26}{:>9}{:>16}{:>16}{:>9}{:>8}{:>20}"
TITLES = ("", "pipeline", "published", "with summary", "DuckDB", "memory", "disk")


class Case(NamedTuple):
    label: str
    dialect: str
    name: str = "Acme"  # of the organization, in every row
    flags: tuple = ()
    most_published: float = 2.2  # limits of the ratios
    most_ended: float = 4.0
    duckdb_reads_it: bool = True


CASES = [
    Case("bare", "bare"),
    Case("quoted", "quoted"),
    Case("quoted, commas and quotes", "quoted", 'Acme "R&D", Inc.'),
    # Every row goes through the csv module. There is no limit.
    Case("bare, commas (slow path)", "bare", "Acme, Inc.", (), 99, 99, False),
    Case("quoted, --raw", "quoted", "Acme", ("--raw",), 2.0, 2.0),
]


class Measured(NamedTuple):
    report: Path
    published: float  # seconds
    ended: float  # seconds
    memory: int  # bytes
    disk: int  # bytes


def make_rows(name):
    """Rows with this name of the organization. No other cell has commas or quotes."""
    rows = list(make_runs(4000, PRIMARY, name, datetime(2026, 9, 1)))
    for row in rows:
        row[BRANCH] = row[BRANCH].replace(",", "-")
    return rows


def run_script(fake, folder, flags):
    """One run of the script, without the waits of a real export."""
    fast = FastTime(5000)
    fake.clock = fast.time
    output = folder / "reports"
    published = memory = disk = 0
    started = time.perf_counter()
    with open(folder / "stdout", "w") as stdout, open(folder / "stderr", "w") as stderr:
        child = fast.start(fake, "--output-dir", output, *flags, stdout=stdout, stderr=stderr)
        while child.poll() is None:
            if not published and (folder / "stdout").stat().st_size:
                published = time.perf_counter()
            with contextlib.suppress(OSError, IndexError):  # Both may just have disappeared.
                status = Path(f"/proc/{child.pid}/status").read_text()
                memory = int(status.split("VmHWM:")[1].split()[0]) * 1024
                disk = max(disk, sum(path.stat().st_size for path in output.rglob("*.*")))
            time.sleep(0.02)
        ended = time.perf_counter()
    assert child.returncode == 0, (folder / "stderr").read_text()
    report = Path((folder / "stdout").read_text().strip())
    return Measured(report, (published or ended) - started, ended - started, memory, disk)


def run_pipeline(fake, parts, out):
    """Seconds of the shell pipeline."""
    fake.clock = time.time
    fake.jobs["pipeline"] = Job("", {}, 0, 0)
    commands = []
    for number in range(parts):
        link = f"{fake.store_url}/pipeline/data_{number}.csv.gz?expires=9999999999&signature=x"
        rest = f"| tail -n +2 >> '{out}'" if number else f"> '{out}'"
        commands.append(f"curl -s '{link}' | gunzip {rest}")
    started = time.perf_counter()
    subprocess.run("; ".join([*commands, f"sync '{out}'"]), shell=True, check=True)
    return time.perf_counter() - started


def run_duckdb(files, dialect, out):
    """Seconds of DuckDB's own conversion."""
    source = f"read_csv({files}, header=true, all_varchar=true, nullstr='{MISSING[dialect]}')"
    started = time.perf_counter()
    duckdb.sql(f"COPY (SELECT * FROM {source}) TO '{out}' (HEADER)")
    subprocess.run(["sync", out], check=True)
    return time.perf_counter() - started


def check_cells(report, rows, count):
    """The report must have the header and `count` times these rows."""
    with open(report, newline="", encoding="utf-8") as file:
        reader = csv.reader(file, strict=True)
        assert next(reader) == COLUMNS
        for _ in range(count):
            for row in rows:
                assert next(reader) == row
        assert next(reader, None) is None


def compare(case, parts, size, rounds=3):
    """Print a line of the table. Returns whether the limits are kept. `size`: bytes of all parts,
    not compressed."""
    rows = make_rows(case.name)
    lines = b"".join(write_row(row, case.dialect) for row in rows)
    repeats = size // parts // len(lines)
    body = gzip.compress(write_row(COLUMNS, case.dialect) + lines * repeats, 6)
    fake = FakeCircleCI()
    fake.job_seconds = 0
    fake.link_seconds = 10**9
    fake.parts = [[Answer(body)]] * parts
    runs, pipelines, conversions = [], [], []
    with tempfile.TemporaryDirectory() as name:
        out = Path(name, "out.csv")
        files = [f"{name}/data_{number}.csv.gz" for number in range(parts)]
        for file in files:
            Path(file).write_bytes(body)
        for _ in range(rounds):
            runs.append(run_script(fake, Path(name), case.flags))
            pipelines.append(run_pipeline(fake, parts, out))
            report = runs[-1].report
            if case.flags:
                subprocess.run(["cmp", report, out], check=True)
            elif len(runs) == 1:
                check_cells(report, as_text(rows), repeats * parts)
            needed = report.stat().st_size + parts * len(body)
            report.unlink()
            if duckdb and case.duckdb_reads_it:
                conversions.append(run_duckdb(files, case.dialect, out))
    fake.close()
    pipeline = median(pipelines)
    published = median(run.published for run in runs)
    ended = median(run.ended for run in runs)
    memory = max(run.memory for run in runs)
    disk = max(run.disk for run in runs)
    seconds = [f"{pipeline:.2f} s"]
    seconds += [f"{time:.2f} s {time / pipeline:5.2f}" for time in (published, ended)]
    seconds += [f"{median(conversions):.2f} s" if conversions else "-"]
    disk_text = f"{disk / MB:.0f} of {needed / MB:.0f} MB"
    print(TABLE_LINE.format(case.label, *seconds, f"{memory / MB:.0f} MB", disk_text), flush=True)
    fast = published <= case.most_published * pipeline and ended <= case.most_ended * pipeline
    return fast and memory < MAX_MEMORY and disk <= needed


if __name__ == "__main__":
    small = "--small" in sys.argv  # Then, starting Python takes most of the time.
    print(TABLE_LINE.format(*TITLES))
    kept = [compare(case, 4, 40 * MB if small else 400 * MB) for case in CASES]
    if "--large" in sys.argv:
        kept.append(compare(Case("quoted, 8 x 350 MB", "quoted"), 8, 2800 * MB, rounds=1))
    if not small and not all(kept):
        sys.exit("A limit is exceeded: see CASES and MAX_MEMORY.")
