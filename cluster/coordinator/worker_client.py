"""Call one worker's control plane: WorkerService as typed methods with deadlines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from cluster.codec.examination import decode_results
from cluster.codec.group_port import decode_group_port
from cluster.codec.stored_models import decode_worker_store
from cluster.codec.worker_info import decode_info
from cluster.coordinator.worker_messages import (
    SumSeat,
    decode_link,
    decode_sums,
    decode_term_answer,
    encode_adapter,
    encode_load,
    encode_peers,
)
from cluster.core.adapter import Adapter
from cluster.core.all_reduce import AllReduce
from cluster.core.errors import (
    DeadlineExceeded,
    OtherParty,
    PortClosed,
    Unreachable,
    WorkerLost,
    WorkerRefused,
    WorkerReplaced,
)
from cluster.core.examination import EXAMINE_S, CheckResult
from cluster.core.group_limits import DEVICES_JOIN_S, GROUP_GATHER_S, SUMS_S
from cluster.core.limits import (
    CONNECT_TIMEOUT_S,
    CONTROL_TIMEOUT_S,
    GONE_S,
    LOAD_STALL_S,
    LOAD_STUCK_S,
)
from cluster.core.link_limits import MAX_SHARED_HOSTS, PROBE_TIMEOUT_S
from cluster.core.plan import FetchOrder, LayerRange, Link, LoadedStage, LoadProgress, StageSpec, StorePlace
from cluster.core.prefix_keys import unpack_beginnings
from cluster.core.prefix_limits import DISK_OPEN_S, MAX_DISK_NODES
from cluster.core.process_groups import GroupAddresses, GroupPort
from cluster.core.stored_models import STORE_S, MacStore
from cluster.core.term_limits import FENCE_S
from cluster.core.text import HIGHEST_PORT, format_address, parse_address
from cluster.core.worker import WorkerInfo
from cluster.membership.in_sync import InSyncSet
from cluster.membership.terms import Process, TermAnswer, TermCall, TermRequest
from cluster.scheduler.disk_prefixes import DiskRead
from cluster.security.limits import MAX_REVOKED
from cluster.security.trust import WORKER, Trust, worker_of
from cluster.transport.grpc_setup import PING_S, control_channel
from cluster.transport.grpc_streams import TermOf, no_term
from cluster.transport.rich_errors import OUTSIDE, from_rpc_error
from cluster.v1 import worker_pb2 as pb
from cluster.v1.worker_pb2_grpc import WorkerServiceStub

if TYPE_CHECKING:
    from cluster.v1.worker_pb2_grpc import WorkerServiceAsyncStub

Message = TypeVar("Message", pb.LoadStageResponse, pb.SetAdaptersResponse)
_SERIAL_BYTES = 20
"""Maximum size of a certificate's serial number."""
_CLOSED = "the channel to worker {} is closed: it is no more at {}"
_RETIRED = 4
"""Maximum number of replaced connections that stay open for the calls still running on them."""


class WorkerClient:
    """Client of the worker at ``address``. Every call raises ``WorkerLost``, naming it, if it does not answer.

    In a cluster, the first connection accepts any worker's certificate and asks for the worker's id. The client then
    reconnects with that id as the expected peer, so from there on TLS proves the id. ``coordinator`` and ``instance``
    are the id and the process of the caller. ``revoked`` returns the certificate serials that the worker must refuse,
    and ``term`` the number of the caller's term.
    """

    def __init__(
        self,
        trust: Trust,
        address: str,
        coordinator: str,
        instance: str = "",
        revoked: Callable[[], Iterable[int]] = tuple,
        term: TermOf = no_term,
    ) -> None:
        self.address, self.name = address, address
        self._coordinator, self._instance, self._term = coordinator, instance, term
        self._trust, self._revoked = trust, revoked
        self._retired: list[grpc.aio.Channel] = []
        self._closed = False
        self._clock_ahead_s = 0.0
        self._ping_s = PING_S
        self._dial(WORKER)

    def _dial(self, peer: str) -> None:
        self._peer = peer
        self._serial = self._trust.serial
        self._channel = control_channel(self._trust, self.address, peer, self._ping_s)
        self._unverified_stub = WorkerServiceStub(self._channel)

    async def _redial(self, peer: str) -> None:
        """Reconnect; running calls keep one of ``_RETIRED`` old connections. Raises ``WorkerLost`` after ``close``."""
        if self._closed:
            raise WorkerLost(_CLOSED.format(self.name, self.address), worker=self.name)
        self._retired.append(self._channel)
        self._dial(peer)
        if len(self._retired) > _RETIRED:
            await self._retired.pop(0).close(None)

    @property
    def _stub(self) -> WorkerServiceAsyncStub:
        """The stub for calls that require a verified worker id. Raises ``WorkerLost`` before the id is verified."""
        if self._trust.me and self._peer == WORKER:
            raise WorkerLost(f"worker {self.name} at {self.address} has not proved its id", worker=self.name)
        return self._unverified_stub

    async def describe(self, timeout_s: float = CONTROL_TIMEOUT_S) -> tuple[WorkerInfo, str]:
        """Return the worker's description and its problem, "" if it has none.

        The worker takes this call as the coordinator's heartbeat. Raises ``WorkerReplaced`` if another worker answers.
        """
        await self._adapt_ping(timeout_s)
        if self._serial != self._trust.serial:  # renewed: the new certificate needs a new connection
            await self._redial(self._peer)
        try:
            answer = await self._call_describe(timeout_s)
            if self._trust.me and self._peer == WORKER:
                await self._redial(_party_of(answer.id))
                answer = await self._call_describe(timeout_s)
        except WorkerReplaced:
            await self._redial(WORKER)
            raise
        self.name = answer.name
        ahead_s = self._clock_ahead_s if answer.clock else 0.0
        return decode_info(answer, self.address, ahead_s), answer.problem

    async def _adapt_ping(self, timeout_s: float) -> None:
        """Scale the ping timeout with ``timeout_s``: a slow worker also answers pings late."""
        wanted_s = PING_S * timeout_s / GONE_S
        if wanted_s >= 4 * self._ping_s or wanted_s <= PING_S < self._ping_s:
            self._ping_s = max(PING_S, wanted_s)
            await self._redial(self._peer)

    def _deadline(self) -> float:
        """Return the timeout, in seconds, of a call that moves no weights; longer for a slow worker."""
        return CONTROL_TIMEOUT_S * self._ping_s / PING_S

    async def _call_describe(self, timeout_s: float) -> pb.DescribeResponse:
        request = pb.DescribeRequest(
            coordinator=self._coordinator,
            instance=self._instance,
            term=self._term(),
            revoked=[serial.to_bytes(_SERIAL_BYTES) for serial in sorted(self._revoked())[:MAX_REVOKED]],
        )
        asked_at = time.time()
        async with self._map_errors():
            answer = await self._unverified_stub.Describe(request, timeout=timeout_s)
        self._clock_ahead_s = answer.clock - (asked_at + time.time()) / 2
        if self._trust.me and self._peer not in (WORKER, _party_of(answer.id)):
            raise WorkerReplaced(
                f"the worker at {self.address} reports an id that does not match its certificate", worker=self.name
            )
        return answer

    async def request_term(self, call: TermCall) -> tuple[TermAnswer, str]:
        """Send a call about a term. Return the answer, and why the worker did not do it, for people; "" if it did.

        A grant is answered once the worker's engines compute for no earlier term. Raises the worker's error.
        """
        term, request = call.term, pb.TermRequest.Value(f"TERM_REQUEST_{call.request.name}")
        timeout_s = self._deadline() + (FENCE_S if call.request is TermRequest.GRANT else 0.0)
        async with self._map_errors():
            answer = await self._stub.GrantTerm(
                pb.GrantTermRequest(
                    request=request,
                    coordinator=term.process.leader,
                    instance=term.process.instance,
                    term=term.number,
                ),
                timeout=timeout_s,
            )
        try:
            return decode_term_answer(call, answer)
        except ValueError:
            why = f"worker {self.name} answers to a term in a way that is not macpipe's"
            raise WorkerLost(why, worker=self.name) from None

    async def name_in_sync(self, process: Process, in_sync: InSyncSet) -> None:
        """Have the worker store which copies are in sync with this process. Raises the worker's error."""
        request = pb.NameInSyncRequest(
            coordinator=process.leader,
            instance=process.instance,
            in_sync=pb.InSyncSet(term=in_sync.term, version=in_sync.version, replicas=in_sync.replicas),
        )
        async with self._map_errors():
            await self._stub.NameInSync(request, timeout=self._deadline())

    async def load(
        self, spec: StageSpec, order: FetchOrder, keep: Sequence[int] = (), memory_limit: int = 0
    ) -> AsyncIterator[LoadProgress | GroupPort | LoadedStage]:
        """Load a slice in place of all others but those of the epochs ``keep``. Yield progress, then what is loaded.

        The rank of a group first yields a port, and waits for ``join_group``.

        ``memory_limit`` is in bytes, for weights, caches and work; 0 is the worker's own.
        Raises the worker's error, or ``WorkerLost`` if the load stalls.
        """
        request = encode_load(spec, order, self._coordinator, self._instance)
        request.term = self._term()
        request.keep.extend(keep)
        request.memory_limit = memory_limit
        digests: list[tuple[str, str]] = []
        port = 0
        async with self._map_errors():
            async for message in _read_with_stall_limit(self._stub.LoadStage(request), self.name):
                if group_port := decode_group_port(message):
                    yield group_port
                    continue
                digests += [(digest.name, digest.sha256.hex()) for digest in message.digests]
                port = message.data_port
                if len(digests) > len(order.tensors) or port > HIGHEST_PORT:
                    why = f"worker {self.name} sent digests of tensors that it was not asked for, or an impossible port"
                    raise WorkerLost(why, worker=self.name)
                yield LoadProgress(
                    self.name,
                    spec.layers,
                    message.done_bytes,
                    message.total_bytes,
                    "ready" if message.ready else message.state,
                    message.hub_bytes,
                    message.peer_bytes,
                    tuple(message.notices),
                )
        yield LoadedStage(self.name, tuple(digests), port)

    async def join_group(self, epoch: int, meeting: GroupAddresses, *, insecure: bool) -> None:
        """Name the ranks of a group, by their addresses, to the worker whose ``load`` of this epoch waits for them."""
        request = pb.JoinGroupRequest(
            epoch=epoch,
            hosts=meeting.hosts,
            backend=meeting.backend,
            devices=[pb.RdmaDevices(names=names) for names in meeting.devices],
            insecure=insecure,
            term=self._term(),
        )
        async with self._map_errors():
            await self._stub.JoinGroup(request, timeout=self._deadline())

    async def measure_sums(self, seat: SumSeat, meeting: int = 0) -> AsyncIterator[GroupPort | AllReduce]:
        """Take a seat in the measurement of a group: yield a port, then how fast it adds up once all have met.

        Without a ``meeting``, nothing is started: yield what the worker has kept, if it has. Raises the worker's error.
        """
        ranks = seat.ranks if meeting else 0
        request = pb.MeasureSumsRequest(
            group=seat.group, rank=seat.rank, ranks=ranks, meeting=meeting, term=self._term()
        )
        timeout_s = GROUP_GATHER_S + DEVICES_JOIN_S + SUMS_S if meeting else self._deadline()
        async with self._map_errors():
            async for message in self._stub.MeasureSums(request, timeout=timeout_s):
                if group_port := decode_group_port(message):
                    yield group_port
                elif found := decode_sums(message):
                    yield found

    async def set_adapters(
        self, epoch: int, layers: LayerRange, adapters: Sequence[Adapter], peers: Sequence[StorePlace]
    ) -> None:
        """Let the worker's stage, of these layers, hold just these adapters. Raises as ``load``."""
        request = pb.SetAdaptersRequest(
            epoch=epoch,
            adapters=[encode_adapter(adapter, layers) for adapter in adapters],
            peers=encode_peers(peers),
            coordinator=self._coordinator,
            instance=self._instance,
            term=self._term(),
        )
        async with self._map_errors():
            async for _ in _read_with_stall_limit(self._stub.SetAdapters(request), self.name):
                pass

    async def link(self, epoch: int, before: WorkerInfo | None, reader: int = 0) -> Link | None:
        """Tell the worker to pull its input from the stage ``before``, as this one of its readers.

        With None, the coordinator feeds it.

        Return the link that the worker uses; None if there is none, or if it was not measured.
        """
        source, others, party = "", list[str](), ""
        if before:
            source, others, party = before.data_address, further_addresses(before), worker_of(before.id)
        async with self._map_errors():
            request = pb.LinkStageRequest(
                epoch=epoch, pull_from=source, peer=party, others=others, term=self._term(), reader=reader
            )
            timeout_s = self._deadline() + CONNECT_TIMEOUT_S * min(len(others), MAX_SHARED_HOSTS)
            answer = await self._stub.LinkStage(request, timeout=timeout_s)
        return decode_link(answer)

    async def open_prefixes(
        self, epoch: int, edition: str, owners: Collection[str], *, anonymous: bool
    ) -> list[tuple[int, bytes]]:
        """Open the worker's prefixes on disk; see ``OpenPrefixes``. Return lengths and names, latest used first."""
        request = pb.OpenPrefixesRequest(
            epoch=epoch, edition=edition, owners=sorted(owners), anonymous=anonymous, term=self._term()
        )
        async with self._map_errors():
            answer = await self._stub.OpenPrefixes(request, timeout=DISK_OPEN_S)
        try:
            found = unpack_beginnings(answer.beginnings)
        except ValueError as e:
            raise WorkerLost(
                f"worker {self.name} sent an invalid list of prefixes; run the same macpipe on all Macs",
                worker=self.name,
            ) from e
        return found[:MAX_DISK_NODES]

    async def read_prefix(self, order: DiskRead) -> None:
        """Have the worker read a prefix from disk. Raises ``PrefixMissing`` if it cannot."""
        request = pb.ReadPrefixRequest(
            epoch=order.epoch,
            prefix=order.prefix,
            owner=order.owner,
            adapter=order.adapter,
            beginning=order.node,
            length=order.length,
            term=self._term(),
        )
        async with self._map_errors():
            await self._stub.ReadPrefix(request, timeout=order.timeout_s)

    async def unload(self, epoch: int, timeout_s: float = CONTROL_TIMEOUT_S, keep: Sequence[int] = ()) -> None:
        """Free the worker's slices of this epoch and of older ones, but those of the epochs ``keep``."""
        async with self._map_errors():
            request = pb.UnloadStageRequest(
                epoch=epoch, coordinator=self._coordinator, instance=self._instance, keep=keep, term=self._term()
            )
            await self._stub.UnloadStage(request, timeout=timeout_s)

    async def measure_link(self, source: WorkerInfo) -> Link:
        """Return the link from ``source`` to this worker, measured recently or now.

        Raises ``WorkerLost``, also if the worker cannot reach ``source`` or the figures are impossible.
        """
        others = further_addresses(source)
        async with self._map_errors():
            request = pb.MeasureLinkRequest(worker=source.id, address=source.data_address, others=others)
            timeout_s = CONTROL_TIMEOUT_S + PROBE_TIMEOUT_S * min(len(others), MAX_SHARED_HOSTS)
            answer = await self._stub.MeasureLink(request, timeout=timeout_s)
        link = decode_link(answer)
        if link is None:
            raise WorkerLost(f"worker {self.name} reports an impossible link measurement", worker=self.name)
        return replace(link, address=answer.address if answer.address in (source.data_address, *others) else "")

    async def send_step_time_ratio(self, fingerprint: str, ratio: float) -> None:
        """Send the worker the ratio of measured to predicted step time for a model, by the model's fingerprint."""
        async with self._map_errors():
            request = pb.LearnRatioRequest(fingerprint=fingerprint, ratio=ratio)
            await self._stub.LearnRatio(request, timeout=CONTROL_TIMEOUT_S)

    async def drain(self, *, undo: bool = False) -> None:
        """Drain the worker: it asks to hold no layers. ``undo`` ends the drain."""
        async with self._map_errors():
            request = pb.DrainWorkerRequest(coordinator=self._coordinator, instance=self._instance, undo=undo)
            await self._stub.DrainWorker(request, timeout=CONTROL_TIMEOUT_S)

    async def reset(self, why: str, timeout_s: float = CONTROL_TIMEOUT_S, epoch: int = 0) -> None:
        """Tell the worker to kill the engine that holds a slice of this epoch; for 0, its first engine.

        The first engine restarts, and then holds no layers.
        """
        async with self._map_errors():
            request = pb.ResetEngineRequest(
                coordinator=self._coordinator, instance=self._instance, why=why, epoch=epoch, term=self._term()
            )
            await self._stub.ResetEngine(request, timeout=timeout_s)

    async def examine(self, others: Iterable[WorkerInfo]) -> tuple[CheckResult, ...]:
        """Have the worker examine its Mac, and try to connect to ``others``.

        Raises ``VersionMismatch`` if it is of a version that cannot.
        """
        members = [pb.MemberAddress(name=one.name, address=one.control_address) for one in others]
        async with self._map_errors():
            request = pb.ExamineRequest(members=members)
            answer = await self._stub.Examine(request, timeout=EXAMINE_S + self._deadline())
        return decode_results(answer.results, self.name)

    async def list_stored(self) -> MacStore:
        """Return the models in the worker's store. Raises as ``examine``."""
        async with self._map_errors():
            answer = await self._stub.ListStored(pb.ListStoredRequest(), timeout=STORE_S)
        return decode_worker_store(answer.store, self.name)

    async def remove_stored(self, fingerprint: str) -> None:
        """Remove a model from the worker's store. Raises ``ModelInUse`` and ``ModelNotFound``."""
        async with self._map_errors():
            await self._stub.RemoveStored(pb.RemoveStoredRequest(fingerprint=fingerprint), timeout=STORE_S)

    async def renew(self, certify: Callable[[bytes], Awaitable[bytes]]) -> None:
        """Renew the worker's certificate. ``certify`` makes it from the worker's signing request."""
        async with self._map_errors():
            answer = await self._stub.RequestCertificate(pb.RequestCertificateRequest(), timeout=CONTROL_TIMEOUT_S)
        certificate = await certify(answer.request)
        async with self._map_errors():
            fresh = pb.InstallCertificateRequest(certificate=certificate)
            await self._stub.InstallCertificate(fresh, timeout=CONTROL_TIMEOUT_S)

    async def close(self) -> None:
        """Close all connections. Calls raise ``WorkerLost`` from then on, also those that run."""
        self._closed = True
        for channel in (*self._retired, self._channel):
            await channel.close(None)

    def _map_errors(self) -> AbstractAsyncContextManager[None]:
        return _map_rpc_errors(self.name, self.address)


@asynccontextmanager
async def _map_rpc_errors(name: str, address: str) -> AsyncIterator[None]:
    """Map RPC errors to ``MacpipeError``, each naming the worker."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task and task.cancelling():
            raise
        raise WorkerLost(f"the channel to worker {name} was closed during a call", worker=name) from None
    except grpc.aio.UsageError:  # for a call that begins on a closed channel: the worker was forgotten meanwhile
        raise WorkerLost(_CLOSED.format(name, address), worker=name) from None
    except grpc.aio.AioRpcError as e:
        error = from_rpc_error(e, address, peer="worker" if name == address else f"worker {name}")
        if isinstance(error, DeadlineExceeded):
            raise WorkerLost(f"worker {name} at {address} does not answer", worker=name) from e
        if isinstance(error, OtherParty):
            raise WorkerReplaced(error.sentence, worker=name) from e
        if isinstance(error, Unreachable):
            kind = WorkerRefused if isinstance(error, PortClosed) else WorkerLost
            lost = kind(error.sentence, worker=name)
            if OUTSIDE in error.details:
                lost.details[OUTSIDE] = error.details[OUTSIDE]
            raise lost from e
        named = type(error)(f"worker {name}: {error.sentence}")
        named.details = error.details | {"worker": name}  # not as keyword arguments: the worker chose the keys
        raise named from e


async def _read_with_stall_limit(call: grpc.aio.UnaryStreamCall[Any, Message], worker: str) -> AsyncIterator[Message]:
    """Yield the call's messages.

    Raises ``WorkerLost`` on a stall: no message for ``LOAD_STALL_S``, or no changed message for ``LOAD_STUCK_S``.
    """
    last: Message | None = None
    changed_at = time.monotonic()
    while True:
        try:
            message: Any = await asyncio.wait_for(call.read(), LOAD_STALL_S)
        except TimeoutError:
            raise _stalled_error(worker, LOAD_STALL_S) from None
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]  # its typing stub lacks it
            return
        if message != last:
            last = message
            changed_at = time.monotonic()
        elif time.monotonic() - changed_at > LOAD_STUCK_S:
            raise _stalled_error(worker, LOAD_STUCK_S)
        yield message


def further_addresses(worker: WorkerInfo) -> list[str]:
    """Return the data addresses of a worker beside its usual one."""
    if not worker.data_hosts:
        return []
    _, port = parse_address(worker.data_address)
    return [format_address(host, port) for host in worker.data_hosts]


def _stalled_error(worker: str, seconds: float) -> WorkerLost:
    return WorkerLost(f"worker {worker}: the load made no progress for {seconds:.0f} s", worker=worker)


def _party_of(worker_id: str) -> str:
    """Return the TLS party of a worker id. Raises ``WorkerReplaced`` for an invalid id, before it becomes a name."""
    from cluster.security.roles import ID

    if not ID.fullmatch(worker_id):
        raise WorkerReplaced("the worker reports an id that is not one of macpipe's")
    return worker_of(worker_id)
