"""Reads the lines of CLIENTS.md that start a coding agent without ``macpipe launch``."""

from __future__ import annotations

import re
from pathlib import Path

CLIENTS = Path(__file__).parents[2] / "ops" / "docs" / "CLIENTS.md"
SECTION = re.compile(r"^## Coding agents by hand$(.*?)^## ", re.MULTILINE | re.DOTALL)


def lines_by_hand(name: str) -> str:
    """Return the lines for an agent. The last one starts it, and arguments may follow it."""
    section = SECTION.search(CLIENTS.read_text(encoding="utf-8"))
    assert section is not None
    (lines,) = re.findall(rf"^```sh\n((?:(?!```).*\n)*{name}\b.*)\n```$", section[1], re.MULTILINE)
    return str(lines)
