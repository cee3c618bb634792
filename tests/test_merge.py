"""The merge and the summary against plain references, on arbitrary tables."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from decimal import Decimal

import pytest
from fake_circleci import COLUMNS, HEADER, ORGANIZATIONS, PRIMARY, make_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import usage_report
from usage_report import BOM, Tally

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = ["ORGANIZATION_ID", "JOB_NAME", "CREDITS USED", "TOTAL_CREDITS"]
cell = st.text(st.characters(blacklist_categories=["Cs", "Cc"]) | st.sampled_from(',"\\ \n\r'), max_size=12)
organization = st.sampled_from([*ORGANIZATIONS, "8D05D166-E199-43B1-B588-415EADAFACC1"])
credits = st.integers(0, 10**6).map(str) | st.decimals(0, 1000, places=2).map(str) | st.just(r"\N") | st.just("")
table = st.lists(st.tuples(organization, cell, cell, credits), max_size=30)


def quoted(row, line_end: str) -> bytes:
    return (",".join('"' + c.replace("\\", "\\\\").replace('"', '""') + '"' for c in row) + line_end).encode()


def escaped(row, line_end: str) -> bytes:
    return (",".join(re.sub(r'([\\,"\n\r])', r"\\\1", c) for c in row) + line_end).encode()


@quick
@given(rows=table, data=st.data(), line_end=st.sampled_from(["\n", "\r\n"]), write=st.sampled_from([quoted, escaped]))
def test_arbitrary_tables_cut_into_parts_come_out_as_one(tmp_path, monkeypatch, rows, data, line_end, write):
    """With or without header, BOM and last line end; and the counts are those of the table."""
    monkeypatch.setattr(usage_report, "BLOCK", data.draw(st.integers(1, 300), label="BLOCK"))
    header, lines = write(NAMES, line_end), [write(row, line_end) for row in rows]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lines)), max_size=4), label="cuts"))
    parts = []
    for number, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(lines)])):
        body = b"".join(lines[begin:end])
        if number == 0 or data.draw(st.booleans(), label="header"):
            body = header + body
        if body not in (b"", header) and data.draw(st.booleans(), label="last line end missing"):
            body = body[: -len(line_end)]
        path = tmp_path / f"part-{number}"
        path.write_bytes((BOM if number and data.draw(st.booleans(), label="BOM") else b"") + body)
        parts.append(path)
    tally = usage_report.merge(parts, tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == header + b"".join(lines)
    assert (tally.problem, tally.open_row) == ("", b"")
    assert tally.runs == Counter(row[0].lower() for row in rows)
    for one in tally.runs:
        used = [Decimal(row[3]) for row in rows if row[0].lower() == one and row[3] not in ("", r"\N")]
        assert tally.credits[one] == sum(used)


@quick
@given(st.lists(st.tuples(st.sampled_from(list(ORGANIZATIONS)), cell, credits), min_size=1, max_size=20), st.booleans())
def test_the_quick_way_to_count_and_the_csv_module_agree(rows, quotes):
    """In the columns of a real export, where an ID comes first and the credits come last."""
    names = ["ORGANIZATION_ID", "JOB_NAME", "TOTAL_CREDITS"]
    block = b"".join((quoted if quotes else escaped)(row, "\n") for row in rows)
    tally, by_csv = Tally(names), Tally(names)
    by_csv.open_row = b"\n"  # a blank row, which makes it take the slow way
    tally.count(block)
    by_csv.count(block)
    assert tally.runs == by_csv.runs == Counter(row[0] for row in rows)
    assert tally.credits == by_csv.credits


def test_rows_of_a_real_export_are_counted_the_quick_way(monkeypatch):
    """Not by timing: the csv module is not called."""
    monkeypatch.setattr(Tally, "rows_by_csv", None)
    tally = Tally(list(COLUMNS))
    rows = make_rows(200)
    tally.count(b"".join(rows))
    expected = sum(int(row.decode().rsplit(",", 1)[1]) for row in rows)
    assert (tally.runs[PRIMARY], tally.credits[PRIMARY], tally.problem) == (200, expected, "")


def row(organization=PRIMARY, name="Acme", credits="5") -> bytes:
    return ",".join([organization, name, *["x"] * (len(COLUMNS) - 3), credits]).encode() + b"\n"


@pytest.mark.parametrize(
    "block, runs, credits",
    [
        pytest.param(row(), 1, 5, id="plain"),
        pytest.param(row(name="a\\,b"), 1, 5, id="a name with an escaped comma"),
        pytest.param(row(name='"a,b"'), 1, 5, id="a name with a quoted comma"),
        pytest.param(row(name='"a\n' + PRIMARY + ',7"'), 1, 5, id="a line break in quotes"),
        pytest.param(row(name='"a,1\n' + PRIMARY + ',7"'), 1, 5, id="a line break in quotes that looks like two rows"),
        pytest.param(row(credits=r"\\N"), 1, 0, id="no value, as the real export has it"),
        pytest.param(row(credits=r"\N"), 1, 0, id="no value"),
        pytest.param(row(name='"a"', credits=r"\N") + row(name='"a"', credits=r"\\N"), 2, 0, id="no value, beside quotes"),
        pytest.param(row(credits="0.25") * 3, 3, Decimal("0.75"), id="fractions add up exactly"),
        pytest.param(row(organization=PRIMARY.upper()), 1, 5, id="an ID in capitals"),
        pytest.param(row() + b"\n" + row(), 2, 10, id="a blank line"),
    ],
)
def test_counts(block, runs, credits):
    tally = Tally(list(COLUMNS))
    tally.count(block)
    assert (tally.runs[PRIMARY], tally.credits[PRIMARY], tally.problem) == (runs, credits, "")


@pytest.mark.parametrize(
    "header, block, said",
    [
        pytest.param("A,B", b"1,2\n", "columns ORGANIZATION_ID and TOTAL_CREDITS are not both there", id="other columns"),
        pytest.param(",".join(COLUMNS), row(credits="many"), "a row does not fit the header", id="credits that are no number"),
        pytest.param(",".join(COLUMNS), row(credits="NaN"), "a row does not fit the header", id="credits that are NaN"),
        pytest.param(",".join(COLUMNS), row(name="a,b", credits="x"), "a row does not fit the header", id="too many cells"),
        pytest.param(",".join(COLUMNS), b"x,y\n", "a row does not fit the header", id="too few cells"),
        pytest.param(",".join(COLUMNS), row(credits='"5 or so'), "a quoted cell is never closed", id="open quote"),
    ],
)  # fmt: skip
def test_what_cannot_be_counted_leaves_the_report_without_summary(tmp_path, header, block, said):
    (tmp_path / "part").write_bytes(header.encode() + b"\n" + block)
    tally = usage_report.merge([tmp_path / "part"], tmp_path / "merged")
    text = usage_report.summary(tally, ORGANIZATIONS)
    assert text.startswith("No summary") and said in text
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "part").read_bytes()


def test_the_summary_shows_every_organization_and_adds_up():
    tally = Tally(list(COLUMNS))
    other = "00000000-0000-4000-8000-000000000000"
    tally.count(row(credits="300") + row(list(ORGANIZATIONS)[1], credits="100") * 2 + row(other, credits="1500"))
    assert usage_report.summary(tally, ORGANIZATIONS).splitlines() == [
        "ORGANIZATION                          JOB RUNS  CREDITS   SHARE",
        "00000000-0000-4000-8000-000000000000         1    1,500   75.0%",
        "Acme                                         1      300   15.0%",
        "Acme Research, Inc.                          2      200   10.0%",
        "acme-labs                             no usage",
        "all                                          4    2,000  100.0%",
    ]


def test_an_export_without_credits_has_a_summary_too():
    tally = Tally(list(COLUMNS))
    tally.count(row(credits="0"))
    assert usage_report.summary(tally, {PRIMARY: "Acme"}).splitlines()[1] == "Acme                 1        0      -"


def test_a_reader_of_the_report_finds_what_the_parts_had(fake, run):
    text = run().report.read_text("utf-8")
    rows = list(csv.DictReader(io.StringIO(text), escapechar="\\"))
    assert {one["ORGANIZATION_NAME"] for one in rows} == {"Acme", "Acme Research, Inc."}
    assert all(one["TOTAL_CREDITS"].isdigit() for one in rows) and HEADER.decode() == text[: len(HEADER)]
