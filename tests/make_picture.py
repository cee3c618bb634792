"""Make the picture in README.md: what a run of the demo leaves on a terminal.

    python tests/make_picture.py

Needs Linux or macOS. Writes .images/run.svg.
"""

from __future__ import annotations

import os
import pty
import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PICTURE = PROJECT / ".images" / "run.svg"
SHOWN_FOLDER = "/opt/usage-report"  # instead of the real one
COLUMNS = 90
WIDTH, HEIGHT, MARGIN = 8, 19, 16  # of a character, of a line, around the text, in pixels
FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"


def record_demo() -> str:
    """What the demo writes to a terminal. Raises SystemExit if it fails."""
    written = []

    def read(terminal: int) -> bytes:
        written.append(os.read(terminal, 1 << 16))
        return written[-1]

    demo = PROJECT / "tests" / "demo.py"
    command = f'stty columns {COLUMNS}; exec "{sys.executable}" "{demo}"'
    if pty.spawn(["sh", "-c", command], read) != 0:
        sys.exit("The demo failed.")
    return b"".join(written).decode().replace(str(PROJECT), SHOWN_FOLDER)


def screen_lines(text: str) -> list[str]:
    """The lines of the final screen. A carriage return goes back to the start of the line, and what
    follows overwrites it."""
    lines = []
    for written in text.rstrip().split("\n"):
        line = ""
        for piece in written.split("\r"):
            line = piece + line[len(piece) :]
        line = line.rstrip()
        lines.append(line[:COLUMNS])
        if len(line) > COLUMNS:
            lines.append(line[COLUMNS:])
    return lines


def draw(lines: list[str]) -> Iterator[str]:
    width = COLUMNS * WIDTH + 2 * MARGIN
    height = len(lines) * HEIGHT + 2 * MARGIN
    yield f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}'"
    yield f" font-family='{FONT}' font-size='13'><title>usage_report.py in a terminal</title>"
    yield "<rect width='100%' height='100%' rx='8' fill='#161b22'/>"
    yield "<g fill='#e6edf3' xml:space='preserve'>"
    for number, line in enumerate(lines, 1):
        y = MARGIN + number * HEIGHT - 5
        ascii_part = re.match("[ -~]*", line)[0]
        others = line[len(ascii_part) :]  # Their width depends on the font.
        width = len(ascii_part) * WIDTH
        # textLength keeps columns aligned, whatever font the reader's computer has.
        yield f"<text x='{MARGIN}' y='{y}' textLength='{width}'>{escape(ascii_part)}</text>"
        if others:
            yield f"<text x='{MARGIN + width}' y='{y}'>{escape(others)}</text>"
    yield "</g></svg>"


if __name__ == "__main__":
    PICTURE.write_text("\n".join(draw(screen_lines(record_demo()))) + "\n", encoding="utf-8")
    print(PICTURE)
