"""The journal: what a coordinator that died had accepted and said, so that its successor can go on.

A file of msgpack records, appended to as tokens come: a request, a token of it, its end. It holds token ids, which are
as good as text: so there is one only where a person asked for it, nobody else may read it, and what has ended is gone
from it at the next compaction. It knows requests; it refuses to know who serves them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgpack

from cluster.coordinator.records import as_data, from_data, token_ids
from cluster.errors import InvalidRequest
from cluster.limits import JOURNAL_BYTES, JOURNAL_FSYNC_S, RESUME_S
from cluster.types import Request

log = logging.getLogger(__name__)

_OPENED, _SAID, _ENDED = range(3)
Said = tuple[tuple[int, ...], ...]
"""Tokens of each sample of an answer; () stands for none of any."""


class Fsync(StrEnum):
    """When records reach the disk itself: a process that dies loses nothing in any case, a power cut does."""

    NEVER = "never"
    SECOND = "second"
    ALWAYS = "always"


@dataclass(slots=True)
class Kept:
    """A request that has not ended, and its answer so far, a list a sample: also of those that are complete, since the
    request is live until all are. ``at`` is the wall clock's seconds when it came.
    """

    request: Request
    at: float
    said: list[list[int]] = field(default_factory=list)


class Journal:
    """The journal in ``path``, for one coordinator. Only the engine loop's thread writes to it."""

    def __init__(self, path: Path, fsync: Fsync = Fsync.SECOND, clock: Callable[[], float] = time.time) -> None:
        self._path, self._fsync, self._clock = path, fsync, clock
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        since = clock() - RESUME_S
        self._before = {i: k for i, k in _read(path).items() if k.at >= since}
        self._live: dict[str, Kept] = {}
        self._synced = 0.0
        self._file = -1
        self._compact()

    # What a coordinator before this one left

    def take(self, request_id: str, client: str) -> Kept | None:
        """A request that was not ended when the coordinator before this one died; None where there is none.

        It is its client's alone, and can be taken once.
        """
        kept = self._before.get(request_id)
        if kept is None or kept.request.client != client:
            return None
        return self._before.pop(request_id)

    # What this one does

    def opened(self, request: Request, said: Said) -> None:
        """A request was accepted; ``said`` is what its answers begin with already, () where they begin with nothing."""
        kept = Kept(replace(request, deadline=None), self._clock(), [list(s) for s in said or ((),) * request.samples])
        if self._size + len(request.prompt) * 5 > JOURNAL_BYTES:
            self._compact()
        if self._size > JOURNAL_BYTES:
            return  # full of live requests: this one cannot be resumed
        try:
            record = _opened(kept)
            if from_data(msgpack.unpackb(record, strict_map_key=False)[3]) != kept.request:
                raise TypeError("it asks for more than the journal keeps")
        except (TypeError, ValueError) as e:
            log.info("request %s is not kept in the journal: %s", request.id, e)
            return
        self._live[request.id] = kept
        self._write(record)

    def said(self, request_id: str, token: int, sample: int = 0) -> None:
        if kept := self._live.get(request_id):
            kept.said[sample].append(token)
            self._write(_packed(_SAID, request_id, token, sample))

    def ended(self, request_id: str) -> None:
        if self._live.pop(request_id, None):
            self._write(_packed(_ENDED, request_id))

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._file)

    def _write(self, record: bytes) -> None:
        self._size += os.write(self._file, record)
        now = self._clock()
        if self._fsync is Fsync.ALWAYS or (self._fsync is Fsync.SECOND and now - self._synced >= JOURNAL_FSYNC_S):
            os.fsync(self._file)
            self._synced = now

    def _compact(self) -> None:
        """Write the file anew with what has not ended, and put it in the old one's place."""
        fresh = self._path.with_suffix(".new")
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        records = [_opened(k) for k in (*self._before.values(), *self._live.values())]
        self._size = os.write(file, b"".join(records)) if records else 0
        os.fsync(file)
        fresh.replace(self._path)
        if self._file >= 0:
            os.close(self._file)
        self._file = file


def continued(kept: Kept, offsets: Sequence[int]) -> tuple[Said, tuple[int, ...]]:
    """With what the answers of a request go on, and how many tokens of each its reader has.

    A token that may have ended its answer is computed anew, and so are those whose log-probabilities are yet to be
    told. Raises ``InvalidRequest`` for another number of offsets than one, or one a sample.
    """
    request = kept.request
    skip = tuple(offsets) * (request.samples if len(offsets) == 1 else 1)
    if len(skip) != request.samples:
        raise InvalidRequest(f"{len(skip)} offsets were given for {request.samples} samples", field="offsets")
    ends = [min(request.max_tokens - 1, n) if request.sampling.logprobs else request.max_tokens - 1 for n in skip]
    return tuple(tuple(s[:end]) for s, end in zip(kept.said, ends, strict=True)), skip


def _packed(*record: Any) -> bytes:
    return bytes(msgpack.packb(record))


def _opened(kept: Kept) -> bytes:
    """The record of a request and all that it has said; raises TypeError where a field is more than data."""
    return _packed(_OPENED, kept.request.id, kept.at, as_data(kept.request), kept.said)


def _read(path: Path) -> dict[str, Kept]:
    """Requests that have not ended; a file that is cut off or damaged counts up to there."""
    found: dict[str, Kept] = {}
    for record in _records(path):
        try:
            _apply(found, *record)
        except (TypeError, ValueError, KeyError, IndexError) as e:
            log.warning("the journal is damaged, what follows is ignored: %s", type(e).__name__)
            break
    return found


def _records(path: Path) -> Iterator[list[Any]]:
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            yield from msgpack.Unpacker(file, max_buffer_size=2 * JOURNAL_BYTES)
        except (ValueError, msgpack.UnpackException) as e:
            log.warning("the journal is damaged, what follows is ignored: %s", type(e).__name__)


def _apply(found: dict[str, Kept], kind: int, request_id: str, *facts: Any) -> None:
    if kind == _OPENED:
        at, request, said = facts
        found[request_id] = _require(Kept(from_data(request), at, said), request_id)
    elif kind == _SAID:
        token, sample = facts
        found[request_id].said[sample].append(*token_ids([token]))
    else:
        found.pop(request_id, None)


def _require(kept: Kept, request_id: object) -> Kept:
    """What was read, where each field has the type that it was written with. Raises TypeError."""
    if kept.request.id != request_id or type(kept.at) not in (int, float) or type(kept.said) is not list:
        raise TypeError("a record is about another request, or of another type, than it was written with")
    for tokens in kept.said:
        token_ids(tokens)
    return kept
