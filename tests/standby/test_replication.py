"""A standby follows a leader over a real connection: it has what the leader has, and events wait until it does."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.api.grpc import follow_call
from cluster.api.grpc.leader_service import LeaderServicer
from cluster.coordinator.answer_queue import AnswerQueue, EventBatch
from cluster.coordinator.identity import hold_identity, state_folder
from cluster.coordinator.in_sync_names import InSyncNames
from cluster.coordinator.journal import Journal
from cluster.coordinator.journal_writer import JournalWriter
from cluster.coordinator.replica_mark import ReplicaMark
from cluster.coordinator.replicated_service import SERVICE_FILE, ReplicatedService
from cluster.coordinator.replicator import Replicator
from cluster.coordinator.state_files import StateFiles
from cluster.core.errors import Busy, InvalidOption, MacpipeError, NotLeader, StaleTerm, WorkerLost
from cluster.core.leadership import CoordinatorName, CoordinatorRole, LeadershipState, Replicate, StoredEdit
from cluster.core.request import Accepted, Request, SamplingParams, TokenEvent
from cluster.membership.in_sync import InSyncSet
from cluster.membership.terms import Process
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.credentials import LocalTrust
from cluster.security.members import Members
from cluster.security.roles import Role
from cluster.standby.follow_stream import FollowStream
from cluster.standby.replica_folder import ReplicaFolder
from cluster.transport.grpc_setup import bind, public_server
from cluster.v1 import leader_pb2 as pb
from cluster.v1.leader_pb2_grpc import add_LeaderServiceServicer_to_server
from disks import FailingDisk
from parties import Lead

CLUSTER = "default"
STANDBY = CoordinatorName("mac-2", "b1", ("127.0.0.1:7701",))
LEADER = CoordinatorName("mac-1", "a1", ("127.0.0.1:7700",))


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for something that another task or thread does."""
    async with asyncio.timeout(15):
        while not is_so():
            await asyncio.sleep(0.01)


@dataclass
class Worker:
    """A worker that stores what it is told, unless it is gone."""

    gone: bool = False
    told: list[InSyncSet] = field(default_factory=list)

    async def name_in_sync(self, process: Process, in_sync: InSyncSet) -> None:
        await asyncio.sleep(0)
        if self.gone:
            raise WorkerLost("worker ada does not answer", worker="ada")
        self.told.append(in_sync)


class Leader:
    """A leader's journal and replicator, behind a port, with one worker and an answer."""

    def __init__(self, home: Path, mode: Replicate | None, earlier: InSyncSet | None = None) -> None:
        self.home, self.worker = home, Worker()
        self.replica = ReplicaMark(home, CLUSTER).id
        asks = None if earlier is None else lambda: earlier
        self.names = InSyncNames(Process("id", "a1"), [self.replica], lambda: 3, lambda: [self.worker], asks)
        self.replicator = Replicator(mode, self.replica, self.names)
        self.journal = JournalWriter(
            Journal(state_folder(home, CLUSTER) / "journal"),
            replication=self.replicator,
            gated=mode is Replicate.SYNC,
        )
        self.replicator.attach(self.journal)
        self.loop = self.journal.open_loop("m", "f")
        self.post = EventBatch()
        self.post.gate = self.journal.gate
        self.got: list[object] = []
        self._answer = AnswerQueue(self.post)
        self._reading = asyncio.create_task(self._read())
        self._files = StateFiles(home, CLUSTER)

    async def publish(self) -> None:
        """Give the replicator what is new, as a leader does before a standby begins to follow."""
        await asyncio.sleep(0)
        for name, content in self._files.read_changed().items():
            self.replicator.publish(name, content)
        self.replicator.publish(SERVICE_FILE, ReplicatedService((), workers=("10.0.0.5:7000",)).encode())

    async def _read(self) -> None:
        try:
            async for event in self._answer:
                self.got.append(event)
        except MacpipeError as e:
            self.got.append(e)

    def accept(self, name: str) -> None:
        self.loop.record_opened(Request(name, (1, 2), SamplingParams(), 20, client="me"), ())
        self._put(Accepted())

    def say(self, name: str, token: int) -> None:
        self.loop.record_token(name, token, 0)
        self._put(TokenEvent(token, token, "a"))

    def _put(self, event: Accepted | TokenEvent) -> None:
        self.loop.flush()
        self._answer.put(event)
        self.post.deliver()

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.got if isinstance(event, TokenEvent)]


@asynccontextmanager
async def leading(
    home: Path, mode: Replicate | None = Replicate.SYNC, earlier: InSyncSet | None = None
) -> AsyncIterator[tuple[Leader, str]]:
    """Run a leader, whose workers were told of the copies ``earlier`` if that matters. Yield it and its address."""
    trust = LocalTrust()
    async with AsyncExitStack() as stack:
        stack.enter_context(hold_identity(home, CLUSTER))
        leader = Leader(home, mode, earlier)
        leader.replicator.announce(LeadershipState(CoordinatorRole.LEADER, 3, LEADER))
        running = asyncio.create_task(leader.replicator.run())
        server = public_server(trust)
        others: Any = None
        servicer = LeaderServicer(others, home, CLUSTER, leader.replicator, publish=leader.publish)
        add_LeaderServiceServicer_to_server(servicer, server)
        port = bind(server, trust, "127.0.0.1", 0)
        await server.start()
        try:
            yield leader, f"127.0.0.1:{port}"
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            leader.journal.close()
            await server.stop(None)


@asynccontextmanager
async def following(home: Path, address: str) -> AsyncIterator[tuple[FollowStream, ReplicaFolder]]:
    with ReplicaFolder(home, CLUSTER) as replica:
        async with FollowStream(address, LocalTrust(), STANDBY, replica) as stream:
            yield stream, replica


@pytest.mark.anyio
async def test_an_edit_is_confirmed_once_the_standbys_have_stored_it(
    homes: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = homes
    async with leading(one, None) as (leader, address):
        assert await leader.replicator.confirm() == StoredEdit()
        async with following(two, address) as (stream, replica):
            await until(lambda: replica.is_complete)
            leader.replicator.publish("epoch", b"78\n")
            edit = await leader.replicator.confirm()
            assert (state_folder(two, CLUSTER) / "epoch").read_bytes() == b"78\n"
            assert ([state.name for state in edit.stored], edit.missing) == (["mac-2"], ())
            monkeypatch.setattr("cluster.coordinator.replicator.CONFIRM_S", 0.1)
            disk = asyncio.Event()
            monkeypatch.setattr(stream, "_store", lambda update: disk.wait())
            leader.replicator.publish("epoch", b"79\n")
            edit = await leader.replicator.confirm()
            assert ([state.name for state in edit.missing], edit.stored) == (["mac-2"], ())
            assert edit.missing[0].problem
            monkeypatch.setattr("cluster.coordinator.replicator.CONFIRM_S", 60.0)
            waiting = asyncio.create_task(leader.replicator.confirm())
        edit = await waiting
        assert ([state.name for state in edit.missing], edit.stored) == (["mac-2"], ()), "it has left"


@pytest.mark.anyio
async def test_no_copy_is_replaced_by_that_of_a_leader_which_may_lack_records_itself(homes: Homes) -> None:
    one, two = homes
    async with leading(one, earlier=InSyncSet(2, 4, ("other",))) as (_, address):
        ReplicaMark(two, CLUSTER).change(is_complete=True)
        with pytest.raises(Busy, match="does not know yet"):
            async with following(two, address):
                pass
        assert ReplicaMark(two, CLUSTER).is_complete
        assert not (state_folder(two, CLUSTER) / "journal").exists()


def resumable(home: Path, name: str) -> list[list[int]] | None:
    copy = home / "looked-at"
    shutil.copy(state_folder(home, CLUSTER) / "journal", copy)  # reading replaces the file, which may be in use
    kept = Journal(copy).take(name, "me")
    return kept.tokens if kept else None


Homes = tuple[Path, Path]


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Homes:
    """Two state folders. Standbys may be slow, since this machine may be."""
    monkeypatch.setattr("cluster.coordinator.replicator.STORE_S", 60.0)
    return tmp_path / "one", tmp_path / "two"


@pytest.mark.anyio
async def test_a_standby_has_the_leaders_state_and_each_record_before_its_event_leaves(homes: Homes) -> None:
    one, two = homes
    async with leading(one) as (leader, address):
        leader.accept("before")
        leader.say("before", 6)
        (state_folder(one, CLUSTER) / "epoch").write_bytes(b"76\n")
        async with following(two, address) as (stream, replica):
            await until(lambda: replica.is_complete)
            epoch = state_folder(two, CLUSTER) / "epoch"
            assert epoch.read_bytes() == b"76\n", "what changed just before is in the first copy"
            await until(lambda: replica.id in leader.replicator.in_sync)
            assert leader.worker.told[-1].replicas == tuple(sorted((leader.replica, replica.id)))
            for token in (7, 8):
                leader.say("before", token)
            leader.accept("after")
            await until(lambda: leader.tokens == [6, 7, 8] and len(leader.got) == 5)
            assert (state_folder(two, CLUSTER) / "id").read_text() == (state_folder(one, CLUSTER) / "id").read_text()
            assert replica.service().workers == ("10.0.0.5:7000",)
            await until(lambda: bool(stream.leadership and stream.leadership.standbys[0].in_sync))
            assert stream.leadership
            assert (stream.leadership.leader, stream.leadership.term) == (LEADER, 3)
            leader.replicator.publish("epoch", b"77\n")
            await until(lambda: epoch.exists() and epoch.read_bytes() == b"77\n")
            (state,) = leader.replicator.standbys()
            assert (state.name, state.in_sync, state.problem) == ("mac-2", True, "")
            assert replica.is_in_sync(leader.worker.told[-1])
            why = NotLeader("it stops")
            await leader.replicator.stop(why, "mac-2")
            leader.loop.record_ended("before")
            leader.say("before", 9)
            await stream.ended.wait()
            assert stream.handover == "mac-2"
            await until(lambda: leader.got[-1] is why)
    assert resumable(two, "before") == [[6, 7, 8]]
    assert resumable(two, "after") == [[]]
    with hold_identity(two, CLUSTER) as taken, hold_identity(one, CLUSTER) as own:
        assert taken == own


@pytest.mark.anyio
async def test_events_wait_for_a_standby_until_all_workers_know_that_it_is_left_out(
    homes: Homes, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = homes
    async with leading(one) as (leader, address), AsyncExitStack() as stack:
        leader.accept("a")
        _, replica = await stack.enter_async_context(following(two, address))
        await until(lambda: replica.id in leader.replicator.in_sync)
        leader.worker.gone = True
        await stack.aclose()
        leader.say("a", 7)
        await until(lambda: leader.replicator._is_untold)
        assert leader.tokens == []
        leader.worker.gone = False
        await until(lambda: leader.tokens == [7])
        assert "replication: copies in sync changed copies=1 joined=none left=mac-2" in caplog.messages, "a warning"
        assert leader.worker.told[-1].replicas == (leader.replica,)
        assert resumable(two, "a") in ([[]], [[7]])
        assert not replica.is_in_sync(leader.worker.told[-1])
        async with following(two, address):
            await until(lambda: replica.id in leader.replicator.in_sync)
    assert resumable(two, "a") == [[7]], "it comes back with a new copy"


@pytest.mark.anyio
async def test_a_standby_that_stores_nothing_is_left_out_while_it_is_connected(
    homes: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = homes
    async with leading(one) as (leader, address), following(two, address) as (_, replica):
        leader.accept("a")
        await until(lambda: replica.id in leader.replicator.in_sync)
        monkeypatch.setattr("cluster.coordinator.replicator.STORE_S", 0.3)
        go_on = asyncio.Event()

        async def store_later(self: FollowStream, update: pb.FollowResponse) -> None:
            await go_on.wait()
            await stored(self, update)

        stored = FollowStream._store
        with monkeypatch.context() as silent:
            silent.setattr(FollowStream, "_store", store_later)
            leader.say("a", 7)
            await until(lambda: replica.id not in leader.replicator.in_sync)
            await until(lambda: leader.tokens == [7])
            (state,) = leader.replicator.standbys()
            assert not state.in_sync
            assert "behind" in state.problem
        go_on.set()
        await until(lambda: replica.id in leader.replicator.in_sync)


@pytest.mark.anyio
async def test_with_async_events_leave_at_once_and_without_a_mode_no_journal_is_sent(homes: Homes) -> None:
    one, two = homes
    async with leading(one, Replicate.ASYNC) as (leader, address), following(two, address) as (_, replica):
        await until(lambda: replica.id in leader.replicator.in_sync)
        leader.accept("a")
        leader.say("a", 7)
        await until(lambda: leader.tokens == [7])
        await until(lambda: resumable(two, "a") == [[7]])
    async with leading(one, None) as (leader, address), following(two, address) as (_, replica):
        await until(lambda: replica.is_complete)
        assert resumable(two, "a") is None
        (state,) = leader.replicator.standbys()
        assert not state.in_sync
        assert "--replicate" in state.problem
        assert not leader.worker.told


@pytest.mark.anyio
async def test_a_leader_whose_own_disk_fails_is_left_out_and_its_standby_is_not(
    homes: Homes, failing_disk: FailingDisk
) -> None:
    one, two = homes
    async with leading(one) as (leader, address), following(two, address) as (_, replica):
        leader.accept("a")
        await until(lambda: replica.id in leader.replicator.in_sync)
        failing_disk.fsync_fails = True
        leader.journal._journal._is_unsynced, leader.journal._journal._synced = True, -100.0
        leader.say("a", 7)
        leader.say("a", 8)
        await until(lambda: leader.replicator.in_sync == {replica.id})
        leader.say("a", 9)
        await until(lambda: leader.tokens == [7, 8, 9])
        assert "the journal is off" in leader.journal.problem
        assert "a standby that is in sync can resume them" in leader.journal.problem
        assert leader.worker.told[-1].replicas == (replica.id,)
        failing_disk.fsync_fails = False
    assert resumable(two, "a") == [[7, 8, 9]]


@pytest.mark.anyio
async def test_a_standby_does_not_go_back_to_an_earlier_term_or_share_a_running_coordinators_folder(
    homes: Homes,
) -> None:
    one, two = homes
    ReplicaMark(two, CLUSTER).change(is_complete=True, term=4)
    async with leading(one) as (_, address):
        with pytest.raises(StaleTerm, match="term 3"):
            async with following(two, address):
                pass
        assert ReplicaMark(two, CLUSTER).is_complete
        with pytest.raises(InvalidOption, match="runs already"), ReplicaFolder(one, CLUSTER):
            pass
        with ReplicaFolder(two, CLUSTER) as replica:
            assert replica.term == 4
        shutil.copytree(one, one.with_name("copied"))
        with pytest.raises(InvalidOption, match="mac-2 was copied from its leader's"):
            async with following(one.with_name("copied"), address):
                pass


@pytest.mark.anyio
async def test_a_stream_that_is_left_has_stored_the_update_that_it_was_storing(
    homes: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one writes to the same folder: an earlier stream's end must not complete a later copy."""
    one, two = homes
    disk, storing, happened = threading.Event(), threading.Event(), list[str]()
    apply = ReplicaFolder.apply

    def apply_slowly(replica: ReplicaFolder, update: pb.FollowResponse) -> None:
        if update.HasField("complete"):
            storing.set()
            assert disk.wait(15)
            happened.append("stored")
        apply(replica, update)

    monkeypatch.setattr(ReplicaFolder, "apply", apply_slowly)
    async with leading(one) as (_, address):

        async def follow_briefly() -> None:
            async with following(two, address):
                await until(storing.is_set)
            happened.append("left")

        brief = asyncio.create_task(follow_briefly())
        await until(storing.is_set)
        asyncio.get_running_loop().call_later(0.1, disk.set)
        await brief
    assert happened == ["stored", "left"]


@pytest.mark.anyio
async def test_an_edit_that_a_leader_did_not_get_is_told_to_the_next_one(
    homes: Homes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = homes
    lead = Lead.make(one, CLUSTER)
    for role, name, own_id, home in (
        (Role.COORDINATOR, "mac-1", "c" * 16, one),
        (Role.COORDINATOR, "mac-2", "d" * 16, two),
        (Role.WORKER, "ada", "a" * 16, tmp_path / "ada"),
    ):
        lead.admit(role, name, own_id, home)

    def removed(home: Path) -> list[str]:
        return [one.name for one in Members(ClusterFolder(home, CLUSTER)).all_members() if one.removed]

    lost = asyncio.Event()

    async def lose(home: Path, cluster: str, file: pb.ReplicatedFile) -> None:
        await asyncio.sleep(0)
        if b"ada" in file.content and removed(two):
            lost.set()

    async with leading(one) as (_, address):
        with monkeypatch.context() as patch:
            patch.setattr(follow_call, "_adopt", lose)
            async with following(two, address) as (_, replica):
                await until(lambda: replica.is_complete)
                Members(ClusterFolder(two, CLUSTER)).remove("ada")
                async with asyncio.timeout(15):
                    await lost.wait()
        assert removed(one) == []
        async with following(two, address):
            await until(lambda: removed(one) == ["ada"])


@pytest.mark.anyio
async def test_a_leader_may_wait_until_a_standby_has_read_what_it_needs_to_lead(homes: Homes) -> None:
    one, two = homes
    async with leading(one, None) as (leader, address):
        replicator = leader.replicator
        async with following(two, address) as (stream, _):
            (standby,) = replicator.standbys()
            assert not await replicator.wait_prepared(standby, 0.01)
            waiting = asyncio.create_task(replicator.wait_prepared(standby, 15.0))
            stream.tell_prepared(is_prepared=True)
            assert await waiting
            assert replicator.is_prepared(standby)
            stream.tell_prepared(is_prepared=False)  # another model is loaded
            await until(lambda: not replicator.is_prepared(standby))
            waiting = asyncio.create_task(replicator.wait_prepared(standby, 60.0))
        assert not await waiting, "it has left"
        async with following(two, address):
            assert not replicator.is_prepared(standby), "a standby that follows anew says so anew"


@pytest.mark.anyio
async def test_the_log_has_a_standby_once_it_has_a_whole_copy_and_when_it_leaves(
    homes: Homes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cluster.coordinator.replicator")

    def said() -> list[str]:
        return [message for message in caplog.messages if message.startswith("replication: standby")]

    async with leading(homes[0]) as (leader, _):
        for _attempt in range(3):  # its disk is full
            follower = leader.replicator.follow(STANDBY, "b")
            leader.replicator.acknowledge(follower, 1)
            leader.replicator.leave(follower)
        assert said() == []
        follower = leader.replicator.follow(STANDBY, "b")
        await until(lambda: follower.has_journal)
        leader.replicator.acknowledge(follower, follower.newest)
        assert said() == ["replication: standby follows name=mac-2 replica=b"]
        leader.replicator.acknowledge(follower, follower.newest)
        leader.replicator.leave(follower)
        assert said()[1:] == ["replication: standby left name=mac-2 replica=b"]
