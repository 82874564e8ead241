"""A client's certificate is renewed while the client lives: at its start, in the middle of a stream, and when idle."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from client.scripted import Coordinator, finish_event, prompt_event, token_event
from cluster.client import AsyncClient, Client
from cluster.client.async_calls import AsyncRepeater
from cluster.client.calls import Repeater
from cluster.client.renewal_schedule import ScheduledRenewal
from cluster.core.errors import Busy, MacpipeError, Unreachable
from cluster.security.certificate_renewal import renew_certificate
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.roles import Role
from parties import Lead

DAY_S = 86_400.0
LEAF_S = 90 * DAY_S
AMY = "a1" * 8
ENDS_S = 4.0


class Amy:
    """A client of a cluster, whose ``lead`` issues its certificates."""

    def __init__(self, lead: Lead, home: Path) -> None:
        self.lead = lead
        self.home = home
        self.admit(Role.CLIENT, ENDS_S - LEAF_S)

    def admit(self, role: Role, ago_s: float) -> None:
        self.lead.admit(role, "amy", AMY, self.home, now=time.time() + ago_s)

    def certify(self, request: bytes) -> bytes:
        return renew_certificate(self.lead.folder, Role.CLIENT, AMY, request, time.time())

    @property
    def ends(self) -> float:
        """When the certificate on disk ends."""
        held = ClusterFolder(self.home, "default").keyring(Role.CLIENT)
        assert held
        return held.not_after


@pytest.fixture
def amy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Amy:
    """A client whose certificate ends in four seconds, and is due."""
    monkeypatch.setenv("MACPIPE_HOME", str(tmp_path / "amy"))
    lead = Lead.make(tmp_path / "lead")
    lead.admit_coordinator()
    return Amy(lead, tmp_path / "amy")


@pytest.fixture
def coordinator(amy: Amy) -> Iterator[Coordinator]:
    with Coordinator(trust=amy.lead.trust(Role.COORDINATOR)) as running:
        running.script.certify = amy.certify
        yield running


def until(seen: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_short_life_renews_before_its_end(amy: Amy, coordinator: Coordinator) -> None:
    """Also commands that make one call renew."""
    with Client(coordinator.address) as client:
        assert client.models()
    assert amy.ends > time.time() + LEAF_S - DAY_S


async def _one_call(address: str) -> None:
    async with AsyncClient(address) as client:
        assert await client.models()


def test_a_short_asynchronous_life_renews_before_its_end(amy: Amy, coordinator: Coordinator) -> None:
    asyncio.run(_one_call(coordinator.address))
    assert amy.ends > time.time() + LEAF_S - DAY_S


class Held:
    """An answer that waits in its middle until ``go``."""

    def __init__(self) -> None:
        self.go = threading.Event()

    async def answer(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield prompt_event()
        yield token_event(0, "a")
        while not self.go.is_set():
            await asyncio.sleep(0.02)
        yield token_event(1, "b")
        yield finish_event(2, "")


def live_long(address: str, wait: Callable[[], None], held: Held) -> str:
    with Client(address, timeout_s=10) as client:
        stream = client.stream("Why?")
        assert stream.wait_accepted()
        wait()
        assert client.models()
        held.go.set()
        assert client.generate("Why?").text == "ab"
        return stream.completion().text


def live_long_asynchronously(address: str, wait: Callable[[], None], held: Held) -> str:
    async def live() -> str:
        async with AsyncClient(address, timeout_s=10) as client:
            stream = client.stream("Why?")
            assert await stream.wait_accepted()
            await asyncio.to_thread(wait)
            assert await client.models()
            held.go.set()
            assert (await client.generate("Why?")).text == "ab"
            return (await stream.completion()).text

    return asyncio.run(live())


@pytest.mark.parametrize("live", [live_long, live_long_asynchronously], ids=["sync", "async"])
def test_a_client_outlives_its_certificate(
    amy: Amy, coordinator: Coordinator, live: Callable[[str, Callable[[], None], Held], str]
) -> None:
    """It has no call of its own between the renewal and the end of its first certificate but an open stream."""
    held = Held()
    coordinator.script.answer = held.answer
    first_end = amy.ends
    assert live(coordinator.address, lambda: until(lambda: time.time() > first_end), held) == "ab"
    kinds = [type(request).__name__ for request in coordinator.script.seen]
    assert sorted(kinds[:2]) == ["GenerateRequest", "RenewCertificateRequest"]
    assert kinds[2:] == ["ListModelsRequest", "GenerateRequest"]
    old, renewal, *new = coordinator.script.peers
    assert old == renewal, "the stream's connection is that of the first certificate"
    assert len({old, *new}) == 2, "the calls after the renewal share a connection of their own"


def test_a_certificate_renewed_by_another_process_is_used(amy: Amy, coordinator: Coordinator) -> None:
    coordinator.script.refusal = Busy("later")  # so that this client renews nothing
    with Client(coordinator.address) as client:
        with pytest.raises(Busy):
            client.models()
        renewal = amy.lead.trust(Role.CLIENT, home=amy.home).renewal
        renewal.install(amy.certify(renewal.request()))
        coordinator.script.refusal = None
        assert client.models()
        gc.collect()  # the error refers to its call
        assert len(client._connection._open) == 1, "the unused channel is closed"
    assert len(set(coordinator.script.peers)) == 2
    with pytest.raises(MacpipeError, match="this client is closed"):
        client.models()


def test_closing_ends_the_calls_on_every_connection(amy: Amy, coordinator: Coordinator) -> None:
    coordinator.script.answer = Held().answer
    client = Client(coordinator.address)
    stream = client.stream("Why?")
    assert stream.wait_accepted()
    until(lambda: amy.ends > time.time() + DAY_S)
    assert client.models()
    assert len(client._connection._open) == 2
    client.close()
    with pytest.raises(MacpipeError):
        list(stream)
    assert coordinator.script.cancelled.wait(5)


def test_threads_share_a_client_while_its_certificate_changes(amy: Amy, coordinator: Coordinator) -> None:
    done = threading.Event()

    def call(client: Client) -> int:
        calls = 0
        while not done.is_set():
            assert client.models()
            calls += 1
        return calls

    with Client(coordinator.address) as client, ThreadPoolExecutor(4) as pool:
        calling = [pool.submit(call, client) for _ in range(4)]
        try:
            for _ in range(5):
                renewal = amy.lead.trust(Role.CLIENT, home=amy.home).renewal
                renewal.install(amy.certify(renewal.request()))
                seen = len(coordinator.script.seen)
                until(lambda seen=seen: len(coordinator.script.seen) > seen + 8 or any(one.done() for one in calling))
        finally:
            done.set()
        assert all(one.result() for one in calling)
    assert len(set(coordinator.script.peers)) >= 5


class Certificate:
    """A trust whose certificate is valid from 0 to 90 s."""

    renewal = object()
    validity = (0.0, 90.0)


@pytest.mark.parametrize(("spread", "due"), [(0.0, 60.0), (1.0, 64.5)])
def test_clients_of_one_machine_renew_one_after_the_other(spread: float, due: float) -> None:
    trust: Any = Certificate()
    assert ScheduledRenewal(trust, lambda: 0.0, spread).due_in_s() == due
    assert 60.0 <= ScheduledRenewal(trust, lambda: 0.0).due_in_s() <= 64.5


@pytest.mark.parametrize(
    ("error", "level"), [(Busy("8 are valid"), logging.WARNING), (Unreachable("nobody answers"), logging.INFO)]
)
def test_a_renewal_that_fails_is_tried_again_and_logged(
    caplog: pytest.LogCaptureFixture, error: MacpipeError, level: int
) -> None:
    trust: Any = Certificate()
    now = [70.0]
    renewal = ScheduledRenewal(trust, lambda: now[0], 0.0)
    assert renewal.due_in_s() <= 0
    with caplog.at_level(logging.INFO, "cluster.client"):
        renewal.postpone(error)
    assert renewal.due_in_s() == pytest.approx(2.0)
    (record,) = caplog.records
    assert record.levelno == level
    assert record.getMessage() == f"certificates: not renewed reason={error.sentence} retry_s=2"
    for now[0], retry_s in ((89.0, 1.0), (90.0, 3600.0)):
        renewal.postpone(error)
        assert renewal.due_in_s() == pytest.approx(retry_s)


class Owner:
    """An object whose method runs now and then."""

    def __init__(self) -> None:
        self.runs = 0
        self.ran = threading.Event()

    def work(self) -> float:
        self.runs += 1
        self.ran.set()
        return 3600.0

    async def work_asynchronously(self) -> float:
        return self.work()


def test_a_client_that_was_never_closed_leaves_no_thread() -> None:
    owner = Owner()
    repeater = Repeater("test", owner.work, longest_s=0.02)
    repeater.start()
    assert owner.ran.wait(5)
    assert repeater._thread
    del owner
    repeater._thread.join(5)
    assert not repeater._thread.is_alive()


def test_an_asynchronous_client_that_was_never_closed_leaves_no_task() -> None:
    async def run() -> None:
        owner = Owner()
        repeater = AsyncRepeater("test", owner.work_asynchronously, longest_s=0.02)
        repeater.start()
        assert repeater._task
        del owner
        await asyncio.wait_for(repeater._task, 5)

    asyncio.run(run())


def test_background_work_runs_once_even_if_it_is_stopped_at_once() -> None:
    """A command that makes one call renews before it ends."""
    owner = Owner()
    repeater = Repeater("test", owner.work, longest_s=60.0)
    repeater.start()
    repeater.stop(5)
    assert owner.runs == 1

    async def run() -> None:
        other = AsyncRepeater("test", owner.work_asynchronously, longest_s=60.0)
        other.start()
        await other.stop(5)

    asyncio.run(run())
    assert owner.runs == 2
