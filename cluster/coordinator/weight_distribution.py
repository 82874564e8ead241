"""Tell workers which tensors to fetch and from where, and check that all hold the same model.

During a load it opens a store port on the address by which workers see this Mac, so that they can read the
coordinator's folder and known digests. It moves no bytes itself.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

import anyio
from grpc import aio

from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.roster import Roster
from cluster.core.adapter import Adapter
from cluster.core.errors import MacpipeError, ModelDiffers
from cluster.core.futures import ignore_error
from cluster.core.limits import HEARTBEAT_S
from cluster.core.plan import FetchOrder, LoadedStage, Plan, StorePlace
from cluster.core.text import format_address, parse_address
from cluster.core.worker import WorkerInfo
from cluster.security.trust import worker_of
from cluster.store.digest_manifest import DigestManifest
from cluster.store.folder_digests import hash_tensors
from cluster.store.store import FoundModel, Store
from cluster.store.store_server import StoreServer
from cluster.transport.grpc_setup import bind, control_server
from cluster.v1.store_pb2_grpc import add_StoreServiceServicer_to_server

log = logging.getLogger(__name__)

COORDINATOR = "the coordinator"


@dataclass(frozen=True, slots=True)
class WeightDelivery:
    """The fetch orders of one load, one per stage, and the check of the result."""

    orders: tuple[FetchOrder, ...]
    manifest: DigestManifest
    own: asyncio.Task[dict[str, str]]
    """Digests of the coordinator's own folder, by tensor name; empty if the folder is incomplete."""

    async def check(self, stages: Sequence[LoadedStage], waiting: Callable[[], None]) -> None:
        """Raise ``ModelDiffers``, naming worker and tensor, unless all workers hold the tensors of one model.

        ``waiting`` is called every ``HEARTBEAT_S`` while the coordinator's own folder is being hashed.
        """
        for stage, order in zip(stages, self.orders, strict=True):
            if missing := set(order.tensors) - {name for name, _ in stage.digests}:
                raise ModelDiffers(
                    f"worker {stage.worker} sent no digest of its tensor {min(missing)}, so its copy of the model is"
                    " not verified; run the same version of macpipe on all Macs and load again",
                    worker=stage.worker,
                )
        while not self.own.done():
            waiting()
            await asyncio.wait([self.own], timeout=HEARTBEAT_S)
        self.manifest.learn((await self.own).items(), f"{COORDINATOR}'s folder")
        compare(stages, self.manifest)
        for stage in stages:
            self.manifest.learn(stage.digests, f"worker {stage.worker}")


def compare(stages: Sequence[LoadedStage], manifest: DigestManifest) -> None:
    """Compare digests with the manifest and with each other. Raises ``ModelDiffers``, naming worker and tensor."""
    seen: dict[str, tuple[str, str]] = {}
    for stage in stages:
        for name, digest in stage.digests:
            known = manifest.known.get(name)
            other, theirs = seen.setdefault(name, (stage.worker, digest))
            if known not in (None, digest):
                raise ModelDiffers(
                    f"worker {stage.worker} has another version of the tensor {name} (sha256 {digest[:12]}, expected "
                    f"{known[:12] if known else ''}): its copy of the model is damaged or another version. Remove that "
                    f"copy and load again; if all Macs have a new version, remove {manifest.path}",
                    worker=stage.worker,
                    tensor=name,
                )
            if theirs != digest:
                raise ModelDiffers(
                    f"worker {other} and worker {stage.worker} have different bytes of the tensor {name} (sha256 "
                    f"{theirs[:12]} and {digest[:12]}). Give both the same copy of the model and load again",
                    worker=stage.worker,
                    tensor=name,
                )


class WeightDistribution:
    """Builds the fetch orders of a load. ``roster`` lists further workers that may have tensors."""

    def __init__(self, store: Store, roster: Roster) -> None:
        self._store, self._roster, self._trust = store, roster, roster.trust
        self._store_server = StoreServer(store)
        self._delivered: Counter[str] = Counter()
        """How many deliveries of a model run, by its fingerprint. While one does, its files stay open."""
        self._store_server.in_use = self._delivered.keys

    @asynccontextmanager
    async def delivery(
        self, plan: Plan, model_info: ModelInfo, workers: Sequence[WorkerInfo]
    ) -> AsyncIterator[WeightDelivery]:
        """Open the coordinator's store and hash its folder until the context ends."""
        found = model_info.found
        stop = Event()
        item = await anyio.to_thread.run_sync(self._store_server.share, found.folder, found.partial)
        orders = _orders(plan, model_info)
        names = sorted({name for order in orders for name in order.tensors})
        own = asyncio.create_task(asyncio.to_thread(self._own_digests, found, names, stop))
        own.add_done_callback(ignore_error)  # nobody awaits it if the load fails
        async with AsyncExitStack() as stack:
            stack.callback(self._end_delivery, item.checkpoint.fingerprint)
            self._delivered[item.checkpoint.fingerprint] += 1
            stack.callback(own.cancel)
            stack.callback(stop.set)
            peers = await self._open_ports(stack, workers)
            orders_with_peers = [
                replace(order, peers=own_peers) for order, own_peers in zip(orders, peers, strict=True)
            ]
            yield WeightDelivery(tuple(orders_with_peers), item.manifest, own)

    def _end_delivery(self, fingerprint: str) -> None:
        self._delivered[fingerprint] -= 1
        self._delivered += Counter()  # drops those of which none runs
        self._store_server.release()

    @asynccontextmanager
    async def adapter_delivery(
        self, adapters: Sequence[Adapter], workers: Sequence[WorkerInfo]
    ) -> AsyncIterator[list[tuple[StorePlace, ...]]]:
        """Share the adapters' folders until the context ends. Yield where each worker may fetch them from.

        A folder that is gone, or has changed since its adapter was added, is not shared: workers may still have it.
        """
        for adapter in adapters:
            try:
                await anyio.to_thread.run_sync(self._share_adapter, adapter)
            except MacpipeError as e:
                log.warning("adapters: folder not shared reason=%s adapter=%s", e.sentence, adapter.ref.name)
        async with AsyncExitStack() as stack:
            yield await self._open_ports(stack, workers) if adapters else [() for _ in workers]

    def _share_adapter(self, adapter: Adapter) -> None:
        folder = Path(adapter.ref.path)
        item = self._store_server.share(folder, None)
        if item.checkpoint.fingerprint != adapter.ref.fingerprint:
            raise ModelDiffers(
                f"the files of the adapter {adapter.ref.name} in {str(folder)!r} have changed since it was added; "
                "remove it and add it again"
            )
        names = [tensor.name for tensor in adapter.tensors]
        item.manifest.learn(hash_tensors(self._store.home, folder, names, Event()).items(), f"{COORDINATOR}'s folder")

    async def _open_ports(self, stack: AsyncExitStack, workers: Sequence[WorkerInfo]) -> list[tuple[StorePlace, ...]]:
        """Open the coordinator's store until ``stack`` unwinds. Return where each worker may fetch from."""
        hosts = [await anyio.to_thread.run_sync(_host_towards, worker.control_address) for worker in workers]
        ports = {host: await self._open_port(stack, host) for host in sorted(set(hosts))}
        return [self._peers(workers, w, ports[host]) for w, host in zip(workers, hosts, strict=True)]

    def _own_digests(self, found: FoundModel, names: Sequence[str], stop: Event) -> dict[str, str]:
        return {} if found.partial else hash_tensors(self._store.home, found.folder, names, stop)

    def _peers(self, workers: Sequence[WorkerInfo], worker: WorkerInfo, port: str) -> tuple[StorePlace, ...]:
        """Return where a worker may fetch from: the coordinator, then the plan's workers, then all others."""
        others = [*workers, *(m.info for m in self._roster.members if m.reachable)]
        named = {w.control_address: w for w in others if w.control_address != worker.control_address}
        own = StorePlace(COORDINATOR, port, self._trust.me)
        return own, *(StorePlace(f"worker {w.name}", address, worker_of(w.id)) for address, w in named.items())

    async def _open_port(self, stack: AsyncExitStack, host: str) -> str:
        """Open a store port on this Mac's address ``host`` until ``stack`` unwinds. Return its address."""
        server = control_server(self._trust)
        add_StoreServiceServicer_to_server(self._store_server, server)
        port = bind(server, self._trust, host, 0)
        await server.start()
        stack.push_async_callback(_stop, server)
        return format_address(host, port)


async def _stop(server: aio.Server) -> None:
    with anyio.CancelScope(shield=True):  # if its stop is cancelled, it listens for ever
        await server.stop(None)


def _orders(plan: Plan, model_info: ModelInfo) -> list[FetchOrder]:
    """Return the order of each stage. A tensor shared by several stages is fetched by the first of them."""
    origin = model_info.found.partial.origin if model_info.found.partial else None
    repo, commit = (origin.repo, origin.commit) if origin else ("", "")
    orders: list[FetchOrder] = []
    assigned: set[str] = set()
    for stage in plan.stages:
        names = model_info.tensors.of(stage.layers)
        orders.append(FetchOrder(tuple(sorted(names)), tuple(sorted(names & assigned)), (), repo, commit))
        assigned |= names
    return orders


def _host_towards(worker: str) -> str:
    """Return the address by which a worker sees this Mac. Sends nothing: connecting a UDP socket only picks a route."""
    host, port = parse_address(worker)
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
