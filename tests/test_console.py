"""What people see: on a terminal, and in a log."""

from __future__ import annotations

import gzip
import os
import re
import struct
import sys
import uuid
from contextlib import closing

import pytest
from clocks import FastTime
from fake_circleci import HEADER, Answer, FakeCircleCI, make_rows, problem

import usage_report

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \S.*")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


# --- A log ---


def test_in_a_log_each_line_has_a_timestamp(fake, run):
    fake.job_seconds = 100
    result = run("--verbose")
    assert result.code == 0
    assert all(LINE.fullmatch(line) for line in result.err.splitlines()), result.err
    polls = re.findall(r"Z Export: (?:created|processing|completed) \(", result.err)
    assert len(polls) == len(fake.requests("GET"))
    assert "Next check" not in result.err and result.err.count("Downloaded ") == 1


def test_quiet_hides_problems_that_the_run_overcame(fake, run):
    fake.plan("me", *[problem(503, "Busy.")] * 2)
    fake.odd_states = ["pondering"]
    result = run("--quiet", "--end", "2030-01-01", "--start", "2026-10-01")
    assert (result.code, result.err) == (0, "") and result.report.exists()


def test_verbose_shows_every_request_with_status_and_time(fake, run):
    result = run("--verbose")
    for request in [
        r"GET http://127.0.0.1:\d+/api/v2/me: 200 after 0.0 s",
        "shares-for: 200 after",
        "POST .*: 201 after",
        "GET .*: 200 after",
        "Part 3 is complete",
    ]:
        assert re.search(request, result.err)


def test_before_waiting_a_line_says_how_long_and_that_ctrl_c_is_safe(run):
    err = run().err
    fixed = err.index("This can take up to 4 hours. Ctrl-C is safe")
    assert err.index("started export job") < fixed < err.index("Export: processing")


@pytest.mark.parametrize("count", [10, 11, 300])
def test_a_list_of_organizations_shows_ten_and_counts_the_rest(fake, run, count):
    fake.organizations.update({str(uuid.UUID(int=n)): f"Org {n}." for n in range(4, count + 1)})
    result = run("--dry-run")
    assert f"(UTC), {count} organizations" in result.err
    table = result.err.partition("Dry run")[0]
    assert len(re.findall(r"Z \S.* {2}[0-9a-f]{8}-", table)) == 10
    more = re.findall(r"\.\.\. and (\d+) more", table)
    assert more == ([str(count - 10)] if count > 10 else [])


def test_the_last_line_has_rows_size_and_time(run):
    assert re.search(r"Z 40 rows, [\d.]+ [kM]B, 2\d s$", run().last_line)


# --- Width and units ---


@pytest.mark.parametrize(
    "text, width",
    [
        pytest.param("abc", 3, id="ASCII"),
        pytest.param("gr\u00fcn", 4, id="an accent"),
        pytest.param("gru\u0308n", 4, id="a combining accent"),
        pytest.param("\u6771\u4eac", 4, id="CJK"),
        pytest.param("\uff21", 2, id="a full-width letter"),
        pytest.param("a\U0001f680b", 4, id="an emoji"),
        pytest.param("", 0, id="nothing"),
    ],
)
def test_display_width(text, width):
    assert usage_report.display_width(text) == width


@pytest.mark.parametrize(
    "text", ["abcdefgh", "\u6771\u4eac\u6771\u4eac", "a\u6771\U0001f680gru\u0308n"]
)
@pytest.mark.parametrize("width", range(1, 12))
@pytest.mark.parametrize("right", [False, True])
def test_fit_gives_exactly_the_width(text, width, right):
    fitted = usage_report.fit(text, width, right)
    assert usage_report.display_width(fitted) == width
    shortened = usage_report.display_width(text) > width
    assert fitted.strip() == text or (shortened and fitted.strip().endswith("\u2026"))


@pytest.mark.parametrize("width", [40, 60, 80, 1000])
def test_a_table_is_aligned_and_fits(width):
    names = [
        "Name",
        "Acme Research, Incorporated, of Springfield",
        "\u6771\u4eac" * 9,
        "\U0001f680",
    ]
    rows = [[name, "other " * (2 * n), f"{n * 999:,}"] for n, name in enumerate(names)]
    lines = usage_report.format_table(rows, 2, width).split("\n")
    widths = {usage_report.display_width(line) for line in lines}
    assert len(widths) == 1 and max(widths) <= width
    assert lines[3].endswith("2,997") and ("\u2026" in "".join(lines)) == (width < 1000)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (-3, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (4.5 * 3600, "4 h 30 min"),
    ],
)
def test_format_duration(seconds, text):
    assert usage_report.format_duration(seconds) == text


@pytest.mark.parametrize(
    "size, text",
    [(4_400_000, "4.4 MB"), (999_900_000, "999.9 MB"), (2.8e9, "2.8 GB")],
)
def test_format_size(size, text):
    assert usage_report.format_size(size) == text


@pytest.mark.parametrize(
    "text, shown",
    [
        pytest.param("a\n b\t\tc\r\n", "a b c", id="blanks"),
        pytest.param("a\x1b[31mb\x07\u202e", "a?[31mb??", id="control characters"),
        pytest.param("x" * 300, "x" * 300, id="300 characters"),
        pytest.param("x" * 301, "x" * 299 + "\u2026", id="301 characters"),
        pytest.param(None, "None", id="not a string"),
    ],
)
def test_clean(text, shown):
    assert usage_report.clean(text) == shown


# --- A terminal ---


class Screen:
    """As much of a terminal as the script needs: characters of one or two columns, carriage return,
    line feed, colors, and erase to the end of the line."""

    def __init__(self, text: str) -> None:
        self.lines: list[list[str]] = [[]]
        self.color = ""
        column = 0
        for piece in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|[^\x1b]|\x1b", text):
            line = self.lines[-1]
            if piece == "\r":
                column = 0
            elif piece == "\n":
                assert self.color == "", "A color must end with its line."
                self.lines.append([])
                column = 0
            elif piece == "\x1b[K":
                del line[column:]
            elif piece.startswith("\x1b["):
                assert piece.endswith("m"), repr(piece)
                self.color = piece[2:-1]
            else:
                assert piece.isprintable() or usage_report.display_width(piece) == 0, repr(piece)
                width = usage_report.display_width(piece)
                cells = [piece, ""][:width]
                line.extend([" "] * (column - len(line)))
                line[column : column + width] = cells
                column += width

    def shown(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.lines]


def on_terminal(fast, fake, width, *command, **variables) -> tuple[int, str, str]:
    """Exit code, stdout (which is not a terminal), and what the script writes to a terminal."""
    import fcntl
    import pty
    import termios

    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    child = fast.start(fake, *command, stderr=terminal, **{"TERM": "xterm", **variables})
    os.close(terminal)
    raw = b""
    while True:
        try:
            chunk = os.read(controller, 4096)
        except OSError:
            break
        if not chunk:
            break
        raw += chunk
    os.close(controller)
    out, _ = child.communicate(timeout=10)
    return child.returncode, out, raw.decode("utf-8", "replace").replace("\r\n", "\n")


LIVE = re.compile(r"\r(?:\x1b\[2m)?((?:Export|Downloaded)[^\r\n\x1b]*)")


@POSIX
@pytest.mark.parametrize(
    "width, variables",
    [
        pytest.param(60, {}, id="60 columns"),
        pytest.param(80, {}, id="80 columns"),
        pytest.param(120, {}, id="120 columns"),
        pytest.param(80, {"NO_COLOR": "1", "PYTHONIOENCODING": "ascii"}, id="NO_COLOR, no UTF-8"),
    ],
)
def test_a_terminal_shows_lines_for_steps_and_one_live_line(output, width, variables):
    """The live line fits, and leaves nothing behind."""
    fast = FastTime(400)
    with closing(FakeCircleCI(fast.time)) as fake:
        fake.organizations["a7124dea-d941-4c1f-b5cd-f8346ec17f59"] = "caf\u00e9 \U0001f680"
        fake.job_seconds = 40
        code, out, text = on_terminal(fast, fake, width, "--output-dir", output, **variables)
    (report,) = output.iterdir()
    assert (code, out) == (0, f"{report}\n"), text
    shown, live = Screen(text).shown(), LIVE.findall(text)
    assert shown[0] == "Signed in as Pat Doe (pat)."
    assert not any("Next check" in line for line in shown)
    assert sum("Downloaded " in line for line in shown) == 1
    tables = [line for line in shown if not line.endswith(".")]
    assert max(map(usage_report.display_width, tables)) <= width
    name = "caf\\xe9 \\U0001f680" if "PYTHONIOENCODING" in variables else "caf\u00e9 \U0001f680"
    assert any(line.startswith(name) for line in tables)
    assert any(line.startswith("Total ") for line in tables)
    assert any(re.match(r"40 rows, [\d.]+ [kM]B, ", line) for line in tables)
    assert all(usage_report.display_width(line) < width for line in live)
    assert text.count("\x1b[K") >= len(live), "each is erased to the end of the line"
    assert len(set(re.findall(r"Next check in (\d+) s", "".join(live)))) > 1, "it counts down"
    colors = set(re.findall(r"\x1b\[([0-9;]*)m", text))
    assert colors == (set() if "NO_COLOR" in variables else {"1", "2", ""}), (
        "bold titles, dim waiting"
    )


@POSIX
def test_a_dumb_terminal_gets_the_lines_of_a_log(fast, fast_fake, output):
    code, _, text = on_terminal(fast, fast_fake, 80, "--output-dir", output, TERM="dumb")
    assert code == 0 and "\r" not in text and "\x1b" not in text and not LIVE.search(text)
    assert all(LINE.fullmatch(line) for line in text.rstrip("\n").split("\n"))


@POSIX
def test_during_a_download_bytes_and_parts_are_counted(fast, fast_fake, output):
    packed = gzip.compress(HEADER + b"".join(make_rows(500)), 0)
    slow = Answer(packed, write_size=len(packed) // 5, pause=0.1)
    fast_fake.parts = [[slow], [slow], [Answer(packed)]]
    code, _, text = on_terminal(fast, fast_fake, 80, "--output-dir", output)
    assert code == 0
    total = rf"{3 * len(packed) / 1e6:.1f}"
    line = rf"Downloaded (\d\.\d) MB of {total} MB, (\d) of 3 parts complete"
    sizes = [(float(size), parts) for size, parts in re.findall(line, text)]
    assert len({size for size, _ in sizes}) >= 2 and sizes == sorted(sizes)
    assert any(parts == "1" for _, parts in sizes)
    assert f"Downloaded {total} MB of {total} MB, 3 of 3 parts complete." in Screen(text).shown()


@POSIX
def test_tables_on_a_terminal_are_aligned_whatever_the_names(fast, fast_fake, output):
    names = ["\u6771\u4eac\u682a\u5f0f\u4f1a\u793e" * 5, "\U0001f680 rockets", "Acme " * 30]
    fast_fake.organizations = dict(zip(fast_fake.organizations, names))
    code, _, text = on_terminal(fast, fast_fake, 80, "--output-dir", output)
    assert code == 0
    lines = Screen(text).shown()
    rows = [line for line in lines if re.search(r"[0-9a-f]{12}$", line)]
    assert len(rows) == 3 and {usage_report.display_width(row) for row in rows} == {80}
    titles = next(n for n, line in enumerate(lines) if "CREDITS" in line)
    shares = [
        usage_report.display_width(row.partition("%")[0])
        for row in lines[titles : titles + 5]
        if "%" in row
    ]
    assert len(shares) == 3 and len(set(shares)) == 1
    tables = [line for line in lines if not line.endswith(".")]
    assert max(map(usage_report.display_width, tables)) <= 80


@POSIX
@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}], ids=["color", "NO_COLOR"])
def test_an_error_is_red_on_a_terminal(fast, fast_fake, output, variables):
    """And it erases the live line of a retry."""
    busy = problem(503, "Busy.")
    fast_fake.plan("me", busy, problem(401, "No."))
    code, _, text = on_terminal(fast, fast_fake, 80, "--output-dir", output, **variables)
    assert code == 1
    red = "" if variables else "\x1b[31m"
    last = text.rstrip("\n").split("\n")[-1]
    assert last.rpartition("\x1b[K")[2].startswith(f"{red}error: ")
    shown = Screen(text).shown()
    url = f"{fast_fake.url}/api/v2/me"
    assert shown[0].startswith(f"notice: GET {url} failed with 503") and len(shown) == 3


@pytest.mark.parametrize("width", [0, 1, 2])
def test_text_never_shrinks_below_one_column(width):
    assert usage_report.display_width(usage_report.fit("Waiting", width)) == max(width, 1)
