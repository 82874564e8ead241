"""The journal: what a coordinator that died had accepted and said, so that its successor can go on.

A file of records (see ``records``), appended to as tokens come: a request, a token of it, its end. It holds token ids,
which are as good as text: so there is one only where a person asked for it, nobody else may read it, and what has ended
is gone from it when it is next rewritten. It knows requests; it refuses to know who serves them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from cluster.coordinator.request_records import (
    HEADER,
    as_data,
    from_data,
    pack_record,
    read_records,
    token_ids,
    unpack_record,
)
from cluster.core.errors import InvalidRequest
from cluster.core.limits import JOURNAL_BYTES, JOURNAL_FSYNC_S, JOURNAL_LIVE_S, JOURNAL_RETRY_S, RESUME_S
from cluster.core.request import Request
from cluster.platform.private_files import (
    create_private_file,
    make_private_folder,
    open_regular_file,
    sync_folder,
    write_all,
)

log = logging.getLogger(__name__)

_OPENED, _SAID, _ENDED, _SAID_SO_FAR, _STILL_LIVE = range(5)
_TOKEN_BYTES: Final = 5
"""What a token takes at most in a rewritten file."""
Said = tuple[tuple[int, ...], ...]
"""Tokens of each sample of an answer; () stands for none of any."""


class Fsync(StrEnum):
    """When records reach the disk itself: a process that dies loses nothing in any case, a power cut does."""

    NEVER = "never"
    SECOND = "second"
    ALWAYS = "always"


@dataclass(slots=True)
class JournaledRequest:
    """A request that has not ended, and its answer so far, a list a sample: also of those that are complete, since the
    request is live until all are. ``at`` is the wall clock's seconds when it was last known to be live.
    """

    request: Request
    at: float
    said: list[list[int]] = field(default_factory=list)


class Journal:
    """The journal in ``path``, for one coordinator. Only the engine loop's thread writes to it.

    No method raises for a disk that fails. The journal is off then: ``problem`` says why, requests are answered as
    ever, and the file stays as it was after its last whole record. Every ``JOURNAL_RETRY_S`` all live requests are
    written to a new file; once that works the journal is on again and misses nothing.
    """

    def __init__(
        self,
        path: Path,
        fsync: Fsync = Fsync.SECOND,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._fsync, self._clock, self._monotonic = path, fsync, clock, monotonic
        self.problem = ""
        """Why nothing is written now, as a sentence; empty while the journal is on."""
        self._before = {i: k for i, k in _read(path, clock()).items() if not self._expired(k)}
        self._live: dict[str, JournaledRequest] = {}
        self._records = {
            i: _opened_record(k) for i, k in self._before.items()
        }  # packed once: a long prompt takes a while
        self._pending: list[bytes] = []
        self._file, self._size = -1, 0
        self._synced = self._retry_at = 0.0
        self._noted_live_at = clock()
        self._rewrite()

    # What a coordinator before this one left

    def take(self, request_id: str, client: str) -> JournaledRequest | None:
        """A request that was not ended when the coordinator before this one died; None where there is none.

        It is its client's alone. It stays here until it was accepted again, or ``RESUME_S`` are over: who asks for it
        in a wrong way, or while nothing is served, may ask again.
        """
        kept = self._before.get(request_id)
        return None if kept is None or kept.request.client != client or self._expired(kept) else kept

    def _expired(self, kept: JournaledRequest) -> bool:
        return self._clock() - kept.at > RESUME_S

    # What this one does

    def record_opened(self, request: Request, said: Said) -> None:
        """A request was accepted; ``said`` is what its answers begin with already, () where they begin with nothing."""
        self._forget(request.id)
        kept = JournaledRequest(
            replace(request, deadline=None), self._clock(), [list(s) for s in said or ((),) * request.samples]
        )
        try:
            _require_plain(replace(kept.request, prompt=()))  # a prompt is token ids in any case
            record = _opened_record(kept)
        except (TypeError, ValueError, OverflowError) as e:
            log.info("journal: request left out reason=%s request=%s", e, request.id)
            return
        if self._needed() + len(record) > JOURNAL_BYTES:
            log.info("journal: request left out reason=full of live requests request=%s", request.id)
            return
        self._live[request.id], self._records[request.id] = kept, record
        self._record(record)

    def record_token(self, request_id: str, token: int, sample: int = 0) -> None:
        """A live request got a token."""
        if kept := self._live.get(request_id):
            kept.said[sample].append(token)
            self._record(pack_record(_SAID, request_id, token, sample))

    def record_ended(self, request_id: str) -> None:
        """A request is live no more."""
        if request_id in self._live:
            self._forget(request_id)
            self._record(pack_record(_ENDED, request_id))

    def flush(self) -> None:
        """Write what was recorded since the last flush: after readers were told, who need not wait for a disk."""
        if self.problem:
            if self._monotonic() >= self._retry_at:
                self._rewrite()
        elif self._size > JOURNAL_BYTES and self._size - self._needed() > JOURNAL_BYTES // 8:
            self._rewrite()
        elif self._pending:
            self._append()

    def close(self) -> None:
        """Write what is left, and let go of the file."""
        self.flush()
        self._close_file()

    def _needed(self) -> int:
        """Bytes that a rewritten file would have, at most."""
        said = sum(len(tokens) for kept in self._live.values() for tokens in kept.said)
        return sum(map(len, self._records.values())) + _TOKEN_BYTES * said

    def _forget(self, request_id: str) -> None:
        self._before.pop(request_id, None)
        self._live.pop(request_id, None)
        self._records.pop(request_id, None)

    def _record(self, record: bytes) -> None:
        if not self.problem:  # else it is in the file that is written once that works
            self._pending.append(record)

    def _append(self) -> None:
        if self._clock() - self._noted_live_at >= JOURNAL_LIVE_S:
            self._pending.append(self._still_live())
        records = b"".join(self._pending)
        self._pending.clear()
        try:
            write_all(self._file, records)
            now = self._monotonic()
            if self._fsync is Fsync.ALWAYS or (self._fsync is Fsync.SECOND and now - self._synced >= JOURNAL_FSYNC_S):
                os.fsync(self._file)
                self._synced = now
            self._size += len(records)
        except OSError as e:
            with suppress(OSError):  # where even this fails, the part of a record is known by its checksum
                os.ftruncate(self._file, self._size)
            self._switch_off(e)

    def _still_live(self) -> bytes:
        """The record of who is live now: the time to resume an answer begins at its coordinator's end."""
        self._noted_live_at = self._clock()
        for kept in self._live.values():
            kept.at = self._noted_live_at
        return pack_record(_STILL_LIVE, "", self._noted_live_at, list(self._live)) if self._live else b""

    def _rewrite(self) -> None:
        """Put a new file with all that has not ended in the old one's place; the old one stays where that fails."""
        for request_id in [i for i, kept in self._before.items() if self._expired(kept)]:
            self._forget(request_id)
        fresh = self._path.with_suffix(".new")
        try:
            make_private_folder(self._path.parent)
            file = create_private_file(fresh)
            try:
                said = (pack_record(_SAID_SO_FAR, i, kept.said) for i, kept in self._live.items())
                content = b"".join((HEADER, *self._records.values(), *said, self._still_live()))
                write_all(file, content)
                os.fsync(file)
                fresh.replace(self._path)
            except BaseException:
                os.close(file)
                fresh.unlink(missing_ok=True)
                raise
            self._close_file()
            self._file, self._size = file, len(content)
            sync_folder(self._path.parent)
        except OSError as e:
            self._switch_off(e)
        else:
            self._switch_on()

    def _switch_off(self, error: OSError) -> None:
        why = error.strerror or type(error).__name__
        if not self.problem:
            log.error("journal: off reason=%s path=%s", why, self._path)
        self.problem = (
            f"the journal is off, since {self._path} cannot be written ({why}): answers go on, but cannot be resumed"
            f" if the coordinator ends now; it is tried again every {JOURNAL_RETRY_S:.0f} s"
        )
        self._retry_at = self._monotonic() + JOURNAL_RETRY_S
        self._pending.clear()

    def _switch_on(self) -> None:
        if self.problem:
            log.warning("journal: on again path=%s live=%d", self._path, len(self._live))
        self.problem = ""
        self._pending.clear()

    def _close_file(self) -> None:
        if self._file >= 0:
            with suppress(OSError):
                os.close(self._file)
        self._file = -1


def continue_request(kept: JournaledRequest, offsets: Sequence[int]) -> tuple[Said, tuple[int, ...]]:
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


def _opened_record(kept: JournaledRequest) -> bytes:
    """The record of a request and all that it has said; raises TypeError where a field is more than data."""
    return pack_record(_OPENED, kept.request.id, kept.at, as_data(kept.request), kept.said)


def _read(path: Path, now: float) -> dict[str, JournaledRequest]:
    """Requests that have not ended; a file that is cut off or damaged counts up to there.

    What seems to have come after ``now``, since the clock went back, counts as of now.
    """
    found: dict[str, JournaledRequest] = {}
    try:
        with open_regular_file(path) as file:
            for record in read_records(file):
                _apply(found, *record)
    except FileNotFoundError:
        return {}
    except OSError as e:
        log.warning("journal: not read reason=%s path=%s", e.strerror, path)
    except (TypeError, ValueError, KeyError, IndexError) as e:
        log.warning("journal: damaged, the rest is ignored reason=%s path=%s", type(e).__name__, path)
    for kept in found.values():
        kept.at = min(kept.at, now)
    return found


def _apply(found: dict[str, JournaledRequest], kind: int, request_id: str, *facts: Any) -> None:
    if kind == _OPENED:
        at, request, said = facts
        found[request_id] = _require(JournaledRequest(from_data(request), at, said), request_id)
    elif kind == _SAID:
        token, sample = facts
        found[request_id].said[sample].append(*token_ids([token]))
    elif kind == _SAID_SO_FAR:
        (said,) = facts
        found[request_id].said = _require_said(said, found[request_id].request.samples)
    elif kind == _ENDED:
        found.pop(request_id, None)
    elif kind == _STILL_LIVE:
        at, live = facts
        for one in live:
            found[one].at = _require_time(at)
    else:
        raise ValueError("a record of no known kind")


def _require(kept: JournaledRequest, request_id: object) -> JournaledRequest:
    """What was read, where each field has the type that it was written with. Raises TypeError."""
    if kept.request.id != request_id:
        raise TypeError("a record is about another request than it was written with")
    _require_time(kept.at)
    _require_said(kept.said, kept.request.samples)
    return kept


def _require_time(at: Any) -> float:
    if type(at) not in (int, float):
        raise TypeError("a time is no number")
    return float(at)


def _require_said(said: Any, samples: int) -> list[list[int]]:
    if type(said) is not list or len(said) != samples or not all(type(tokens) is list for tokens in said):
        raise TypeError("what was said is no list of token ids a sample")
    for tokens in said:
        token_ids(tokens)
    return said


def _require_plain(request: Request) -> None:
    """Raise TypeError or ValueError for a request that is another one once it was written and read."""
    record = _opened_record(JournaledRequest(request, 0.0))
    if from_data(unpack_record(record)[3]) != request:
        raise TypeError("it asks for more than the journal keeps")
