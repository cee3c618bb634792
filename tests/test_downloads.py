"""Downloads and merge: whatever the store does, the report is complete and right, or it is not there."""

from __future__ import annotations

import gzip
import re
import shutil
import time
import zlib
from pathlib import Path

import pytest
from conftest import leftovers
from fake_circleci import COLUMNS, HEADER, ORGANIZATIONS, PRIMARY, Answer, make_rows, problem, split

import usage_report

ROWS = make_rows(60)
PLAIN = [HEADER + b"".join(piece) for piece in split(ROWS, 3)]
PACKED = [gzip.compress(part) for part in PLAIN]
WHOLE = HEADER + b"".join(ROWS)
FIRST, SECOND, LAST = ([[Answer(body)] for body in PACKED][n] for n in range(3))


def damaged(body: bytes) -> bytes:
    """One bit of the CRC-32 is wrong."""
    return body[:-8] + bytes([body[-8] ^ 1]) + body[-7:]


def odd_row(text: str) -> bytes:
    return ",".join([PRIMARY, "Acme", *[text] * (len(COLUMNS) - 3), "5"]).encode() + b"\n"


good = Answer(PACKED[1])
cut_at = [0, 1, 2, 9, 10, len(PACKED[1]) // 2, len(PACKED[1]) - 8, len(PACKED[1]) - 1]


@pytest.mark.parametrize(
    "middle",
    [
        *(pytest.param([Answer(PACKED[1], cut=n), good], id=f"cut after {n} bytes") for n in cut_at),
        *(pytest.param([Answer(PACKED[1], cut=n, length=False), good], id=f"cut after {n}, no length") for n in cut_at[1:]),
        *(pytest.param([Answer(PACKED[1], cut=n, chunked=True), good], id=f"cut after {n}, chunked") for n in cut_at),
        pytest.param([Answer(PLAIN[1], cut=500), good], id="cut without gzip"),
        pytest.param([Answer(drop=True), Answer(drop=True), good], id="no answer twice"),
        pytest.param([problem(n, "?") for n in (408, 429, 500, 503)] + [good], id="408, 429, 500 and 503 once each"),
        pytest.param([Answer(PACKED[1], bytes_a_write=len(PACKED[1]) // 9, pause=0.01)], id="slow bytes"),
        pytest.param([Answer(PACKED[1], bytes_a_write=1)], id="byte by byte"),
        pytest.param([Answer(PACKED[1], bytes_a_write=1, chunked=True)], id="byte by byte, chunked"),
        pytest.param([Answer(damaged(PACKED[1])), good], id="wrong CRC-32"),
        pytest.param([Answer(PACKED[1][:-4] + b"\0\0\0\0"), good], id="wrong length in the gzip trailer"),
        pytest.param([Answer(PACKED[1], headers={"Content-Length": str(len(PACKED[1]) - 20)}), good], id="length too short"),
        pytest.param([Answer(PACKED[1], headers={"Content-Length": str(len(PACKED[1]) + 20)}, cut=10**6), good], id="length too long"),
        pytest.param([Answer(PACKED[1] + b"more"), good], id="bytes after the gzip stream"),
        pytest.param([Answer(b"<html><body>Log in</body></html>"), good], id="HTML with 200"),
        pytest.param([Answer(gzip.compress(b"\xef\xbb\xbf \n<!DOCTYPE html>")), good], id="HTML in gzip"),
        pytest.param([Answer(b" " * 900 + b"<!-- S3 --><body>Sign in"), good], id="HTML behind blanks"),
        pytest.param([Answer(b"<Error><Code>SlowDown</Code></Error>"), good], id="an XML error with 200"),
        pytest.param([Answer(b'{"message": "Try again."}'), good], id="a JSON error with 200"),
        pytest.param([Answer(gzip.compress(PLAIN[1][:999]) + gzip.compress(PLAIN[1][999:]))], id="several gzip members"),
        pytest.param([Answer(gzip.compress(PACKED[1]), headers={"Content-Encoding": "gzip"})], id="Content-Encoding: gzip around it"),
        pytest.param([Answer(PACKED[1], headers={"Content-Encoding": "gzip"})], id="Content-Encoding: gzip is its own gzip"),
        pytest.param([Answer(PLAIN[1])], id="no gzip"),
        pytest.param([Answer(PLAIN[1], length=False)], id="no gzip, no length"),
        pytest.param([Answer(PLAIN[1], chunked=True)], id="no gzip, chunked"),
        pytest.param([Answer(PACKED[1], length=False)], id="no length"),
        pytest.param([Answer(PLAIN[1][:-1])], id="no newline at the end"),
        pytest.param([Answer(b"".join(PLAIN[1].splitlines(True)[1:]))], id="no header"),
        pytest.param([Answer(b"\xef\xbb\xbf" + PLAIN[1])], id="BOM in a later part"),
        pytest.param([Answer(b"\xef\xbb\xbf" + PLAIN[1].partition(b"\n")[2])], id="BOM and no header"),
        pytest.param([Answer(HEADER.replace(b"\n", b"\r\n") + PLAIN[1].partition(b"\n")[2])], id="header with CRLF"),
        pytest.param([Answer(('"' + '","'.join(COLUMNS) + '"\n').encode() + PLAIN[1].partition(b"\n")[2])], id="header with quotes"),
    ],
)  # fmt: skip
def test_trouble_that_is_overcome(fake, run, output, middle):
    fake.parts = [FIRST, list(middle), LAST]
    result = run("--verbose")
    assert result.code == 0, result.err
    assert result.report.read_bytes() == WHOLE
    assert leftovers(output) == [] and len(fake.jobs) == 1


FOREVER = 99


@pytest.mark.parametrize(
    "middle, code, said",
    [
        pytest.param([Answer(PACKED[1][:-9])], 1, "Part 2 of 3 is damaged", id="truncated gzip"),
        pytest.param([Answer(damaged(PACKED[1]))], 1, "is damaged", id="wrong CRC-32"),
        pytest.param([Answer(PACKED[1] + b"more")], 1, "is damaged", id="bytes after the gzip stream"),
        pytest.param([Answer(b"<html>Log in</html>")], 1, "is a web page", id="HTML"),
        pytest.param([problem(404, "?")], 1, "answered 404: without it", id="404"),
        pytest.param([problem(302, "?", Location="http://127.0.0.1:9/")], 1, "answered 302", id="redirect"),
        pytest.param([problem(503, "?")], 1, "answered 503", id="503"),
        pytest.param([problem(403, "?")], 1, "answered 403: the link has expired", id="403"),
        pytest.param([Answer(PACKED[1], cut=99)], 75, "did not come through", id="cut"),
        pytest.param([Answer(drop=True)], 75, "did not come through", id="no answer"),
        pytest.param(
            [Answer(PLAIN[1].replace(b"PROJECT_ID,", b"").replace(b"JOB_ID", b"RUN_ID"))], 1,
            "Part 2 has other columns: without PROJECT_ID, without JOB_ID, with RUN_ID", id="other columns",
        ),
        pytest.param([Answer(b",".join(reversed(HEADER.strip().split(b","))) + b"\n")], 1, "in another order", id="order"),
        pytest.param([Answer(b"Service unavailable\n")], 1, "begins with a row of 1 cells, where the header has 48", id="plain text"),
    ],
)  # fmt: skip
def test_trouble_for_good_leaves_no_report_and_loses_nothing(fake, run, output, middle, code, said):
    fake.parts = [FIRST, middle, LAST]
    result = run()
    assert result.code == code
    assert re.search(said, result.err), result.err
    assert "Traceback" not in result.err and result.out == ""
    assert not list(output.glob("all_orgs_*"))
    fetched = [len(fake.requests("GET", "store", f"data_{n}.")) for n in (0, 2)]
    fake.parts = [FIRST, [good], LAST]
    if "columns" in said or "order" in said or "cells" in said:
        for part in output.glob(".export-*/part-0001*"):
            part.unlink()
    assert run().report.read_bytes() == WHOLE
    assert [len(fake.requests("GET", "store", f"data_{n}.")) for n in (0, 2)] == fetched == [1, 1]
    assert len(fake.jobs) == 1 and leftovers(output) == []


def test_a_stall_longer_than_the_read_timeout(fake, run, monkeypatch):
    monkeypatch.setattr(usage_report, "TIMEOUTS", (1, 0.1))
    fake.parts = [FIRST, [Answer(PACKED[1], bytes_a_write=200, pause=0.3), good], LAST]
    result = run()
    assert result.code == 0 and "Part 2 of 3 did not come through: no answer in time" in result.err
    assert result.report.read_bytes() == WHOLE


def test_an_odd_name_of_a_column_is_another_column_all_the_same(fake, run, output):
    fake.parts = [FIRST, [Answer(PLAIN[1].replace(b"JOB_ID", b"2XLARGE %"))]]
    result = run()
    assert result.code == 1 and "without JOB_ID, with 2XLARGE %" in result.err
    assert not list(output.glob("all_orgs_*"))


@pytest.mark.parametrize("status", [401, 403])
def test_links_that_expire_in_the_middle_of_several_parts(fake, run, status):
    fake.parts = [FIRST, [problem(status, "expired"), good], LAST]
    result = run()
    assert result.code == 0 and "Asking the job for fresh links" in result.err
    assert result.report.read_bytes() == WHOLE
    assert len(fake.requests("GET", "store", "data_0.")) == 1, "a complete part is not downloaded again"


@pytest.mark.parametrize(
    "parts, report",
    [
        pytest.param([HEADER, HEADER + ROWS[0], b""], HEADER + ROWS[0], id="header alone, and zero bytes"),
        pytest.param([b"", b"", PLAIN[0], PLAIN[1]], PLAIN[0] + PLAIN[1].partition(b"\n")[2], id="empty parts first"),
        pytest.param([HEADER.rstrip(), b"", HEADER.rstrip()], HEADER, id="headers without newline"),
        pytest.param(
            [HEADER.replace(b"JOB_ID", b"CPU_%") + ROWS[0]] * 2, HEADER.replace(b"JOB_ID", b"CPU_%") + ROWS[0] * 2, id="an odd name of a column"
        ),
        pytest.param([b"\xef\xbb\xbf" + PLAIN[0]] * 2, b"\xef\xbb\xbf" + PLAIN[0] + PLAIN[0].partition(b"\n")[2], id="BOM once, at the start"),
        pytest.param([p.replace(b"\n", b"\r\n") for p in PLAIN], WHOLE.replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param([p.replace(b"\n", b"\r\n")[:-2] for p in PLAIN], WHOLE.replace(b"\n", b"\r\n"), id="CRLF, the last missing"),
        pytest.param(
            [HEADER + odd_row('a\\,b'), HEADER + odd_row('"x, ""y"""') + odd_row("caf\u00e9 \U0001f680")],
            HEADER + odd_row('a\\,b') + odd_row('"x, ""y"""') + odd_row("caf\u00e9 \U0001f680"), id="commas, quotes, emoji",
        ),
        pytest.param([HEADER + odd_row('"two\nlines"')[:-1], HEADER + b"\xff\xfe\n"], HEADER + odd_row('"two\nlines"') + b"\xff\xfe\n", id="line break in a cell, no UTF-8"),
    ],
)  # fmt: skip
def test_parts_as_they_come(fake, run, parts, report):
    fake.parts = [[Answer(gzip.compress(part) if part else b"")] for part in parts]
    result = run()
    assert result.code == 0, result.err
    assert result.report.read_bytes() == report


def test_files_without_a_byte_are_no_usage(fake, run, output):
    fake.parts = [[Answer(b"")], [Answer(gzip.compress(b""))]]
    result = run()
    assert result.code == 3 and "its files are empty" in result.err
    assert leftovers(output) == []


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_name_that_is_taken_is_never_overwritten(fake, run, clock, output, monkeypatch, links):
    if not links:
        monkeypatch.setattr(usage_report.os, "link", lambda *paths: (_ for _ in ()).throw(OSError(1, "not permitted")))
    output.mkdir()
    moments = [time.strftime("%Y%m%d_%H%M%S", time.localtime(clock.now + n)) for n in range(100)]
    taken = [output / f"all_orgs_{moment}_2026-09-01_2026-09-30.csv" for moment in moments]
    for path in taken:
        path.write_text("of somebody else")
    result = run()
    assert result.code == 0 and result.report not in taken and result.report.read_bytes() == fake.report()
    assert {path.read_text() for path in taken} == {"of somebody else"}
    assert leftovers(output) == []


def test_the_report_and_its_parts_are_flushed_to_disk(fake, run, monkeypatch):
    flush, flushed = usage_report.flush, []
    monkeypatch.setattr(usage_report, "flush", lambda file: flushed.append(Path(file.name).name) or flush(file))
    assert run().code == 0
    assert {name.partition("-")[0] for name in flushed} == {"state.new", "part", "merged.csv"}
    assert sum(name.startswith("part-") for name in flushed) == fake.part_count


def test_an_output_folder_that_vanishes(fake, run, output, monkeypatch):
    merge = usage_report.merge
    monkeypatch.setattr(usage_report, "merge", lambda parts, target: shutil.rmtree(output) or merge(parts, target))
    result = run()
    assert result.code == 75 and "No such file or directory" in result.err and "Traceback" not in result.err
    (job_id,) = fake.jobs
    monkeypatch.setattr(usage_report, "merge", merge)
    assert job_id in result.last_line and run("--job-id", job_id).code == 0


def test_a_few_parts_are_downloaded_at_once(fake, run):
    fake.parts = [[Answer(PACKED[0], bytes_a_write=len(PACKED[0]) // 5, pause=0.02)] for _ in range(12)]
    assert run().code == 0
    assert 3 <= fake.most_at_once["store"] <= 8
    assert fake.most_at_once["api"] == 1


def chunks_of(data: bytes, size: int):
    return (data[start : start + size] for start in range(0, len(data), size))


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_gunzip_never_gives_more_than_a_block_at_once(size):
    data = bytes(5 * usage_report.BLOCK)
    pieces = list(usage_report.gunzip(chunks_of(gzip.compress(data), size)))
    assert b"".join(pieces) == data and max(map(len, pieces)) <= usage_report.BLOCK


@pytest.mark.parametrize("cut", range(1, len(gzip.compress(b"abc"))))
def test_gunzip_notices_every_place_where_a_stream_can_break_off(cut):
    with pytest.raises(zlib.error):
        list(usage_report.gunzip(iter([gzip.compress(b"abc")[:cut]])))


def test_every_organization_is_in_the_summary(fake, run):
    result = run()
    for name in ORGANIZATIONS.values():
        assert name in result.err
