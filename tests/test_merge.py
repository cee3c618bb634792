"""The merge: the header once, then every row of every part, byte for byte."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from conftest import leftovers
from fake_circleci import (
    COLUMNS,
    DIALECTS,
    HEADER,
    ORGANIZATIONS,
    PRIMARY,
    Answer,
    make_rows,
    split,
    write_row,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import usage_report
from usage_report import BOM

many = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NAMES = ["ORGANIZATION_ID", "JOB_NAME", "CREDITS USED", "TOTAL_CREDITS"]
letters = st.characters(blacklist_categories=["Cs", "Cc"]) | st.sampled_from(',"\\ \r')
cell = st.none() | st.integers() | st.text(letters, max_size=12)
organization = st.sampled_from(list(ORGANIZATIONS))
table = st.lists(st.tuples(organization, cell, cell, st.integers(0, 10**6)), max_size=30)


def merge(folder: Path, parts: list[bytes], plain: bool = False) -> bytes:
    """What merge_parts() writes for parts with these contents."""
    paths = [folder / f"part-{number}" for number in range(len(parts))]
    for path, content in zip(paths, parts):
        path.write_bytes(gzip.compress(content, 1))
    usage_report.merge_parts(paths, folder / "merged.csv", plain)
    return (folder / "merged.csv").read_bytes()


@many
@given(table, st.data(), st.sampled_from(["\n", "\r\n"]), st.sampled_from(DIALECTS))
def test_any_table_cut_into_parts_becomes_one_file(
    tmp_path, monkeypatch, rows, data, line_end, dialect
):
    """Later parts with or without a header or BOM; any part with or without a final newline."""
    monkeypatch.setattr(usage_report, "BLOCK", data.draw(st.integers(1, 300), label="BLOCK"))
    header = write_row(NAMES, dialect, line_end)
    lines = [write_row(row, dialect, line_end) for row in rows]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lines)), max_size=4), label="cuts"))
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(lines)]):
        part = b"".join(lines[start:end])
        if not parts or data.draw(st.booleans(), label="header"):
            part = header + part
        if part not in (b"", header) and data.draw(st.booleans(), label="no final line end"):
            part = part[: -len(line_end)]
        parts.append(BOM + part if parts and data.draw(st.booleans(), label="BOM") else part)
    assert merge(tmp_path, parts) == header + b"".join(lines)


ROWS = make_rows(60)
PARTS = [HEADER + b"".join(rows) for rows in split(ROWS, 3)]
WHOLE = HEADER + b"".join(ROWS)
CRLF = [part.replace(b"\n", b"\r\n") for part in PARTS]
WITH_BLANKS = HEADER.replace(b"JOB_ID", b"JOB RUN ID 2")


def row(text: str) -> bytes:
    return ",".join([PRIMARY, "Acme", *[text] * (len(COLUMNS) - 3), "5"]).encode() + b"\n"


@pytest.mark.parametrize(
    "parts, report",
    [
        pytest.param(
            [HEADER, HEADER + ROWS[0], b""],
            HEADER + ROWS[0],
            id="header only, and zero bytes",
        ),
        pytest.param([b"", b"", *PARTS], WHOLE, id="empty parts first"),
        pytest.param([HEADER.rstrip(), b"", HEADER.rstrip()], HEADER, id="headers without newline"),
        pytest.param(
            [WITH_BLANKS + ROWS[0], WITH_BLANKS + ROWS[1]],
            WITH_BLANKS + ROWS[0] + ROWS[1],
            id="a column name with spaces",
        ),
        pytest.param([BOM + part for part in PARTS], BOM + WHOLE, id="a BOM, kept once"),
        pytest.param(
            [PARTS[0], BOM + PARTS[1], PARTS[2]],
            WHOLE,
            id="a BOM in a later part, dropped",
        ),
        pytest.param(CRLF, WHOLE.replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param(
            [part[:-2] for part in CRLF],
            WHOLE.replace(b"\n", b"\r\n"),
            id="CRLF, the final one missing",
        ),
        pytest.param(
            [PARTS[0], HEADER.replace(b"\n", b"\r\n") + ROWS[0]],
            PARTS[0] + ROWS[0],
            id="a later header with CRLF",
        ),
        pytest.param(
            [PARTS[0], write_row(COLUMNS, "quoted") + ROWS[0]],
            PARTS[0] + ROWS[0],
            id="a later header with quotes",
        ),
        pytest.param(
            [HEADER + row(r"a\,b"), HEADER + row('"x, ""y"""')],
            HEADER + row(r"a\,b") + row('"x, ""y"""'),
            id="dialects mixed",
        ),
        pytest.param(
            [HEADER + row('"two\nlines"')],
            HEADER + row('"two\nlines"'),
            id="a line break in quotes",
        ),
        pytest.param(
            [HEADER + row("a\rb")[:-1], HEADER],
            HEADER + row("a\rb"),
            id="bare carriage returns in a row",
        ),
        pytest.param([HEADER + b"\xff\xfe\n"], HEADER + b"\xff\xfe\n", id="not UTF-8"),
        pytest.param(
            [HEADER + row("x" * 70_000), HEADER + ROWS[0]],
            HEADER + row("x" * 70_000) + ROWS[0],
            id="a row of 3 MB",
        ),
    ],
)
def test_every_row_keeps_its_bytes(fake, run, parts, report):
    fake.parts = [[Answer(gzip.compress(part, 1) if part else b"")] for part in parts]
    result = run("--quiet")
    assert (result.code, result.err) == (0, "")
    assert result.report.read_bytes() == report


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_keeps_its_bytes(fake, run, dialect):
    fake.use_dialect(dialect)
    assert run().report.read_bytes() == fake.report()


@pytest.mark.parametrize(
    "part, text",
    [
        pytest.param(
            HEADER.replace(b"JOB_ID", b"CPU_%") + ROWS[0],
            "Part 1 is not a usage export",
            id="a name with %",
        ),
        pytest.param(
            (HEADER + ROWS[0]).replace(b"\n", b"\r"),
            "Part 1 is not a usage export",
            id="bare carriage returns as line ends",
        ),
        pytest.param(ROWS[0], "Part 1 is not a usage export", id="rows only"),
        pytest.param(b"JOB_ID,,B\n", "Part 1 is not a usage export", id="a column without a name"),
        pytest.param(
            b"Sorry, no usage today.\n",
            "Part 1 is not a usage export",
            id="a sentence with a comma",
        ),
        pytest.param(
            b"A,B" * 400_000,
            "Part 2 does not match part 1 (48 and",
            id="a header of over a megabyte",
        ),
    ],
)
def test_a_first_part_without_a_usable_header_is_refused(fake, run, output, part, text):
    fake.parts = [[Answer(gzip.compress(part, 1))], [Answer(gzip.compress(PARTS[1]))]]
    result = run()
    assert result.code == 1 and text in result.last_line and len(result.last_line) < 1000
    assert not list(output.glob("all_orgs_*"))


def test_empty_parts_mean_no_usage(fake, run, output):
    fake.parts = [[Answer(b"")], [Answer(gzip.compress(b""))]]
    result = run()
    assert result.code == 3 and "no usage in this window" in result.err
    assert leftovers(output) == []
