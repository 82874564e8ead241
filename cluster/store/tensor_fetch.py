"""Fills a partial checkpoint with the wanted tensors from peers and the hub, and verifies each tensor.

A ``Fetch`` belongs to one load and works in rounds. Each round assigns the missing tensors to sources: a peer that has
the tensor, else the hub. A source that failed or sent wrong bytes is not asked for that tensor again. ``run`` blocks,
with threads of its own, until all tensors are present or no source is left. Sources are anything that can read ranges;
this module knows nothing of gRPC or HTTP.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

from cluster.core.errors import (
    Aborted,
    DiskFull,
    FetchFailed,
    InvalidOption,
    MacpipeError,
    ModelDiffers,
    ModelNotFound,
)
from cluster.core.limits import FETCH_TICK_S
from cluster.model.checkpoint import TensorInfo
from cluster.store.digest_manifest import DigestManifest
from cluster.store.disk_quota import make_room
from cluster.store.disk_space import free_bytes, require_room
from cluster.store.hub import Hub
from cluster.store.limits import CHECK_S, DEFER_S, FETCH_RANGE_BYTES, FETCH_STREAMS, MAX_NOTICES, MAX_TENSORS_NAMED
from cluster.store.model_files import StoredFile
from cluster.store.partial_checkpoint import PartialCheckpoint
from cluster.store.peer_client import Holdings, Peer
from cluster.store.range_download import CountedRanges, RangeDownload, fetch_run

log = logging.getLogger(__name__)

Free = Callable[[Path], int]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Names of the tensors to fetch. For those in ``deferred``, wait for a peer that fetches them first."""

    tensors: tuple[str, ...]
    deferred: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Fetched:
    """The progress of a fetch, in bytes.

    ``done`` of ``total`` are present, including bytes from before the fetch. ``hub`` and ``peers`` count the bytes
    received from each kind of source.
    """

    done: int
    total: int
    hub: int
    peers: int
    notices: tuple[str, ...] = ()
    """Messages for the user about damaged bytes."""

    @property
    def state(self) -> str:
        """The activity to show to the user: ``checking`` if all bytes are present already, else ``fetching``."""
        return "fetching" if self.hub or self.peers or self.done < self.total else "checking"


class Fetch:
    """Fetches and verifies every wanted tensor of ``partial``. ``stop`` ends it between two pieces."""

    def __init__(
        self,
        partial: PartialCheckpoint,
        manifest: DigestManifest,
        wanted: Wanted,
        *,
        peers: Sequence[Peer] = (),
        hub: Hub | None = None,
        stop: Event,
        what: str = "the model",
        free: Free = free_bytes,
    ) -> None:
        self._partial = partial
        self._manifest = manifest
        self._wanted = wanted
        self._peers = peers
        self._hub = hub
        self._stop = stop
        self._what = what
        self._free = free
        self._tensors = [partial.tensors[name] for name in wanted.tensors]
        self._holdings: dict[Peer, Holdings] = {}
        self._failed: dict[tuple[str, str], MacpipeError] = {}
        self._lock = Lock()
        self._notices: dict[str, None] = {}
        self._began = time.monotonic()
        self._total = sum(tensor.nbytes for tensor in self._tensors)
        self._counted = CountedRanges()

    @property
    def progress(self) -> Fetched:
        """The current progress. May be read from any thread."""
        missing = sum(self._partial.missing_bytes(tensor) for tensor in self._tensors)
        counted = self._counted
        return Fetched(
            self._total - missing, self._total, counted.hub, counted.peers, tuple(self._notices)[:MAX_NOTICES]
        )

    def run(self) -> None:
        """Fetch and verify all wanted tensors.

        Raise DiskFull before the first byte is fetched, Aborted once stopped, ModelDiffers if sources have different
        bytes of a tensor, and FetchFailed or the last source's error if no source can provide a tensor.
        """
        self._verify([tensor for tensor in self._tensors if tensor.name not in self._partial.verified], None)
        missing = self._missing_tensors()
        needed = sum(self._partial.missing_bytes(tensor) for tensor in missing)
        make_room(self._partial.folder.parent.parent, needed, self._what)
        require_room(self._partial.folder, needed, self._free(self._partial.folder), self._what)
        self._fetch(missing)
        if self._drop_mismatched_file():  # it is unknown which source sent the wrong bytes, so all may try once more
            self._fetch(self._missing_tensors())
            if bad := self._drop_mismatched_file():
                raise FetchFailed(
                    f"{bad.name} of {self._what} was fetched twice, but does not match the hub's hash (sha256 "
                    f"{bad.sha256[:12]}). It counts as not fetched; try again, or ask the model's publisher",
                    file=bad.name,
                )
        self._partial.seal()

    def _fetch(self, missing: list[TensorInfo]) -> None:
        """Fetch in rounds until nothing is missing."""
        while missing:
            self._ask_peers([tensor.name for tensor in missing])
            runs = self._assign(missing)
            self._fetch_runs(runs)
            if not runs:
                self._pause()
            missing = self._missing_tensors()

    def _missing_tensors(self) -> list[TensorInfo]:
        verified = self._partial.verified
        return [t for t in self._tensors if t.name not in verified or self._partial.missing_bytes(t)]

    def _pause(self) -> None:
        if self._stop.wait(FETCH_TICK_S):
            raise Aborted("the load was cancelled")

    # Sources

    def _ask_peers(self, names: Sequence[str]) -> None:
        """Ask every peer which of these tensors it has. A peer that does not answer has none."""
        with ThreadPoolExecutor(FETCH_STREAMS, thread_name_prefix="ask") as pool:
            answers = list(pool.map(lambda peer: _ask_peer(peer, names), self._peers))
        self._holdings = dict(zip(self._peers, answers, strict=True))
        for peer, held in self._holdings.items():
            for name in sorted(held.damaged.intersection(names)):
                self._notice(f"{peer.label} reports that its copy of the tensor {name} is damaged")

    def _expected_digest(self, name: str) -> str:
        """Return a tensor's expected digest, or an empty string if unknown. Raise ModelDiffers if peers disagree."""
        if known := self._manifest.known.get(name) or self._partial.recorded_digest(name):
            return known
        reported = {held.digests[name]: peer for peer, held in self._holdings.items() if name in held.digests}
        if len(reported) > 1:
            whose = " and ".join(peer.label for peer in reported.values())
            raise ModelDiffers(
                f"{whose} have different bytes of the tensor {name}; fetch the model again on one of them", tensor=name
            )
        return next(iter(reported), "")

    def _assign(self, missing: Iterable[TensorInfo]) -> list[RangeDownload]:
        """Assign tensors to sources for this round. A tensor that a peer will have later waits for a later round."""
        chosen: dict[Peer | Hub, list[TensorInfo]] = {}
        for tensor in missing:
            source = self._source(tensor.name)
            if source is not None:
                chosen.setdefault(source, []).append(tensor)
        return [run for source, tensors in chosen.items() for run in _group_runs(source, tensors)]

    def _source(self, name: str) -> Peer | Hub | None:
        """Return the source to ask, or None to wait. Raise the last failure if no source is left."""
        peers = [p for p in self._peers if name in self._holdings[p].here and (name, p.label) not in self._failed]
        if peers:
            return peers[hash(name) % len(peers)]
        if self._peer_may_fetch(name) or self._peer_may_verify(name):
            return None
        if self._hub and (name, self._hub.label) not in self._failed:
            return self._hub
        if failures := [error for (tensor, _), error in self._failed.items() if tensor == name]:
            raise failures[-1]
        raise FetchFailed(
            f"no source has the tensor {name} of {self._what}: neither this Mac, nor the coordinator's folder, nor "
            "another worker. Copy the model's folder to this Mac, or load the model by its Hugging Face id",
            tensor=name,
        )

    def _peer_may_fetch(self, name: str) -> bool:
        """Return whether another worker is fetching the tensor, or may still begin to."""
        if name not in self._wanted.deferred:
            return False
        return any(name in held.coming for held in self._holdings.values()) or self._seconds_waited() < DEFER_S

    def _peer_may_verify(self, name: str) -> bool:
        """Return whether a peer rechecks its copy of the tensor. That waits for no other Mac, so it ends."""
        return any(name in held.checking for held in self._holdings.values()) and self._seconds_waited() < CHECK_S

    def _seconds_waited(self) -> float:
        return time.monotonic() - self._began

    # Fetching

    def _fetch_runs(self, runs: Sequence[RangeDownload]) -> None:
        """Fetch the runs, ``FETCH_STREAMS`` at a time. Raise the first error that no other source can fix."""
        with ThreadPoolExecutor(FETCH_STREAMS, thread_name_prefix="fetch") as pool:
            jobs = [pool.submit(self._fetch_one, run) for run in runs]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                self._counted.stopped = True
                pool.shutdown(cancel_futures=True)
                raise

    def _fetch_one(self, run: RangeDownload) -> None:
        try:
            fetch_run(run, self._partial, self._counted, self._stop)
        except (Aborted, DiskFull, InvalidOption):
            raise  # not the source's fault
        except MacpipeError as error:
            if isinstance(error, ModelNotFound) and isinstance(run.source, Peer) and self._seconds_waited() < CHECK_S:
                self._pause()  # the peer had them a moment ago, and may have begun to recheck them
                return
            log.warning(
                "fetch: source failed reason=%s model=%s tensors=%s source=%s",
                error.sentence,
                self._what,
                run,
                run.source.label,
            )
            self._fail((t for t in run.tensors if self._partial.missing_bytes(t)), run.source, error)
        self._verify(run.tensors, run.source)

    def _verify(self, tensors: Iterable[TensorInfo], source: Peer | Hub | None) -> None:
        """Hash the complete tensors. Drop wrong ones, and do not ask ``source`` for them again."""
        good: list[tuple[str, str]] = []
        for tensor in tensors:
            if self._partial.missing_bytes(tensor) or self._stop.is_set():
                continue
            digest = self._partial.digest(tensor)
            expected = self._expected_digest(tensor.name)
            if expected and digest != expected:
                self._reject(tensor, digest, expected, source)
            else:
                good.append((tensor.name, digest))
        self._manifest.learn(good, source.label if source else "this Mac")
        self._partial.accept(good)

    def _reject(self, tensor: TensorInfo, digest: str, expected: str, source: Peer | Hub | None) -> None:
        whose = source.label if source else "this Mac"
        sentence = (
            f"{whose} has damaged bytes of the tensor {tensor.name} (sha256 {digest[:12]}, expected {expected[:12]})"
        )
        self._notice(f"{sentence}; it is fetched again")
        self._partial.drop(tensor)
        if source:
            self._fail([tensor], source, FetchFailed(f"{sentence}, and no other source has it", tensor=tensor.name))

    def _notice(self, sentence: str) -> None:
        with self._lock:
            if sentence in self._notices:
                return
            self._notices[sentence] = None
        log.warning("fetch: damaged tensor reason=%s", sentence)

    def _fail(self, tensors: Iterable[TensorInfo], source: Peer | Hub, error: MacpipeError) -> None:
        with self._lock:
            self._failed.update({(tensor.name, source.label): error for tensor in tensors})

    def _drop_mismatched_file(self) -> StoredFile | None:
        """Compare complete files with the hub's hashes. Return the first that does not match, or None.

        All tensors of that file are dropped, and their digests are forgotten.
        """
        bad = next((file for file in self._partial.unproved_files() if not self._partial.prove(file)), None)
        if bad:
            log.warning("fetch: file does not match the hub's hash, fetching again file=%s", bad.name)
            tensors = [tensor for tensor in self._partial.tensors.values() if tensor.file == bad.name]
            self._manifest.forget(tensor.name for tensor in tensors)
            for tensor in tensors:
                self._partial.drop(tensor, forget=True)
        return bad


def _ask_peer(peer: Peer, names: Sequence[str]) -> Holdings:
    try:
        return peer.holdings(names)
    except MacpipeError as error:
        log.info("fetch: peer did not answer reason=%s peer=%s", error.sentence, peer.label)
        return Holdings()


def _group_runs(source: Peer | Hub, tensors: Iterable[TensorInfo]) -> list[RangeDownload]:
    """Group tensors that are adjacent in a file into runs of at most ``FETCH_RANGE_BYTES``."""
    runs: list[RangeDownload] = []
    for tensor in sorted(tensors, key=lambda t: (t.file, t.offset, t.end)):
        last = runs[-1] if runs else None
        joins = last and last.file == tensor.file and last.end == tensor.offset
        fits = last and tensor.end - last.start <= FETCH_RANGE_BYTES and len(last.tensors) < MAX_TENSORS_NAMED
        if last and joins and fits:
            runs[-1] = RangeDownload(source, (*last.tensors, tensor))
        else:
            runs.append(RangeDownload(source, (tensor,)))
    return runs
