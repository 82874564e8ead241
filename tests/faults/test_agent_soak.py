"""Agents of several keys work for minutes: prefixes and marks keep to their budget, and no process grows."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from cluster.model.checkpoint import resolve_model
from cluster.model.tokenizer import load_tokenizer
from faults.agent_soak import SUB_AGENTS, TOKENS, AgentFound, AgentSoak, choose_session
from integration.daemons import Footprint

from agent_sessions import CHAT, Ask, Script  # isort: skip


def test_growth_is_told_from_a_spike() -> None:
    def found(*mebibytes: int) -> AgentFound:
        return AgentFound(footprints={"hal": [Footprint(size * 2**20, 9, 40, size * 2**20) for size in mebibytes]})

    assert found(100, 150, 200, 200, 200, 900, 205, 205, 210, 900, 205, 205).flat
    assert not found(100, 150, 200, 200, 200, 900, 205, 205, 240, 240, 245, 250).flat


@pytest.mark.parametrize(("number", "at_once"), [(0, 1), (1, SUB_AGENTS), (2, 1)])
def test_every_kind_of_session_has_turns(number: int, at_once: int) -> None:
    script = Script(load_tokenizer(resolve_model("faq")), TOKENS)
    for recordings in ([], [[Ask(CHAT, {"messages": [{"role": "user", "content": "Hello"}]})] * 2]):
        turns = list(choose_session(script, number, recordings, random.Random(number)))
        assert len(turns) > 1
        assert {len(turn) for turn in turns} == {at_once}


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
