"""The prefixes of one worker on its disk: written as they are kept, read back when a coordinator asks.

It joins the stage, whose caches the MLX thread alone may touch, with the files. A coordinator opens it for each epoch,
since only it knows which owners there are and which edition of the model is loaded; until then nothing is written or
read. Reading takes many short jobs of the MLX thread, so that frames go on in between.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from cluster.core.errors import Aborted, Busy, MacpipeError, PrefixMissing, StaleEpoch
from cluster.core.frames import Persist, Tensor
from cluster.core.prefix_keys import node_ids
from cluster.core.prefix_limits import (
    DISK_FLUSH_S,
    DISK_NODE_TOKENS,
    DISK_OPEN_S,
    DISK_READ_S,
    MAX_DISK_NODES,
    MAX_DISK_READS,
)
from cluster.model.sequences import Prefix
from cluster.model.stage import Stage
from cluster.model.stored_caches import CacheBuilder, StoredPiece, leaf_names
from cluster.worker.piece_file import Piece
from cluster.worker.pipe_messages import ReadPrefix
from cluster.worker.prefix_files import Node, Place, PrefixFiles
from cluster.worker.prefix_writer import Post, PrefixWriter

log = logging.getLogger(__name__)
Result = TypeVar("Result")
Answer = Callable[[MacpipeError | None], None]
_REMEMBERED_DROPS = 1024
"""As many as there may be prefixes."""


@dataclass(frozen=True, slots=True)
class PrefixDiskPlace:
    """The folder of a worker's prefixes, and their maximum bytes."""

    folder: Path
    limit: int


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a coordinator opened the disk for."""

    epoch: int
    edition: str
    stage: Stage
    leaves: tuple[str, ...]


class PrefixDisk:
    """The prefixes in ``folder``, at most ``limit`` bytes. Methods that say so may be called from any thread.

    ``post`` gives a job to the MLX thread. ``every`` is the length of a piece in tokens.
    """

    def __init__(self, folder: Path, limit: int, post: Post, every: int = DISK_NODE_TOKENS) -> None:
        self._post, self._every = post, every
        self._files: Future[PrefixFiles] = Future()
        self._writer: PrefixWriter | None = None
        self._opened: _Opened | None = None
        self._dropped: deque[int] = deque(maxlen=_REMEMBERED_DROPS)
        """Prefixes that were dropped, perhaps before a read of them arrived or ended."""
        self._reads: queue.Queue[tuple[ReadPrefix, Answer] | None] = queue.Queue(MAX_DISK_READS)
        threading.Thread(target=self._run, args=(folder, limit), name="prefix-reader", daemon=True).start()

    @property
    def nbytes(self) -> int:
        """Return the bytes on disk; 0 while they are being counted. Any thread may ask."""
        return self._files.result().nbytes if self._is_ready() else 0

    @property
    def evictions(self) -> int:
        """Return how many beginnings went to make room since the start. Any thread may ask."""
        return self._files.result().evictions if self._is_ready() else 0

    def _is_ready(self) -> bool:
        return self._files.done() and self._files.exception() is None

    # On the MLX thread

    def open(self, stage: Stage, edition: str, owners: Collection[str], *, anonymous: bool) -> list[tuple[int, bytes]]:
        """Delete what must not be kept, and return end and id of each beginning that the stage can start from.

        ``owners`` are the names of those who may have prefixes; with ``anonymous``, also all who need no key. Raises
        PrefixMissing if the disk cannot be used.
        """
        try:
            files = self._files.result(DISK_OPEN_S)
            files.keep_owners(owners, anonymous=anonymous)
        except (OSError, TimeoutError) as e:
            self.end_epoch()
            raise PrefixMissing(f"prefixes on disk cannot be used: {_reason(e)}") from e
        self._writer = self._writer or PrefixWriter(files, self._post)
        leaves = leaf_names(stage.new_caches())
        self._opened = _Opened(stage.spec.epoch, edition, stage, leaves)
        return files.startable(edition, leaves)[:MAX_DISK_NODES]

    def persist(self, prefix: Prefix, edit: Persist) -> None:
        """Begin to write a prefix that the stage keeps."""
        if self._opened and self._writer:
            self._writer.persist(prefix, edit, self._opened.edition, self._every)

    def drop(self, prefix: int) -> None:
        """Write no more of a prefix, and keep it no more once it is read."""
        self._dropped.append(prefix)
        if self._writer:
            self._writer.drop(prefix)

    def flush(self) -> None:
        """Write what is not on disk yet, for at most ``DISK_FLUSH_S``: the stage is about to be unloaded."""
        if self._opened and self._writer:
            self._writer.flush(DISK_FLUSH_S)

    def end_epoch(self) -> None:
        """Write and read nothing more until the disk is opened again."""
        self._opened = None
        self._dropped.clear()
        if self._writer:
            self._writer.clear()

    # On any thread

    def read(self, order: ReadPrefix, answer: Answer) -> None:
        """Read a prefix. ``answer`` is called once, on any thread, with None if the stage keeps it now."""
        try:
            self._reads.put_nowait((order, answer))
        except queue.Full:
            answer(Busy(f"{MAX_DISK_READS} prefixes wait to be read from disk"))

    def close(self) -> None:
        """End the threads."""
        if self._writer:
            self._writer.close()
        self._reads.put(None)

    # On the reading thread

    def _run(self, folder: Path, limit: int) -> None:
        try:
            self._files.set_result(PrefixFiles(folder, limit))
        except OSError as e:
            log.warning("prefixes: the folder cannot be used reason=%s path=%s", e.strerror, folder)
            self._files.set_exception(e)
        while (asked := self._reads.get()) is not None:
            order, answer = asked
            try:
                self._read(order)
            except MacpipeError as e:
                answer(e)
            except Exception as e:  # top of the thread: whatever it was, the prompt can be prefilled
                log.exception("prefixes: read failed")
                answer(PrefixMissing(f"the prefix cannot be read: {type(e).__name__}: {e}"))
            else:
                answer(None)

    def _read(self, order: ReadPrefix) -> None:
        opened = self._require_open(order)
        files = self._files.result(0)
        path = files.path(Place(order.owner, opened.edition), order.node)
        tokens = _read_tokens(files, path, order, opened.edition)
        builder = self._on_mlx(order, lambda: CacheBuilder(opened.stage.new_caches()))
        for leaf in opened.leaves:
            self._read_leaf(files, path, leaf, order, builder)
        self._on_mlx(order, lambda: opened.stage.add_prefix(order.prefix, tokens, builder.caches, order.adapter))
        files.touch(path)

    def _read_leaf(
        self, files: PrefixFiles, path: list[Node], leaf: str, order: ReadPrefix, builder: CacheBuilder
    ) -> None:
        """Read one cache. A node whose files cannot be used is deleted. Raises PrefixMissing."""
        node, start = path[-1], 0
        try:
            if node.has_state(leaf):
                state = _parse_piece(files.read(node, leaf, rows=False))
                self._on_mlx(order, partial(builder.set_state, leaf, state))
                return
            for node in path:
                rows = _parse_piece(files.read(node, leaf, rows=True))
                self._on_mlx(order, partial(builder.add_rows, rows, node.end - start))
                start = node.end
            self._on_mlx(order, partial(builder.end_rows, leaf, order.length))
        except PrefixMissing as e:
            _delete(files, node, e)
            raise

    def _require_open(self, order: ReadPrefix) -> _Opened:
        opened = self._opened
        if opened is None or opened.epoch != order.epoch:
            raise StaleEpoch("the prefix belongs to another epoch than the one that is loaded")
        if order.prefix in self._dropped:
            raise Aborted("the prefix is not wanted any more")
        if not self._files.result(0).keeps(order.owner):
            raise Aborted("the prefix belongs to an owner who is gone")
        return opened

    def _on_mlx(self, order: ReadPrefix, work: Callable[[], Result]) -> Result:
        """Run a short piece of work on the MLX thread, unless the read has become useless. Raises what it raises."""
        done: Future[Result] = Future()

        def job() -> None:
            try:
                self._require_open(order)
                done.set_result(work())
            except Exception as e:  # the thread goes on; the reading thread gets the error
                done.set_exception(e)

        self._post(job)
        return done.result(DISK_READ_S)


def _read_tokens(files: PrefixFiles, path: list[Node], order: ReadPrefix, edition: str) -> tuple[int, ...]:
    """Return the tokens of a path. Raises PrefixMissing if they are not those that the order's node stands for."""
    tokens: tuple[int, ...] = ()
    for node in path:
        try:
            start, more = files.read_tokens(node)
            if start != len(tokens) or start + len(more) != node.end:
                raise PrefixMissing("the tokens of a prefix are not those of its name")
        except PrefixMissing as e:
            _delete(files, node, e)
            raise
        tokens += more
    if node_ids(edition, order.owner, order.adapter, tokens, [order.length]) != [(len(tokens), order.node)]:
        error = PrefixMissing("the tokens of a prefix are not those of its name")
        _delete(files, path[-1], error)
        raise error
    return tokens


def _delete(files: PrefixFiles, node: Node, why: PrefixMissing) -> None:
    log.warning("prefixes: deleted unusable prefix reason=%s node=%s", why.sentence, node.id.hex())
    files.delete(node)


def _parse_piece(piece: Piece) -> StoredPiece:
    """Return a file's content as a piece of a cache. Raises PrefixMissing if the header is invalid."""
    try:
        kind, values, forms = piece.header["kind"], piece.header["values"], piece.header["tensors"]
        tensors, at = [], 0
        for dtype, shape, size in forms:
            tensors.append(Tensor(str(dtype), tuple(map(int, shape)), piece.data[at : at + int(size)]))
            at += int(size)
        return StoredPiece(str(kind), dict(values), tuple(tensors))
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise PrefixMissing("the header of a prefix file is invalid") from e


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
