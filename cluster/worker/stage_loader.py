"""Load a stage on a worker: fetch the slice's bytes, have the engine read them, and hash them meanwhile.

It knows the store and the messages of a load; of an engine it knows only the progress that it reports.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import TypeVar

from cluster.core.adapter import AdapterRef
from cluster.core.futures import ignore_error
from cluster.core.limits import FETCH_TICK_S, MAX_ANSWER_BYTES
from cluster.core.plan import ModelRef
from cluster.security.trust import Trust
from cluster.store.folder_digests import hash_tensors
from cluster.store.hub import Hub
from cluster.store.peer_client import Peer
from cluster.store.store import FoundModel, Store
from cluster.store.store_server import StoreServer
from cluster.store.tensor_fetch import Fetch, Fetched, Wanted
from cluster.v1 import worker_pb2 as pb
from cluster.worker.pipe_messages import Progress

_FIELD_BYTES = 4
"""Bytes of a submessage's tag and length."""
Result = TypeVar("Result")
Read = Callable[[Path], AsyncIterator[Progress]]
"""Has the engine read the slice from a folder."""


class StageLoader:
    """The model bytes of one worker, in ``home``. Lives on one event loop; blocking work runs on threads."""

    def __init__(self, home: Path, trust: Trust) -> None:
        self._store, self._trust = Store(home), trust
        self.store_server = StoreServer(self._store)

    async def stage(self, request: pb.LoadStageRequest, read: Read) -> AsyncGenerator[pb.LoadStageResponse, None]:
        """Fetch what is missing, have the engine read it, and yield progress and the hashes of the slice's tensors.

        Raises what ``Fetch.run``, ``Store.meant`` and the engine raise. Closing the generator ends the fetch.
        """
        job = _LoadJob(self._store, self._trust, self.store_server, _wanted_weights(request))
        task = _run_on_thread(job.fetch)
        try:
            async for fetched in _watch_job(task, job):
                done, total = (fetched.done, fetched.total) if fetched else (0, 0)
                yield _progress_message(fetched.state if fetched else "checking", fetched, done, total)
            found, got = await task, job.progress
            hashing = _run_on_thread(lambda: job.hash_tensors(found))
            async for p in read(found.folder):
                yield _progress_message("reading", got, p.done_bytes, p.total_bytes)
            async for _ in _watch_job(hashing, job):
                yield _progress_message("hashing", got)
            for batch in _batches(await hashing):
                yield _progress_message("hashing", got, digests=batch)
        finally:
            job.stop.set()

    async def adapters(
        self, request: pb.SetAdaptersRequest, held: Collection[str]
    ) -> AsyncGenerator[pb.SetAdaptersResponse | Sequence[AdapterRef], None]:
        """Fetch what is missing of a stage's adapters. Yield progress, and at last where the adapters are on this Mac.

        Those with the keys ``held`` are in the engine already, so their files are not needed. Raises what ``Fetch.run``
        and ``Store.find_adapter`` raise. Closing the generator ends the fetch.
        """
        refs: list[AdapterRef] = []
        for adapter in request.adapters:
            ref = AdapterRef(adapter.name, adapter.path, adapter.fingerprint)
            if ref.key in held:
                refs.append(ref)
                continue
            wanted = _wanted_adapter(ref, adapter.tensors, request.peers)
            job = _LoadJob(self._store, self._trust, self.store_server, wanted)
            task = _run_on_thread(job.fetch)
            try:
                async for fetched in _watch_job(task, job):
                    done, total = (fetched.done, fetched.total) if fetched else (0, 0)
                    yield pb.SetAdaptersResponse(done_bytes=done, total_bytes=total)
                refs.append(replace(ref, path=str((await task).folder)))
            finally:
                job.stop.set()
        yield refs


@dataclass(frozen=True, slots=True)
class _WantedBytes:
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


def _wanted_weights(r: pb.LoadStageRequest) -> _WantedBytes:
    what = f"{r.model} (layers {r.start_layer}-{r.end_layer - 1})"
    model, deferred = ModelRef(r.model, r.path, r.fingerprint), frozenset(r.deferred)
    return _WantedBytes(model, what, tuple(r.tensors), r.peers, deferred, r.repo, r.commit)


def _wanted_adapter(ref: AdapterRef, tensors: Sequence[str], peers: Sequence[pb.StorePeer]) -> _WantedBytes:
    model = ModelRef(ref.name, ref.path, ref.fingerprint)
    return _WantedBytes(model, f"the adapter {ref.name}", tuple(tensors), peers, adapter=ref)


class _LoadJob:
    """One load's fetch and hashing; ``fetch`` and ``hash_tensors`` run on threads."""

    def __init__(self, store: Store, trust: Trust, store_server: StoreServer, wanted: _WantedBytes) -> None:
        self._store, self._trust, self._store_server, self._wanted = store, trust, store_server, wanted
        self._running: Fetch | None = None
        self.stop = Event()

    @property
    def progress(self) -> Fetched | None:
        """The progress of the fetch; None if nothing has to be fetched."""
        return self._running.progress if self._running else None

    def fetch(self) -> FoundModel:
        """Bring the wanted tensors to this Mac and return their place."""
        w = self._wanted
        model, adapter = w.model, w.adapter
        with ExitStack() as stack:
            peers = [
                stack.enter_context(Peer(self._trust, p.name, p.address, model.fingerprint, p.party)) for p in w.peers
            ]
            found = self._store.find_adapter(adapter, peers) if adapter else self._store.find_for_worker(model, peers)
            item = self._store_server.share(found.folder, found.partial)
            if not adapter:  # a worker holds layers of one model, so the quota may remove the others
                self._store_server.release(keep=model.fingerprint)
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


def _run_on_thread(work: Callable[[], Result]) -> asyncio.Task[Result]:
    """Run ``work`` on a thread. If nobody awaits the task any more, its exception is ignored."""
    task = asyncio.create_task(asyncio.to_thread(work))
    task.add_done_callback(ignore_error)
    return task


async def _watch_job(
    task: asyncio.Task[FoundModel] | asyncio.Task[dict[str, str]], job: _LoadJob
) -> AsyncIterator[Fetched | None]:
    """Yield the job's progress periodically until its task is done."""
    while not task.done():
        await asyncio.wait([task], timeout=FETCH_TICK_S)
        yield job.progress


def _progress_message(
    state: str, got: Fetched | None, done: int = 0, total: int = 0, digests: Sequence[pb.TensorDigest] = ()
) -> pb.LoadStageResponse:
    return pb.LoadStageResponse(
        state=state,
        done_bytes=done,
        total_bytes=total,
        hub_bytes=got.hub if got else 0,
        peer_bytes=got.peers if got else 0,
        notices=got.notices if got else (),
        digests=digests,
    )


def _batches(proved: dict[str, str]) -> Iterator[list[pb.TensorDigest]]:
    """Yield digests in messages of at most half of MAX_ANSWER_BYTES, unless a name alone is longer."""
    batch, size = list[pb.TensorDigest](), 0
    for name, digest in proved.items():
        message = pb.TensorDigest(name=name, sha256=bytes.fromhex(digest))
        if batch and size + message.ByteSize() > MAX_ANSWER_BYTES // 2:
            yield batch
            batch, size = [], 0
        batch.append(message)
        size += message.ByteSize() + _FIELD_BYTES
    if batch:
        yield batch
