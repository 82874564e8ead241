"""The gRPC server of this Mac's store: gives other Macs the bytes of shared models. ``peer_client`` is the client.

A model is shared once a load has put it here. Requests name a fingerprint, tensors and files. A name that the model
does not have is refused, and no path is ever looked up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import grpc

from cluster.core.errors import Busy, InvalidRequest, MacpipeError, ModelNotFound
from cluster.core.limits import RETRY_AFTER_S
from cluster.model.adapter_files import holds_adapter, open_folder
from cluster.model.checkpoint import Checkpoint
from cluster.store.digest_manifest import DigestManifest
from cluster.store.limits import MAX_TENSORS_NAMED, PEER_CHUNK_BYTES, STORE_READERS
from cluster.store.model_files import ADAPTER_FILES, ModelFiles, StoredFile, is_wanted
from cluster.store.partial_checkpoint import PartialCheckpoint, read_origin
from cluster.store.quantized_copy import read_sources
from cluster.store.store import Store
from cluster.transport.rich_errors import abort
from cluster.v1 import store_pb2 as pb
from cluster.v1.store_pb2_grpc import StoreServiceServicer

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Range: TypeAlias = tuple[str, int, int]


@dataclass
class SharedModel:
    """One shared model or adapter. ``partial`` is None if its folder is complete.

    ``coming`` names the tensors that are being fetched.
    """

    checkpoint: Checkpoint
    partial: PartialCheckpoint | None
    manifest: DigestManifest
    coming: frozenset[str] = frozenset()
    checking: set[str] = field(default_factory=set)
    """Tensors that a peer asked for and that are being hashed again, because their file changed on disk."""

    @property
    def here(self) -> Iterable[str]:
        return self.checkpoint.tensors if self.partial is None else self.partial.verified

    @property
    def files(self) -> ModelFiles:
        if self.partial is not None:
            return read_origin(self.checkpoint.path)
        folder = self.checkpoint.path
        if holds_adapter(folder):
            found = [folder / name for name in ADAPTER_FILES]
        else:
            found = sorted(path for path in folder.iterdir() if path.is_file() and is_wanted(path.name))
        editions = self.checkpoint.editions
        return ModelFiles(tuple(StoredFile(p.name, p.stat().st_size, edition=editions.get(p.name, "")) for p in found))


class StoreServer(StoreServiceServicer):
    """Implements StoreService for the shared models and the store's partial checkpoints. For one event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._items: dict[str, SharedModel] = {}
        self.in_use: Callable[[], Collection[str]] = frozenset
        """Returns the fingerprints of the models that this Mac's engines hold, which are never closed."""
        self._readers = anyio.Semaphore(STORE_READERS)
        self._checks: set[asyncio.Task[None]] = set()

    def share(self, folder: Path, partial: PartialCheckpoint | None) -> SharedModel:
        """Share a model's or an adapter's bytes with other Macs from now on. Blocks; raises as ``open_folder``."""
        item = self._open_model(folder, partial)
        before = self._items.get(item.checkpoint.fingerprint)
        if before and before.partial and partial:
            partial.note_damaged(before.partial.damaged)
        self._items[item.checkpoint.fingerprint] = item
        return item

    def release(self, keep: str = "") -> None:
        """Close the partial checkpoints that nothing fills, hashes or uses, except that with the fingerprint ``keep``.

        While they are open they cannot be removed from this Mac. One that a peer asks for is opened again.
        """
        kept = {keep, *self.in_use()}
        for fingerprint, item in list(self._items.items()):
            if item.partial and fingerprint not in kept and not item.coming and not item.checking:
                self._items.pop(fingerprint, None)

    def _open_model(self, folder: Path, partial: PartialCheckpoint | None) -> SharedModel:
        checkpoint = open_folder(folder)
        return SharedModel(checkpoint, partial, DigestManifest(self._store.home, checkpoint.fingerprint))

    async def DescribeModel(self, request: pb.DescribeModelRequest, context: Context) -> pb.DescribeModelResponse:
        item = await self._item(request.fingerprint, context)
        files = await anyio.to_thread.run_sync(lambda: item.files)
        described = [pb.StoredFile(name=f.name, size=f.size, sha256=f.sha256, edition=f.edition) for f in files.files]
        return pb.DescribeModelResponse(files=described, repo=files.repo, commit=files.commit)

    async def ReadFile(self, request: pb.ReadFileRequest, context: Context) -> AsyncIterator[pb.ReadFileResponse]:
        item = await self._item(request.fingerprint, context)
        files = await anyio.to_thread.run_sync(lambda: item.files)
        file = next((f for f in files.files if f.name == request.file), None)
        if file is None:
            await abort(context, InvalidRequest("the model has no such file", field="file"))
        headers = [t.offset for t in item.checkpoint.tensors.values() if t.file == file.name]
        end = min(headers, default=file.size) if file.weights else file.size
        async with self._read_slot(context):
            async for data in _chunks(item.checkpoint.path, [(file.name, 0, end)]):
                yield pb.ReadFileResponse(data=data)

    async def ListTensors(
        self, request: pb.ListTensorsRequest, context: Context
    ) -> AsyncIterator[pb.ListTensorsResponse]:
        item = await self._item(request.fingerprint, context)
        if request.sources:
            known = await anyio.to_thread.run_sync(read_sources, item.checkpoint.path)
            states = _sources(known, request.tensors)
        else:
            names = [name for name in request.tensors if name in item.checkpoint.tensors] or item.checkpoint.tensors
            self._recheck(item, names)
            states = _states(item, names)
        while batch := list(islice(states, MAX_TENSORS_NAMED)):  # others get their turn between two
            yield pb.ListTensorsResponse(tensors=batch)

    async def ReadTensors(
        self, request: pb.ReadTensorsRequest, context: Context
    ) -> AsyncIterator[pb.ReadTensorsResponse]:
        item = await self._item(request.fingerprint, context)
        here = item.here
        if missing := next((name for name in request.tensors if name not in here), None):
            await abort(context, ModelNotFound(f"this Mac does not have the tensor {missing[:200]}", field="tensors"))
        ranges = _ranges(item.checkpoint, request)
        async with self._read_slot(context):
            async for data in _chunks(item.checkpoint.path, ranges):
                yield pb.ReadTensorsResponse(data=data)

    async def _item(self, fingerprint: str, context: Context) -> SharedModel:
        item = self._items.get(fingerprint) or await anyio.to_thread.run_sync(self._find_kept, fingerprint)
        if item is None:
            await abort(context, ModelNotFound("this Mac has no part of that model", field="fingerprint"))
        return item

    def _find_kept(self, fingerprint: str) -> SharedModel | None:
        """Share and return a partial checkpoint that an earlier load left in the store, or None."""
        found = self._store.find_kept(fingerprint)
        if found is None:
            return None
        item = self._open_model(found.folder, found.partial)
        return self._items.setdefault(fingerprint, item)  # if a load has put its own meanwhile, that one is used

    def _recheck(self, item: SharedModel, names: Iterable[str]) -> None:
        """Hash again, in the background, the tensors whose file changed. Until then, peers are told to ask again."""
        if item.partial and (awaiting := item.partial.awaiting_recheck(names) - item.checking):
            item.checking |= awaiting
            task = asyncio.create_task(self._recheck_tensors(item, item.partial, sorted(awaiting)))
            self._checks.add(task)
            task.add_done_callback(self._checks.discard)

    async def _recheck_tensors(self, item: SharedModel, partial: PartialCheckpoint, names: Sequence[str]) -> None:
        try:
            for name in names:
                if not await anyio.to_thread.run_sync(partial.recheck, partial.tensors[name]):
                    log.warning("store server: damaged tensor counts as missing tensor=%s", name)
                item.checking.discard(name)
        except MacpipeError as e:  # such as a full disk: the next request for these tensors starts another check
            log.warning("store server: recheck stopped reason=%s", e.sentence)
        finally:
            item.checking.difference_update(names)

    def _read_slot(self, context: Context) -> _ReadSlot:
        return _ReadSlot(self._readers, context)


class _ReadSlot:
    """A context manager for one of the ``STORE_READERS`` slots. If none is free, abort the call; the client retries."""

    def __init__(self, readers: anyio.Semaphore, context: Context) -> None:
        self._readers, self._context = readers, context

    async def __aenter__(self) -> None:
        try:
            self._readers.acquire_nowait()
        except anyio.WouldBlock:
            error: MacpipeError = Busy("this Mac already serves as many reads as it can", retry_after_s=RETRY_AFTER_S)
            await abort(self._context, error)

    async def __aexit__(self, *_: object) -> None:
        self._readers.release()


def _states(item: SharedModel, names: Iterable[str]) -> Iterator[pb.TensorState]:
    """Yield the state of each tensor that is present, expected, damaged, or has a known digest."""
    known = item.manifest.known
    here = frozenset(item.here)
    own = item.partial.verified if item.partial else {}
    damaged = item.partial.damaged if item.partial else frozenset()
    for name in names:
        digest = bytes.fromhex(own.get(name) or known.get(name, ""))
        if name in here:
            yield pb.TensorState(name=name, presence=pb.PRESENCE_HERE, sha256=digest)
        elif name in item.coming:
            yield pb.TensorState(name=name, presence=pb.PRESENCE_COMING, sha256=digest)
        elif name in item.checking:
            yield pb.TensorState(name=name, presence=pb.PRESENCE_CHECKING, sha256=digest)
        elif name in damaged:
            yield pb.TensorState(name=name, presence=pb.PRESENCE_DAMAGED, sha256=digest)
        elif digest:
            yield pb.TensorState(name=name, presence=pb.PRESENCE_KNOWN, sha256=digest)


def _sources(known: Mapping[str, str], names: Iterable[str]) -> Iterator[pb.TensorState]:
    """Yield the known digests of the tensors with these names; without names, of all."""
    for name in list(names) or known:
        if name in known:
            yield pb.TensorState(name=name, presence=pb.PRESENCE_KNOWN, sha256=bytes.fromhex(known[name]))


def _ranges(checkpoint: Checkpoint, request: pb.ReadTensorsRequest) -> list[Range]:
    """Return the byte ranges of files that a request asks for."""
    found: list[Range] = []
    skip = request.offset
    left = request.length
    for tensor in (checkpoint.tensors[name] for name in request.tensors):
        start = tensor.offset + min(skip, tensor.nbytes)
        end = min(tensor.end, start + left)
        skip -= start - tensor.offset
        left -= end - start
        if start < end:
            found.append((tensor.file, start, end))
    return found


async def _chunks(folder: Path, ranges: Iterable[Range]) -> AsyncIterator[bytes]:
    """Yield the bytes of the ranges in pieces, read on a thread as fast as the consumer takes them."""
    for name, at, end in ranges:
        async with await anyio.open_file(folder / name, "rb") as file:
            await file.seek(at)
            while at < end and (data := await file.read(min(PEER_CHUNK_BYTES, end - at))):
                at += len(data)
                yield data
