"""The known SHA-256 digests of one model's tensors. The first digest seen for a tensor is the reference.

A manifest knows names and digests, and nothing of where the bytes are.
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
    """The known digests of the model ``fingerprint``, saved in ``home``. Digests are lower-case hex. Thread-safe."""

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
        """Add the digests of the copy on ``whose``. Raise ModelDiffers if one contradicts a known digest."""
        with self._writing:
            fresh: dict[str, str] = {}
            for name, digest in digests:
                if (self._known.get(name) or fresh.setdefault(name, digest)) != digest:
                    raise self._differs(name, digest, whose)
            fresh = {name: digest for name, digest in fresh.items() if name not in self._known}
            self._known.update(fresh)
            self._keep([name, digest] for name, digest in fresh.items())

    def forget(self, names: Iterable[str]) -> None:
        """Delete the digests of these tensors: they were wrong."""
        with self._writing:
            gone = [name for name in names if self._known.pop(name, None)]
            self._keep([name, ""] for name in gone)

    def _keep(self, entries: Iterable[Entry]) -> None:
        """Persist entries. If that fails, they are known until this process ends and are learned again after that."""
        try:
            self._journal.append(entries)
        except MacpipeError as e:
            log.warning("manifest: cannot save digests reason=%s", e.sentence)

    def _differs(self, name: str, digest: str, whose: str) -> ModelDiffers:
        return ModelDiffers(
            f"{whose} has different bytes of the tensor {name} than this model had before (sha256 {digest[:12]}, "
            f"expected {self._known.get(name, '')[:12]}): that copy is damaged or of another version. "
            f"Remove it and load again; if that copy is the right one, remove {self.path}",
            tensor=name,
        )
