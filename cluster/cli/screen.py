"""Terminal output: consoles, tables, formatted numbers, and text without control characters."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Final, TextIO

from cluster.core.limits import GIB, KIB, MIB
from cluster.core.text import figure_in_words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_COLUMNS: Final = 200
"""Table width if the output is not a terminal: wide enough to avoid wrapping."""

_HARMLESS: Final = {"\n", "\t"}


def console(stream: TextIO) -> Console:
    """Return a console on ``stream`` that prints text literally: no markup, no emoji codes, no highlighting."""
    from rich.console import Console

    width = None if stream.isatty() else wanted_columns() or PIPE_COLUMNS
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


def wanted_columns() -> int:
    """Return the width that COLUMNS asks for; 0 if it asks for none."""
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isascii() and columns.isdigit() else 0


def table(*columns: str, right: frozenset[str] = frozenset()) -> Table:
    """Return a table with these headings and no border. The columns in ``right`` are right-aligned."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def print_lines(screen: Console, *lines: str) -> None:
    """Print lines without control characters. On a terminal, or with COLUMNS, they wrap at words; else they do not."""
    for line in lines:
        screen.print(printable(line), soft_wrap=not screen.is_terminal and not wanted_columns())


def format_bytes(count: int) -> str:
    """Format a size like ``1.5 GiB``."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def format_share(part: int, whole: int) -> str:
    """Format two sizes in the unit of the larger one, like ``1.5 of 16 GiB``."""
    unit, name = next(((u, n) for u, n in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")) if whole >= u), (1, "B"))
    return f"{figure_in_words(round(part / unit, 1))} of {figure_in_words(whole / unit)} {name}"


def format_duration(seconds: float) -> str:
    """Format a duration like ``3 d 4 h``, ``2 h 5 min`` or ``12 s``."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def write_answer(text: str) -> None:
    """Write part of an answer to stdout and flush. A terminal gets no control characters from the model."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Write a text to stderr. On a terminal it wraps at words."""
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else 0
    sys.stderr.write(f"{wrap_words(printable(text), width)}\n")
    sys.stderr.flush()


def wrap_words(text: str, width: int) -> str:
    """Return ``text`` with lines of at most ``width`` characters, but for longer words; 0 changes nothing."""
    if not width:
        return text
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False)
    return "\n".join(wrapper.fill(line) for line in text.split("\n"))


def printable(text: str) -> str:
    """Replace the control characters with which ``text`` could write elsewhere on the screen."""
    return "".join(c if c.isprintable() or c in _HARMLESS or c == " " else _visible(c) for c in text)


def _visible(character: str) -> str:
    """Return a replacement for C0 and C1 controls. Keep other unprintable characters, such as joiners in emoji."""
    code = ord(character)
    return "�" if code < 32 or 127 <= code < 160 else character
