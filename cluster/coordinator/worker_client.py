"""The coordinator's end of one worker's control plane: WorkerService as typed calls with deadlines."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
import grpc

from cluster.core.errors import (
    DeadlineExceeded,
    OtherParty,
    PortClosed,
    Unreachable,
    WorkerLost,
    WorkerRefused,
    WorkerReplaced,
)
from cluster.core.limits import (
    CONTROL_TIMEOUT_S,
    GONE_S,
    KEPT_CORRECTIONS,
    LOAD_STALL_S,
    LOAD_STUCK_S,
    MAX_FACT_CHARS,
    MAX_LAG_S,
    MAX_SENTENCE_CHARS,
)
from cluster.core.plan import FetchOrder, LayerRange, Link, LoadProgress, Profile, StageProof, StageSpec
from cluster.core.text import HIGHEST_PORT, parse_address
from cluster.core.worker import WorkerInfo
from cluster.security.bounds import MAX_REVOKED
from cluster.security.trust import WORKER, Trust, worker_of
from cluster.transport.grpc_setup import PING_S, control_channel
from cluster.transport.rich_errors import from_rpc_error
from cluster.v1 import worker_pb2 as pb
from cluster.v1.worker_pb2_grpc import WorkerServiceStub

if TYPE_CHECKING:
    from cluster.v1.worker_pb2_grpc import WorkerServiceAsyncStub

_SERIAL_BYTES = 20
"""A certificate's serial has at most so many."""
_RETIRED = 4
"""Connections that are kept open for the calls on them."""


class WorkerClient:
    """One worker at ``address``. Every call raises ``WorkerLost`` naming it where it does not answer.

    In a cluster it is asked who it is first, as any worker, and then dialled anew by the id that it said: from there
    on TLS proves that id. ``coordinator`` and ``instance`` are the id and the process that ask. ``revoked`` says which
    serials the worker has to refuse.
    """

    def __init__(
        self,
        trust: Trust,
        address: str,
        coordinator: str,
        instance: str = "",
        revoked: Callable[[], Iterable[int]] = tuple,
    ) -> None:
        self.address, self.name = address, address
        self._coordinator, self._instance = coordinator, instance
        self._trust, self._revoked = trust, revoked
        self._retired: list[grpc.aio.Channel] = []
        self._ahead_s = 0.0
        self._ping_s = PING_S
        self._dial(WORKER)

    def _dial(self, peer: str) -> None:
        self._peer, self._serial = peer, self._trust.serial
        self._channel = control_channel(self._trust, self.address, peer, self._ping_s)
        self._any = WorkerServiceStub(self._channel)

    async def _redial(self, peer: str) -> None:
        """Calls under way keep the connection that they have, unless they outlive a few more."""
        self._retired.append(self._channel)
        self._dial(peer)
        if len(self._retired) > _RETIRED:
            await self._retired.pop(0).close(None)

    @property
    def _stub(self) -> WorkerServiceAsyncStub:
        """For all that only the worker that was described may be asked."""
        if self._trust.me and self._peer == WORKER:
            raise WorkerLost(f"worker {self.name} at {self.address} has not shown who it is", worker=self.name)
        return self._any

    async def describe(self, timeout_s: float = CONTROL_TIMEOUT_S) -> tuple[WorkerInfo, str]:
        """What the worker says of itself, and its problem (empty: none). Also this coordinator's heartbeat."""
        await self._adapt(timeout_s)
        if self._serial != self._trust.serial:  # renewed: the next connection must show the new certificate
            await self._redial(self._peer)
        try:
            answer = await self._call_describe(timeout_s)
            if self._trust.me and self._peer == WORKER:
                await self._redial(_party(answer.id))
                answer = await self._call_describe(timeout_s)
        except WorkerReplaced:
            await self._redial(WORKER)
            raise
        self.name = answer.name
        facts = replace(_facts(answer, self.address), clock_ahead_s=self._ahead_s if answer.clock else 0.0)
        return facts, answer.problem

    async def _adapt(self, timeout_s: float) -> None:
        """Dial a worker that turned out to be slow, and is given longer to answer, with as much more time for pings."""
        wanted_s = PING_S * timeout_s / GONE_S
        if wanted_s >= 4 * self._ping_s or wanted_s <= PING_S < self._ping_s:
            self._ping_s = max(PING_S, wanted_s)
            await self._redial(self._peer)

    def _deadline(self) -> float:
        """Seconds for a call that moves no weights: more where the worker turned out to be slow."""
        return CONTROL_TIMEOUT_S * self._ping_s / PING_S

    async def _call_describe(self, timeout_s: float) -> pb.DescribeResponse:
        request = pb.DescribeRequest(
            coordinator=self._coordinator, instance=self._instance, revoked=_serials(self._revoked())
        )
        asked = time.time()
        async with self._map_errors():
            answer = await self._any.Describe(request, timeout=timeout_s)
        self._ahead_s = answer.clock - (asked + time.time()) / 2
        if self._trust.me and self._peer not in (WORKER, _party(answer.id)):
            raise WorkerReplaced(f"the worker at {self.address} says that it is another than it is", worker=self.name)
        return answer

    async def load(self, spec: StageSpec, order: FetchOrder) -> AsyncIterator[LoadProgress | StageProof]:
        """Load a slice: its progress, and last what its tensors hash to. Raises what the worker raised."""
        call = self._stub.LoadStage(_load_request(spec, order, self._coordinator, self._instance))
        proof: list[tuple[str, str]] = []
        async with self._map_errors():
            async for p in _read_with_stall_limit(call, self.name):
                state = "ready" if p.ready else p.state
                proof += [(one.name, one.sha256.hex()) for one in p.digests]
                if len(proof) > len(order.tensors):
                    raise WorkerLost(f"worker {self.name} proves tensors that it was not asked for", worker=self.name)
                told = tuple(p.notices)
                sizes = p.done_bytes, p.total_bytes
                yield LoadProgress(self.name, spec.layers, *sizes, state, p.hub_bytes, p.peer_bytes, told)
        yield StageProof(self.name, tuple(proof))

    async def link(self, epoch: int, before: WorkerInfo | None) -> None:
        """Have the worker pull from the stage ``before``; with None it is fed."""
        async with self._map_errors():
            source, party = (before.data_address, worker_of(before.id)) if before else ("", "")
            request = pb.LinkStageRequest(epoch=epoch, pull_from=source, peer=party)
            await self._stub.LinkStage(request, timeout=self._deadline())

    async def unload(self, epoch: int, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        async with self._map_errors():
            request = pb.UnloadStageRequest(epoch=epoch, coordinator=self._coordinator, instance=self._instance)
            await self._stub.UnloadStage(request, timeout=timeout_s)

    async def measure_link(self, source: WorkerInfo) -> Link:
        """The way from ``source`` to this worker, as measured of late or now. Raises ``Unreachable`` likewise."""
        async with self._map_errors():
            request = pb.MeasureLinkRequest(worker=source.id, address=source.data_address)
            answer = await self._stub.MeasureLink(request, timeout=CONTROL_TIMEOUT_S)
        figures = answer.round_trip_s, answer.bandwidth
        if not all(map(math.isfinite, figures)) or answer.round_trip_s < 0 or answer.bandwidth <= 0:
            raise WorkerLost(f"worker {self.name} measured a link that cannot be", worker=self.name)
        return Link(*figures)

    async def learn(self, fingerprint: str, ratio: float) -> None:
        """Tell the worker what a model's frames took there over what its profile predicts."""
        async with self._map_errors():
            request = pb.LearnRatioRequest(fingerprint=fingerprint, ratio=ratio)
            await self._stub.LearnRatio(request, timeout=CONTROL_TIMEOUT_S)

    async def drain(self, *, undo: bool = False) -> None:
        """Have the worker want to hold nothing; ``undo`` takes that back."""
        async with self._map_errors():
            request = pb.DrainWorkerRequest(coordinator=self._coordinator, instance=self._instance, undo=undo)
            await self._stub.DrainWorker(request, timeout=CONTROL_TIMEOUT_S)

    async def reset(self, why: str, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        """Have the worker kill its engine, which starts again and holds nothing then."""
        async with self._map_errors():
            request = pb.ResetEngineRequest(coordinator=self._coordinator, instance=self._instance, why=why)
            await self._stub.ResetEngine(request, timeout=timeout_s)

    async def renew(self, certify: Callable[[bytes], bytes]) -> None:
        """Have the worker show a further certificate: ``certify`` makes it of the worker's request, on a thread."""
        async with self._map_errors():
            asked = await self._stub.RequestCertificate(pb.RequestCertificateRequest(), timeout=CONTROL_TIMEOUT_S)
        certificate = await anyio.to_thread.run_sync(certify, asked.request)
        async with self._map_errors():
            fresh = pb.InstallCertificateRequest(certificate=certificate)
            await self._stub.InstallCertificate(fresh, timeout=CONTROL_TIMEOUT_S)

    async def close(self) -> None:
        for channel in (*self._retired, self._channel):
            await channel.close(None)

    def _map_errors(self) -> AbstractAsyncContextManager[None]:
        return _errors_of(self.name, self.address)


@asynccontextmanager
async def _errors_of(name: str, address: str) -> AsyncIterator[None]:
    """Turn RPC errors into ours, each naming the worker."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task and task.cancelling():
            raise
        raise WorkerLost(f"the channel to worker {name} was closed under a call", worker=name) from None
    except grpc.aio.AioRpcError as e:
        error = from_rpc_error(e, address, peer="worker" if name == address else f"worker {name}")
        if isinstance(error, DeadlineExceeded):
            raise WorkerLost(f"worker {name} at {address} does not answer", worker=name) from e
        if isinstance(error, OtherParty):
            raise WorkerReplaced(error.sentence, worker=name) from e
        if isinstance(error, Unreachable):
            kind = WorkerRefused if isinstance(error, PortClosed) else WorkerLost
            raise kind(error.sentence, worker=name) from e
        named = type(error)(f"worker {name}: {error.sentence}")
        named.details = error.details | {"worker": name}  # not as arguments: the worker chose their names
        raise named from e


async def _read_with_stall_limit(
    call: grpc.aio.UnaryStreamCall[pb.LoadStageRequest, pb.LoadStageResponse], worker: str
) -> AsyncIterator[pb.LoadStageResponse]:
    """The call's messages. A stall ends it: no message for ``LOAD_STALL_S``, or none with news for ``LOAD_STUCK_S``."""
    last, since = pb.LoadStageResponse(), time.monotonic()
    while True:
        try:
            message = await asyncio.wait_for(call.read(), LOAD_STALL_S)
        except TimeoutError:
            raise _stalled(worker, LOAD_STALL_S) from None
        if not isinstance(message, pb.LoadStageResponse):
            return
        if message != last:
            last, since = message, time.monotonic()
        elif time.monotonic() - since > LOAD_STUCK_S:
            raise _stalled(worker, LOAD_STUCK_S)
        yield message


def _stalled(worker: str, seconds: float) -> WorkerLost:
    return WorkerLost(f"worker {worker}: a load made no progress for {seconds:.0f} s", worker=worker)


def _load_request(spec: StageSpec, order: FetchOrder, coordinator: str, instance: str) -> pb.LoadStageRequest:
    return pb.LoadStageRequest(
        epoch=spec.epoch,
        index=spec.index,
        count=spec.count,
        model=spec.model.name,
        path=spec.model.path,
        fingerprint=spec.model.fingerprint,
        start_layer=spec.layers.start,
        end_layer=spec.layers.end,
        max_context=spec.max_context,
        kv_bits=spec.kv_bits,
        coordinator=coordinator,
        instance=instance,
        tensors=order.tensors,
        deferred=order.deferred,
        peers=[pb.StorePeer(name=p.name, address=p.address, party=p.party) for p in order.peers],
        repo=order.repo,
        commit=order.commit,
    )


def _party(worker_id: str) -> str:
    """Who is dialled; an id that is none is refused before it gets into a name."""
    from cluster.security.roles import ID

    if not ID.fullmatch(worker_id):
        raise WorkerReplaced("it says an id that is none")
    return worker_of(worker_id)


def _serials(revoked: Iterable[int]) -> list[bytes]:
    return [serial.to_bytes(_SERIAL_BYTES) for serial in sorted(revoked)[:MAX_REVOKED]]


def _require_sense(a: pb.DescribeResponse, address: str) -> None:
    """Raise ``WorkerLost`` for a description that no worker gives: what is in it goes to terminals and into plans."""
    own = (a.id, a.name, a.instance, a.version, a.cluster, a.chip, a.backend, a.mlx_version, a.interface)
    texts = (*own, a.holder, a.owner, a.holder_instance)
    sound = all(text.isprintable() and len(text) <= MAX_FACT_CHARS for text in texts) and a.data_port <= HIGHEST_PORT
    if not sound or (a.epoch and a.start_layer >= a.end_layer) or len(a.problem) > MAX_SENTENCE_CHARS:
        raise WorkerLost(f"what answers at {address} describes itself as no worker does; is it macpipe?")


def _facts(a: pb.DescribeResponse, address: str) -> WorkerInfo:
    _require_sense(a, address)
    host, _ = parse_address(address)
    data_host = f"[{host}]" if ":" in host else host
    return WorkerInfo(
        id=a.id,
        name=a.name,
        version=a.version,
        cluster=a.cluster,
        control_address=address,
        data_address=f"{data_host}:{a.data_port}",
        chip=a.chip,
        backend=a.backend,
        mlx_version=a.mlx_version,
        memory_total=a.memory_total,
        memory_limit=a.memory_limit,
        epoch=a.epoch,
        layers=LayerRange(a.start_layer, a.end_layer) if a.epoch else None,
        model=a.model,
        memory_used=a.memory_used,
        memory_peak=a.memory_peak,
        sequences=a.sequences,
        holder=a.holder,
        profile=_profile(a.profile),
        interface=a.interface,
        gpu_cores=a.gpu_cores,
        memory_pressure=a.memory_pressure,
        busy_ms=a.busy_ms,
        lag_s=min(max(a.lag_seconds, 0.0), MAX_LAG_S) if math.isfinite(a.lag_seconds) else 0.0,
        computing=a.computing,
        owner=a.owner,
        instance=a.instance,
        holder_instance=a.holder_instance,
        fingerprint=a.fingerprint,
        kv_bits=a.kv_bits,
        draining=a.draining,
        stopping=a.stopping,
        certificate=(a.certificate_begins, a.certificate_ends),
    )


def _profile(p: pb.Profile) -> Profile:
    """What a worker says of its speed; figures that make no sense count as unknown."""
    figures = (p.bandwidth, p.layer_s, p.step_s, p.flops, p.row_cost, *(c.ratio for c in p.corrections))
    if not all(math.isfinite(f) and f >= 0 for f in figures) or any(c.ratio == 0 for c in p.corrections):
        return Profile()
    learned = tuple((c.fingerprint, c.ratio) for c in p.corrections[:KEPT_CORRECTIONS])
    return Profile(p.bandwidth, p.layer_s, p.step_s, p.flops, p.row_cost, learned)
