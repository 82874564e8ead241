"""Which causes an operator reads where no worker can be used, and how soon."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster import __version__
from cluster.coordinator.lost_workers import KnownWorker
from cluster.coordinator.roster import MLX_LM, Roster
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.worker_client import WorkerClient
from cluster.coordinator.worker_gathering import gather_remaining, gather_workers
from cluster.core.errors import MacpipeError, NoPlan, NoWorkers, VersionMismatch, WorkerLost
from cluster.core.limits import DESCRIBE_TIMEOUT_S, GIB, HEARTBEAT_S
from cluster.core.plan import LayerRange, LoadProgress, ModelRef, ModelShape, Plan
from cluster.core.worker import WorkerInfo
from cluster.discovery.static import static_source
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.credentials import LocalTrust
from cluster.security.members import Members
from cluster.security.roles import Party, Role

ADA = WorkerInfo("1", "ada", __version__, "127.0.0.1:1", "", "", "", f"0 mlx-lm {MLX_LM}", 1, GIB, cluster="c")
BOB = replace(ADA, id="2", name="bob", control_address="127.0.0.1:2")
CYD = replace(ADA, id="3", name="cyd", control_address="127.0.0.1:3")
SHAPE = ModelShape(ModelRef("m", "", "f" * 64), 6, (1,) * 6, (1,) * 6, (), (1, 2, 3, 4, 5), (), 64)


class Telling:
    """A worker that describes itself; one without a version does not answer, or is outside in the way of its chip."""

    def __init__(self, info: WorkerInfo) -> None:
        self._info = info if info.version else None
        self._address, self._outside = info.control_address, info.chip

    async def describe(self, timeout_s: float) -> tuple[WorkerInfo, str]:
        if self._info is None and self._outside:
            raise WorkerLost(f"cannot connect to {self._address}: no TLS", worker="", outside=self._outside)
        if self._info is None:
            raise WorkerLost("worker ada does not answer", worker="ada")
        return self._info, ""

    async def close(self) -> None:
        """Nothing is open."""


class Silent:
    """Reports nothing."""

    def waiting(self, found: Sequence[WorkerInfo], wanted: int | None) -> None:
        """Nothing is shown."""

    def planned(self, plan: Plan) -> None:
        raise AssertionError(plan)

    def progress(self, progress: LoadProgress) -> None:
        raise AssertionError(progress)


def a_roster(monkeypatch: pytest.MonkeyPatch, *workers: WorkerInfo) -> Roster:
    """Return a roster of these workers. Those without a version do not answer."""
    roster = Roster(static_source([w.control_address for w in workers]), "c", "me", LocalTrust())
    told = {w.control_address: Telling(w) for w in workers}
    monkeypatch.setattr(roster, "control", lambda address: cast(Any, told[address]))
    monkeypatch.setattr("cluster.coordinator.roster.SETTLE_S", 0.05)
    return roster


def refusal(
    monkeypatch: pytest.MonkeyPatch, *workers: WorkerInfo, wanted: int | None = None, wait_s: float = 60.0
) -> MacpipeError:
    """Return the error of a wait for workers, of which these are there."""
    roster = a_roster(monkeypatch, *workers)
    with pytest.raises(MacpipeError) as refused:
        asyncio.run(roster.gather(wanted, wait_s, Silent()))
    return refused.value


def test_workers_of_one_other_version_share_a_sentence_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    old = [replace(worker, version="0.0.9") for worker in (ADA, BOB)]
    error = refusal(monkeypatch, *old, replace(CYD, mlx_version="0 mlx-lm 0.1"))
    assert isinstance(error, VersionMismatch)
    assert error.sentence == (
        f"ada, bob run macpipe 0.0.9, this coordinator {__version__}; install the same version on all Macs; "
        f"cyd runs mlx-lm 0.1, this coordinator {MLX_LM}; install the same version on both"
    )


def test_workers_of_another_cluster_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refusal(monkeypatch, replace(ADA, cluster="lab"))
    assert isinstance(error, NoWorkers)
    assert error.sentence == "no worker can be used: ada belongs to the cluster lab, not to c"


def test_a_worker_that_may_come_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    error = refusal(monkeypatch, replace(ADA, version=""), replace(BOB, cluster="lab"), wait_s=0.3)
    assert time.monotonic() - began >= 0.3
    assert error.sentence.startswith("wanted 1 worker of cluster c, found no worker")
    assert "found no worker; worker ada does not answer; bob belongs to the cluster lab" in error.sentence


def test_those_that_came_are_returned_if_the_wait_ends_before_they_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    roster = a_roster(monkeypatch, ADA, BOB)
    monkeypatch.setattr("cluster.coordinator.roster.SETTLE_S", 60.0)
    assert asyncio.run(roster.gather(None, 0.1, Silent())) == (ADA, BOB)


@pytest.mark.anyio
async def test_a_worker_that_did_not_answer_in_the_election_holds_up_nobody_until_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = dict[str, list[float]]()

    async def describe(self: Telling, timeout_s: float) -> tuple[WorkerInfo, str]:
        given.setdefault(self._address, []).append(timeout_s)
        return await told(self, timeout_s)

    told = Telling.describe
    monkeypatch.setattr(Telling, "describe", describe)
    roster = a_roster(monkeypatch, ADA, replace(BOB, version=""))
    roster.silent = {ADA.control_address, BOB.control_address}
    for _ in range(2):
        await roster.refresh()
    assert given == {
        ADA.control_address: [HEARTBEAT_S, DESCRIBE_TIMEOUT_S],
        BOB.control_address: [HEARTBEAT_S, HEARTBEAT_S],
    }


@pytest.mark.anyio
async def test_a_worker_that_a_load_began_to_use_during_a_refresh_keeps_its_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The refresh waits for a worker that does not answer; the other one was announced too late for it."""
    asked, answered = asyncio.Event(), asyncio.Event()

    async def describe(control: WorkerClient, timeout_s: float) -> tuple[WorkerInfo, str]:
        asked.set()
        await answered.wait()
        raise WorkerLost(f"worker {control.name} does not answer", worker=control.name)

    monkeypatch.setattr(WorkerClient, "describe", describe)
    roster = Roster(static_source([ADA.control_address]), "c", "me", LocalTrust())
    refreshing = asyncio.create_task(roster.refresh())
    await asked.wait()
    roster.pin("model", [BOB])
    used, unused = roster.control(BOB.control_address), roster.control(CYD.control_address)
    answered.set()
    await refreshing
    assert roster.control(BOB.control_address) is used
    assert roster.control(CYD.control_address) is not unused
    await roster.close()


def test_a_plan_that_waits_for_nobody_does_not_say_that_it_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refusal(monkeypatch, replace(ADA, version=""), wait_s=0)
    assert error.sentence.startswith("wanted 1 worker of cluster c, found no worker")


def test_a_model_that_was_served_goes_on_with_the_workers_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.coordinator.worker_gathering.RETURN_S", 0.2)
    roster = a_roster(monkeypatch, ADA, replace(BOB, version=""))
    halves = (LayerRange(0, 3), LayerRange(3, 6))
    order = LoadOrder("m", worker_count=2, layers=halves, wait_s=3600)
    found, changed = asyncio.run(gather_remaining(roster, order, SHAPE, Silent()))
    assert [worker.name for worker in found] == ["ada"]
    assert (changed.worker_count, changed.layers) == (None, None)
    found, changed = asyncio.run(gather_remaining(a_roster(monkeypatch, ADA, BOB), order, SHAPE, Silent()))
    assert [worker.name for worker in found] == ["ada", "bob"]
    assert changed == order
    nobody = a_roster(monkeypatch, replace(ADA, version=""))
    with pytest.raises(NoWorkers):
        asyncio.run(gather_remaining(nobody, replace(order, wait_s=0.1), SHAPE, Silent()))


def test_workers_that_a_model_cannot_use_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    order = LoadOrder("m", worker_count=7, wait_s=3600)
    roster = a_roster(monkeypatch, ADA)
    with pytest.raises(NoPlan, match="m has 6 layers and can be cut into 6 stages at most, not 7"):
        asyncio.run(gather_workers(roster, order, SHAPE, Silent()))


def test_missing_workers_are_counted_for_the_model_and_for_its_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    order = LoadOrder("m", worker_count=3, draft="models/faq-draft", wait_s=0.1)
    with pytest.raises(NoWorkers) as refused:
        asyncio.run(gather_workers(a_roster(monkeypatch, ADA, BOB, CYD), order, SHAPE, Silent()))
    assert refused.value.sentence.startswith(
        "wanted 4 workers of cluster c (3 for the model and 1 for the draft model faq-draft), found ada, bob, cyd. "
    )


def test_a_drained_worker_comes_first_and_those_outside_share_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = [
        replace(ADA, id="", version="", chip="no_tls", control_address=f"127.0.0.1:{port}") for port in (7, 8, 9)
    ]
    lab = [replace(worker, cluster="lab") for worker in (ADA, BOB)]
    error = refusal(monkeypatch, *foreign, *lab, replace(CYD, draining=True))
    assert isinstance(error, NoWorkers)
    assert error.sentence == (
        "no worker can be used: cyd is drained; `macpipe drain cyd --undo` takes it back; "
        "ada, bob belong to the cluster lab, not to c; "
        "cannot connect to 127.0.0.1:7: no TLS; the same is true at 127.0.0.1:8, 127.0.0.1:9"
    )


def test_nothing_is_advised_where_every_cause_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refusal(monkeypatch, ADA, replace(BOB, draining=True), wanted=2, wait_s=0.1)
    assert error.sentence == (
        "wanted 2 workers of cluster c, found ada; bob is drained; `macpipe drain bob --undo` takes it back"
    )


KNOWN = tuple(KnownWorker(one.id, one.name, one.control_address) for one in (ADA, BOB, CYD))


def lost(roster: Roster) -> list[str]:
    return [entry.info.name for entry in roster.lost()]


@pytest.mark.anyio
async def test_who_was_lost_with_the_leader_before_is_named_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    roster = a_roster(monkeypatch, replace(ADA, version=""), replace(BOB, version=""), CYD)
    roster.silent = {ADA.control_address, BOB.control_address}
    roster.miss(KNOWN)
    assert lost(roster) == ["ada", "bob"], "cyd answered in the election"
    entries = {entry.info.name: entry for entry in await roster.refresh()}
    assert entries.keys() == {"ada", "bob", "cyd"}
    assert [entries[name].reachable for name in ("ada", "bob", "cyd")] == [False, False, True]
    roster.member(replace(ADA, control_address="127.0.0.1:9"), "")
    assert lost(roster) == ["bob"], "ada is back at another address"


def test_who_was_removed_from_the_cluster_is_not_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    members = Members(ClusterFolder(tmp_path, "c"))
    for worker in (ADA, BOB):
        members.admit(Party(Role.WORKER, worker.id, "c" * 16, worker.name, 2**159 + int(worker.id)), 9e9)
    roster = a_roster(monkeypatch, ADA, BOB)
    roster.trust = cast(Any, SimpleNamespace(members=members))
    roster.silent = roster.addresses()
    roster.miss(KNOWN[:2])
    assert lost(roster) == ["ada", "bob"]
    members.remove("ada")
    assert lost(roster) == ["bob"]
