"""Downloads: whatever the store does, the report is complete and correct, or there is none."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import leftovers
from fake_circleci import HEADER, Answer, make_rows, problem, split

import usage_report

ROWS = make_rows(60)
PARTS = [HEADER + b"".join(rows) for rows in split(ROWS, 3)]
GZIPPED = [gzip.compress(part) for part in PARTS]
WHOLE = HEADER + b"".join(ROWS)
FIRST, GOOD, LAST = (Answer(body) for body in GZIPPED)
SIZE = len(GZIPPED[1])
HALF = SIZE // 2
CUTS = [0, 1, 10, HALF, SIZE - 1]


def damaged(body: bytes) -> bytes:
    """One bit of the CRC-32 is wrong."""
    return body[:-8] + bytes([body[-8] ^ 1]) + body[-7:]


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.csv", content)
    return file.getvalue()


def bad_then_good(body: bytes) -> list[Answer]:
    return [Answer(body), Answer(gzip.compress(body)), GOOD]


@pytest.mark.parametrize(
    "answers",
    [
        *(pytest.param([Answer(GZIPPED[1], cut=n), GOOD], id=f"cut at {n}") for n in CUTS),
        *(
            pytest.param(
                [Answer(GZIPPED[1], cut=n, length=False), GOOD], id=f"cut at {n}, no length"
            )
            for n in CUTS[1:]
        ),
        *(
            pytest.param([Answer(GZIPPED[1], cut=n, chunked=True), GOOD], id=f"cut at {n}, chunked")
            for n in CUTS
        ),
        pytest.param([Answer(PARTS[1], cut=500), GOOD], id="cut, not compressed"),
        pytest.param(
            [Answer(PARTS[1], cut=500, chunked=True), GOOD],
            id="cut, not compressed, chunked",
        ),
        pytest.param([Answer(drop=True), Answer(drop=True), GOOD], id="no answer twice"),
        pytest.param(
            [problem(n, "?") for n in (408, 429, 500, 503)] + [GOOD],
            id="408, 429, 500, 503",
        ),
        pytest.param([Answer(damaged(GZIPPED[1])), GOOD], id="wrong CRC-32"),
        pytest.param(
            [Answer(GZIPPED[1][:-4] + b"\0\0\0\0"), GOOD],
            id="wrong length in the gzip trailer",
        ),
        pytest.param(
            [Answer(GZIPPED[1], headers={"Content-Length": f"{SIZE - 20}"}), GOOD],
            id="Content-Length too small",
        ),
        pytest.param(
            [Answer(GZIPPED[1], headers={"Content-Length": f"{SIZE + 20}"}, cut=10**6), GOOD],
            id="Content-Length too large",
        ),
        pytest.param([Answer(GZIPPED[1] + b"more"), GOOD], id="bytes after the gzip stream"),
        pytest.param(bad_then_good(b"<html><body>Log in</body></html>"), id="HTML with 200"),
        pytest.param(bad_then_good(b"\xef\xbb\xbf \n<!DOCTYPE html>"), id="HTML after a BOM"),
        pytest.param(
            bad_then_good(b" " * 900 + b"<!-- S3 --><body>Sign in, please"),
            id="HTML after spaces",
        ),
        pytest.param(
            bad_then_good(b'<?xml version="1.0"?><Error><Code>SlowDown</Code></Error>'),
            id="XML with 200",
        ),
        pytest.param(bad_then_good(b'{"message": "Wait, then try again."}'), id="JSON with 200"),
        pytest.param(bad_then_good(b'["a", "b"]'), id="a JSON list"),
        pytest.param(bad_then_good(b"null"), id="null"),
        pytest.param(bad_then_good(b"[]"), id="[]"),
        pytest.param(bad_then_good(b'""'), id="an empty JSON string"),
        pytest.param(bad_then_good(b"\n\n"), id="empty lines"),
        pytest.param(bad_then_good(b"upstream connect error"), id="a sentence"),
        pytest.param(bad_then_good(zipped(PARTS[1])), id="zip"),
        pytest.param(bad_then_good(bz2.compress(PARTS[1])), id="bzip2"),
        pytest.param(bad_then_good(lzma.compress(PARTS[1])), id="xz"),
        pytest.param(bad_then_good(b"\x28\xb5\x2f\xfd\x04\x00A,B,C\n1,2,3\n"), id="zstd"),
        pytest.param(bad_then_good(b"PAR1\x15\x04,\x15\x00"), id="Parquet"),
        pytest.param(bad_then_good(PARTS[1].decode().encode("utf-16")), id="UTF-16"),
        pytest.param(
            [Answer(gzip.compress(gzip.compress(GZIPPED[1]))), GOOD],
            id="gzip three times",
        ),
        pytest.param([Answer(PARTS[1], length=False), GOOD], id="not compressed and no length"),
        pytest.param(
            [
                Answer(PARTS[1], cut=500, length=False, headers={"Transfer-Encoding": "identity"}),
                GOOD,
            ],
            id="cut, not compressed, Transfer-Encoding: identity",
        ),
    ],
)
def test_a_temporary_problem_is_retried(fake, run, output, answers):
    fake.parts = [[FIRST], list(answers), [LAST]]
    result = run("--verbose")
    assert result.code == 0, result.err
    assert result.report.read_bytes() == WHOLE
    assert len(fake.requests("GET", "store", "data_1.")) == len(answers)
    assert leftovers(output) == [] and len(fake.jobs) == 1


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(
            Answer(gzip.compress(PARTS[1][:999]) + gzip.compress(PARTS[1][999:])),
            id="several gzip members",
        ),
        pytest.param(
            Answer(gzip.compress(GZIPPED[1]), headers={"Content-Encoding": "gzip"}),
            id="Content-Encoding: gzip around the part",
        ),
        pytest.param(
            Answer(GZIPPED[1], headers={"Content-Encoding": "gzip"}),
            id="Content-Encoding: gzip for the part's own gzip",
        ),
        pytest.param(Answer(PARTS[1]), id="not compressed"),
        pytest.param(Answer(PARTS[1], chunked=True), id="not compressed, chunked"),
        pytest.param(Answer(GZIPPED[1], length=False), id="no Content-Length"),
        pytest.param(Answer(GZIPPED[1], write_size=1), id="byte by byte"),
        pytest.param(Answer(GZIPPED[1], write_size=1, chunked=True), id="byte by byte, chunked"),
        pytest.param(Answer(GZIPPED[1], write_size=HALF, pause=0.05), id="in two pieces"),
        pytest.param(Answer(PARTS[1][:-1]), id="no newline at the end"),
        pytest.param(Answer(b"".join(PARTS[1].splitlines(True)[1:])), id="no header"),
        pytest.param(Answer(b"\xef\xbb\xbf" + PARTS[1]), id="a BOM in a later part"),
        pytest.param(
            Answer(b"\xef\xbb\xbf" + PARTS[1].partition(b"\n")[2]),
            id="a BOM and no header",
        ),
    ],
)
def test_every_valid_form_of_a_part_is_accepted(fake, run, output, answer):
    fake.parts = [[FIRST], [answer], [LAST]]
    result = run()
    assert result.code == 0, result.err
    assert result.report.read_bytes() == WHOLE
    assert "notice" not in result.err and len(fake.requests("GET", "store", "data_1.")) == 1
    assert leftovers(output) == []


@pytest.mark.parametrize(
    "answer, code, text",
    [
        pytest.param(Answer(GZIPPED[1][:-9]), 1, "Part 2 is damaged", id="truncated gzip"),
        pytest.param(Answer(damaged(GZIPPED[1])), 1, "Part 2 is damaged", id="wrong CRC-32"),
        pytest.param(
            Answer(b"<html>Log in</html>"),
            1,
            "is not a CSV file. The server may have sent a web page",
            id="HTML",
        ),
        pytest.param(
            Answer(PARTS[1], length=False),
            1,
            "may be incomplete: the server",
            id="not compressed and no length",
        ),
        pytest.param(
            problem(404, "?"),
            1,
            "failed with 404. The report needs every part",
            id="404",
        ),
        pytest.param(
            problem(302, "?", Location="http://127.0.0.1:9/"),
            1,
            "failed with 302",
            id="redirect",
        ),
        *(
            pytest.param(Answer(b"", status), 1, f"failed with {status}", id=f"an empty {status}")
            for status in (201, 202, 204, 206)
        ),
        pytest.param(problem(503, "?"), 75, "failed with 503", id="503"),
        pytest.param(problem(429, "?"), 75, "failed with 429", id="429"),
        pytest.param(problem(403, "?"), 1, "Downloads still fail with new links.", id="403"),
        pytest.param(
            Answer(GZIPPED[1], cut=99),
            75,
            "Part 2 failed: connection lost",
            id="cut",
        ),
        pytest.param(Answer(drop=True), 75, "Part 2 failed: connection lost", id="no answer"),
        pytest.param(
            Answer(PARTS[1].replace(b"PROJECT_ID,", b"").replace(b"JOB_ID", b"RUN_ID")),
            1,
            "(47 and 48 columns): without PROJECT_ID, without JOB_ID, with RUN_ID",
            id="other columns",
        ),
        pytest.param(
            Answer(PARTS[1].replace(b"JOB_ID", b"2XLARGE %")),
            1,
            "without JOB_ID, with 2XLARGE %",
            id="a column with an odd name",
        ),
        pytest.param(
            Answer(b",".join(reversed(HEADER.strip().split(b","))) + b"\n"),
            1,
            "in a different order",
            id="columns in another order",
        ),
        pytest.param(
            Answer(b"Try again later, please.\n"),
            1,
            "Part 2 does not match part 1 (2 and 48 columns): without ORGANIZATION_ID",
            id="a sentence with a comma",
        ),
        pytest.param(
            Answer(b"x," * 2_000_000),
            1,
            "Part 2 does not match part 1 (524289 and 48",
            id="a line of several megabytes",
        ),
        pytest.param(
            Answer(b'"' + b"x," * 2_000_000),
            1,
            "Part 2 does not match part 1 (0 and 48",
            id="a quote that is never closed",
        ),
    ],
)
def test_a_lasting_problem_leaves_no_report_and_the_next_run_recovers(
    fake, run, output, answer, code, text
):
    fake.parts = [[FIRST], [answer], [LAST]]
    result = run()
    assert result.code == code, result.err
    assert text in result.last_line and len(result.last_line) < 1000
    assert "Traceback" not in result.err and result.out == ""
    assert not list(output.glob("all_orgs_*"))
    fake.parts = [[FIRST], [GOOD], [LAST]]
    again = run()
    assert again.code == 0, again.err
    assert again.report.read_bytes() == WHOLE
    first, last = (len(fake.requests("GET", "store", f"data_{n}.")) for n in (0, 2))
    refused_by_merge = "Part 2 does not match" in result.err
    assert (first, last) == (2 if refused_by_merge else 1, 1), "part 1 may be the wrong one"
    assert len(fake.jobs) == 1 and leftovers(output) == []


def test_a_missing_part_ends_the_run_even_if_another_link_has_expired(fake, run):
    """New links would not bring it back."""
    fake.parts = [[problem(403, "?")], [problem(404, "?")], [LAST]]
    result = run()
    assert result.code == 1 and "Part 2 failed with 404" in result.last_line
    assert len(fake.requests("GET", "store", "data_1.")) == 1


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(GZIPPED[1], write_size=200, pause=0.3), id="a stall"),
        pytest.param(Answer(GZIPPED[1], write_size=1, pause=0.02), id="a few bytes a second"),
        pytest.param(
            Answer(PARTS[1], write_size=1, pause=0.02),
            id="a few bytes a second, not compressed",
        ),
        pytest.param(
            Answer(b"\x1f", write_size=1, pause=0.02, length=False, endless=True), id="endless"
        ),
        pytest.param(
            Answer(b"\0", write_size=1, pause=0.02, chunked=True, endless=True),
            id="endless, chunked",
        ),
    ],
)
def test_a_download_that_is_too_slow_is_aborted_and_retried(fake, run, monkeypatch, answer):
    monkeypatch.setattr(usage_report, "READ_SECONDS", 0.1)
    fake.parts = [[FIRST], [answer, GOOD], [LAST]]
    started = time.perf_counter()
    result = run()
    assert result.code == 0, result.err
    assert "Part 2 failed: the response timed out" in result.err
    assert result.report.read_bytes() == WHOLE
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("start", [GZIPPED[1], PARTS[1]], ids=["gzip", "CSV"])
def test_a_part_that_never_ends_is_refused(fake, run, monkeypatch, start):
    monkeypatch.setattr(usage_report, "MAX_PART", 1_000_000)
    fake.parts = [[FIRST], [Answer(start, chunked=True, endless=True), GOOD], [LAST]]
    result = run()
    assert result.code == 0 and "Part 2 is too large." in result.err
    assert result.report.read_bytes() == WHOLE


def test_an_endless_first_line_is_refused(fake, run):
    line = Answer(b"x" * (1 << 16), chunked=True, endless=True)
    fake.parts = [[FIRST], [line, GOOD], [LAST]]
    result = run()
    assert (
        result.code == 0 and "is not a CSV file. The server may have sent a web page" in result.err
    )
    assert result.report.read_bytes() == WHOLE


@pytest.mark.parametrize("status", [401, 403])
def test_expired_links_are_replaced_and_complete_parts_kept(fake, run, status):
    fake.job_seconds = 10
    fake.parts = [[FIRST], [problem(status, "expired"), GOOD], [LAST]]
    result = run()
    assert result.code == 0 and "links have expired. Asking CircleCI for new links" in result.err
    assert result.report.read_bytes() == WHOLE
    assert len(fake.requests("GET", "store", "data_0.")) == 1
    assert len(fake.requests("GET")) == 2, "one more GET, for the new links"


def test_parts_are_in_the_order_of_the_links_whatever_finishes_first(fake, run):
    parts = [HEADER + row for row in ROWS[:12]]
    slow = {"write_size": 200, "pause": 0.01}
    fake.parts = [[Answer(gzip.compress(part), **slow)] for part in parts[:2]]
    fake.parts += [[Answer(gzip.compress(part))] for part in parts[2:]]
    assert run().report.read_bytes() == HEADER + b"".join(ROWS[:12])


def test_a_few_parts_are_downloaded_at_the_same_time(fake, run):
    answer = Answer(GZIPPED[0], write_size=len(GZIPPED[0]) // 3, pause=0.03)
    fake.parts = [[answer] for _ in range(12)]
    assert run().code == 0
    assert 3 <= fake.most_at_once["store"] <= 8
    assert fake.most_at_once["api"] == 1


def sizes(output: Path, pattern: str) -> list[int]:
    return [path.stat().st_size for path in sorted(output.glob(f".export-*/{pattern}"))]


@pytest.mark.parametrize("flags", [[], ["--plain"]], ids=["raw", "plain"])
def test_parts_stay_compressed_on_disk(fake, run, output, monkeypatch, flags):
    """Disk space needed: the compressed parts and the report."""
    merge_parts, seen = usage_report.merge_parts, []

    def watched_merge(*arguments):
        seen.append((sizes(output, "part-*"), sizes(output, "merged*")))
        merge_parts(*arguments)
        seen.append((sizes(output, "part-*"), len(sizes(output, "merged*"))))

    monkeypatch.setattr(usage_report, "merge_parts", watched_merge)
    fake.parts = [[FIRST], [GOOD], [LAST]]
    assert run(*flags).code == 0
    compressed = [len(body) for body in GZIPPED]
    assert seen == [(compressed, []), (compressed, 1)]


DAMAGE = {
    "a wrong CRC-32": damaged,
    "cut": lambda body: body[:HALF],
    "cut to nothing": lambda body: b"",
    "bytes added": lambda body: body + b"more",
    "overwritten": lambda body: b"\0" * len(body),
    "replaced by text": lambda body: b"Disk, failure\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_part_damaged_on_disk_between_runs_is_downloaded_again(fake, run, output, damage):
    fake.parts = [[FIRST], [GOOD], [problem(404, "?")]]
    assert run().code == 1
    (part,) = output.glob(".export-*/part-0001-*")
    part.write_bytes(damage(part.read_bytes()))
    fake.parts = [[FIRST], [GOOD], [LAST]]
    result = run()
    if result.code:
        assert "Part 1" in result.last_line and not list(output.glob("all_orgs_*"))
        result = run()
    assert result.code == 0, result.err
    assert result.report.read_bytes() == WHOLE
    assert len(fake.jobs) == 1 and leftovers(output) == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_the_report_and_its_parts_are_flushed_to_disk(fake, run, monkeypatch):
    fsync, flushed = os.fsync, []

    def watched_fsync(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    assert run().code == 0
    assert "state.json.new" in flushed and "merged.csv.new" in flushed
    assert sum(name.startswith("part-") for name in flushed) == fake.part_count


def test_a_name_taken_at_the_last_moment_is_not_overwritten(fake, run, output, monkeypatch):
    link, taken = os.link, []

    def take_the_name(source: Path, target: Path) -> None:
        if not taken:
            taken.append(Path(target))
            taken[0].write_text("another report")
        link(source, target)

    monkeypatch.setattr(os, "link", take_the_name)
    result = run()
    assert result.code == 0 and result.report.read_bytes() == fake.report()
    assert taken[0] != result.report and taken[0].read_text() == "another report"


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_an_existing_file_is_never_overwritten(fake, run, clock, output, monkeypatch, links):
    def refuse(*paths: object) -> None:
        raise OSError(1, "not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    output.mkdir()
    moments = [time.localtime(clock.now + n) for n in range(100)]
    stamps = [time.strftime("%Y%m%d_%H%M%S", moment) for moment in moments]
    taken = [output / f"all_orgs_{stamp}_2026-09-01_2026-09-30.csv" for stamp in stamps]
    for path in taken:
        path.write_text("someone else's")
    result = run()
    assert result.code == 0 and result.report not in taken
    assert result.report.read_bytes() == fake.report()
    assert {path.read_text() for path in taken} == {"someone else's"}
    assert leftovers(output) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not remove open files")
def test_an_output_folder_that_vanishes_costs_no_export(fake, run, output, monkeypatch):
    merge_parts = usage_report.merge_parts

    def vanish(*arguments):
        shutil.rmtree(output)
        merge_parts(*arguments)

    monkeypatch.setattr(usage_report, "merge_parts", vanish)
    result = run()
    assert result.code == 75 and "No such file or directory" in result.err
    assert "Traceback" not in result.err
    monkeypatch.setattr(usage_report, "merge_parts", merge_parts)
    (job_id,) = fake.jobs
    assert f"export job {job_id}" in result.err and run("--job-id", job_id).code == 0
