"""The list of what ``--quick`` leaves out is complete and current."""

from __future__ import annotations

import re
from pathlib import Path

from quick import NOT_QUICK

TESTS = Path(__file__).parent
STARTS_DAEMONS = re.compile(
    r"^from integration\.daemons import .*\b(?:Cluster|Daemon|command|launch)\b|\bcampaign: Campaign\b", re.MULTILINE
)

LOADS_MODELS = re.compile(
    r"^from model\.ring import .*\bRing\b|^from cluster\.model\.training_commands import ", re.MULTILINE
)


def test_every_file_that_quick_leaves_out_exists() -> None:
    assert [name for name in NOT_QUICK if not (TESTS / name).exists()] == []


def test_quick_leaves_out_every_file_that_starts_daemons() -> None:
    """A file that uses the helpers that start daemons is on the list, or its folder is."""
    require_left_out(STARTS_DAEMONS)


def test_quick_leaves_out_every_file_that_loads_a_model() -> None:
    require_left_out(LOADS_MODELS)


def require_left_out(use: re.Pattern[str]) -> None:
    files = {path.relative_to(TESTS): path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py")}
    users = {path for path, text in files.items() if use.search(text)}
    assert len(users) > 10
    assert {path for path in users if not {path.as_posix(), path.parts[0]} & NOT_QUICK} == set()
