"""One load's work on threads: find the model or adapter on this Mac, fetch what is missing, and hash it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Protocol, TypeVar

from cluster.core.adapter import AdapterRef
from cluster.core.futures import ignore_error
from cluster.core.limits import FETCH_TICK_S
from cluster.core.plan import ModelRef
from cluster.security.trust import Trust
from cluster.store.folder_digests import hash_tensors
from cluster.store.hub import Hub
from cluster.store.peer_client import Peer
from cluster.store.store import FoundModel, Store
from cluster.store.store_server import StoreServer
from cluster.store.tensor_fetch import Fetch, Fetched, Wanted
from cluster.v1 import worker_pb2 as pb

__all__ = ["LoadJob", "WantedBytes", "open_peers", "run_on_thread", "watch_job"]

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class WantedBytes:
    """The tensors of a model or an adapter that a load needs, and where they may be.

    ``model`` is ``adapter`` in the form of a model, if it is one. ``deferred`` are fetched by another worker first.
    """

    model: ModelRef
    what: str
    tensors: tuple[str, ...]
    peers: Sequence[pb.StorePeer]
    deferred: frozenset[str] = frozenset()
    repo: str = ""
    commit: str = ""
    adapter: AdapterRef | None = None

    @staticmethod
    def of_weights(r: pb.LoadStageRequest) -> WantedBytes:
        """Return what a stage's load needs."""
        what = f"{r.model} (layers {r.start_layer}-{r.end_layer - 1})"
        model, deferred = ModelRef(r.model, r.path, r.fingerprint), frozenset(r.deferred)
        return WantedBytes(model, what, tuple(r.tensors), r.peers, deferred, r.repo, r.commit)

    @staticmethod
    def of_adapter(ref: AdapterRef, tensors: Sequence[str], peers: Sequence[pb.StorePeer]) -> WantedBytes:
        """Return what a stage needs of an adapter."""
        model = ModelRef(ref.name, ref.path, ref.fingerprint)
        return WantedBytes(model, f"the adapter {ref.name}", tuple(tensors), peers, adapter=ref)


class LoadJob:
    """One load's fetch and hashing; all methods but ``progress`` run on threads. Setting ``stop`` ends them."""

    def __init__(self, store: Store, trust: Trust, store_server: StoreServer, wanted: WantedBytes) -> None:
        self._store, self._trust, self._store_server, self._wanted = store, trust, store_server, wanted
        self._running: Fetch | None = None
        self.stop = Event()

    @property
    def progress(self) -> Fetched | None:
        """The progress of the fetch; None if nothing has to be fetched."""
        return self._running.progress if self._running else None

    def find(self) -> FoundModel:
        """Return where the model or adapter is on this Mac, without its tensors if it is new here."""
        with open_peers(self._trust, self._wanted.peers, self._wanted.model.fingerprint) as peers:
            return self._find(peers)

    def _find(self, peers: Sequence[Peer]) -> FoundModel:
        adapter = self._wanted.adapter
        return (
            self._store.find_adapter(adapter, peers)
            if adapter
            else self._store.find_for_worker(self._wanted.model, peers)
        )

    def lacks_bytes(self, found: FoundModel) -> bool:
        """Return whether a wanted tensor is not on this Mac, or not verified."""
        return found.partial is not None and not found.partial.verified.keys() >= set(self._wanted.tensors)

    def fetch(self) -> FoundModel:
        """Bring the wanted tensors to this Mac and return their place."""
        w = self._wanted
        with open_peers(self._trust, w.peers, w.model.fingerprint) as peers:
            found = self._find(peers)
            item = self._store_server.share(found.folder, found.partial)
            if not w.adapter:  # a worker holds layers of one model, so the quota may remove the others
                self._store_server.release(keep=w.model.fingerprint)
            if found.partial:
                hub = Hub(w.repo, w.commit) if w.repo else None
                item.coming = frozenset(w.tensors) - w.deferred
                self._running = Fetch(
                    found.partial,
                    item.manifest,
                    Wanted(w.tensors, w.deferred),
                    peers=peers,
                    hub=hub,
                    stop=self.stop,
                    what=w.what,
                )
                try:
                    self._running.run()
                finally:
                    item.coming = frozenset()
        return found

    def hash_tensors(self, found: FoundModel) -> dict[str, str]:
        """Return the SHA-256 (hex) of each of the slice's tensors by name."""
        if found.partial:
            verified = found.partial.verified
            return {name: verified[name] for name in self._wanted.tensors}
        return hash_tensors(self._store.home, found.folder, self._wanted.tensors, self.stop)


@contextmanager
def open_peers(trust: Trust, places: Sequence[pb.StorePeer], fingerprint: str) -> Iterator[list[Peer]]:
    """Open clients of other Macs' stores, for the model ``fingerprint``, during the block."""
    with ExitStack() as stack:
        yield [stack.enter_context(Peer(trust, p.name, p.address, fingerprint, p.party)) for p in places]


class _Watched(Protocol):
    @property
    def progress(self) -> Fetched | None: ...


def run_on_thread(work: Callable[[], Result]) -> asyncio.Task[Result]:
    """Run ``work`` on a thread. If nobody awaits the task any more, its exception is ignored."""
    task = asyncio.create_task(asyncio.to_thread(work))
    task.add_done_callback(ignore_error)
    return task


async def watch_job(task: asyncio.Task[Result], job: _Watched) -> AsyncIterator[Fetched | None]:
    """Yield the job's progress periodically until its task is done."""
    while not task.done():
        await asyncio.wait([task], timeout=FETCH_TICK_S)
        yield job.progress
