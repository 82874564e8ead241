"""Run a command in a terminal of its own and write what it printed as an SVG picture for the README.

usage: ops/picture.py FILE TITLE COMMAND [ARG ...]

That of `macpipe top` shows what it prints into a pipe, in colour:
  FORCE_COLOR=1 ops/picture.py ops/docs/pictures/top.svg 'macpipe top' sh -c 'macpipe top | cat'
"""

from __future__ import annotations

import io
import os
import pty
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH, HEIGHT = 100, 40


def record(command: list[str]) -> str:
    """Run ``command`` on a pseudo-terminal and return what it wrote. Raises RuntimeError where it fails."""
    written = bytearray()

    def read(fd: int) -> bytes:
        data = os.read(fd, 4096)
        written.extend(data)
        return data

    os.environ.update(COLUMNS=str(WIDTH), LINES=str(HEIGHT), TERM="xterm-256color")
    if status := os.waitstatus_to_exitcode(pty.spawn(command, read)):
        raise RuntimeError(f"{command[0]} exited with {status}")
    return written.decode()


def last_screen(output: str) -> str:
    """Return the lines as they stay: what a carriage return or a cursor movement overwrote is left out."""
    lines: list[str] = []
    for raw in re.sub(r"\x1b\[\?\d+[hl]", "", output).replace("\r\n", "\n").split("\n"):
        up = sum(int(n or 1) for n in re.findall(r"\x1b\[(\d*)A", raw))
        del lines[len(lines) - up :]
        text = re.sub(r"\x1b\[\d*[A-HJK]", "", raw.rsplit("\r", 1)[-1])
        lines.append(text)
    return "\n".join(lines).strip("\n")


def main(file: str, title: str, command: list[str]) -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {title}", style="bold"))
    console.print(Text.from_ansi(last_screen(record(command))))
    svg = console.export_svg(title=title)
    # The template loads a font from another host; a picture of ours loads nothing.
    Path(file).write_text(re.sub(r"@font-face\s*\{[^}]*\}\s*", "", svg), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
