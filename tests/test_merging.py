"""Merging: parts in either dialect become one plain CSV that has the same cells."""

import gzip
import re
import shutil
import subprocess

import pytest
from conftest import read_report
from fake_circleci import COLUMNS, DIALECTS, PRIMARY, Answer, as_text, make_usage, write_row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import usage_report

NAMES = ["ORGANIZATION_ID", "PROJECT_NAME", "JOB_NAME", "TOTAL_CREDITS"]
RUNS = make_usage()[PRIMARY]


def write(rows, dialect="quoted", line_end="\n"):
    """Rows, the header included, as CircleCI writes them."""
    return b"".join(write_row(row, dialect, line_end) for row in rows)


def merge(folder, parts, raw=False):
    """The path of what merge_parts() writes for parts with these contents."""
    paths = []
    for number, content in enumerate(parts):
        path = folder / f"part-{number}"
        path.write_bytes(gzip.compress(content, 1))
        paths.append(path)
    merged = folder / "merged.csv"
    usage_report.merge_parts(paths, merged, raw)
    return merged


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "cell",
    [
        pytest.param("Acme, Inc.", id="a comma"),
        pytest.param('say "hi"', id="quotes"),
        pytest.param('"x" y', id="quotes at the start"),
        pytest.param('5" disk', id="one quote"),
        pytest.param("C:\\New\\", id="backslashes"),
        pytest.param("a,\\N", id="a comma before a backslash and N"),
        pytest.param('"\\N', id="a quote before a backslash and N"),
        pytest.param('\\N"', id="a quote after a backslash and N"),
        pytest.param("\\\\N", id="two backslashes and N"),
        pytest.param("gr\u00fcn \u682a\U0001f680", id="non-ASCII"),
        pytest.param("two\nlines", id="a line feed"),
        pytest.param("two\rlines", id="a carriage return"),
    ],
)
def test_a_cell_stays_what_it_is(tmp_path, dialect, cell):
    table = [NAMES, [PRIMARY, cell, cell, 5], [cell + "x", "main", cell, "0012"]]
    report = merge(tmp_path, [write(table, dialect)])
    assert read_report(report) == as_text(table) and b"\r\n" not in report.read_bytes()


@pytest.mark.parametrize(
    "row, cells",
    [
        pytest.param(r"\N,a,b,1", ["", "a", "b", "1"], id="at the start"),
        pytest.param(r"1,\\N,\\N,2", ["1", "", "", "2"], id="neighbors"),
        pytest.param(r"1,\N,\\N,\N", ["1", "", "", ""], id="neighbors and the end"),
        pytest.param(r"\N,\N,\N,\N", ["", "", "", ""], id="a whole row"),
        pytest.param(r"\\N,a\,b,\\N,\N", ["", "a,b", "", ""], id="beside an escape"),
        pytest.param(r'\N,5" disk,\\N,\N', ["", '5" disk', "", ""], id="beside a quote"),
        pytest.param(r'\\N,"a, b",\N,\\N', ["", "a, b", "", ""], id="beside a quoted cell"),
        pytest.param(r'"\N","a","b","\N"', ["", "a", "b", ""], id="quoted after all"),
        pytest.param(r'1,"a,b",\N', ["1", '"a', 'b"', ""], id="beside quotes that are text"),
    ],
)
def test_a_missing_value_of_a_bare_part_is_empty(tmp_path, row, cells):
    for line_end in ("\n", "\r\n"):
        content = line_end.join([",".join(NAMES), row, row, ""])
        report = read_report(merge(tmp_path, [content.encode()]))
        assert report == [NAMES, cells, cells]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(r'1,"a, b",C:\temp\,2', id="backslashes"),
        pytest.param(r'"C:\New, x",b,"say ""hi""",2', id="a backslash and N"),
        pytest.param('1,"two\nlines","two\r\nmore",2', id="line breaks"),
        pytest.param('"1","b","c","2"', id="quotes that are not needed"),
    ],
)
def test_ordinary_csv_in_a_bare_part_stays_as_it_is(tmp_path, monkeypatch, row):
    monkeypatch.setattr(usage_report, "BLOCK", 64)
    header, rows = write([NAMES], "bare"), f"{row}\n".encode() * 20
    assert merge(tmp_path, [header + rows, rows]).read_bytes() == header + rows + rows


@pytest.mark.parametrize(
    "dialect, name", [("quoted", b"\xff\xfe"), ("bare", b"\xff\xfe"), ("bare", b"a\\, \xff\xfe")]
)
def test_bytes_that_are_not_utf_8_survive(tmp_path, dialect, name):
    row = write_row([PRIMARY, "NAME", "main", 5], dialect).replace(b"NAME", name)
    report = merge(tmp_path, [write([NAMES], dialect) + row])
    assert b"\xff\xfe" in report.read_bytes()
    assert len(read_report(report)) == 2


many = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
letters = st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from(',"\\N0 \n\r')
# A text that reads \N cannot be told from a missing value.
text = st.text(letters, max_size=8).filter(lambda text: text != r"\N")
# In a bare part, a quote where a cell begins may be an ordinary CSV's.
bare_text = text.filter(lambda text: not re.search('(^|[,\r\n])"', text))


def tables(text):
    """Tables of up to 20 rows, with missing values, integers, decimals, and texts."""
    cell = st.none() | st.integers() | st.decimals(0, 1000, places=2) | text
    row = st.tuples(st.just(PRIMARY), cell, cell, st.none() | st.integers(0, 10**6))
    return st.lists(row, min_size=1, max_size=20)


@many
@given(tables(bare_text), st.data(), st.sampled_from(["\n", "\r\n"]), st.integers(100, 400))
def test_any_table_in_any_mix_of_parts_has_the_same_cells(
    tmp_path, monkeypatch, rows, data, line_end, block
):
    monkeypatch.setattr(usage_report, "BLOCK", block)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3), label="cuts"))
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(rows)]):
        dialect = data.draw(st.sampled_from(DIALECTS), label="dialect")
        part = rows[start:end]
        one_line = len(write(part[:1], dialect).splitlines()) == 1
        if not parts or not one_line or data.draw(st.booleans(), label="header"):
            part = [NAMES, *part]
        content = write(part, dialect, line_end)
        if data.draw(st.booleans(), label="no newline at the end"):
            content = content[: -len(line_end)]
        parts.append(content)
    assert read_report(merge(tmp_path, parts)) == [NAMES, *as_text(rows)]


@many
@given(tables(text), st.sampled_from(["\n", "\r\n"]), st.integers(100, 400))
def test_a_quoted_table_changes_in_its_missing_values_alone(
    tmp_path, monkeypatch, rows, line_end, block
):
    monkeypatch.setattr(usage_report, "BLOCK", block)
    table = [NAMES, *rows]
    part = write(table, "quoted", line_end)
    expected = write(as_text(table), "quoted", line_end)
    assert merge(tmp_path, [part]).read_bytes() == expected


def test_parts_in_different_dialects_become_one_report(fake, run):
    first, second = fake.usage.values()
    dialects = ["bare", "quoted", "bare"]
    tables = [[COLUMNS, *first[:10]], [COLUMNS, *first[10:]], [COLUMNS, *second]]
    fake.parts = [[Answer(write(*part))] for part in zip(tables, dialects)]
    assert read_report(run().report) == fake.table()


@pytest.mark.parametrize(
    "names",
    [["Job ID", "credits used"], ["a", "b", "c_3"], [name.lower() for name in COLUMNS]],
)
def test_any_header_will_do(tmp_path, names):
    rows = [range(len(names)), [None] * len(names)]
    parts = [write([names, *rows], dialect) for dialect in DIALECTS]
    assert read_report(merge(tmp_path, parts)) == as_text([names, *rows, *rows])


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["main", "two\nlines"], ids=["usual", "a line feed"])
def test_a_later_part_without_a_header_is_all_rows(tmp_path, dialect, name):
    row = [PRIMARY, name, None, 5]
    parts = [write([NAMES, row], dialect), write([row, row], dialect)]
    assert read_report(merge(tmp_path, parts)) == as_text([NAMES, row, row, row])


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "name, line",
    [
        pytest.param("main", 17, id="usual names"),
        pytest.param("a,b", 17, id="names with commas"),
        pytest.param("two\nlines", 32, id="names with line feeds"),
    ],
)
def test_an_irregular_row_is_kept_and_named(fake, run, monkeypatch, dialect, name, line):
    monkeypatch.setattr(usage_report, "BLOCK", 2000)
    rows = [[*row[:1], name, *row[2:]] for row in RUNS]
    fake.parts = []
    for cells in (48, 49, 47):
        rows[15] = [*RUNS[15], 7][:cells]
        rows[15][1] = name
        header = [] if cells == 47 else [COLUMNS]
        fake.parts.append([Answer(write([*header, *rows], dialect))])
    result = run()
    assert len(read_report(result.report)) == 61
    assert read_report(result.report)[41:] == as_text(rows)
    named = re.findall("notice: (Part .*)", result.err)
    assert len(named) == 2
    assert re.match(f"Part 2, line {line}: 49 cells .*48", named[0])
    assert re.match(f"Part 3, line {line - 1}: 47 cells .*48", named[1])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_first_few_irregular_rows_are_named_and_all_counted(fake, run, dialect):
    rows = [RUNS[0], *[[*row, 7] for row in RUNS]]
    fake.parts = [[Answer(write([COLUMNS, *rows], dialect))]]
    result = run()
    assert read_report(result.report) == [COLUMNS, *as_text(rows)]
    assert "Part 1, line 3: 49 cells" in result.err
    assert 2 <= len(re.findall("Part 1, line", result.err)) <= 5
    assert re.search("Part 1: 20 ", result.err)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["Acme", "Acme, Inc."])
def test_one_cell_more_and_one_fewer_are_both_named(fake, run, name, dialect):
    rows = [[PRIMARY, name, *range(46)]] * 9
    rows[3] = [*rows[3], 7]
    rows[5] = rows[5][:-1]
    fake.parts = [[Answer(write([COLUMNS, *rows], dialect))]]
    err = run().err
    assert "line 5: 49 cells" in err and "line 7: 47 cells" in err


LONG = "many, many words " * 10_000


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_cell_of_any_length_stays_what_it_is(tmp_path, dialect):
    rows = [[PRIMARY, LONG, "main", 5]] * 3
    merged = merge(tmp_path, [write([NAMES, *rows], dialect)])
    assert LONG in merged.read_text() and merged.read_bytes().count(b"\n") == 4


def test_a_quote_that_is_never_closed_costs_no_row(fake, run):
    row = write_row(RUNS[0], "quoted")
    content = write([COLUMNS]) + row.replace(b'Acme"', b"Acme, Inc.") + row * 600
    fake.parts = [[Answer(gzip.compress(content))]]
    result = run()
    assert result.code == 0, result.err
    assert result.report.read_bytes().count(b"\n") == 602
    assert "notice: Part 1, line 2" in result.err


@pytest.mark.parametrize(
    "dialect, end",
    [("quoted", b"\r\n"), ("bare", b"\n"), ("quoted", b""), ("bare", b"")],
)
def test_raw_writes_every_byte_of_the_rows(fake, run, dialect, end):
    rows = [[PRIMARY, 'a\\,"b"\n', None, 5, 6], ["x", "\\N"], *RUNS]
    lines = write(rows, dialect)[:-1] + end
    fake.parts = [[Answer(gzip.compress(write([COLUMNS], dialect) + lines))] for _ in range(2)]
    result = run("--raw")
    assert result.code == 0, result.err
    lines += b"" if end else b"\n"
    assert result.report.read_bytes() == write([COLUMNS], dialect) + lines + lines
    assert "notice: Part" not in result.err and "CREDITS" not in result.err


SUMS = (len(RUNS), sum(row[-1] for row in RUNS), sum(row[22] is None for row in RUNS))


@pytest.fixture(params=DIALECTS)
def report(request, fake, run):
    fake.parts = [[Answer(write([COLUMNS, *RUNS], request.param))]]
    return run().report


@pytest.mark.skipif(not shutil.which("sqlite3"), reason="needs the sqlite3 command")
def test_sqlite_reads_the_same_sums(report):
    select = "SELECT count(*), sum(TOTAL_CREDITS), sum(JOB_NAME = '') FROM usage"
    command = ["sqlite3", "-csv", ":memory:", f'.import "{report}" usage', select]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert tuple(map(int, answer.stdout.split(","))) == SUMS


def test_duckdb_reads_the_same_sums(report):
    duckdb = pytest.importorskip("duckdb")
    select = "SELECT count(*), sum(TOTAL_CREDITS), count(*) - count(JOB_NAME)"
    assert duckdb.sql(f"{select} FROM '{report}'").fetchall() == [SUMS]
