"""What people see: consoles for tables and progress, and text that is safe to put on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final, TextIO

from cluster.core.limits import GIB, KIB, MIB

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_COLUMNS: Final = 200
"""Width of a table that no terminal shows: wide enough to cut nothing."""

_HARMLESS: Final = {"\n", "\t"}


def console(stream: TextIO) -> Console:
    """A console on ``stream`` that never guesses: no markup, no emoji, no highlighting."""
    from rich.console import Console

    width = None if stream.isatty() else PIPE_COLUMNS
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


def table(*columns: str, right: frozenset[str] = frozenset()) -> Table:
    """An open table with these headings; those in ``right`` hold numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def figure(number: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


def bytes_in_words(count: int) -> str:
    """``1.5 GiB``: three digits are enough for people."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def seconds_in_words(seconds: float) -> str:
    """``2 h 5 min``, ``12 s``."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def say(text: str) -> None:
    """Put a piece of an answer on stdout at once; a terminal gets no control characters from a model."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """A line on stderr, for people."""
    sys.stderr.write(f"{printable(text)}\n")
    sys.stderr.flush()


def printable(text: str) -> str:
    """``text`` without the control characters by which it could write elsewhere on the screen."""
    return "".join(c if c.isprintable() or c in _HARMLESS or c == " " else _visible(c) for c in text)


def _visible(character: str) -> str:
    """A stand-in for C0 and C1 controls; other unprintables (joiners in emoji) stay."""
    code = ord(character)
    return "�" if code < 32 or 127 <= code < 160 else character
