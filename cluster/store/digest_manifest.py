"""What the tensors of one model hash to, as far as this Mac has learned it. The first to be seen counts.

A manifest knows names and SHA-256 digests, and nothing of where bytes are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock

from cluster.core.errors import MacpipeError, ModelDiffers
from cluster.store.append_log import AppendLog, Entry
from cluster.store.model_files import is_digest

log = logging.getLogger(__name__)


class DigestManifest:
    """The digests known for the model ``fingerprint``, kept in ``home``. Digests are lower-case hex. Thread-safe."""

    def __init__(self, home: Path, fingerprint: str) -> None:
        self.path = home / "manifests" / f"{fingerprint}.jsonl"
        self._journal = AppendLog(self.path)
        self._writing = Lock()
        self._known: dict[str, str] = {}
        for entry in self._journal.entries():
            match entry:
                case [str(name), ""]:
                    self._known.pop(name, None)
                case [str(name), str(digest)] if is_digest(digest):
                    self._known.setdefault(name, digest)

    @property
    def known(self) -> Mapping[str, str]:
        return self._known

    def learn(self, digests: Iterable[tuple[str, str]], whose: str) -> None:
        """Add what ``whose`` copy hashes to. Raises ModelDiffers, naming the tensor, where it is known otherwise."""
        with self._writing:
            fresh: dict[str, str] = {}
            for name, digest in digests:
                if (self._known.get(name) or fresh.setdefault(name, digest)) != digest:
                    raise self._differs(name, digest, whose)
            fresh = {name: digest for name, digest in fresh.items() if name not in self._known}
            self._known.update(fresh)
            self._keep([name, digest] for name, digest in fresh.items())

    def forget(self, names: Iterable[str]) -> None:
        """What was learned of these was wrong."""
        with self._writing:
            gone = [name for name in names if self._known.pop(name, None)]
            self._keep([name, ""] for name in gone)

    def _keep(self, entries: Iterable[Entry]) -> None:
        """Write what is known already: where that fails, it is so until this process ends, and learned anew then."""
        try:
            self._journal.append(entries)
        except MacpipeError as e:
            log.warning("manifest: not kept reason=%s", e.sentence)

    def _differs(self, name: str, digest: str, whose: str) -> ModelDiffers:
        return ModelDiffers(
            f"{whose} has other bytes of the tensor {name} than this model had before (sha256 {digest[:12]}, expected "
            f"{self._known.get(name, '')[:12]}): that copy is damaged or of another version. Remove it and load again; "
            f"if it is the right one, remove {self.path}",
            tensor=name,
        )
