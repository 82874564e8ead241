"""The list of what ``--quick`` leaves out is complete and current."""

from __future__ import annotations

import re
from pathlib import Path

from quick import NOT_QUICK

TESTS = Path(__file__).parent
STARTS_DAEMONS = re.compile(
    r"^from integration\.daemons import .*\b(?:Cluster|Daemon|command|launch)\b|\bcampaign: Campaign\b", re.MULTILINE
)


def test_every_file_that_quick_leaves_out_exists() -> None:
    assert [name for name in NOT_QUICK if not (TESTS / name).exists()] == []


def test_quick_leaves_out_every_file_that_starts_daemons() -> None:
    """A file that uses the helpers that start daemons is on the list, or its folder is."""
    files = {path.relative_to(TESTS): path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py")}
    starting = {path for path, text in files.items() if STARTS_DAEMONS.search(text)}
    assert len(starting) > 10
    assert {path for path in starting if not {path.as_posix(), path.parts[0]} & NOT_QUICK} == set()
