"""The shelf: what this Mac gives to others of the models that it serves. The other side is ``peer``.

A model is on the shelf because a load put it there. Whoever asks names a fingerprint, tensors and files; a name that
the model has not is refused, and a path is never looked up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import grpc

from cluster.core.errors import Busy, InvalidRequest, MacpipeError, ModelNotFound
from cluster.core.limits import MAX_TENSORS_NAMED, PEER_CHUNK_BYTES, RETRY_AFTER_S, SHELF_READERS
from cluster.model.checkpoint import Checkpoint, open_checkpoint
from cluster.store.digest_manifest import DigestManifest
from cluster.store.model_files import ModelFiles, StoredFile, is_wanted
from cluster.store.partial_checkpoint import PartialCheckpoint, read_origin
from cluster.store.store import Store
from cluster.transport.rich_errors import abort
from cluster.v1 import store_pb2 as pb
from cluster.v1.store_pb2_grpc import StoreServiceServicer

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Range: TypeAlias = tuple[str, int, int]


@dataclass
class SharedModel:
    """One model on the shelf. ``partial`` is None where all of it is in the folder; ``coming`` is being fetched."""

    checkpoint: Checkpoint
    partial: PartialCheckpoint | None
    manifest: DigestManifest
    coming: frozenset[str] = frozenset()
    checking: set[str] = field(default_factory=set)
    """Somebody has asked for these, and they are hashed anew first: their file has changed on the disk."""

    @property
    def here(self) -> Iterable[str]:
        return self.checkpoint.tensors if self.partial is None else self.partial.verified

    @property
    def files(self) -> ModelFiles:
        if self.partial is not None:
            return read_origin(self.checkpoint.path)
        found = sorted(path for path in self.checkpoint.path.iterdir() if path.is_file() and is_wanted(path.name))
        editions = self.checkpoint.editions
        return ModelFiles(tuple(StoredFile(p.name, p.stat().st_size, edition=editions.get(p.name, "")) for p in found))


class StoreServer(StoreServiceServicer):
    """Answers StoreService for the models that were put on it, and for parts that the store has. For one event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._items: dict[str, SharedModel] = {}
        self._readers = anyio.Semaphore(SHELF_READERS)
        self._checks: set[asyncio.Task[None]] = set()

    def put(self, folder: Path, partial: PartialCheckpoint | None) -> SharedModel:
        """Give this model's bytes to others from now on. Blocks; raises as ``open_checkpoint`` does."""
        item = self._open_model(folder, partial)
        self._items[item.checkpoint.fingerprint] = item
        return item

    def _open_model(self, folder: Path, partial: PartialCheckpoint | None) -> SharedModel:
        checkpoint = open_checkpoint(folder)
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
        async with self._turn(context):
            async for data in _chunks(item.checkpoint.path, [(file.name, 0, end)]):
                yield pb.ReadFileResponse(data=data)

    async def ListTensors(
        self, request: pb.ListTensorsRequest, context: Context
    ) -> AsyncIterator[pb.ListTensorsResponse]:
        item = await self._item(request.fingerprint, context)
        names = [name for name in request.tensors if name in item.checkpoint.tensors] or item.checkpoint.tensors
        self._recheck(item, names)
        states = list(_states(item, names))
        for at in range(0, len(states), MAX_TENSORS_NAMED):
            yield pb.ListTensorsResponse(tensors=states[at : at + MAX_TENSORS_NAMED])

    async def ReadTensors(
        self, request: pb.ReadTensorsRequest, context: Context
    ) -> AsyncIterator[pb.ReadTensorsResponse]:
        item = await self._item(request.fingerprint, context)
        here = item.here
        if strange := next((name for name in request.tensors if name not in here), None):
            await abort(context, ModelNotFound(f"the tensor {strange[:200]} is not here", field="tensors"))
        ranges = _ranges(item.checkpoint, request)
        async with self._turn(context):
            async for data in _chunks(item.checkpoint.path, ranges):
                yield pb.ReadTensorsResponse(data=data)

    async def _item(self, fingerprint: str, context: Context) -> SharedModel:
        item = self._items.get(fingerprint) or await anyio.to_thread.run_sync(self._find_kept, fingerprint)
        if item is None:
            await abort(context, ModelNotFound("this Mac has nothing of that model", field="fingerprint"))
        return item

    def _find_kept(self, fingerprint: str) -> SharedModel | None:
        """A model of which an earlier load has left something in the store."""
        found = self._store.find_kept(fingerprint)
        if found is None:
            return None
        item = self._open_model(found.folder, found.partial)
        return self._items.setdefault(fingerprint, item)  # a load may have put its own there meanwhile, which counts

    def _recheck(self, item: SharedModel, names: Iterable[str]) -> None:
        """Begin to hash what is asked for and was verified before its file changed; whoever asks comes back."""
        if item.partial and (doubtful := item.partial.doubtful(names) - item.checking):
            item.checking |= doubtful
            task = asyncio.create_task(self._recheck_tensors(item, item.partial, sorted(doubtful)))
            self._checks.add(task)
            task.add_done_callback(self._checks.discard)

    async def _recheck_tensors(self, item: SharedModel, partial: PartialCheckpoint, names: Sequence[str]) -> None:
        try:
            for name in names:
                if not await anyio.to_thread.run_sync(partial.recheck, partial.tensors[name]):
                    log.warning("this Mac has damaged bytes of the tensor %s; they count as not here", name)
                item.checking.discard(name)
        except MacpipeError as e:  # a full disk: they are looked at again when somebody asks for them
            log.warning("shelf: check stopped reason=%s", e.sentence)
        finally:
            item.checking.difference_update(names)

    def _turn(self, context: Context) -> _ReadSlot:
        return _ReadSlot(self._readers, context)


class _ReadSlot:
    """One of the few readers; where there is none left, the call ends and its client comes back."""

    def __init__(self, readers: anyio.Semaphore, context: Context) -> None:
        self._readers, self._context = readers, context

    async def __aenter__(self) -> None:
        try:
            self._readers.acquire_nowait()
        except anyio.WouldBlock:
            error: MacpipeError = Busy("this Mac gives bytes to others already", retry_after_s=RETRY_AFTER_S)
            await abort(self._context, error)

    async def __aexit__(self, *_: object) -> None:
        self._readers.release()


def _states(item: SharedModel, names: Iterable[str]) -> Iterator[pb.TensorState]:
    """Those tensors of which there is something to say."""
    known, here = item.manifest.known, frozenset(item.here)
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


def _ranges(checkpoint: Checkpoint, request: pb.ReadTensorsRequest) -> list[Range]:
    """Which bytes of which files are asked for."""
    found: list[Range] = []
    skip, left = request.offset, request.length
    for tensor in (checkpoint.tensors[name] for name in request.tensors):
        start = tensor.offset + min(skip, tensor.nbytes)
        end = min(tensor.end, start + left)
        skip, left = skip - (start - tensor.offset), left - (end - start)
        if start < end:
            found.append((tensor.file, start, end))
    return found


async def _chunks(folder: Path, ranges: Iterable[Range]) -> AsyncIterator[bytes]:
    """The bytes, read piece by piece on a thread, as fast as they are taken."""
    for name, at, end in ranges:
        async with await anyio.open_file(folder / name, "rb") as file:
            await file.seek(at)
            while at < end and (data := await file.read(min(PEER_CHUNK_BYTES, end - at))):
                at += len(data)
                yield data
