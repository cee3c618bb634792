"""The summary: exact for every dialect, or not shown."""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest
from fake_circleci import (
    COLUMNS,
    DIALECTS,
    HEADER,
    HEADERS,
    ORGANIZATIONS,
    PRIMARY,
    Answer,
    Cell,
    Job,
    make_runs,
    write_row,
)
from hypothesis import given
from hypothesis import strategies as st
from test_merge import many
from test_plain import plain_file, text

import usage_report

OTHER = list(ORGANIZATIONS)[1]
PROJECT = "64b687d6-a9c7-4d25-b641-d153181e2777"
FIELDS = ["ORGANIZATION_ID", "ORGANIZATION_NAME", "PROJECT_ID", "PROJECT_NAME", "TOTAL_CREDITS"]
PLACES = [COLUMNS.index(name) for name in FIELDS]


def row(
    organization_id: str = PRIMARY,
    name: Cell = "Acme",
    project_id: str = PROJECT,
    project: Cell = "api",
    credits: Cell = 5,
) -> list[Cell]:
    cells: list[Cell] = ["x"] * len(COLUMNS)
    for place, cell in zip(PLACES, (organization_id, name, project_id, project, credits)):
        cells[place] = cell
    return cells


def count(folder: Path, content: bytes, plain: bool = False) -> dict[str, tuple[int, Decimal]]:
    """Rows and credits by organization ID, as count_usage() finds them in a report."""
    report = folder / "report.csv"
    report.write_bytes(content)
    usage = usage_report.count_usage(report, plain)
    return {key[0]: (rows, credits) for key, (rows, credits, _) in usage.items() if len(key) == 1}


def expected(rows: list[list[Cell]]) -> dict[str, tuple[int, Decimal]]:
    counts: Counter[str] = Counter()
    credits: Counter[str] = Counter()
    for cells in rows:
        counts[str(cells[0]).lower()] += 1
        credits[str(cells[0]).lower()] += Decimal(str(cells[-1] or 0))  # type: ignore[assignment]
    return {key: (counts[key], Decimal(credits[key])) for key in counts}


names = text | st.just("Acme, Inc.") | st.none()
amounts = st.integers(0, 10**6) | st.decimals(0, 1000, places=3) | st.none() | st.just("")
table = st.lists(
    st.builds(
        row,
        st.sampled_from([*ORGANIZATIONS, OTHER.upper()]),
        names,
        st.sampled_from([PROJECT, OTHER]),
        names,
        amounts,
    ),
    max_size=20,
)
simple = st.builds(row, st.sampled_from(list(ORGANIZATIONS)), credits=amounts)


@many
@given(table | st.lists(simple, max_size=20), st.data())
def test_any_table_is_counted_exactly(tmp_path, rows, data):
    """In one dialect, in a mix, and as plain CSV; with the columns in the usual order and in
    another one."""
    mixed = data.draw(st.booleans(), label="mixed dialects")
    dialect = st.sampled_from(DIALECTS)
    one = data.draw(dialect)
    dialects = [data.draw(dialect) if mixed else one for _ in rows]
    line_end = data.draw(st.sampled_from(["\n", "\r\n"]))

    def written(turn: int) -> bytes:
        lines = [
            write_row(cells[turn:] + cells[:turn], dialect, line_end)
            for cells, dialect in zip(rows, dialects)
        ]
        return write_row(COLUMNS[turn:] + COLUMNS[:turn], one, line_end) + b"".join(lines)

    assert count(tmp_path, written(0)) == expected(rows)
    assert count(tmp_path, written(5)) == expected(rows)
    assert count(tmp_path, plain_file(COLUMNS, rows), plain=True) == expected(rows)


def test_a_report_of_many_rows_is_counted_exactly(tmp_path):
    """More rows than are counted at a time."""
    rows = [write_row(row(credits=Decimal(number % 7))) for number in range(7)]
    content = HEADER + b"".join(rows) * 20_000
    assert count(tmp_path, content) == {PRIMARY: (140_000, 21 * 20_000)}


def test_a_quoted_report_is_counted_without_the_csv_module(tmp_path, monkeypatch):
    """It is several times faster without."""
    monkeypatch.setattr(csv, "reader", None)
    runs = list(make_runs(200, PRIMARY, "Acme Research, Inc.", datetime(2026, 9, 1)))
    content = HEADERS["quoted"] + b"".join(write_row(run, "quoted") for run in runs)
    assert count(tmp_path, content) == expected(runs)


ROW = write_row(row())


@pytest.mark.parametrize(
    "content, rows, credits",
    [
        pytest.param(ROW, 1, 5, id="a row"),
        pytest.param(ROW[:-1], 1, 5, id="no final newline"),
        pytest.param(ROW + b"\n" + ROW, 2, 10, id="an empty line"),
        pytest.param(write_row(row(name="a,b")), 1, 5, id="a name with an escaped comma"),
        pytest.param(write_row(row(name="a,b"), "quoted"), 1, 5, id="a name with a quoted comma"),
        pytest.param(ROW.replace(b"Acme", b'"a,b"'), 1, 5, id="one quoted cell in a bare row"),
        pytest.param(ROW.replace(b"Acme", b'say "hi"'), 1, 5, id="quotes inside a bare cell"),
        pytest.param(write_row(row(name="a\\")), 1, 5, id="a name that ends in a backslash"),
        pytest.param(
            write_row(row(name=f"a\n{PRIMARY},7"), "quoted"),
            1,
            5,
            id="a line break in quotes that looks like a row",
        ),
        pytest.param(write_row(row(name='","'), "quoted"), 1, 5, id="a name of separators"),
        pytest.param(ROW.replace(b"Acme", b"\xff"), 1, 5, id="a name that is not UTF-8"),
        pytest.param(write_row(row(credits=None)), 1, 0, id=r"credits missing: \\N"),
        pytest.param(ROW.replace(b",5\n", b",\\N\n"), 1, 0, id=r"credits missing: \N"),
        pytest.param(write_row(row(credits=None), "quoted"), 1, 0, id=r'credits missing: "\N"'),
        pytest.param(ROW.replace(b",5\n", b",\n"), 1, 0, id="credits missing: empty"),
        pytest.param(
            write_row(row(credits="0.1")) * 3,
            3,
            Decimal("0.3"),
            id="fractions add up exactly",
        ),
        pytest.param(write_row(row(credits="-5")) + ROW * 2, 3, 5, id="a refund"),
        pytest.param(write_row(row(PRIMARY.upper())) + ROW, 2, 10, id="an ID in capitals"),
        pytest.param(
            write_row(row(), "quoted") + ROW + write_row(row(), "strings quoted"),
            3,
            15,
            id="three dialects",
        ),
        pytest.param(
            ROW.replace(b",x,5", b',"x,5') + ROW.replace(b",x,5", b',x",5'),
            1,
            5,
            id="a quoted cell from one line to the next, each of which looks like a row",
        ),
    ],
)
def test_rows_and_credits_are_counted_exactly(tmp_path, content, rows, credits):
    assert count(tmp_path, HEADER + content) == {PRIMARY: (rows, credits)}


BAD = {
    "a word": "many",
    "NaN": "NaN",
    "an infinity": "Infinity",
    "a huge exponent": "1e999999",
    "a long number": "9" * 5000,
    "a hexadecimal number": "0x10",
    "two numbers": "1 2",
    "two points": "1.2.3",
    "a lone point": ".",
    "other digits": "\u0663",
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("credits", BAD.values(), ids=BAD.keys())
def test_credits_that_cannot_be_counted_cost_only_the_summary(fake, run, credits, dialect):
    rows = b"".join(write_row(row(credits=cell), dialect) for cell in (5, credits, 5))
    fake.parts = [[Answer(HEADERS[dialect] + rows)]]
    result = run()
    assert result.code == 0 and result.report.read_bytes() == HEADERS[dialect] + rows
    assert result.err.count("notice: No summary") == 1 and "Total" not in result.err
    assert len(result.last_line) < 500


@pytest.mark.parametrize(
    "content, text",
    [
        pytest.param(b"A,B\n1,2\n", "no column ORGANIZATION_ID", id="other columns"),
        pytest.param(HEADER + ROW + b"x,y\n", "", id="a row that is too short"),
        pytest.param(HEADER + b"x," + ROW, "", id="a row that is too long"),
        pytest.param(HEADER + ROW + b'"' + ROW, "", id="a quote that is never closed"),
        pytest.param(HEADER + b"x" * 3_000_000 + b"\n", "", id="a line of several megabytes"),
        pytest.param(HEADER + b'"' + b"x\n" * 600_000, "", id="a quoted cell of a megabyte"),
        pytest.param(
            HEADER + ROW.replace(b",5\n", b",x,5\n"), "", id="one cell too many before the credits"
        ),
    ],
)
def test_rows_that_cannot_be_counted_cost_only_the_summary(fake, run, content, text):
    fake.parts = [[Answer(content)]]
    result = run()
    assert result.code == 0 and result.report.read_bytes().startswith(content)
    assert "notice: No summary" in result.last_line and text in result.last_line
    assert "Total" not in result.err and len(result.last_line) < 500


def lines_from(err: str, title: str) -> list[str]:
    """The lines from the last table with this title to the end, without timestamps."""
    lines = [line.partition(" ")[2] for line in err.splitlines()]
    start = max(n for n, line in enumerate(lines) if line.startswith(title))
    return lines[start:]


SUMMARY_ROWS = [
    row(OTHER, None, credits="1500.5"),
    row(PRIMARY, "Acme (old name)", credits=300),
    row(PRIMARY, "Acme", OTHER, None, credits="199.5"),
]


@pytest.mark.parametrize("flags", [[], ["--plain"]], ids=["raw", "plain"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_summary_lists_organizations_and_projects_by_credits(fake, run, dialect, flags):
    rows = b"".join(write_row(cells, dialect) for cells in SUMMARY_ROWS)
    fake.parts = [[Answer(HEADERS[dialect] + rows)]]
    result = run(*flags)
    table = [line.split() for line in lines_from(result.err, "ORGANIZATION ")]
    assert table[0] == ["ORGANIZATION", "ROWS", "CREDITS", "SHARE"]
    assert table[1] == ["Acme", "Research,", "Inc.", "1", "1,500.5", "75.0%"]
    assert table[2] == ["Acme", "2", "499.5", "25.0%"]
    assert table[3] == ["acme-labs", "no", "usage"]
    assert table[4] == ["Total", "3", "2,000", "100.0%"]
    projects = [line.split() for line in lines_from(result.err, "TOP PROJECTS ")]
    assert projects[0] == ["TOP", "PROJECTS", "ORGANIZATION", "ROWS", "CREDITS", "SHARE"]
    assert projects[1] == ["api", "Acme", "Research,", "Inc.", "1", "1,500.5", "75.0%"]
    assert projects[2] == ["api", "Acme", "1", "300", "15.0%"]
    assert projects[3][1:] == ["Acme", "1", "199.5", "10.0%"]
    assert re.search(r"3 rows, .*B, \d+ s$", result.last_line)


def test_names_come_from_the_file_where_the_api_gave_none(fake, run):
    rows = [row(OTHER, "Name in the file"), row(PRIMARY, "Acme, by the file")]
    fake.parts = [[Answer(HEADER + b"".join(map(write_row, rows)))]]
    result = run(SHARED_ORG_IDS=OTHER)
    table = "\n".join(lines_from(result.err, "ORGANIZATION "))
    assert "Name in the file" in table and "Acme, by the file" in table


def test_with_a_job_id_only_organizations_in_the_file_are_named(fake, run):
    job_id = "0e1b3f58-3c0c-4f5b-9d6c-3f8a9a1f0c11"
    fake.jobs[job_id] = Job(PRIMARY, {}, created_at=0, empty_answers=0)
    fake.parts = [[Answer(HEADER + write_row(row(OTHER, "Only this one")))]]
    result = run("--job-id", job_id)
    assert result.code == 0, result.err
    assert "Only this one" in result.err and "no usage" not in result.err
    assert PRIMARY not in "\n".join(lines_from(result.err, "ORGANIZATION "))


def test_ten_projects_with_the_most_credits_are_shown(fake, run):
    ids = [f"64b687d6-a9c7-4d25-b641-{n:012}" for n in range(15)]
    rows = [row(project_id=ids[n], project=f"project-{n}", credits=n) for n in range(15)]
    fake.parts = [[Answer(HEADER + b"".join(map(write_row, rows)))]]
    lines = lines_from(run().err, "TOP PROJECTS ")
    shown = [line.split()[0] for line in lines if line.startswith("project-")]
    assert shown == [f"project-{n}" for n in range(14, 4, -1)]


def test_projects_with_the_same_name_are_counted_separately(fake, run):
    rows = [row(), row(OTHER, "Acme Research, Inc."), row(project_id=OTHER), row()]
    fake.parts = [[Answer(HEADER + b"".join(map(write_row, rows)))]]
    lines = lines_from(run().err, "TOP PROJECTS ")
    assert sorted(line.split()[-3] for line in lines if line.startswith("api")) == ["1", "1", "2"]


def test_an_export_without_credits_has_a_summary(fake, run):
    fake.parts = [[Answer(HEADER + write_row(row(credits=0)))]]
    result = run()
    table = [line.split() for line in lines_from(result.err, "ORGANIZATION ")]
    assert table[1] == ["Acme", "1", "0", "0.0%"]


@pytest.mark.parametrize("rows, shown", [(b"", "Z 0 rows,"), (ROW, "Z 1 row,")])
def test_a_report_with_hardly_any_rows_has_a_summary(fake, run, rows, shown):
    fake.parts = [[Answer(HEADER + rows)]]
    result = run()
    assert result.code == 0 and "notice" not in result.err
    assert shown in result.last_line


def test_quiet_spends_no_time_on_the_summary(fake, run, monkeypatch):
    counted = []
    count_usage = usage_report.count_usage
    monkeypatch.setattr(
        usage_report, "count_usage", lambda *args: counted.append(args) or count_usage(*args)
    )
    result = run("--quiet")
    assert (result.code, result.err, counted) == (0, "", [])
    run("--start", "2026-09-02")
    assert len(counted) == 1


LONG = "a-very-long-organization-name " * 3


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(
    "name", ["Acme", LONG, "\u682a\u5f0f\u4f1a\u793e" * 12, "\U0001f680 rocket"]
)
def test_the_tables_fit_the_terminal(tmp_path, caplog, width, name):
    """The bar appears where there is room."""
    report = tmp_path / "report.csv"
    rows = [row(PRIMARY, name, project=name, credits=1_234_567), row(OTHER, "b", credits=1)]
    report.write_bytes(HEADER + b"".join(map(write_row, rows)))
    caplog.set_level(logging.DEBUG, "usage_report")
    usage_report.show_summary(report, False, {**ORGANIZATIONS, PRIMARY: ""}, width, 0)
    tables = caplog.messages[:2]
    for line in "\n".join(tables).split("\n"):
        assert usage_report.display_width(line) <= width
    assert "1,234,567" in tables[0] and "100.0%" in tables[0]
    assert ("#" in tables[0]) == (width >= 80)
