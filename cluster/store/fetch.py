"""Fetching: fill a partial checkpoint with the tensors that are wanted, from whoever has them, and verify each.

One ``Fetch`` is one load's. It decides in rounds who is asked for what: peers that have a tensor, else the hub; who
gave wrong bytes or none is not asked for that tensor again. It blocks, on threads of its own, until all is there or
nobody is left to ask. It knows sources by what they can read; it knows nothing of gRPC or HTTP.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

from cluster.core.errors import Aborted, DiskFull, FetchFailed, InvalidOption, MacpipeError, ModelDiffers, ModelNotFound
from cluster.core.limits import CHECK_S, DEFER_S, FETCH_RANGE_BYTES, FETCH_STREAMS, FETCH_TICK_S, MAX_NOTICES
from cluster.model.checkpoint import TensorInfo
from cluster.store.digest_manifest import DigestManifest
from cluster.store.disk_space import free_bytes, require_room
from cluster.store.hub import Hub
from cluster.store.model_files import StoredFile
from cluster.store.partial_checkpoint import PartialCheckpoint
from cluster.store.peer_client import Holdings, Peer
from cluster.store.range_download import CountedRanges, RangeDownload, fetch_run

log = logging.getLogger(__name__)

Free = Callable[[Path], int]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Names of tensors; those in ``deferred`` come from a peer that fetches them first."""

    tensors: tuple[str, ...]
    deferred: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Fetched:
    """How far a fetch is. ``done`` counts what was there before; the rest is what came, by source. Bytes."""

    done: int
    total: int
    hub: int
    peers: int
    notices: tuple[str, ...] = ()
    """What a person should know: whose bytes are damaged."""

    @property
    def state(self) -> str:
        """What is being done, for people: where all is here, it is only looked at."""
        return "fetching" if self.hub or self.peers or self.done < self.total else "checking"


class Fetch:
    """Makes every wanted tensor of ``partial`` be there, verified. ``stop`` ends it between two pieces."""

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
        self._partial, self._manifest, self._wanted = partial, manifest, wanted
        self._peers, self._hub, self._stop, self._what, self._free = peers, hub, stop, what, free
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
        """How far it is; may be asked on any thread."""
        missing = sum(self._partial.missing_bytes(tensor) for tensor in self._tensors)
        counted = self._counted
        return Fetched(
            self._total - missing, self._total, counted.hub, counted.peers, tuple(self._notices)[:MAX_NOTICES]
        )

    def run(self) -> None:
        """Fetch. Raises DiskFull before the first byte, Aborted once stopped, ModelDiffers where the sources have
        different models, FetchFailed and what the hub's refusals mean where a tensor can be had from nobody.
        """
        self._verify([tensor for tensor in self._tensors if tensor.name not in self._partial.verified], None)
        missing = self._missing_tensors()
        needed = sum(self._partial.missing_bytes(tensor) for tensor in missing)
        require_room(self._partial.folder, needed, self._free(self._partial.folder), self._what)
        self._fetch(missing)
        if self._find_disproved_file():  # whoever gave wrong bytes is not known, and gets a second chance
            self._fetch(self._missing_tensors())
            if bad := self._find_disproved_file():
                raise FetchFailed(
                    f"all of {bad.name} of {self._what} came, twice, but it is not the file that the hub names (sha256 "
                    f"{bad.sha256[:12]}). It counts as not fetched; try again, or ask who publishes the model",
                    file=bad.name,
                )
        self._partial.seal()

    def _fetch(self, missing: list[TensorInfo]) -> None:
        """Rounds, until all is there."""
        while missing:
            self._look_around([tensor.name for tensor in missing])
            runs = self._assign(missing)
            self._carry_out(runs)
            if not runs:
                self._pause()
            missing = self._missing_tensors()

    def _missing_tensors(self) -> list[TensorInfo]:
        verified = self._partial.verified
        return [t for t in self._tensors if t.name not in verified or self._partial.missing_bytes(t)]

    def _pause(self) -> None:
        if self._stop.wait(FETCH_TICK_S):
            raise Aborted("the load was given up")

    # Who has what

    def _look_around(self, names: Sequence[str]) -> None:
        """Ask every peer what it has of these; one that does not answer has nothing."""
        with ThreadPoolExecutor(FETCH_STREAMS, thread_name_prefix="ask") as pool:
            answers = list(pool.map(lambda peer: _ask(peer, names), self._peers))
        self._holdings = dict(zip(self._peers, answers, strict=True))
        for peer, held in self._holdings.items():
            for name in sorted(held.damaged.intersection(names)):
                self._notice(f"{peer.label} has damaged bytes of the tensor {name}, as it found itself")

    def _expected_digest(self, name: str) -> str:
        """What the tensor must hash to; empty where nobody knows. Raises ModelDiffers where peers say two things."""
        if known := self._manifest.known.get(name) or self._partial.noted_digest(name):
            return known
        said = {held.digests[name]: peer for peer, held in self._holdings.items() if name in held.digests}
        if len(said) > 1:
            whose = " and ".join(peer.label for peer in said.values())
            raise ModelDiffers(
                f"{whose} have different bytes of {name}; load the model anew on one of them", tensor=name
            )
        return next(iter(said), "")

    def _assign(self, missing: Iterable[TensorInfo]) -> list[RangeDownload]:
        """What is asked of whom now; a tensor that should come from a peer by and by is left for a later round."""
        chosen: dict[Peer | Hub, list[TensorInfo]] = {}
        for tensor in missing:
            source = self._source(tensor.name)
            if source is not None:
                chosen.setdefault(source, []).append(tensor)
        return [run for source, tensors in chosen.items() for run in _runs(source, tensors)]

    def _source(self, name: str) -> Peer | Hub | None:
        """Whom to ask; None: not yet. Raises the last failure where nobody is left."""
        peers = [p for p in self._peers if name in self._holdings[p].here and (name, p.label) not in self._failed]
        if peers:
            return peers[hash(name) % len(peers)]
        if self._may_come(name) or self._may_be_sound(name):
            return None
        if self._hub and (name, self._hub.label) not in self._failed:
            return self._hub
        if failures := [error for (tensor, _), error in self._failed.items() if tensor == name]:
            raise failures[-1]
        raise FetchFailed(
            f"nobody has the tensor {name} of {self._what}: not this Mac, not the coordinator's folder, no other "
            "worker. Copy the model's folder to this Mac, or load the model by its Hugging Face id",
            tensor=name,
        )

    def _may_come(self, name: str) -> bool:
        """Whether another worker is fetching the tensor, or may be about to."""
        if name not in self._wanted.deferred:
            return False
        return any(name in held.coming for held in self._holdings.values()) or self._seconds_waited() < DEFER_S

    def _may_be_sound(self, name: str) -> bool:
        """Whether another Mac is looking if it still has the tensor. It waits for nobody itself."""
        return any(name in held.checking for held in self._holdings.values()) and self._seconds_waited() < CHECK_S

    def _seconds_waited(self) -> float:
        return time.monotonic() - self._began

    # Fetching

    def _carry_out(self, runs: Sequence[RangeDownload]) -> None:
        """Fetch the runs, a few at a time. The first error that no other source can mend is raised."""
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
            raise  # no source's fault
        except MacpipeError as error:
            if isinstance(error, ModelNotFound) and isinstance(run.source, Peer) and self._seconds_waited() < CHECK_S:
                self._pause()  # it had them a moment ago, and may have begun to look whether it still has
                return
            log.warning("%s: could not fetch %s from %s: %s", self._what, run, run.source.label, error.sentence)
            self._fail((t for t in run.tensors if self._partial.missing_bytes(t)), run.source, error)
        self._verify(run.tensors, run.source)

    def _verify(self, tensors: Iterable[TensorInfo], source: Peer | Hub | None) -> None:
        """Hash what is complete; what is wrong is dropped, and ``source`` not asked for it again."""
        good: list[tuple[str, str]] = []
        for tensor in tensors:
            if self._partial.missing_bytes(tensor) or self._stop.is_set():
                continue
            digest, expected = self._partial.digest(tensor), self._expected_digest(tensor.name)
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
            self._fail([tensor], source, FetchFailed(f"{sentence}, and nobody else has them", tensor=tensor.name))

    def _notice(self, sentence: str) -> None:
        with self._lock:
            if sentence in self._notices:
                return
            self._notices[sentence] = None
        log.warning("%s", sentence)

    def _fail(self, tensors: Iterable[TensorInfo], source: Peer | Hub, error: MacpipeError) -> None:
        with self._lock:
            self._failed.update({(tensor.name, source.label): error for tensor in tensors})

    def _find_disproved_file(self) -> StoredFile | None:
        """Hold files that are whole by now against the hub's hashes. -> one that is not what it should be, all of whose
        tensors count as not there and not known then.
        """
        bad = next((file for file in self._partial.unproved_files() if not self._partial.prove(file)), None)
        if bad:
            log.warning("%s did not come as the hub has it; it is fetched again", bad.name)
            tensors = [tensor for tensor in self._partial.tensors.values() if tensor.file == bad.name]
            self._manifest.forget(tensor.name for tensor in tensors)
            for tensor in tensors:
                self._partial.drop(tensor, forget=True)
        return bad


def _ask(peer: Peer, names: Sequence[str]) -> Holdings:
    try:
        return peer.holdings(names)
    except MacpipeError as error:
        log.info("%s has nothing to give: %s", peer.label, error.sentence)
        return Holdings()


def _runs(source: Peer | Hub, tensors: Iterable[TensorInfo]) -> list[RangeDownload]:
    """Tensors that lie side by side in a file are asked for together."""
    runs: list[RangeDownload] = []
    for tensor in sorted(tensors, key=lambda t: (t.file, t.offset, t.end)):
        last = runs[-1] if runs else None
        joins = last and last.file == tensor.file and last.end == tensor.offset
        if last and joins and tensor.end - last.start <= FETCH_RANGE_BYTES:
            runs[-1] = RangeDownload(source, (*last.tensors, tensor))
        else:
            runs.append(RangeDownload(source, (tensor,)))
    return runs
