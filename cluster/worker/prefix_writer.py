"""Writes kept prefixes to disk, piece by piece, while the stage computes.

The MLX thread copies a piece between two frames; a thread of its own hashes and writes it, and then has the next one
copied. So at most ``PIECES_AHEAD`` pieces wait, and no frame waits for the disk. What the disk has already is not
written again. A prefix that is dropped before it is written is written no further.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from cluster.core.errors import PrefixMissing
from cluster.core.frames import Persist
from cluster.core.prefix_keys import node_ends, node_ids
from cluster.core.prefix_limits import MAX_PIECE_BYTES, PIECES_AHEAD
from cluster.model.sequences import Prefix
from cluster.model.stored_caches import StoredPiece, leaf_names, take_rows, take_state
from cluster.worker.prefix_files import ROOT, Node, Place, PrefixFiles

log = logging.getLogger(__name__)
Post = Callable[[Callable[[], None]], None]


@dataclass(frozen=True, slots=True)
class _Span:
    """A node that a prefix passes: its tokens follow those of its parent, which ends at ``start``."""

    place: Place
    id: bytes
    parent: bytes
    start: int
    end: int


_Taken = tuple[_Span, str, StoredPiece, bool]
"""Where a piece belongs, its leaf, the piece, and whether it has rows."""


@dataclass(frozen=True, slots=True)
class _Write:
    """A piece to write. ``again``: have the next one copied afterwards."""

    job: PrefixCopy
    span: _Span
    leaf: str
    piece: StoredPiece
    rows: bool
    again: bool


class PrefixCopy:
    """A prefix that is being written. ``pieces`` yields what the disk lacks of it, on the MLX thread."""

    def __init__(self, files: PrefixFiles, prefix: Prefix, place: Place, adapter: str, every: int) -> None:
        self._files, self.prefix, self._place = files, prefix, place
        ends = node_ends(len(prefix.tokens), prefix.marks, every)
        self._ids = node_ids(place.edition, place.owner, adapter, prefix.tokens, ends)
        self.stopped = False
        self.pieces = self._pieces()

    def _pieces(self) -> Iterator[_Taken]:
        leaves = leaf_names(self.prefix.caches)
        done: set[bytes] = set()
        before = _Span(self._place, ROOT, ROOT, 0, 0)
        for end, node_id in self._ids:
            known = self._known_spans(node_id)
            spans = known or [_Span(self._place, node_id, before.id, before.end, end)]
            exists = bool(known)
            for taken in chain(
                *(self._rows(s, leaves) for s in spans if s.id not in done), self._states(spans, leaves)
            ):
                exists = True
                yield taken
            done.update(span.id for span in spans)
            if exists:  # at some lengths, a model has neither rows nor a state
                before = spans[-1]

    def _known_spans(self, node_id: bytes) -> list[_Span]:
        """Return the path to a node on disk, which may be divided differently; an empty list if there is none."""
        node = self._files.node(self._place, node_id)
        if node is None:
            return []
        try:
            path = self._files.path(self._place, node_id)
        except PrefixMissing:  # its beginning went first; it is written anew
            self._files.delete(node)
            return []
        self._files.touch(path)
        starts = (0, *(node.end for node in path[:-1]))
        return [_Span(self._place, n.id, n.parent, at, n.end) for at, n in zip(starts, path, strict=True)]

    def _rows(self, span: _Span, leaves: tuple[str, ...]) -> Iterator[_Taken]:
        for leaf in self._find_lacking(span, leaves):
            if piece := take_rows(self.prefix.caches, leaf, span.start, span.end):
                yield span, leaf, piece, True

    def _states(self, spans: list[_Span], leaves: tuple[str, ...]) -> Iterator[_Taken]:
        span = spans[-1]
        excess, mark = len(self.prefix.tokens) - span.end, self.prefix.marks.get(span.end)
        for leaf in self._find_lacking(span, leaves):
            if piece := take_state(self.prefix.caches, leaf, excess, mark):
                yield span, leaf, piece, False

    def _find_lacking(self, span: _Span, leaves: tuple[str, ...]) -> Iterator[str]:
        for leaf in leaves:
            node = self._files.node(span.place, span.id)
            if node is None or not node.has(leaf):
                yield leaf


class PrefixWriter:
    """Writes to ``files``. ``post`` gives a job to the MLX thread, on which every method but ``close`` is called."""

    def __init__(self, files: PrefixFiles, post: Post) -> None:
        self._files, self._post = files, post
        self._pending: OrderedDict[int, PrefixCopy] = OrderedDict()
        """By the prefix's id. Bounded by the prefixes that the stage keeps."""
        self._parked = PIECES_AHEAD
        """How many pieces could be copied ahead, if there were any."""
        self._queue: queue.Queue[_Write | None] = queue.Queue(2 * PIECES_AHEAD)
        self._written = threading.Condition()
        self._waiting = 0
        self.failure = ""
        """Why nothing more is written; empty if nothing failed."""
        threading.Thread(target=self._write_all, name="prefix-writer", daemon=True).start()

    def persist(self, prefix: Prefix, edit: Persist, edition: str, every: int) -> None:
        """Begin to write a prefix."""
        if self.failure:
            return
        place = Place(edit.owner, edition)
        self._pending[edit.prefix] = PrefixCopy(self._files, prefix, place, edit.adapter, every)
        parked, self._parked = self._parked, 0
        for _ in range(parked):
            self._post(self._copy_next)

    def drop(self, prefix: int) -> None:
        """Write no more of a prefix."""
        self._pending.pop(prefix, None)

    def clear(self) -> None:
        """Write no more of anything; try again after a failure."""
        self._pending.clear()
        self.failure = ""

    def flush(self, seconds: float) -> None:
        """Write as much as possible of what is not on disk yet, for at most so long. Then write no more of it."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and (write := self._next(again=False)):
            if not self._put(write, left):
                break
        with self._written:
            self._written.wait_for(lambda: not self._waiting, max(0.0, until - time.monotonic()))
        self.clear()

    def _copy_next(self) -> None:
        """Copy one piece for the writing thread, which posts this job again; park if there is nothing to copy."""
        write = self._next(again=True)
        if write is None or not self._put(write, 0.0):
            self._parked += 1

    def _put(self, write: _Write, seconds: float) -> bool:
        with self._written:
            self._waiting += 1
        try:
            self._queue.put(write, timeout=seconds) if seconds else self._queue.put_nowait(write)
        except queue.Full:
            with self._written:
                self._waiting -= 1
            return False
        return True

    def _next(self, *, again: bool) -> _Write | None:
        while self._pending:
            prefix, job = next(iter(self._pending.items()))
            found = None if job.stopped or self.failure else next(job.pieces, None)
            if found is None:
                del self._pending[prefix]
                continue
            span, leaf, piece, rows = found
            if piece.nbytes <= MAX_PIECE_BYTES:
                return _Write(job, span, leaf, piece, rows, again)
        return None

    def close(self) -> None:
        """End the writing thread once it has written what waits."""
        self._queue.put(None)

    def _write_all(self) -> None:
        while (write := self._queue.get()) is not None:
            try:
                if not (write.job.stopped or self.failure):
                    write.job.stopped = not self._write(write)
                    if write.job.stopped:
                        log.info(
                            "prefixes: prefix not fully written, no room in the quota or on the disk tokens=%d",
                            len(write.job.prefix.tokens),
                        )
            except OSError as e:
                self.failure = e.strerror or type(e).__name__
                log.warning("prefixes: writing to disk paused reason=%s", self.failure)
            with self._written:
                self._waiting -= 1
                self._written.notify_all()
            if write.again:
                self._post(self._copy_next)

    def _write(self, write: _Write) -> bool:
        """Return False if there is no room for the prefix."""
        span, piece = write.span, write.piece
        tokens = write.job.prefix.tokens[span.start : span.end]
        node: Node | None = self._files.add_node(span.place, span.id, span.parent, span.start, tokens)
        if node is None:
            return False
        if node.parent != span.parent:
            return True  # another prefix has just written it, divided differently
        forms = [[t.dtype, list(t.shape), memoryview(t.data).nbytes] for t in piece.tensors]
        header = {"kind": piece.kind, "values": dict(piece.values), "tensors": forms}
        return self._files.write(node, write.leaf, header, [_bytes(t.data) for t in piece.tensors], rows=write.rows)


def _bytes(data: bytes | memoryview) -> memoryview:
    return memoryview(data).cast("B")
