"""Write the journal on a thread of its own, so that engine loops wait neither for the disk nor for each other."""

from __future__ import annotations

import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Final, Protocol

from cluster.coordinator.event_gate import EventGate
from cluster.coordinator.journal import Answerer, AnswerTokens, Journal, JournalCopies, JournaledRequest
from cluster.core.journal_limits import JOURNAL_BATCHES, JOURNAL_RETRY_S
from cluster.core.limits import LOOP_STOP_S, RESUME_S
from cluster.core.request import Request
from cluster.platform.continuous_clock import continuous_seconds

__all__ = ["JournalReplication", "JournalWriter", "LoopJournal"]

log = logging.getLogger(__name__)

_Record = Callable[[Journal], None]
_MOST_AT_ONCE: Final = 64
"""Most batches between two writes, so that no record waits for long."""
_ENDS_WITH_THIS: Final = "answers continue, but cannot be resumed if the coordinator ends now"
_ELSEWHERE: Final = "answers continue, and a standby that is in sync can resume them"
_TOO_SLOW: Final = (
    "the journal is off, since its disk does not keep up: answers continue, but those that are live now cannot be "
    "resumed if the coordinator ends"
)


class JournalReplication(JournalCopies, Protocol):
    """Has the journal stored on other machines. Called on the journal's thread."""

    @property
    def has_standby_in_sync(self) -> bool:
        """Whether another machine has all that clients saw. Any thread may ask."""

    def written(self, number: int, problem: str) -> None:
        """Take note that all batches up to ``number`` are written here, or why they are not.

        Their records were given to ``append`` before.
        """


class JournalWriter:
    """Gives each engine loop its own part of one ``Journal``, and writes what they record.

    If they have a ``gate``, their events wait there until ``replication`` has stored what they recorded before.
    ``lacks_earlier``: an earlier leader has answers that are not in this journal. ``clock`` returns seconds, and counts
    sleep.
    """

    def __init__(
        self,
        journal: Journal,
        most_batches: int = JOURNAL_BATCHES,
        replication: JournalReplication | None = None,
        gated: bool = False,
        *,
        lacks_earlier: bool = False,
        clock: Callable[[], float] = continuous_seconds,
    ) -> None:
        self._journal = journal
        self._replication = journal.copies = replication
        self.gate = EventGate(lambda: self._queued) if gated else None
        self._clock = clock
        self._lacks_until = clock() + RESUME_S if lacks_earlier else -math.inf
        self._numbering = threading.Lock()
        self._queued = self._applied = 0
        """Numbers of the last batch that was queued, and of the last one that is in the journal."""
        self._frozen = False
        self._batches: queue.Queue[list[_Record] | None] = queue.Queue(most_batches)
        self._loops = itertools.count(1)
        self._dropped_at = -JOURNAL_RETRY_S
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    @property
    def problem(self) -> str:
        """Why the journal is off, as a sentence; empty while it is on."""
        if self._journal.problem:
            is_elsewhere = self._replication is not None and self._replication.has_standby_in_sync
            risk = _ELSEWHERE if is_elsewhere else _ENDS_WITH_THIS
            return f"{self._journal.problem}: {risk}; the journal is retried every {JOURNAL_RETRY_S:.0f} s"
        too_slow = time.monotonic() - self._dropped_at < JOURNAL_RETRY_S
        return _TOO_SLOW if too_slow else ""

    def take(self, request_id: str, client: str) -> JournaledRequest | None:
        """Return a request of the previous coordinator, see ``Journal.take``."""
        return self._journal.take(request_id, client)

    def has_ended(self, request_id: str, client: str) -> bool:
        """Return whether a request has ended and cannot be resumed, see ``Journal.has_ended``."""
        return self._journal.has_ended(request_id, client)

    @property
    def lacks_earlier(self) -> bool:
        """Whether clients may still look here for answers that only an earlier leader has."""
        return self._clock() < self._lacks_until

    def flushed(self) -> Future[None]:
        """Return a future that is done once all records that are queued now count."""
        done: Future[None] = Future()
        if self._thread.ident is None or not self.queue([lambda journal: done.set_result(None)]):
            done.set_result(None)
        return done

    def open_loop(self, deployment: str, fingerprint: str) -> LoopJournal:
        """Return the recorder of an engine loop that serves this model for this deployment."""
        self._start()
        return LoopJournal(self, Answerer(deployment, fingerprint, next(self._loops)))

    def queue(self, batch: list[_Record]) -> bool:
        """Queue records. Return False, and drop them, if the disk does not keep up. Any thread may call this."""
        try:
            with self._numbering:
                self._batches.put_nowait(batch)
                self._queued += 1
        except queue.Full:
            self._dropped_at = time.monotonic()
            return False
        return True

    def copy(self, take: Callable[[bytes], None]) -> bool:
        """Have the whole journal given to ``take``, on the journal's thread. Return False if its disk is behind."""
        self._start()
        return self.queue([lambda journal: journal.copy(take)])

    def freeze(self) -> int:
        """Record nothing any more: live requests are to be resumed from what is recorded by now.

        Return the number of the last batch. The gate lets no event pass that has its records in a later one.
        """
        with self._numbering:
            with suppress(queue.Full):
                self._batches.put_nowait([lambda _: self._freeze()])
                self._queued += 1
            if self.gate:
                self.gate.close_after(self._queued)
            return self._queued

    def _freeze(self) -> None:
        self._frozen = True

    def _start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def close(self) -> None:
        """Write what is queued, within ``LOOP_STOP_S``. Call it after the engine loops have ended."""
        if self._thread.ident is None:
            return
        try:
            self._batches.put(None, timeout=LOOP_STOP_S)
        except queue.Full:
            log.error("journal: not closed, its disk does not answer")
            return
        self._thread.join(LOOP_STOP_S)

    def _run(self) -> None:
        while True:
            try:
                batches = [self._batches.get(timeout=JOURNAL_RETRY_S if self._journal.problem else None)]
            except queue.Empty:
                batches = []
            while len(batches) < _MOST_AT_ONCE and not self._batches.empty():
                batches.append(self._batches.get())
            for batch in batches:
                self._apply(batch or [])
            if None in batches:
                self._journal.close()
                self._report()  # so that the last events leave: they say why the requests end
                return
            self._journal.flush()
            self._report()
            if not self._journal.sync():
                self._report()

    def _report(self) -> None:
        if self._replication:
            self._replication.written(self._applied, self._journal.problem)

    def _apply(self, batch: list[_Record]) -> None:
        self._applied += 1
        for record in batch if not self._frozen else ():
            try:
                record(self._journal)
            except Exception:  # top of the thread: other requests are still to be recorded
                log.exception("journal: record lost")


class LoopJournal:
    """The part of a journal that belongs to one engine loop. Its methods are called on the loop's thread.

    If the disk does not keep up, records are lost, and then the live requests of this loop cannot be resumed.
    """

    def __init__(self, writer: JournalWriter, answerer: Answerer) -> None:
        self._writer, self._answerer = writer, answerer
        self._batch: list[_Record] = []
        self._has_gap = False

    def record_opened(self, request: Request, tokens: AnswerTokens) -> None:
        """Record an accepted request. ``tokens`` are those that its samples already have, () for none."""
        self._batch.append(lambda journal: journal.record_opened(request, tokens, self._answerer))

    def record_token(self, request_id: str, token: int, sample: int) -> None:
        """Record a token of a live request. Ignore other requests."""
        self._batch.append(lambda journal: journal.record_token(request_id, token, sample, self._answerer.loop))

    def record_ended(self, request_id: str) -> None:
        """Record the end of a live request. Ignore other requests."""
        self._batch.append(lambda journal: journal.record_ended(request_id, self._answerer.loop))

    def record_parked(self, request_id: str) -> None:
        """Record that a live request has no reader any more, but may be resumed. Ignore other requests."""
        self._batch.append(lambda journal: journal.record_parked(request_id, self._answerer.loop))

    def flush(self) -> None:
        """Hand the records since the last flush to the journal's thread."""
        if not self._batch:
            return
        batch, self._batch = self._batch, []
        if self._has_gap:
            batch.insert(0, lambda journal: journal.record_gap(self._answerer.loop))
        has_gap = not self._writer.queue(batch)
        if has_gap and not self._has_gap:
            log.warning("journal: records dropped, its disk does not keep up deployment=%s", self._answerer.deployment)
        self._has_gap = has_gap
