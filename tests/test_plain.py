"""--plain: the same rows as plain CSV (RFC 4180), whatever the dialects of the parts."""

from __future__ import annotations

import csv
import gzip
import io
import re
import shutil
import subprocess
from datetime import datetime
from decimal import Decimal

import pytest
from conftest import leftovers
from crash import Killed
from fake_circleci import (
    COLUMNS,
    DIALECTS,
    HEADER,
    HEADERS,
    ORGANIZATIONS,
    PRIMARY,
    Answer,
    Cell,
    make_rows,
    make_runs,
    problem,
    write_row,
)
from hypothesis import given
from hypothesis import strategies as st
from test_merge import NAMES, many, merge

import usage_report

# A text that reads \N cannot be told from a missing value.
letters = st.characters(blacklist_categories=["Cs", "Cc"]) | st.sampled_from(',"\\N0 \n\r')
text = st.text(letters, max_size=8).filter(lambda text: text != r"\N")
cell = st.none() | st.integers() | st.decimals(0, 1000, places=2) | text
organization = st.sampled_from(list(ORGANIZATIONS))
table = st.lists(st.tuples(organization, cell, cell, st.integers(0, 10**6)), max_size=20)


def plain_row(cells: list[Cell]) -> str:
    """By the letter of RFC 4180, with quotes only where needed."""
    texts = ["" if cell is None else str(cell) for cell in cells]
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    needed = [re.search('[,"\r\n]', text) for text in texts]
    return ",".join(q if n else t for q, n, t in zip(quoted, needed, texts)) + "\r\n"


def plain_file(names: list[str], rows: list[list[Cell]]) -> bytes:
    return "".join(map(plain_row, [names, *rows])).encode()


@many
@given(table, st.data(), st.sampled_from(["\n", "\r\n"]))
def test_any_table_in_any_mix_of_dialects_becomes_plain_csv(tmp_path, rows, data, line_end):
    """Parts, and rows of a part, differ in dialect."""
    dialect = st.sampled_from(DIALECTS)
    half = data.draw(st.integers(0, len(rows)), label="rows in part 1")
    parts = []
    for piece in (rows[:half], rows[half:]):
        lines = [write_row(row, data.draw(dialect), line_end) for row in piece]
        parts.append(write_row(NAMES, data.draw(dialect), line_end) + b"".join(lines))
    report = merge(tmp_path, parts, plain=True)
    assert report == plain_file(NAMES, rows)
    read = list(csv.reader(io.StringIO(report.decode(), newline=""), strict=True))
    assert read == [NAMES, *(["" if cell is None else str(cell) for cell in row] for row in rows)]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "cell, plain",
    [
        pytest.param("Acme, Inc.", '"Acme, Inc."', id="a comma"),
        pytest.param('say "hi"', '"say ""hi"""', id="quotes"),
        pytest.param('"', '""""', id="a lone quote"),
        pytest.param("C:\\temp\\", "C:\\temp\\", id="backslashes"),
        pytest.param("a\\,b", '"a\\,b"', id="a backslash before a comma"),
        pytest.param("\\\\N", "\\\\N", id="two backslashes and N"),
        pytest.param("gr\u00fcn \U0001f680", "gr\u00fcn \U0001f680", id="emoji"),
        pytest.param("two\nlines", '"two\nlines"', id="a line break"),
        pytest.param("two\r\nlines", '"two\r\nlines"', id="a Windows line break"),
        pytest.param("N", "N", id="the letter N"),
        pytest.param("0012", "0012", id="leading zeros"),
        pytest.param(" x ", " x ", id="spaces"),
        pytest.param("NULL", "NULL", id="the word NULL"),
        pytest.param("=1+1", "=1+1", id="a formula"),
        pytest.param("", "", id="an empty string"),
        pytest.param(None, "", id="a missing value"),
        pytest.param(0, "0", id="zero"),
        pytest.param(Decimal("1.50"), "1.50", id="a fraction"),
    ],
)
def test_a_cell_is_the_same_plain_csv_from_every_dialect(tmp_path, dialect, cell, plain):
    part = write_row(NAMES, dialect) + write_row([PRIMARY, cell, cell, 5], dialect)
    header = ",".join(NAMES)
    assert merge(tmp_path, [part], plain=True).decode() == (
        f"{header}\r\n{PRIMARY},{plain},{plain},5\r\n"
    )


@pytest.mark.parametrize(
    "row, plain",
    [
        pytest.param(r"\N,\\N,1,x", ",,1,x", id="one or two backslashes, not quoted"),
        pytest.param(r'"\N","a",\N,"x"', ",a,,x", id="quoted and not quoted"),
        pytest.param(
            r'a,say "hi",1,x',
            'a,"say ""hi""",1,x',
            id="quotes inside a cell, not escaped",
        ),
        pytest.param(r"a,\"b\",1,x", 'a,"""b""",1,x', id="escaped quotes around a cell"),
        pytest.param(r'1,"b\",2,"x"', "1,b\\,2,x", id="a number first, and a backslash at the end"),
        pytest.param(r"\N,a\\,\\N,\N", ",a\\,,", id="missing, in a row with an escaped backslash"),
        pytest.param("a,b,1,\\\n", 'a,b,1,"\n"', id="a line break at the end"),
        pytest.param("a,b,1,\\\n\\\n", 'a,b,1,"\n\n"', id="two line breaks at the end"),
    ],
)
def test_what_counts_as_missing_or_quoted_is_decided_row_by_row(tmp_path, row, plain):
    for line_end in ("\n", "\r\n"):
        parts = [line_end.join([",".join(NAMES), row, row, ""]).encode()]
        assert merge(tmp_path, parts, plain=True).decode().split("\r\n")[1:] == [plain, plain, ""]


def test_a_cell_of_300_000_escaped_line_breaks_becomes_plain_csv(tmp_path):
    """If time grew with the square of the size, this would take half a minute."""
    part = f"A,B\n1,{chr(92)}\n".encode() + b"\\\n" * 300_000 + b"x\n"
    assert merge(tmp_path, [part], plain=True).count(b"\n") == 300_003


RUNS = list(make_runs(40, PRIMARY, 'Acme "R&D", Inc.', datetime(2026, 9, 1)))


def gzipped_part(runs: list[list[Cell]], dialect: str) -> Answer:
    rows = b"".join(write_row(run, dialect) for run in runs)
    return Answer(gzip.compress(HEADERS[dialect] + rows))


def test_parts_in_three_dialects_become_one_plain_report(fake, run, output):
    runs = [RUNS[:10], RUNS[10:20], RUNS[20:]]
    fake.parts = [[gzipped_part(*pair)] for pair in zip(runs, DIALECTS)]
    result = run("--plain")
    assert result.code == 0, result.err
    assert result.report.read_bytes() == plain_file(COLUMNS, RUNS)
    assert leftovers(output) == []


def test_a_bom_and_blank_lines_are_left_out(tmp_path):
    parts = [b"\xef\xbb\xbf" + HEADER + b"\n", b"\xef\xbb\xbf" + HEADER + b"\r\n", b""]
    assert merge(tmp_path, parts, plain=True) == plain_file(COLUMNS, [])


@pytest.mark.skipif(not shutil.which("sqlite3"), reason="needs the sqlite3 command")
@pytest.mark.parametrize("dialect", DIALECTS)
def test_sqlite_reads_the_same_rows_and_sums(fake, run, dialect):
    fake.parts = [[gzipped_part(RUNS, dialect)]]
    report = run("--plain").report
    sql = "SELECT count(*), sum(TOTAL_CREDITS), sum(JOB_NAME = ''), min(ORGANIZATION_NAME) FROM t"
    command = ["sqlite3", "-csv", ":memory:", f'.import "{report}" t', sql]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    missing = sum(run[COLUMNS.index("JOB_NAME")] is None for run in RUNS)
    name = RUNS[0][1]
    assert list(csv.reader([answer])) == [
        [str(len(RUNS)), str(sum(run[-1] for run in RUNS)), str(missing), name]
    ]


@pytest.mark.parametrize(
    "flags", [[[], ["--plain"]], [["--plain"], []]], ids=["raw, then plain", "plain, then raw"]
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_after_a_failure_the_other_format_needs_no_second_export(fake, run, flags, dialect):
    runs = [RUNS[:20], RUNS[20:]]
    good = [[gzipped_part(piece, dialect)] for piece in runs]
    fake.parts = [good[0], [problem(404, "?")]]
    assert run(*flags[0]).code == 1
    fake.parts = good
    result = run(*flags[1])
    raw = HEADERS[dialect] + b"".join(write_row(run, dialect) for run in RUNS)
    assert result.report.read_bytes() == (plain_file(COLUMNS, RUNS) if flags[1] else raw)
    assert len(fake.jobs) == 1 and len(fake.requests("GET", "store", "data_")) == 3


def test_a_raw_report_that_is_published_already_does_not_pass_for_the_plain_one(
    fake, run, output, monkeypatch
):
    publish_report = usage_report.publish_report

    def publish_and_die(*arguments):
        publish_report(*arguments)
        raise Killed

    monkeypatch.setattr(usage_report, "publish_report", publish_and_die)
    with pytest.raises(Killed):
        run()
    (raw,) = output.glob("all_orgs_*")
    monkeypatch.setattr(usage_report, "publish_report", publish_report)
    result = run("--plain")
    assert result.code == 0 and result.report != raw
    assert raw.read_bytes() == fake.report() and b"\r\n" in result.report.read_bytes()
    assert len(fake.jobs) == 1 and leftovers(output) == []


ROW = make_rows(1)[0]
EXTRA, SHORT = ROW.replace(b"\n", b",more\n"), ROW.replace(b"Acme,", b"")


@pytest.mark.parametrize(
    "row, text",
    [
        pytest.param(EXTRA, "a row has 49 cells, but the header has 48", id="too many cells"),
        pytest.param(SHORT, "a row has 47 cells, but the header has 48", id="too few cells"),
        pytest.param(b'"' + ROW, "Part 2: ", id="a quote that is never closed"),
        pytest.param(b'"a"b,c' + ROW, "Part 2: ", id="text after a closing quote"),
        pytest.param(ROW[:-1] + b"\\\n", "a row ends with a backslash", id="an escape at the end"),
        pytest.param(b"x" * 3_000_000, "a row has 1 cells", id="a line of several megabytes"),
        pytest.param(
            b'"' + b"x\n" * 600_000, "field larger than field limit", id="an endless quoted cell"
        ),
    ],
)
def test_plain_refuses_a_bad_row_and_the_raw_report_still_works(fake, run, output, row, text):
    """It is clear what to do, and the raw report needs no second export."""
    parts = [HEADER + ROW, HEADER + ROW + row, HEADER + ROW]
    fake.parts = [[Answer(gzip.compress(part, 1))] for part in parts]
    result = run("--plain")
    assert result.code == 1 and text in result.last_line and len(result.last_line) < 1000
    assert "without --plain" in result.last_line and "Traceback" not in result.err
    assert not list(output.glob("all_orgs_*"))
    raw = run("--quiet")
    assert raw.code == 0 and len(fake.jobs) == 1
    ends = [b"" if part.endswith(b"\n") else b"\n" for part in parts]
    whole = HEADER + b"".join(part[len(HEADER) :] + end for part, end in zip(parts, ends))
    assert raw.report.read_bytes() == whole
