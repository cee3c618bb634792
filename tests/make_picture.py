"""Make the picture in README.md: what a run of the demo leaves on a terminal.

    python tests/make_picture.py

Needs Linux or macOS. Writes .images/run.svg.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import sys
import termios
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PICTURE = TESTS.parent / ".images" / "run.svg"
COLUMNS = 90
WIDTH, HEIGHT, MARGIN = 8, 19, 16  # of a character, of a line, around the text, in pixels
STYLES = {"1": "font-weight='bold'", "2": "opacity='.6'", "31": "fill='#f77'"}  # by SGR code


def record_demo() -> str:
    """What the demo writes to a terminal. Raises SystemExit if it fails."""
    child, terminal = pty.fork()
    if child == 0:
        demo = [sys.executable, str(TESTS / "demo.py"), "--plain"]
        environment = {**os.environ, "TERM": "xterm"}
        environment.pop("NO_COLOR", None)
        os.execve(sys.executable, demo, environment)
    size = struct.pack("HHHH", 50, COLUMNS, 0, 0)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    written = b""
    try:
        while block := os.read(terminal, 1 << 16):
            written += block
    except OSError:  # Linux: the child has ended.
        pass
    text = written.decode()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"The demo failed:\n{text}")
    return text


def draw_screen(text: str) -> list[list[tuple[str, str]]]:
    """The lines of the final screen: a character and its style per cell."""
    lines: list[list[tuple[str, str]]] = [[]]
    column, style = 0, ""
    for code, final, character in re.findall("\x1b\\[([0-9;]*)([A-Za-z])|(.|\n|\r)", text):
        line = lines[-1]
        if final == "m":
            style = STYLES.get(code, "")
        elif final == "K":
            del line[column:]
        elif character == "\r":
            column = 0
        elif character == "\n" or column == COLUMNS:
            lines.append([])
            column = 0
        if character >= " ":
            line = lines[-1]
            line[column : column + 1] = [(character, style)]
            column += 1
    return lines


def svg(lines: list[list[tuple[str, str]]]) -> Iterator[str]:
    width, height = COLUMNS * WIDTH + 2 * MARGIN, len(lines) * HEIGHT + 2 * MARGIN
    yield f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}'"
    yield " font-family='ui-monospace,SFMono-Regular,Menlo,Consolas,monospace' font-size='13'>"
    yield "<title>usage_report.py in a terminal</title>"
    yield "<rect width='100%' height='100%' rx='8' fill='#161b22'/>"
    yield "<g fill='#e6edf3' xml:space='preserve'>"
    for number, line in enumerate(lines, 1):
        column = 0
        for style, cells in groupby(line, key=lambda cell: cell[1]):
            text = "".join(character for character, _ in cells)
            x, y = MARGIN + column * WIDTH, MARGIN + number * HEIGHT - 5
            # textLength keeps columns aligned, whatever font the reader's computer has.
            place = f"x='{x}' y='{y}' textLength='{len(text) * WIDTH}'"
            yield f"<text {place} {style}>{escape(text)}</text>"
            column += len(text)
    yield "</g></svg>"


if __name__ == "__main__":
    recording = record_demo().strip()
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text("\n".join(svg(draw_screen(recording))) + "\n", encoding="utf-8")
    folder = re.search(r"/\S+/usage-report-demo-\w+", recording)
    if folder:
        shutil.rmtree(folder[0])
    print(PICTURE)
