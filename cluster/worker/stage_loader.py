"""Load a stage on a worker: fetch the slice's bytes, have the engine read them, and hash them meanwhile.

Weights that are to be quantized are read from a quantized copy in the store, which other Macs or the engine complete.
It knows the store and the messages of a load; of an engine it knows only the progress that it reports.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from cluster.core.adapter import AdapterRef
from cluster.core.errors import BadCheckpoint, DiskFull, InvalidOption
from cluster.core.limits import MAX_ANSWER_BYTES
from cluster.core.plan import LayerRange
from cluster.security.trust import Trust
from cluster.store.quantized_copy import CopyKey, QuantizedCopy
from cluster.store.store import FoundModel, Store
from cluster.store.store_server import StoreServer
from cluster.store.tensor_fetch import Fetched
from cluster.v1 import worker_pb2 as pb
from cluster.worker.copy_job import CopyJob
from cluster.worker.load_job import LoadJob, WantedBytes, run_on_thread, watch_job
from cluster.worker.pipe_messages import Progress

log = logging.getLogger(__name__)

_FIELD_BYTES = 4
"""Bytes of a submessage's tag and length."""


@dataclass(frozen=True, slots=True)
class StageWeights:
    """The checkpoint that the engine reads: its folder and fingerprint, and the bits to which it is still quantized."""

    folder: Path
    fingerprint: str
    weight_bits: int


class StageEngine(Protocol):
    """The engine's part of a load. Each call yields progress until it is done, and raises what the engine reports."""

    def copy_key(self) -> CopyKey:
        """Return the key of the quantized copy that this engine makes of the stage's model."""

    def lay_out_copy(self, models: Path, source: Path) -> AsyncIterator[Progress]:
        """Create a copy of the checkpoint in ``source``, without tensors, in the folder ``models``."""

    def quantize(self, models: Path, source: Path) -> AsyncIterator[Progress]:
        """Compute what the stage lacks of the copy in ``models``, from the checkpoint in ``source``."""

    def read(self, weights: StageWeights) -> AsyncIterator[Progress]:
        """Read the slice."""


class StageLoader:
    """The model bytes of one worker, in ``home``. Lives on one event loop; blocking work runs on threads."""

    def __init__(self, home: Path, trust: Trust) -> None:
        self._store, self._trust = Store(home), trust
        self.store_server = StoreServer(self._store)

    async def stage(
        self, request: pb.LoadStageRequest, engine: StageEngine
    ) -> AsyncGenerator[pb.LoadStageResponse, None]:
        """Fetch what is missing, have the engine read it, and yield progress and the hashes of the slice's tensors.

        Raises what ``Fetch.run``, ``Store.find_for_worker`` and the engine raise. Closing the generator ends the fetch.
        """
        job = LoadJob(self._store, self._trust, self.store_server, WantedBytes.of_weights(request))
        try:
            copy: QuantizedCopy | None = None
            if request.weight_bits:
                async for event in self._complete_copy(request, engine, job):
                    if isinstance(event, QuantizedCopy):
                        copy = event
                    else:
                        yield event
            reading = self._read_copy(request, engine, copy) if copy else self._read_source(request, engine, job)
            async for message in reading:
                yield message
        finally:
            job.stop.set()

    async def _read_source(
        self, request: pb.LoadStageRequest, engine: StageEngine, job: LoadJob
    ) -> AsyncIterator[pb.LoadStageResponse]:
        """Load the stage from the model's own files."""
        task = run_on_thread(job.fetch)
        async for fetched in watch_job(task, job):
            yield _fetch_message(fetched)
        found, got = await task, job.progress
        hashing = run_on_thread(lambda: job.hash_tensors(found))
        async for p in engine.read(StageWeights(found.folder, request.fingerprint, request.weight_bits)):
            yield _progress_message("reading", got, p.done_bytes, p.total_bytes)
        async for _ in watch_job(hashing, job):
            yield _progress_message("hashing", got)
        for batch in _batches(await hashing):
            yield _progress_message("hashing", got, digests=batch)

    async def _read_copy(
        self, request: pb.LoadStageRequest, engine: StageEngine, copy: QuantizedCopy
    ) -> AsyncIterator[pb.LoadStageResponse]:
        """Load the stage from a complete copy. The hashes are those of the tensors that it was made from."""
        partial = copy.partial
        await asyncio.to_thread(self.store_server.share, partial.folder, partial)
        self.store_server.release(keep=partial.fingerprint)
        async for p in engine.read(StageWeights(partial.folder, partial.fingerprint, 0)):
            yield _progress_message("reading", None, p.done_bytes, p.total_bytes)
        for batch in _batches({name: copy.sources[name] for name in request.tensors}):
            yield _progress_message("hashing", None, digests=batch)

    async def _complete_copy(
        self, request: pb.LoadStageRequest, engine: StageEngine, job: LoadJob
    ) -> AsyncIterator[pb.LoadStageResponse | QuantizedCopy]:
        """Yield progress, and at last a copy that has all tensors of the stage; none if it cannot be stored."""
        try:
            async for event in self._make_copy(request, engine, job):
                yield event
        except (DiskFull, InvalidOption) as error:
            log.warning("copy: quantized weights are not kept reason=%s model=%s", error.sentence, request.model)

    async def _make_copy(
        self, request: pb.LoadStageRequest, engine: StageEngine, job: LoadJob
    ) -> AsyncIterator[pb.LoadStageResponse | QuantizedCopy]:
        """Complete the copy: from this Mac's store, else from other Macs, else by quantizing the model's tensors."""
        layers = LayerRange(request.start_layer, request.end_layer)
        wanted = WantedBytes.of_weights(request)
        own = CopyJob(self._store, self._trust, self.store_server, wanted, engine.copy_key(), layers, job.stop)
        looking = run_on_thread(own.look_up)
        async for fetched in watch_job(looking, own):
            yield _fetch_message(fetched)
        copy, complete = await looking
        if not complete:
            taking = run_on_thread(job.find)
            async for fetched in watch_job(taking, job):
                yield _fetch_message(fetched)
            found = await taking
            if copy is None:
                async for p in engine.lay_out_copy(self._store.models, found.folder):
                    yield _progress_message("quantizing", None, p.done_bytes, p.total_bytes)
            async for message in self._fill_copy(found, own, engine, job):
                yield message
            looking = run_on_thread(own.look_up)
            async for fetched in watch_job(looking, own):
                yield _fetch_message(fetched)
            copy, complete = await looking
        if copy is None or not complete:
            raise BadCheckpoint("the quantized weights in the store were removed or damaged meanwhile; load again")
        yield copy

    async def _fill_copy(
        self, found: FoundModel, own: CopyJob, engine: StageEngine, job: LoadJob
    ) -> AsyncIterator[pb.LoadStageResponse]:
        """Bring what the copy lacks from other Macs, if the model's own tensors are not here; else quantize these."""
        if job.lacks_bytes(found):
            taking = run_on_thread(own.take)
            async for fetched in watch_job(taking, own):
                yield _fetch_message(fetched)
            if await taking:
                return
        fetching = run_on_thread(job.fetch)
        async for fetched in watch_job(fetching, job):
            yield _fetch_message(fetched)
        found, got = await fetching, job.progress
        hashing = run_on_thread(lambda: job.hash_tensors(found))
        async for _ in watch_job(hashing, job):
            yield _progress_message("hashing", got)
        sources = await hashing
        await asyncio.to_thread(own.prepare, sources)
        async for p in engine.quantize(self._store.models, found.folder):
            yield _progress_message("quantizing", got, p.done_bytes, p.total_bytes)

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
            wanted = WantedBytes.of_adapter(ref, adapter.tensors, request.peers)
            job = LoadJob(self._store, self._trust, self.store_server, wanted)
            task = run_on_thread(job.fetch)
            try:
                async for fetched in watch_job(task, job):
                    done, total = (fetched.done, fetched.total) if fetched else (0, 0)
                    yield pb.SetAdaptersResponse(done_bytes=done, total_bytes=total)
                refs.append(replace(ref, path=str((await task).folder)))
            finally:
                job.stop.set()
        yield refs


def _fetch_message(fetched: Fetched | None) -> pb.LoadStageResponse:
    done, total = (fetched.done, fetched.total) if fetched else (0, 0)
    return _progress_message(fetched.state if fetched else "checking", fetched, done, total)


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


def _batches(proved: Mapping[str, str]) -> Iterator[list[pb.TensorDigest]]:
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
