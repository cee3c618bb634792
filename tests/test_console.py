"""What people see on a terminal and in a log."""

from __future__ import annotations

import gzip
import os
import re
import sys

import pytest
from clocks import FastTime
from fake_circleci import HEADER, Answer, FakeCircleCI, make_rows, problem

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \S.*")


def test_elsewhere_than_on_a_terminal_each_line_has_a_timestamp(fake, run):
    fake.job_seconds = 100
    result = run("--verbose")
    assert result.code == 0
    assert all(LINE.fullmatch(line) for line in result.err.splitlines()), result.err
    polls = [line for line in result.err.splitlines() if "Export job processing" in line or "Export job completed" in line]
    assert len(polls) == len(fake.requests("GET"))


def test_quiet_says_nothing_even_of_what_it_overcame(fake, run):
    fake.plan("me", *[problem(503, "Busy.")] * 2)
    fake.odd_states = ["pondering"]
    result = run("--quiet", "--end", "2030-01-01", "--start", "2026-10-01")
    assert (result.code, result.err) == (0, "") and result.report.exists()


def test_verbose_shows_every_request_with_status_and_time(fake, run):
    result = run("--verbose")
    for request in ("GET /api/v2/me: 200 after", "shares-for: 200 after", "POST .*: 201 after", "GET .*: 200 after"):
        assert re.search(request, result.err)
    assert "Part 3 of 3 is complete" in result.err


class Screen:
    """As much of a terminal as the script needs: characters, carriage return, line feed, and no escapes."""

    def __init__(self, width: int) -> None:
        self.width, self.lines, self.column = width, [""], 0

    def write(self, text: str) -> None:
        for c in text:
            if c == "\r":
                self.column = 0
            elif c == "\n":
                self.lines.append("")
                self.column = 0
            else:
                assert c.isprintable(), repr(c)
                line = self.lines[-1].ljust(self.column)
                self.lines[-1] = line[: self.column] + c + line[self.column + 1 :]
                self.column += 1

    def shown(self) -> list[str]:
        return [line.rstrip() for line in self.lines]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1", "PYTHONIOENCODING": "ascii"}, {"TERM": "dumb"}], ids=["plain", "no UTF-8", "dumb"])
def test_on_a_terminal(output, width, variables):
    """A line per step, and one live line that leaves nothing behind."""
    import fcntl
    import pty
    import struct
    import termios

    fast = FastTime(200)
    fake = FakeCircleCI(fast.time)
    fake.organizations["a7124dea-d941-4c1f-b5cd-f8346ec17f59"] = "caf\u00e9 \U0001f680"
    fake.job_seconds = 40
    packed = gzip.compress(HEADER + b"".join(make_rows(500)))
    fake.parts = [[Answer(packed, bytes_a_write=len(packed) // 4, pause=0.15)] for _ in range(3)]
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    child = fast.start(fake, "--output-dir", output, stderr=terminal, **{"TERM": "xterm", **variables})
    os.close(terminal)
    raw = b""
    while True:
        try:
            chunk = os.read(controller, 4096)
        except OSError:
            break
        raw += chunk
        if not chunk:
            break
    os.close(controller)
    assert child.wait(10) == 0, raw
    fake.close()
    screen = Screen(width)
    text = raw.decode("utf-8", "replace").replace("\r\n", "\n")
    screen.write(text)
    live = re.findall(r"\rExport [a-z]+, 0:00:\d\d\. Next check in 0:00:\d\d, (\d) of 10 this hour used\.", text)
    shown = screen.shown()
    if "dumb" in variables.values():
        assert not live and "Downloading: " not in text and "\r" not in text and LINE.fullmatch(shown[0])
    else:
        assert re.search(r"\rDownloading: 0 of 3 parts, 0\.\d MB", text)
        assert {"0", "1", "2"} <= set(live) and shown[0] == "The token belongs to Pat Doe (pat)."
        assert not any(line.startswith(("Export ", "Downloading: ")) for line in shown), "the live line is wiped out"
        assert all(len(piece) < width for piece in re.split("[\r\n]", text) if piece.startswith("Export"))
    assert any("took 0:0" in line for line in shown) and any(line.endswith("100.0%") for line in shown)
    name = "caf\\xe9 \\U0001f680" if "PYTHONIOENCODING" in variables else "caf\u00e9 \U0001f680"
    assert any(name in line for line in shown)
