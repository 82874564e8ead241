"""A draft model's Mac, then a stage's, is killed in mid-answer: no token changes, and the draft model comes back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from cluster.client import ClusterState, Speculation
from cluster.core.errors import MacpipeError
from faults.campaign import Campaign
from faults.fleet import MEND_S, MODEL, Fleet
from faults.scenario import Fault, Kind, Moment

pytestmark = [pytest.mark.timeout(240), pytest.mark.xdist_group("faults")]

QUESTION = [("user", "What is a hop?")]
TOKENS = 60
STRUCK_AT = 12


@pytest.fixture
def drafted(campaign: Campaign) -> Iterator[Fleet]:
    """The fleet with a draft model on its spare. It has none again afterwards."""
    fleet = campaign.fleet
    load(fleet, Speculation.DRAFT, "faq-draft")
    try:
        yield fleet
    finally:
        fleet.mend()
        load(fleet, Speculation.OFF, "")


def load(fleet: Fleet, speculate: Speculation, draft: str) -> None:
    """Load the model, again and again while the machine is too slow for it."""
    deadline = time.monotonic() + MEND_S
    while (state := fleet.client.cluster()).speculation is not speculate or state.state != "serving":
        assert time.monotonic() < deadline, state
        with suppress(MacpipeError):
            fleet.client.load(MODEL, workers=fleet.stages, speculate=speculate, draft=draft).wait()


def answer(fleet: Fleet, strike: str = "") -> list[int]:
    """Answer once. Kill the worker ``strike`` after a few tokens."""
    tokens = []
    for event in fleet.client.stream_chat(QUESTION, max_tokens=TOKENS, ignore_eos=True, temperature=1.0, seed=7):
        tokens.append(event.token)
        if strike and len(tokens) == STRUCK_AT:
            fleet.strike(Fault(Kind.KILL_WORKER, 0, Moment.TOKEN, STRUCK_AT, False), (strike,))
    return tokens


def wait_for_draft(fleet: Fleet, *, there: bool) -> ClusterState:
    """Return the state once a worker that holds no layers has the draft model, or once none does."""
    deadline = time.monotonic() + MEND_S
    while bool((state := fleet.client.cluster()).draft_worker) is not there or state.state != "serving":
        assert time.monotonic() < deadline, state
        time.sleep(0.05)
    assert any("the draft model faq-draft" in warning for warning in state.warnings) is not there
    assert state.draft_worker not in [stage.worker for stage in state.stages]
    return state


def test_kills_around_a_draft_change_no_token_and_it_comes_back(drafted: Fleet) -> None:
    expected = answer(drafted)
    spare = wait_for_draft(drafted, there=True).draft_worker
    assert answer(drafted, spare) == expected
    wait_for_draft(drafted, there=False)
    drafted.mend()
    state = wait_for_draft(drafted, there=True)
    spare, stage = state.draft_worker, state.stages[1].worker
    assert answer(drafted, stage) == expected
    state = wait_for_draft(drafted, there=False)
    workers = [one.worker for one in state.stages]
    assert spare in workers or len(workers) < drafted.stages, "layers go first, where its Mac answers in time"
    drafted.mend()
    wait_for_draft(drafted, there=True)
    assert answer(drafted) == expected
