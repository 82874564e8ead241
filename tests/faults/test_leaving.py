"""Workers that leave in good order: streams continue, and a lost worker gets its layers back if requested."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from cluster.client import Client
from cluster.core.errors import MacpipeError
from faults.campaign import Campaign
from faults.fleet import MODEL, Fleet
from faults.scenario import Asked

pytestmark = [pytest.mark.timeout(240), pytest.mark.xdist_group("faults")]


def longest(campaign: Campaign) -> tuple[Asked, tuple[int, ...]]:
    """The request of the pool with the most tokens, and its undisturbed answer."""
    at = max(range(len(campaign.asked)), key=lambda i: campaign.asked[i].max_tokens)
    return campaign.asked[at], campaign.expected[at]


def streamed(campaign: Campaign, at: int, then: threading.Thread) -> tuple[int, ...]:
    """The tokens of that request, while ``then`` happens from its token ``at`` on."""
    asked, _ = longest(campaign)
    said: list[int] = []
    with Client(campaign.fleet.address, timeout_s=60) as client:
        for token in client.stream(
            list(asked.prompt), max_tokens=asked.max_tokens, ignore_eos=True, **dict(asked.sampling)
        ):
            said.append(token.token)
            if len(said) == at:
                then.start()
    then.join(60)
    return tuple(said)


def test_a_drained_worker_holds_nothing_and_the_stream_goes_on(campaign: Campaign) -> None:
    campaign.fleet.mend()
    client, leaver = campaign.fleet.client, campaign.fleet.plan()[1]
    spare = next(iter(set(campaign.fleet.parties) - set(campaign.fleet.plan())))
    drained = threading.Thread(target=lambda: client.drain(leaver))
    assert streamed(campaign, 5, drained) == longest(campaign)[1]
    assert campaign.fleet.plan()[1] == spare
    state = {w.name: w for w in client.cluster().workers}[leaver]
    assert (state.draining, state.standing, state.memory_used < 100_000) == (True, "up", True)
    client.drain(leaver, undo=True)
    assert not {w.name: w for w in client.cluster().workers}[leaver].draining
    with pytest.raises(MacpipeError, match="no worker named nobody"):
        client.drain("nobody")


def test_a_worker_that_is_told_to_stop_moves_its_layers_first(campaign: Campaign) -> None:
    campaign.fleet.mend()
    leaver = campaign.fleet.plan()[2]
    party = campaign.fleet.parties[leaver]
    assert party.daemon
    process = party.daemon.process
    stop = threading.Thread(target=process.send_signal, args=(signal.SIGTERM,))
    assert streamed(campaign, 5, stop) == longest(campaign)[1]
    assert process.wait(10) == 0
    assert leaver not in campaign.fleet.plan()
    assert {w.name: w.losses for w in campaign.fleet.client.cluster().workers}[leaver] <= 1
    campaign.fleet.mend()


def test_who_was_lost_takes_its_layers_back_where_that_is_wished(campaign: Campaign) -> None:
    campaign.fleet.mend()
    client, home = campaign.fleet.client, campaign.fleet.plan()
    client.load(MODEL, workers=len(home), take_back=True).wait()
    assert campaign.fleet.plan() == home
    kill = threading.Thread(target=os.kill, args=(campaign.fleet.parties[home[0]].pids[0], signal.SIGKILL))
    assert streamed(campaign, 5, kill) == longest(campaign)[1]
    assert campaign.fleet.plan() != home
    campaign.fleet.mend_processes()
    deadline = time.monotonic() + 30
    while campaign.fleet.plan() != home:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert streamed(campaign, 5, threading.Thread()) == longest(campaign)[1]
    client.load(MODEL, workers=len(home)).wait()


def test_what_cannot_go_elsewhere_is_not_drained(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, stages=1, names=("gil",))
    try:
        with pytest.raises(MacpipeError, match="no worker is left"):
            fleet.client.drain("gil")
        assert fleet.client.generate([1, 2], max_tokens=3, ignore_eos=True).finish_reason == "length"
        assert not fleet.client.cluster().workers[0].draining
        began = time.monotonic()
        os.kill(fleet.parties["gil"].pids[0], signal.SIGTERM)
        party = fleet.parties["gil"].daemon
        assert party
        assert party.process.wait(10) == 0
        assert time.monotonic() - began < 10
    finally:
        fleet.close()
