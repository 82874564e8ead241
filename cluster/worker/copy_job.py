"""One load's work on a quantized copy, on threads: what it lacks, and which other Macs can give that.

A copy is taken for a model only if it was made from that model's tensors, by their digests. It knows stores; the engine
computes what no Mac has.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Event

from cluster.core.errors import Aborted, MacpipeError
from cluster.core.plan import LayerRange
from cluster.security.trust import Trust
from cluster.store.digest_manifest import DigestManifest
from cluster.store.disk_quota import make_room
from cluster.store.disk_space import free_bytes, require_room
from cluster.store.folder_digests import hash_tensors
from cluster.store.model_files import is_digest
from cluster.store.peer_client import Peer
from cluster.store.quantized_copy import CopyKey, QuantizedCopy, agree, require_copy
from cluster.store.store import Store
from cluster.store.store_server import StoreServer
from cluster.store.tensor_fetch import Fetch, Fetched, Wanted
from cluster.worker.load_job import WantedBytes, open_peers

__all__ = ["CopyJob"]

log = logging.getLogger(__name__)


class CopyJob:
    """The copy with ``key`` for a stage with ``layers``; all methods but ``progress`` run on threads."""

    def __init__(
        self,
        store: Store,
        trust: Trust,
        store_server: StoreServer,
        wanted: WantedBytes,
        key: CopyKey,
        layers: LayerRange,
        stop: Event,
    ) -> None:
        self._store, self._trust, self._store_server, self._wanted = store, trust, store_server, wanted
        self._key, self._layers, self._stop = key, layers, stop
        self._running: Fetch | None = None

    @property
    def progress(self) -> Fetched | None:
        """The progress of the fetch from other Macs; None if nothing was fetched."""
        return self._running.progress if self._running else None

    def look_up(self) -> tuple[QuantizedCopy | None, bool]:
        """Return the copy (None if it was not laid out yet), and whether it has all tensors of the stage.

        If this Mac has the model's own files, a copy of other tensors than theirs loses its tensors. Their digests are
        cached, so that usually no tensor is read. Raise as ``Store.find_whole`` and ``QuantizedCopy.bind``.
        """
        copy = self._store.find_copy(self._key)
        if copy is None:
            return None, False
        if copy.sources and (whole := self._store.find_whole(self._wanted.model)):
            own = hash_tensors(self._store.home, whole.folder, self._wanted.tensors, self._stop)
            if not copy.agrees(own):
                copy.bind(own)
        return copy, self._is_complete(copy)

    def _is_complete(self, copy: QuantizedCopy) -> bool:
        """Return whether the copy has the stage's tensors, and knows what they were made from."""
        return copy.sources.keys() >= set(self._wanted.tensors) and not copy.missing(self._layers)

    def take(self) -> bool:
        """Fetch what the copy lacks from other Macs that have made it. Return whether it is complete then.

        A Mac counts only if it says from which tensors it was made, and no digest contradicts those known here.
        """
        copy = require_copy(self._store.models, self._key.digest)
        with open_peers(self._trust, self._wanted.peers, copy.partial.fingerprint) as peers:
            sources, makers = self._agreed_sources(copy, peers)
            missing = copy.missing(self._layers)
            if not makers or not sources.keys() >= set(self._wanted.tensors) or not _have(makers, missing):
                return False
            copy.bind({name: sources[name] for name in self._wanted.tensors})
            try:
                self._fetch(copy, missing, makers)
            except Aborted:
                raise
            except MacpipeError as error:  # this Mac can still make the copy itself
                log.info("copy: not fetched from other Macs reason=%s model=%s", error.sentence, self._wanted.what)
                return False
        return self._is_complete(copy)

    def _agreed_sources(self, copy: QuantizedCopy, peers: Sequence[Peer]) -> tuple[dict[str, str], list[Peer]]:
        """Return the digests of the sources of the copy here and elsewhere, and the peers with the same sources."""
        sources, makers = dict(copy.sources), list[Peer]()
        known = DigestManifest(self._store.home, self._wanted.model.fingerprint).known
        for peer in peers:
            told = self._ask_sources(peer)
            if told and agree(told, sources) and agree(told, known):
                sources |= told
                makers.append(peer)
        return sources, makers

    def _ask_sources(self, peer: Peer) -> dict[str, str]:
        """Return the digests of what the peer's copy was made from; none if it has no copy."""
        try:
            told = peer.holdings(self._wanted.tensors, sources=True).digests
        except MacpipeError as error:
            log.debug("copy: peer has none peer=%s reason=%s", peer.label, error.sentence)
            return {}
        wanted = set(self._wanted.tensors)
        return {name: digest for name, digest in told.items() if name in wanted and is_digest(digest)}

    def prepare(self, sources: Mapping[str, str]) -> None:
        """Get ready to compute what the copy lacks from these sources. Raise DiskFull or InvalidOption."""
        copy = require_copy(self._store.models, self._key.digest)
        copy.bind(sources)
        partial = copy.partial
        needed = sum(partial.tensors[name].nbytes for name in copy.missing(self._layers))
        what = f"{self._wanted.what}, quantized,"
        make_room(self._store.home, needed, what)
        require_room(partial.folder, needed, free_bytes(partial.folder), what)

    def _fetch(self, copy: QuantizedCopy, missing: Sequence[str], makers: Sequence[Peer]) -> None:
        item = self._store_server.share(copy.partial.folder, copy.partial)
        self._running = Fetch(
            copy.partial, item.manifest, Wanted(tuple(missing)), peers=makers, stop=self._stop, what=self._wanted.what
        )
        item.coming = frozenset(missing)
        try:
            self._running.run()
        finally:
            item.coming = frozenset()


def _have(peers: Sequence[Peer], names: Sequence[str]) -> bool:
    """Return whether each tensor is at one of the peers."""
    here: set[str] = set()
    for peer in peers:
        with suppress(MacpipeError):
            here |= peer.holdings(names).here
    return here >= set(names)
