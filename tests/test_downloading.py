"""Downloads: whatever the store does, the report has every row, or there is none."""

import gzip

import pytest
from conftest import always, leftovers, read_report
from fake_circleci import COLUMNS, HEADERS, Answer, as_text, make_usage, split, write_table

ROWS = [row for rows in make_usage().values() for row in rows]
TABLE = [COLUMNS, *as_text(ROWS)]
PARTS = [write_table(piece) for piece in split(ROWS, 3)]
GZIPPED = [gzip.compress(part) for part in PARTS]
FIRST, GOOD, LAST = (Answer(body) for body in GZIPPED)
BODY = GZIPPED[1]
HALF = len(BODY) // 2
HEADER = HEADERS["quoted"]


def downloads(fake):
    """How often each part has been requested."""
    return [len(fake.requests("GET", "store", f"data_{n}.")) for n in range(3)]


def check_recovery(fake, run, output, number=2):
    """After a failed run, the same command downloads the bad part alone."""
    assert not list(output.glob("all_orgs_*"))
    expected = [1, 1, 1]
    expected[number - 1] = downloads(fake)[number - 1] + 1
    fake.parts = [[FIRST], [GOOD], [LAST]]
    result = run()
    assert result.code == 0, result.err
    assert read_report(result.report) == TABLE
    assert downloads(fake) == expected
    assert len(fake.requests("POST")) == 1
    assert leftovers(output) == []


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param([Answer(BODY, cut=HALF)], id="cut in the middle"),
        pytest.param([Answer(BODY, cut=len(BODY) - 1)], id="last byte missing"),
        pytest.param([Answer(BODY, cut=HALF, chunked=True)], id="cut, chunked"),
        pytest.param([Answer(PARTS[1], cut=2000)], id="cut, not gzipped"),
        pytest.param([Answer(drop=True)] * 5, id="no answer five times"),
        pytest.param([Answer(b"", status) for status in (408, 429, 500, 599)], id="four statuses"),
    ],
)
def test_a_temporary_problem_is_retried(fake, run, output, answers):
    fake.parts = [[FIRST], [*answers, GOOD], [LAST]]
    result = run()
    assert result.code == 0, result.err
    assert read_report(result.report) == TABLE
    assert downloads(fake) == [1, len(answers) + 1, 1]
    assert "notice: " in result.err
    assert leftovers(output) == []


@pytest.mark.parametrize(
    "answer, code, word, tries",
    [
        pytest.param(Answer(b"", 401), 75, "expired", 1, id="401"),
        pytest.param(Answer(b"", 403), 75, "expired", 1, id="403"),
        pytest.param(Answer(b"", 404), 1, "404", 1, id="404"),
        pytest.param(Answer(b"", 302, {"Location": "/me"}), 1, "302", 1, id="a redirect"),
        pytest.param(Answer(b"", 429), 75, "429", 6, id="429"),
        pytest.param(Answer(b"", 503), 75, "503", 6, id="503"),
        pytest.param(Answer(BODY, cut=99), 75, "connection", 6, id="cut"),
    ],
)
def test_a_lasting_problem_ends_the_run(fake, run, output, answer, code, word, tries):
    fake.parts = [[FIRST], always(answer), [LAST]]
    result = run()
    assert (result.code, result.out) == (code, "")
    assert "error: Part 2" in result.last_line and word in result.last_line
    assert downloads(fake)[1] == tries
    check_recovery(fake, run, output)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(BODY[:-8] + b"CRC?" + BODY[-4:]), id="wrong CRC-32"),
        pytest.param(Answer(BODY[:HALF] + b"?" + BODY[HALF + 1 :]), id="wrong byte in the middle"),
        pytest.param(Answer(BODY, cut=HALF, length=False), id="cut, no Content-Length"),
        pytest.param(Answer(BODY + b"more"), id="bytes after the end"),
        pytest.param(Answer(BODY, headers={"Content-Length": "500"}), id="too short by its length"),
    ],
)
def test_a_damaged_part_alone_is_downloaded_again(fake, run, output, answer):
    fake.parts = [[FIRST], [answer], [LAST]]
    result = run()
    assert (result.code, result.out) == (75, "")
    assert "Part 2" in result.last_line
    check_recovery(fake, run, output)


def in_members(part):
    return gzip.compress(part[:999]) + gzip.compress(part[999:]) + gzip.compress(b"")


FORMS = {
    "several gzip members": lambda part: Answer(in_members(part)),
    "Content-Encoding": lambda part: Answer(gzip.compress(part), 200, {"Content-Encoding": "gzip"}),
    "not gzipped": lambda part: Answer(part),
    "chunked": lambda part: Answer(gzip.compress(part), chunked=True),
    "no Content-Length": lambda part: Answer(gzip.compress(part), length=False),
    "BOM": lambda part: Answer(gzip.compress(b"\xef\xbb\xbf" + part)),
    "CRLF": lambda part: Answer(gzip.compress(part.replace(b"\n", b"\r\n"))),
    "no newline at the end": lambda part: Answer(gzip.compress(part[:-1])),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_of_a_part_is_accepted(fake, run, output, form):
    fake.parts = [[form(part)] for part in PARTS]
    result = run()
    assert result.code == 0, result.err
    assert read_report(result.report) == TABLE
    assert "Part" not in result.err.split("downloading")[-1]
    assert not result.report.read_bytes().startswith(b"\xef\xbb\xbf")
    assert downloads(fake) == [1, 1, 1]


EMPTY = {
    "header only": Answer(gzip.compress(HEADER)),
    "header only, no newline": Answer(gzip.compress(HEADER[:-1])),
    "zero bytes": Answer(b""),
}


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY.keys())
def test_a_part_without_rows_adds_none(fake, run, output, empty):
    fake.parts = [[empty], [FIRST], [empty], [GOOD], [LAST], [empty]]
    result = run()
    assert result.code == 0 and read_report(result.report) == TABLE
    fake.parts = [[empty], [Answer(b"")], [empty]]
    result = run()
    assert (result.code, result.out) == (3, "")
    assert leftovers(output) == []


HTML = b"<!DOCTYPE html>\n<html><body>Log in</body></html>\n"
JSON = b'{"message": "Wait, please."}'
NAME_AND_URL = b'"VCS_NAME","VCS_URL"'
URL_AND_NAME = b'"VCS_URL","VCS_NAME"'


@pytest.mark.parametrize(
    "number, content, word",
    [
        pytest.param(1, HTML, "header", id="HTML first"),
        pytest.param(1, b"\n\n\n", "header", id="empty lines first"),
        pytest.param(1, PARTS[0][len(HEADER) :], "header", id="rows without a header first"),
        pytest.param(2, b"\xef\xbb\xbf" + HTML, "header", id="HTML after a BOM"),
        pytest.param(2, b'"' + b"Log in, " * 20_000, "header", id="a quote that is never closed"),
        pytest.param(2, JSON, "header", id="JSON"),
        pytest.param(2, b"1,2,3\n", "header", id="too few cells"),
        pytest.param(2, HEADER.replace(b"JOB_ID", b"RUN_ID"), "JOB_ID", id="another column"),
        pytest.param(2, HEADER[:-1] + b',"EXTRA"\n', "EXTRA", id="one more column"),
        pytest.param(2, HEADER.replace(NAME_AND_URL, URL_AND_NAME), "order", id="another order"),
    ],
)
def test_something_else_never_becomes_a_report(fake, run, output, number, content, word):
    fake.parts = [[FIRST], [GOOD], [LAST]]
    fake.parts[number - 1] = [Answer(content)]
    result = run()
    assert (result.code, result.out) == (1, "")
    assert f"Part {number}" in result.last_line and word in result.last_line
    check_recovery(fake, run, output, number)


def test_twelve_parts_keep_the_order_of_the_links(fake, run):
    fake.part_count = 12
    assert read_report(run().report) == fake.table()
