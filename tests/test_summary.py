"""The summary: exact credits by organization, kind, and project, whatever the rows hold."""

import re
from collections import defaultdict
from decimal import Decimal

import pytest
from fake_circleci import COLUMNS, DIALECTS, ORGANIZATIONS, PRIMARY, Answer, Job, write_row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TITLE = re.compile(r"\S+Z +CREDITS +SHARE +ROWS  (\w+).*")
LINE = re.compile(r"\S+Z +(-?[\d,.]+) +(-?[\d.]+%) +#* +([\d,]+)  (.*)")


def make_row(columns=COLUMNS, **cells):
    cells = {"ORGANIZATION_ID": PRIMARY, "PROJECT_NAME": "api", **cells}
    cells.setdefault("ORGANIZATION_NAME", ORGANIZATIONS[cells["ORGANIZATION_ID"]])
    cells.setdefault("PROJECT_ID", cells["PROJECT_NAME"].encode().hex())
    return [cells.get(name, 0 if name.endswith("_CREDITS") else None) for name in columns]


def serve(fake, rows, columns=COLUMNS, dialect="quoted", line_end="\n"):
    lines = [write_row(row, dialect, line_end) for row in [columns, *rows]]
    fake.parts = [[Answer(b"".join(lines))]]


def read_tables(result):
    """Credits, share, and rows by name, by the first word of each table's title."""
    tables = {}
    for line in result.err.splitlines():
        title = TITLE.fullmatch(line)
        cells = LINE.fullmatch(line)
        if title:
            table = {}
            tables[title[1]] = table
        elif cells:
            table[cells[4]] = cells.group(1, 2, 3)
    return tables


RESEARCH = "8d05d166-e199-43b1-b588-415eadafacc1"
ROWS = [
    make_row(PROJECT_NAME="web", COMPUTE_CREDITS=300, TOTAL_CREDITS=300),
    make_row(JOB_RUN_SECONDS=8, COMPUTE_CREDITS=100, USER_CREDITS=25000, TOTAL_CREDITS=25100),
    make_row(),
    make_row(ORGANIZATION_ID=RESEARCH, DLC_CREDITS=600, TOTAL_CREDITS=600),
]
TABLES = {
    "ORGANIZATION": {
        "Acme": ("25,400", "97.7%", "3"),
        "Acme Research, Inc.": ("600", "2.3%", "1"),
        "acme-labs (no usage)": ("0", "0.0%", "0"),
        "Total": ("26,000", "100.0%", "4"),
    },
    "KIND": {
        "USER_CREDITS": ("25,000", "96.2%", "1"),
        "DLC_CREDITS": ("600", "2.3%", "1"),
        "COMPUTE_CREDITS": ("400", "1.5%", "2"),
    },
    "PROJECT": {
        "api (Acme Research, Inc.)": ("600", "60.0%", "1"),
        "web (Acme)": ("300", "30.0%", "1"),
        "api (Acme)": ("100", "10.0%", "2"),
    },
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "case, line_end",
    [(str.upper, "\n"), (str.lower, "\n"), (str.upper, "\r\n")],
    ids=["upper case", "lower case", "CRLF"],
)
def test_three_tables_show_credits_and_set_seats_apart(fake, run, case, dialect, line_end):
    """A job of 8 seconds with the charge for a user does not lead the projects."""
    serve(fake, ROWS, map(case, COLUMNS), dialect, line_end)
    result = run()
    assert repr(read_tables(result)) == repr(TABLES)  # The order counts.
    assert "without USER_CREDITS (25,000 per" in result.err
    assert [len(bar) for bar in re.findall("% +(#+) +", result.err)] == [20, 19, 12, 6, 2]
    assert "notice: The report" not in result.err


def test_a_kind_that_circleci_adds_is_shown_wherever_it_stands(fake, run):
    columns = ["AI_AGENT_CREDITS", *COLUMNS[::-1]]
    serve(fake, [make_row(columns, AI_AGENT_CREDITS=7, TOTAL_CREDITS=7)], columns)
    result = run()
    kinds, projects = list(read_tables(result).values())[1:]
    assert (list(kinds), list(projects)) == (["AI_AGENT_CREDITS"], ["api (Acme)"])
    assert "25,000" not in result.err


@pytest.mark.parametrize(
    "credits, total",
    [
        pytest.param(["0.1", "0.2"], "0.3", id="decimals add up exactly"),
        pytest.param(["12.50", "12.5"], "25", id="zeros at the end"),
        pytest.param(["9007199254740993", "0.01"], "9,007,199,254,740,993.01", id="large"),
        pytest.param(["-5", "7"], "2", id="a refund"),
        pytest.param([None, "", 0, "0.00"], "0", id="missing values and zeros"),
    ],
)
def test_sums_are_exact(fake, run, credits, total):
    serve(fake, [make_row(TOTAL_CREDITS=cell, DLC_CREDITS=cell) for cell in credits])
    tables = read_tables(run())
    assert tables["ORGANIZATION"]["Acme"][0] == tables["PROJECT"]["api (Acme)"][0] == total
    assert [line[0] for line in tables["KIND"].values()] == ([] if total == "0" else [total])


@pytest.mark.parametrize(
    "name, shown",
    [
        pytest.param("Acme, Inc.", "Acme, Inc.", id="a comma"),
        pytest.param('say "hi"', 'say "hi"', id="quotes"),
        pytest.param("\u682a\u5f0f\u4f1a\u793e", "\u682a\u5f0f\u4f1a\u793e", id="Japanese"),
        pytest.param('say "hi",', 'say "hi",', id="a comma after quotes"),
        pytest.param("two\nlines", "two lines", id="a line feed"),
        pytest.param("red\x1b[31m", "red[31m", id="an escape sequence"),
    ],
)
def test_a_name_is_shown_in_full_on_one_line(fake, run, name, shown):
    serve(fake, [make_row(ORGANIZATION_NAME=name, PROJECT_NAME=name, TOTAL_CREDITS=5)] * 2)
    tables = read_tables(run(SHARED_ORG_IDS=PRIMARY))
    assert list(tables["ORGANIZATION"]) == [shown, "Total"]
    assert list(tables["PROJECT"]) == [f"{shown} ({shown})"]


def test_the_ten_largest_projects_are_shown(fake, run):
    credits = [5, 3, 12, 7, 1, 11, 9, 2, 10, 4, 8, 6]
    serve(fake, [make_row(PROJECT_NAME=f"p{n}", TOTAL_CREDITS=n) for n in credits])
    assert list(read_tables(run())["PROJECT"]) == [f"p{n} (Acme)" for n in range(12, 2, -1)]


@pytest.mark.parametrize("missing", ["PROJECT_ID", "ORGANIZATION_NAME", "TOTAL_CREDITS"])
def test_without_a_column_the_other_tables_are_shown(fake, run, missing):
    columns = [name for name in COLUMNS if name != missing]
    cells = {"COMPUTE_CREDITS": 5, "TOTAL_CREDITS": 5}
    serve(fake, [make_row(columns, PROJECT_NAME=name, **cells) for name in "ab"], columns)
    result = run()
    tables = read_tables(result)
    assert result.code == 0
    assert len(tables.pop("PROJECT", [])) == (0 if missing == "TOTAL_CREDITS" else 2)
    assert {list(table.values())[0][0] for table in tables.values()} == {"10"}
    assert re.findall(r"notice: The report .* column (\w+)", result.err) == [missing]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(ROWS[0][:-1], id="a row too short"),
        pytest.param([*ROWS[0], 1], id="a row too long"),
        pytest.param(make_row(PROJECT_NAME='a","b')[:-1], id="a row that looks complete"),
        pytest.param(make_row(TOTAL_CREDITS="NaN"), id="NaN"),
        pytest.param(make_row(TOTAL_CREDITS="1,5"), id="a number with a comma"),
    ],
)
def test_what_cannot_be_counted_is_said_in_one_notice(fake, run, row):
    serve(fake, [row, *ROWS, row])
    result = run()
    tables = read_tables(result)
    assert len(re.findall("notice: The report .*: 2[,)]", result.err)) == 1
    assert tables["ORGANIZATION"]["Total"][0] == "26,000"
    assert (result.code, tables["KIND"]) == (0, TABLES["KIND"])


def test_the_last_line_has_rows_file_size_and_time(fake, run):
    serve(fake, [make_row(VCS_URL="x" * 1500)] * 2000)
    result = run()
    size = result.report.stat().st_size / 1_000_000
    assert re.search(f"Z 2,000 rows, {size:.1f} MB in 0:00:[1-5][0-9]$", result.last_line)


def test_with_a_job_id_no_organization_is_marked(fake, run):
    fake.jobs["older-job"] = Job(PRIMARY, {}, created_at=0, empty_answers=0)
    serve(fake, ROWS)
    tables = read_tables(run("--job-id", "older-job"))
    assert list(tables["ORGANIZATION"]) == ["Acme", "Acme Research, Inc.", "Total"]


def test_a_quote_may_end_a_cell_without_quotes(fake, run):
    fake.parts = [[Answer(b'ORGANIZATION_NAME,TOTAL_CREDITS\n5","7"\n')]]
    assert read_tables(run())["ORGANIZATION"]['5"'] == ("7", "100.0%", "1")


def test_rows_of_both_dialects_are_counted(fake, run):
    rows = [COLUMNS, make_row(TOTAL_CREDITS=5)]
    parts = [b"".join(write_row(row, dialect) for row in rows) for dialect in ("quoted", "bare")]
    fake.parts = [[Answer(part)] for part in parts]
    assert read_tables(run())["ORGANIZATION"]["Acme"][0] == "10"


name = st.text(st.sampled_from('aB,"\\\u682a'), max_size=5) | st.sampled_from(['","', '""'])
credits = st.integers(0, 10**9) | st.decimals(0, 10**6, places=3)
cells = {"USER_CREDITS": credits, "DLC_CREDITS": st.none() | credits}
cells["PROJECT_NAME"] = name.map(lambda text: f"n{text}n")
cells["ORGANIZATION_ID"] = st.sampled_from(list(ORGANIZATIONS))
cells["irregular"] = st.integers(0, 9).map(lambda number: number == 9)
tables = st.lists(st.fixed_dictionaries(cells), min_size=1, max_size=5)
parts = st.lists(st.tuples(tables, st.sampled_from(DIALECTS)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(parts, st.sampled_from(["\n", "\r\n"]))
def test_any_table_in_any_mix_of_parts_is_summed_exactly(fake, run, parts, line_end):
    fake.limits = {"POST": 10**6, "GET": 10**6}
    fake.parts = []
    expected = defaultdict(Decimal)
    for table, dialect in parts:
        rows = [COLUMNS]
        for row in table:
            organization = ORGANIZATIONS[row["ORGANIZATION_ID"]]
            used = row["DLC_CREDITS"] or 0
            row["TOTAL_CREDITS"] = row["USER_CREDITS"] + used
            rows.append(make_row(**row))
            if row["irregular"]:
                rows[-1].pop(1)
                continue
            for total in ("Total", organization):
                expected[total] += row["TOTAL_CREDITS"]
            expected["USER_CREDITS"] += row["USER_CREDITS"]
            expected["DLC_CREDITS"] += used
            expected[f"{row['PROJECT_NAME']} ({organization})"] += used
        part = b"".join(write_row(row, dialect, line_end) for row in rows)
        fake.parts.append([Answer(part)])
    result = run()
    result.report.unlink()  # so that the next one may have its name
    irregular = sum(row["irregular"] for table, _ in parts for row in table)
    assert (f"wrong number of cells: {irregular}" in result.err) == bool(irregular)
    shown = {}
    for table in read_tables(result).values():
        shown.update(table)
    for name, total in expected.items():
        assert Decimal(shown.get(name, ["0"])[0].replace(",", "")) == total
