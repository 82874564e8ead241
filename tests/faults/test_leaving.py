"""Workers that leave in good order, and coordinators that die: streams go on, and no weight is read again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.client import Client
from cluster.errors import MacpipeError, RequestNotFound
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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    """Two workers without a spare, and a coordinator with a journal."""
    fleet = Fleet(tmp_path_factory.mktemp("small"), stages=2, names=("eve", "fay"), options=("--journal", "never"))
    try:
        yield Campaign(fleet)
    finally:
        fleet.close()


ROUNDS = 4


def test_a_coordinator_that_dies_is_followed_by_one_that_reads_no_weight_and_resumes(small: Campaign) -> None:
    fleet = small.fleet
    engines = [p.engine for p in fleet.parties.values()]
    port = int(fleet.address.rpartition(":")[2])
    asked, expected = longest(small)
    for i in range(ROUNDS):
        name, said = f"resumed-{i}", []
        stream = fleet.client.stream(
            list(asked.prompt), max_tokens=asked.max_tokens, ignore_eos=True, request_id=name, **dict(asked.sampling)
        )
        with suppress(MacpipeError):
            for token in stream:
                said.append(token.token)
                if len(said) == 3 + 9 * i:
                    fleet.serve.process.kill()
        assert stream.finish is None
        fleet.serve.process.wait(10)
        fleet.client.close()
        fleet.start_coordinator(port)
        offset = max(0, len(said) - i)  # a client may have lost its last tokens, too
        rest = [t.token for t in fleet.client.resume(name, offset)]
        assert (*said[:offset], *rest) == expected
        assert "reading, 0%" not in fleet.serve.said()
        assert [p.engine for p in fleet.parties.values()] == engines
        with pytest.raises(RequestNotFound, match=name):
            list(fleet.client.resume(name, 0))


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
