"""Keep a journal of live requests and their tokens, so that a restarted coordinator can resume their answers.

The journal is an append-only file of records (see ``request_records``): a request, each of its tokens, its end. Token
ids reveal the text, so the journal exists only if the operator asks for it, only its owner can read the file, and the
next rewrite drops requests that have ended. This module knows requests; it refuses to know who serves them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol

from cluster.coordinator.ended_requests import EndedRequests
from cluster.coordinator.request_records import (
    HEADER,
    as_data,
    from_data,
    pack_record,
    read_records,
    token_ids,
    unpack_record,
)
from cluster.core.journal_limits import JOURNAL_BYTES, JOURNAL_FSYNC_S, JOURNAL_LIVE_S, JOURNAL_RETRY_S, PARKED_S
from cluster.core.limits import RESUME_S
from cluster.core.request import Request
from cluster.platform.private_files import make_private_folder, open_regular_file, replace_and_open, write_all

log = logging.getLogger(__name__)

_OPENED, _TOKEN, _ENDED, _ALL_TOKENS, _STILL_LIVE, _PARKED, _ALL_ENDED = range(7)
_TOKEN_BYTES: Final = 5
"""Maximum size of a token in a rewritten file."""
MOST_JOURNAL_SIZES: Final = 4
"""A file that cannot be rewritten may grow to this many times JOURNAL_BYTES."""
AnswerTokens = tuple[tuple[int, ...], ...]
"""Token ids of each sample of an answer. () means that no sample has tokens yet."""


class Fsync(StrEnum):
    """When records are flushed to disk. A crash of the process loses nothing with any value; a power cut may."""

    NEVER = "never"
    SECOND = "second"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Answerer:
    """What answers a request: the deployment's name, the fingerprint of its model, and the number of an engine loop.

    A record of an older version names no deployment and no model. Loops are numbered anew by each coordinator.
    """

    deployment: str = ""
    fingerprint: str = ""
    loop: int = 0


@dataclass(slots=True)
class JournaledRequest:
    """A live or parked request and its answer so far.

    ``tokens`` has a list of token ids per sample, complete samples included: a request is live until all of its samples
    are complete. ``at`` is the wall clock time, in seconds, at which the request was last known to be live.
    """

    request: Request
    at: float
    tokens: list[list[int]] = field(default_factory=list)
    answerer: Answerer = Answerer()
    parked: bool = False
    """It is complete, or nobody reads it any more; its client may resume it for ``PARKED_S``."""


class AnswerRecorder(Protocol):
    """Records the live requests of one engine loop. Called on the loop's thread."""

    def record_opened(self, request: Request, tokens: AnswerTokens) -> None:
        """Record an accepted request. ``tokens`` are those that its samples already have, () for none."""

    def record_token(self, request_id: str, token: int, sample: int) -> None:
        """Record a token of a live request. Ignore other requests."""

    def record_ended(self, request_id: str) -> None:
        """Record the end of a live request. Ignore other requests."""

    def record_parked(self, request_id: str) -> None:
        """Record that a live request has no reader any more, but may be resumed. Ignore other requests."""

    def flush(self) -> None:
        """Write the records since the last flush, or have them written."""


class JournalCopies(Protocol):
    """Takes what is written to a journal, to have it stored on other machines. Called on the journal's thread."""

    def append(self, records: bytes) -> None:
        """Take records that follow those before them."""

    def replace(self, content: bytes) -> None:
        """Take a whole journal in place of all records before it."""


class Journal:
    """The journal of one coordinator, in ``path``. One thread alone writes to it (see ``JournalWriter``).

    ``copies`` gets every record, also while the file cannot be written.

    No method raises on a disk error. Instead the journal switches off: ``problem`` says why, requests are still
    answered, and the file keeps every record up to the last complete one. Every ``JOURNAL_RETRY_S`` the journal tries
    to write all live requests to a new file. When that succeeds, it is on again and complete.
    """

    def __init__(
        self,
        path: Path,
        fsync: Fsync = Fsync.SECOND,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._fsync = path, fsync
        self._clock, self._monotonic = clock, monotonic
        self.problem = ""
        """Why the journal is off; empty while it is on."""
        self._ended = EndedRequests(clock)
        found = _read_live(path, clock(), self._ended)
        self._previous = {i: k for i, k in found.items() if not self._is_expired(k)}
        self._live: dict[str, JournaledRequest] = {}
        self._parked: dict[str, JournaledRequest] = {}
        """Oldest first."""
        # packed once, since a long prompt takes a while to pack
        self._records = {i: _pack_opened(k) for i, k in self._previous.items()}
        self._needed = sum(map(len, self._records.values()))
        """Maximum size of a rewritten file in bytes. Counted as records come and go: there may be many."""
        self.copies: JournalCopies | None = None
        self._copied = 0
        """Size of the largest copy in bytes."""
        self._pending: list[bytes] = []
        self._file, self._size = -1, 0
        self._synced = self._retry_at = 0.0
        self._is_unsynced = False
        self._noted_live_at = clock()
        self._rewrite()

    # Requests of the previous coordinator

    def take(self, request_id: str, client: str) -> JournaledRequest | None:
        """Return a request that was live when the previous coordinator died, or that is parked.

        None if ``client`` has no such request. The request stays in the journal until it is accepted again, or until
        its time has passed. So a client may retry after an invalid call, or after a call while no model is served.
        """
        kept = self._previous.get(request_id) or self._parked.get(request_id)
        return None if kept is None or kept.request.client != client or self._is_expired(kept) else kept

    def has_ended(self, request_id: str, client: str) -> bool:
        """Return whether a resumable request of ``client`` has ended and cannot be resumed."""
        return self._ended.has(request_id, client)

    def _is_expired(self, kept: JournaledRequest) -> bool:
        return self._clock() - kept.at > (PARKED_S if kept.parked else RESUME_S)

    # Requests of this coordinator

    def record_opened(self, request: Request, tokens: AnswerTokens, answerer: Answerer = Answerer()) -> None:
        """Record an accepted request, which may have had another ``answerer`` before.

        ``tokens`` are those that its samples already have, () for none.
        """
        self._forget(request.id)
        answer = [list(sample) for sample in tokens or ((),) * request.samples]
        kept = JournaledRequest(replace(request, deadline=None), self._clock(), answer, answerer)
        try:
            _require_round_trip(replace(kept.request, prompt=()))  # the prompt holds only token ids
            record = _pack_opened(kept)
        except (TypeError, ValueError, OverflowError) as e:
            log.info("journal: request not recorded reason=%s request=%s", e, request.id)
            return
        self._drop_parked(len(record))
        if self._needed + len(record) > JOURNAL_BYTES:
            log.info("journal: request not recorded, journal is full request=%s", request.id)
            return
        self._ended.forget(request.id)
        self._live[request.id], self._records[request.id] = kept, record
        self._needed += len(record) + _token_bytes(kept)
        self._record(record)

    def record_token(self, request_id: str, token: int, sample: int = 0, loop: int = 0) -> None:
        """Record a token of a live request that this engine loop answers. Ignore other requests."""
        if kept := self._live_in(loop, request_id):
            kept.tokens[sample].append(token)
            self._needed += _TOKEN_BYTES
            self._record(pack_record(_TOKEN, request_id, token, sample))

    def record_ended(self, request_id: str, loop: int = 0) -> None:
        """Record the end of a live request that this engine loop answers. Ignore other requests."""
        if kept := self._live_in(loop, request_id):
            self._forget(request_id)
            now = self._clock()
            if kept.request.resumable:
                self._ended.add(request_id, kept.request.client, now)
            self._record(pack_record(_ENDED, request_id, now))

    def record_parked(self, request_id: str, loop: int = 0) -> None:
        """Record that a live request of this engine loop has no reader any more. Ignore other requests.

        It can be resumed for ``PARKED_S``, unless the journal needs its room.
        """
        if kept := self._live_in(loop, request_id):
            self._parked[request_id] = self._live.pop(request_id)
            kept.parked, kept.at = True, self._clock()
            self._record(pack_record(_PARKED, request_id, kept.at))

    def record_gap(self, loop: int) -> None:
        """Record that tokens of an engine loop are missing, so none of its live requests can be resumed."""
        for request_id in [i for i, kept in self._live.items() if kept.answerer.loop == loop]:
            self.record_ended(request_id, loop)

    def _live_in(self, loop: int, request_id: str) -> JournaledRequest | None:
        """Return a live request; None if another loop answers it by now."""
        kept = self._live.get(request_id)
        return kept if kept and kept.answerer.loop == loop else None

    def _drop_parked(self, more: int = 0) -> None:
        """Drop the parked requests whose time has passed, and the oldest ones until ``more`` bytes have room."""
        while self._parked:
            oldest = next(iter(self._parked))
            if self._needed + more <= JOURNAL_BYTES and not self._is_expired(self._parked[oldest]):
                return
            self._forget(oldest)

    def flush(self) -> None:
        """Write the records since the last flush. They survive a crash of this process; see ``sync``.

        Unless there are copies, call it after the readers have their tokens, so that they do not wait for the disk.
        """
        self._drop_parked()
        if self._pending and self._clock() - self._noted_live_at >= JOURNAL_LIVE_S:
            self._pending.append(self._pack_still_live())
        records = b"".join(self._pending)
        self._pending.clear()
        if records and self.copies:
            self._copy(records, self.copies)
        if self.problem:
            if self._monotonic() >= self._retry_at:
                self._rewrite()
        elif self._has_much_to_drop(self._size) and self._monotonic() >= self._retry_at:
            self._compact(records)
        elif records:
            self._append(records)

    def sync(self) -> bool:
        """Flush what was written to the disk if that is due. Return False if that switched the journal off."""
        now = self._monotonic()
        due = self._fsync is Fsync.ALWAYS or (self._fsync is Fsync.SECOND and now - self._synced >= JOURNAL_FSYNC_S)
        if not due or not self._is_unsynced or self.problem:
            return True
        try:
            os.fsync(self._file)
        except OSError as e:
            self._switch_off(e)
            return False
        self._synced, self._is_unsynced = now, False
        return True

    def copy(self, take: Callable[[bytes], None]) -> None:
        """Give the whole journal to ``take``. What ``copies`` gets from then on follows it."""
        self.flush()
        content = self._content()
        self._copied = max(self._copied, len(content))
        take(content)

    def _copy(self, records: bytes, copies: JournalCopies) -> None:
        copies.append(records)
        self._copied += len(records)
        if self._has_much_to_drop(self._copied):
            content = self._content()
            self._copied = len(content)
            copies.replace(content)

    def close(self) -> None:
        """Write the remaining records and close the file."""
        self.flush()
        self.sync()
        self._close_file()

    def _forget(self, request_id: str) -> None:
        self._previous.pop(request_id, None)
        if mine := self._live.pop(request_id, None) or self._parked.pop(request_id, None):
            self._needed -= _token_bytes(mine)
        self._needed -= len(self._records.pop(request_id, b""))

    def _record(self, record: bytes) -> None:
        if not self.problem or self.copies:  # while off, the next rewrite contains all live requests
            self._pending.append(record)

    def _append(self, records: bytes) -> None:
        try:
            write_all(self._file, records)
            self._size += len(records)
            self._is_unsynced = True
        except OSError as e:
            with suppress(OSError):  # if this fails too, the checksum shows that the last record is incomplete
                os.ftruncate(self._file, self._size)
            self._switch_off(e)

    def _pack_still_live(self) -> bytes:
        """Return the record of the requests that are live now; b"" if there are none.

        ``RESUME_S`` counts from the time when a request was last known to be live.
        """
        self._noted_live_at = self._clock()
        for kept in self._live.values():
            kept.at = self._noted_live_at
        return pack_record(_STILL_LIVE, "", self._noted_live_at, list(self._live)) if self._live else b""

    def _has_much_to_drop(self, size: int) -> bool:
        return size > JOURNAL_BYTES and size - self._needed > JOURNAL_BYTES // 8

    def _compact(self, records: bytes) -> None:
        """Replace the file, or go on with the old one: a disk may have room for records but not for a second file."""
        try:
            self._replace()
        except OSError as e:
            if self._size > MOST_JOURNAL_SIZES * JOURNAL_BYTES:
                self._switch_off(e)
                return
            log.warning("journal: cannot compact file reason=%s path=%s", e.strerror or type(e).__name__, self._path)
            self._retry_at = self._monotonic() + JOURNAL_RETRY_S
            if records:
                self._append(records)
        else:
            self._switch_on()

    def _rewrite(self) -> None:
        """Replace the file, or switch the journal off."""
        try:
            self._replace()
        except OSError as e:
            self._switch_off(e)
        else:
            self._switch_on()

    def _replace(self) -> None:
        """Replace the file with one that holds only live requests. On failure, keep the old file and raise OSError."""
        for request_id in [i for i, kept in self._previous.items() if self._is_expired(kept)]:
            self._forget(request_id)
        make_private_folder(self._path.parent)
        content = self._content()
        # always the same name, since a crash leaves the file, and it contains answers
        file = replace_and_open(self._path, content, self._path.with_suffix(".new"))
        self._close_file()
        self._file, self._size, self._is_unsynced = file, len(content), False

    def _content(self) -> bytes:
        """Return a journal that holds only live and parked requests, and the ids of those that ended."""
        mine = {**self._live, **self._parked}
        answers = (pack_record(_ALL_TOKENS, i, kept.tokens) for i, kept in mine.items())
        parked = (pack_record(_PARKED, i, k.at) for i, k in (*self._previous.items(), *mine.items()) if k.parked)
        ended = (pack_record(_ALL_ENDED, "", self._ended.as_data()),) if self._ended.as_data() else ()
        return b"".join((HEADER, *self._records.values(), *answers, *parked, *ended, self._pack_still_live()))

    def _switch_off(self, error: OSError) -> None:
        why = error.strerror or type(error).__name__
        if not self.problem:
            log.error("journal: switched off reason=%s path=%s", why, self._path)
        self.problem = f"the journal is off, since {self._path} cannot be written ({why})"
        self._retry_at = self._monotonic() + JOURNAL_RETRY_S

    def _switch_on(self) -> None:
        if self.problem:
            log.warning("journal: switched on again path=%s live=%d", self._path, len(self._live))
        self.problem = ""

    def _close_file(self) -> None:
        if self._file >= 0:
            with suppress(OSError):
                os.close(self._file)
        self._file = -1


def _token_bytes(kept: JournaledRequest) -> int:
    """Return the maximum size of an answer so far in a rewritten file."""
    return _TOKEN_BYTES * sum(map(len, kept.tokens))


def _pack_opened(kept: JournaledRequest) -> bytes:
    """Return the record of a request and its answer so far. Raises ``TypeError`` if a field is not plain data."""
    by = kept.answerer
    return pack_record(
        _OPENED, kept.request.id, kept.at, as_data(kept.request), kept.tokens, by.deployment, by.fingerprint
    )


def _read_live(path: Path, now: float, ended: EndedRequests) -> dict[str, JournaledRequest]:
    """Return the live and parked requests in the file, by id, and add those that ended to ``ended``.

    If the file is cut off or damaged, use the records before that. Times after ``now`` are set to ``now``: they mean
    that the wall clock was set back.
    """
    found: dict[str, JournaledRequest] = {}
    try:
        with open_regular_file(path) as file:
            for record in read_records(file):
                _apply_record(found, ended, *record)
    except FileNotFoundError:
        return {}
    except OSError as e:
        log.warning("journal: file not read reason=%s path=%s", e.strerror, path)
    except (TypeError, ValueError, KeyError, IndexError) as e:
        log.warning("journal: damaged record, rest of file ignored reason=%s path=%s", type(e).__name__, path)
    for kept in found.values():
        kept.at = min(kept.at, now)
    return found


def _apply_record(
    found: dict[str, JournaledRequest], ended: EndedRequests, kind: int, request_id: str, *values: Any
) -> None:
    if kind == _OPENED:
        at, request, tokens, *by = values
        kept = JournaledRequest(from_data(request), at, tokens, _read_answerer(*by))
        found[request_id] = _require_valid(kept, request_id)
        ended.forget(request_id)
    elif kind == _TOKEN:
        token, sample = values
        found[request_id].tokens[sample].append(*token_ids([token]))
    elif kind == _ALL_TOKENS:
        (tokens,) = values
        found[request_id].tokens = _require_tokens(tokens, found[request_id].request.samples)
    elif kind == _ENDED:
        was = found.pop(request_id, None)
        if was and was.request.resumable and values:
            ended.read([(request_id, was.request.client, *values)])
    elif kind == _PARKED:
        (at,) = values
        found[request_id].parked, found[request_id].at = True, _require_time(at)
    elif kind == _ALL_ENDED:
        ended.read(*values)
    elif kind == _STILL_LIVE:
        at, live = values
        for live_id in live:
            found[live_id].at = _require_time(at)
    else:
        raise ValueError("unknown kind of record")


def _read_answerer(deployment: Any = "", fingerprint: Any = "") -> Answerer:
    if type(deployment) is not str or type(fingerprint) is not str:
        raise TypeError("the name of a deployment or of its model is not a string")
    return Answerer(deployment, fingerprint)


def _require_valid(kept: JournaledRequest, request_id: object) -> JournaledRequest:
    """Return ``kept`` if every field has the type that it was written with. Raises ``TypeError``."""
    if kept.request.id != request_id:
        raise TypeError("the request id of the record does not match its request")
    _require_time(kept.at)
    _require_tokens(kept.tokens, kept.request.samples)
    return kept


def _require_time(at: Any) -> float:
    if type(at) not in (int, float):
        raise TypeError("a time is not a number")
    return float(at)


def _require_tokens(tokens: Any, samples: int) -> list[list[int]]:
    if type(tokens) is not list or len(tokens) != samples or not all(type(answer) is list for answer in tokens):
        raise TypeError("the answer is not one list of token ids per sample")
    for answer in tokens:
        token_ids(answer)
    return tokens


def _require_round_trip(request: Request) -> None:
    """Raise ``TypeError`` or ``ValueError`` if writing and reading the request does not restore it exactly."""
    record = _pack_opened(JournaledRequest(request, 0.0))
    if from_data(unpack_record(record)[3]) != request:
        raise TypeError("the request has fields that the journal cannot store")
