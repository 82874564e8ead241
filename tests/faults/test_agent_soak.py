"""Agents of several keys work for minutes: prefixes and marks keep to their budget, and no process grows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from faults.agent_soak import AgentSoak


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_sessions_of_agents_stay_within_the_budget_of_prefixes(tmp_path: Path) -> None:
    soak = AgentSoak(tmp_path)
    try:
        found = soak.minutes(3)
    finally:
        soak.close()
    print(json.dumps(found.facts()))
    assert found.good, found.facts()
    assert min(found.answers, found.left, found.cached_tokens, found.prefixes) > 0
    assert max(found.shares) > 0.8, "the budget was never nearly full"
