"""A cluster with certificates and real daemons: the same answers, recovery, and the end of removed members."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.client import AsyncClient, Client, Options
from cluster.core.errors import (
    Aborted,
    Forbidden,
    InvalidOption,
    MacpipeError,
    RequestNotFound,
    Unauthenticated,
    Unreachable,
)
from cluster.core.worker import WorkerState
from cluster.model.tokenizer import load_tokenizer
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.limits import LEAF_S
from cluster.security.roles import Role
from integration.daemons import Cluster, free_port, until, watchdog_pipe
from integration.reference import greedy
from parties import shown_by

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("secured")]

NAMES = ("ann", "ben", "cal")
DAY_S = 86_400.0
SHORT_S = 6.0
LONG = Options(max_tokens=500, ignore_eos=True)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Iterator[tuple[Cluster, str]]:
    """Three workers and a coordinator, all with certificates; this process is an admin meanwhile, and no longer."""
    folder = tmp_path_factory.mktemp("secured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MACPIPE_HOME", str(folder / "admin"))
        made = Cluster(folder, mtls=True)
        try:
            made.lead.admit_worker("ann", made.folder / "home", now=time.time() - 70 * DAY_S)
            for name in NAMES:
                made.worker(name)
            _, address = made.serving(llama, 3)
            yield made, address
        finally:
            made.close()


def worker(client: Client, name: str) -> WorkerState:
    return next(w for w in client.cluster().workers if w.name == name)


def test_three_workers_give_the_tokens_of_one_process(secured: tuple[Cluster, str], llama: Path) -> None:
    ids = load_tokenizer(llama).encode("hello there")
    with Client(secured[1], timeout_s=60) as client:
        state = client.cluster()
        assert {s.worker for s in state.stages} == set(NAMES)
        assert [s.input_route for s in state.stages] == ["relay", "direct", "direct"]
        assert client.generate(ids, max_tokens=16, ignore_eos=True).tokens == greedy(llama, ids, 16)


def test_an_answer_outlives_a_killed_worker(secured: tuple[Cluster, str], llama: Path) -> None:
    cluster, address = secured
    ids = load_tokenizer(llama).encode("hello there")
    killed = next(d for d in cluster.daemons if d.name == "ben")
    with Client(address, timeout_s=90) as client:
        with client.stream(ids, max_tokens=300, ignore_eos=True) as stream:
            events = iter(stream)
            said = [next(events).token]
            os.killpg(killed.process.pid, signal.SIGKILL)
            killed.process.wait()
            said += [event.token for event in events]
        assert said == list(greedy(llama, ids, 300))
        cluster.worker("ben").wait_for("of cluster")
        until(lambda: worker(client, "ben").reachable)
        client.load(str(llama), workers=3).wait()


def test_a_certificate_that_is_due_was_renewed_while_the_worker_served(secured: tuple[Cluster, str]) -> None:
    cluster, address = secured
    ann = next(m for m in cluster.lead.members.current() if m.name == "ann")
    until(lambda: len(next(m for m in cluster.lead.members.current() if m.id == ann.id).issued) == 2, 30.0)
    folder = ClusterFolder(cluster.folder / "home", cluster.name)
    fresh = {m.issued[-1].serial for m in cluster.lead.members.current() if m.id == ann.id}
    until(lambda: {ring.party.serial for ring in [folder.keyring(Role.WORKER, "ann")] if ring} == fresh, 30.0)
    with Client(address, timeout_s=30) as client:
        assert worker(client, "ann").reachable
        assert abs(worker(client, "ann").clock_ahead_seconds) < 5
        shown = shown_by(cluster.lead, worker(client, "ann").control_address)
        assert shown in fresh
        assert client.generate("x", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2


def test_a_client_asks_and_does_not_command(
    secured: tuple[Cluster, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, address = secured
    cluster.lead.admit(Role.CLIENT, "guest", "c1" * 8, tmp_path)
    monkeypatch.setenv("MACPIPE_HOME", str(tmp_path))
    with Client(address, cluster=cluster.name, timeout_s=30) as guest:
        assert guest.generate("x", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2
        with pytest.raises(Forbidden, match="UnloadModel is for admin or coordinator, and guest is a client"):
            guest.unload()
        events = iter(guest.stream("x", max_tokens=2000, ignore_eos=True))
        next(events)
        removed = time.monotonic()
        cluster.lead.members.remove("guest")
        with pytest.raises(Unauthenticated, match="guest was removed"):
            list(events)
        print(f"an open answer ended {time.monotonic() - removed:.2f} s after its client was removed")
        with pytest.raises(Unauthenticated, match="guest was removed"):
            guest.models()


def live_long(address: str, cluster: str, until_s: float) -> None:
    """Open a stream and be idle until ``until_s``; then go on with it, and with new calls."""
    with Client(address, cluster=cluster, timeout_s=30) as client, client.stream("x", **LONG) as stream:
        stream.wait_accepted()
        time.sleep(max(0.0, until_s - time.time()))
        assert client.models()
        assert client.generate("x", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2
        assert stream.completion().usage.completion_tokens == LONG["max_tokens"]


async def live_long_asynchronously(address: str, cluster: str, until_s: float) -> None:
    async with AsyncClient(address, cluster=cluster, timeout_s=30) as client, client.stream("x", **LONG) as stream:
        await stream.wait_accepted()
        await asyncio.sleep(max(0.0, until_s - time.time()))
        assert await client.models()
        assert (await client.generate("x", max_tokens=2, ignore_eos=True)).usage.completion_tokens == 2
        assert (await stream.completion()).usage.completion_tokens == LONG["max_tokens"]


def live_both(address: str, cluster: str, until_s: float) -> None:
    """Let a client of each kind live, which share a certificate."""
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(live_long, address, cluster, until_s)
        asyncio.run(live_long_asynchronously(address, cluster, until_s))
        other.result()


def test_clients_outlive_their_certificate(
    secured: tuple[Cluster, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, address = secured
    first_end = time.time() + 4
    cluster.lead.admit(Role.CLIENT, "pat", "c3" * 8, tmp_path, now=first_end - LEAF_S)
    monkeypatch.setenv("MACPIPE_HOME", str(tmp_path))
    live_both(address, cluster.name, first_end + 0.5)


SHORT_CERTIFICATES = f"""
import cluster.security.limits as limits
limits.LEAF_S, limits.BACKDATED_S = {SHORT_S}, 0.0
from cluster.cli.main import main
main()
"""


def launch_with_short_certificates(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a coordinator whose certificates last for seconds."""
    command = [sys.executable, "-c", SHORT_CERTIFICATES, *arguments, "--exit-with-stdin"]
    with log.open("wb") as out:
        return subprocess.Popen(command, stdin=watchdog_pipe(), stdout=out, stderr=out, start_new_session=True)


@pytest.mark.long
def test_clients_outlive_many_certificates_of_seconds(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(tmp_path, mtls=True)
    port = free_port()
    address = f"127.0.0.1:{port}"
    monkeypatch.setenv("MACPIPE_HOME", str(tmp_path / "pat"))
    try:
        cluster.worker("ann")
        serve = cluster.serve(llama, "--workers", "1", "--port", str(port), launch=launch_with_short_certificates)
        serve.wait_for("serving")
        cluster.lead.admit(Role.CLIENT, "pat", "c3" * 8, tmp_path / "pat", now=time.time() + SHORT_S - LEAF_S)
        live_both(address, cluster.name, time.time() + 4 * SHORT_S)
        pat = next(m for m in cluster.lead.members.all_members() if m.name == "pat")
        assert all(one.not_after < time.time() + 2 * SHORT_S for one in pat.issued)
    finally:
        cluster.close()


def test_a_request_is_ended_by_its_own_client_and_by_admins_alone(
    secured: tuple[Cluster, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, address = secured
    cluster.lead.admit(Role.CLIENT, "reader", "c2" * 8, tmp_path)
    with Client(address, timeout_s=30) as admin:
        monkeypatch.setenv("MACPIPE_HOME", str(tmp_path))
        with Client(address, cluster=cluster.name, timeout_s=30) as reader:
            mine = iter(admin.stream("x", max_tokens=2000, ignore_eos=True, request_id="the-admins"))
            theirs = iter(reader.stream("x", max_tokens=2000, ignore_eos=True, request_id="the-readers"))
            next(mine), next(theirs)
            with pytest.raises(RequestNotFound, match="you have no live request"):
                reader.abort("the-admins")
            with pytest.raises(RequestNotFound, match="no trace of request the-admins"):
                reader.trace("the-admins")
            assert reader.trace().request_id == admin.trace("the-readers").request_id == "the-readers"
            assert next(mine).index == 1
            admin.abort("the-readers")
            with pytest.raises(Aborted):
                list(theirs)
            admin.abort("the-admins")
            with pytest.raises(Aborted):
                list(mine)


def test_who_is_in_no_cluster_is_told_so(secured: tuple[Cluster, str]) -> None:
    with Client(secured[1], cluster="none-of-ours", timeout_s=10) as stranger, pytest.raises(Unreachable, match="clu"):
        stranger.models()
    with pytest.raises(InvalidOption, match="macpipe join TOKEN"):
        Client("10.1.2.3:7700", cluster="none-of-ours")


def test_a_removed_worker_loses_its_layers_and_nothing_more_is_sent_there(secured: tuple[Cluster, str]) -> None:
    cluster, address = secured
    cal = next(d for d in cluster.daemons if d.name == "cal")
    with Client(address, timeout_s=90) as client:
        with client.stream("x", max_tokens=2000, ignore_eos=True) as stream:
            events = iter(stream)
            said = [next(events).token]
            removed = time.monotonic()
            cluster.lead.members.remove("cal")
            assert cal.process.wait(30) == 1
            print(f"a removed worker knew of it and ended after {time.monotonic() - removed:.2f} s")
            assert "this Mac was removed from the cluster" in cal.said()
            assert "Traceback" not in cal.said()
            said += [event.token for event in events]
        assert len(said) == 2000
        state = client.cluster()
        assert {s.worker for s in state.stages} == {"ann", "ben"}
        home = cluster.folder / "home"
        told = [cluster.lead.like(cluster.lead, home, cluster.name).folder.revoked(name) for name in ("ann", "ben")]
        until(lambda: all(path.exists() for path in told), 30.0)
        with pytest.raises(MacpipeError, match="3 workers"):
            client.plan("faq", workers=3)
    again = cluster.worker("cal", admit=False)
    assert again.process.wait(30) == 1
    assert "`macpipe token create`" in " ".join(again.said().split())
