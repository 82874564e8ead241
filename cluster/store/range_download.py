"""Downloads a run of adjacent tensors from one source into a partial checkpoint, and resumes after failures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Event, Lock

from cluster.core.errors import Aborted, Busy, FetchFailed, HubOffline, HubUnreachable, MacpipeError, Unreachable
from cluster.model.checkpoint import TensorInfo
from cluster.store.hub import Hub
from cluster.store.limits import FETCH_ATTEMPTS, FETCH_BACKOFF_S, FETCH_COMMIT_BYTES, FETCH_COMMIT_S
from cluster.store.partial_checkpoint import PartialCheckpoint
from cluster.store.peer_client import Peer


@dataclass(frozen=True, slots=True)
class RangeDownload:
    """Adjacent tensors of one file, in order, and the source to read them from."""

    source: Peer | Hub
    tensors: tuple[TensorInfo, ...]

    @property
    def file(self) -> str:
        return self.tensors[0].file

    @property
    def start(self) -> int:
        return self.tensors[0].offset

    @property
    def end(self) -> int:
        return self.tensors[-1].end

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes ``start .. end - 1`` of the file, in pieces."""
        if isinstance(self.source, Hub):
            return self.source.read(self.file, start, end)
        return self.source.read(self.tensors, start - self.start, end - start)

    def __str__(self) -> str:
        more = f" and {len(self.tensors) - 1} more" if len(self.tensors) > 1 else ""
        return f"{self.tensors[0].name}{more}"


@dataclass
class CountedRanges:
    """Bytes received by kind of source, over all threads of a fetch. ``stopped`` tells the threads to stop."""

    hub: int = 0
    peers: int = 0
    stopped: bool = False
    _lock: Lock = field(default_factory=Lock)

    def add(self, source: Peer | Hub, count: int) -> None:
        with self._lock:
            if isinstance(source, Hub):
                self.hub += count
            else:
                self.peers += count


def fetch_run(run: RangeDownload, partial: PartialCheckpoint, counted: CountedRanges, stop: Event) -> None:
    """Fill the gaps of a run, with retries. Raise the source's last error, Aborted once stopped, or DiskFull."""
    failures = 0
    while gaps := partial.gaps(run.file, run.start, run.end):
        before = counted.hub + counted.peers
        try:
            for start, end in gaps:
                _fill(run, start, end, partial, counted, stop)
        except MacpipeError as error:
            failures = failures + 1 if counted.hub + counted.peers == before else 1
            if not _is_retryable(error) or failures >= FETCH_ATTEMPTS:
                raise
            if stop.wait(FETCH_BACKOFF_S * 2 ** (failures - 1)):
                raise Aborted("the load was cancelled") from error


def _is_retryable(error: MacpipeError) -> bool:
    return isinstance(error, HubUnreachable | FetchFailed | Busy | Unreachable) and not isinstance(error, HubOffline)


def _fill(
    run: RangeDownload, start: int, end: int, partial: PartialCheckpoint, counted: CountedRanges, stop: Event
) -> None:
    """Write one gap and record it piece by piece, so that bytes received before an error are kept."""
    file = partial.writer(run.file)
    noted = at = start
    due = time.monotonic() + FETCH_COMMIT_S
    try:
        for data in run.read(start, end):
            if stop.is_set() or counted.stopped:
                raise Aborted("the load was cancelled")
            partial.write(file, data, at)
            at += len(data)
            counted.add(run.source, len(data))
            if at - noted >= FETCH_COMMIT_BYTES or time.monotonic() >= due:
                partial.note(file, run.file, noted, at)
                noted, due = at, time.monotonic() + FETCH_COMMIT_S
    finally:
        try:
            if at > noted:
                partial.note(file, run.file, noted, at)
        finally:
            os.close(file)
