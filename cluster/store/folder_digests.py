"""Hashes the tensors of a complete folder, and caches the digests by each file's size, modification time and inode."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from cluster.core.errors import MacpipeError
from cluster.model.adapter_files import open_folder
from cluster.model.checkpoint import TensorInfo
from cluster.store.append_log import AppendLog
from cluster.store.limits import HASH_THREADS
from cluster.store.partial_checkpoint import hash_range

log = logging.getLogger(__name__)
Stopped = Callable[[], bool]


def hash_tensors(home: Path, folder: Path, names: Iterable[str], stop: Event) -> dict[str, str]:
    """Return the SHA-256 in hex, by name, of these tensors of the model or the adapter in ``folder``.

    If ``stop`` is set, return those of fewer tensors. Raise what ``open_folder`` raises, and KeyError for a tensor that
    is not there.
    """
    tensors = open_folder(folder).tensors
    asked = [tensors[name] for name in names]
    cache = _Cache(home, folder, {tensor.file for tensor in asked})
    unknown = [tensor for tensor in asked if tensor.name not in cache.known]

    def hash_one(tensor: TensorInfo) -> tuple[TensorInfo, str]:
        digest = "" if stop.is_set() else hash_range(folder / tensor.file, tensor.offset, tensor.end)
        return tensor, digest

    with ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="hash") as pool:
        cache.keep((tensor, digest) for tensor, digest in pool.map(hash_one, unknown) if digest)
    return {tensor.name: cache.known[tensor.name] for tensor in asked if tensor.name in cache.known}


class _Cache:
    """The persistent digests of one folder that are valid for the current state of its files."""

    def __init__(self, home: Path, folder: Path, files: Iterable[str]) -> None:
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
        self._journal = AppendLog(home / "digests" / f"{name}.jsonl")
        self._now = {file: _state(folder / file) for file in files}
        self.known: dict[str, str] = {}
        for entry in self._journal.entries():
            match entry:
                case [str(file), str(state), str(tensor), str(digest)] if self._now.get(file) == state:
                    self.known[tensor] = digest

    def keep(self, found: Iterable[tuple[TensorInfo, str]]) -> None:
        fresh = list(found)
        try:
            self._journal.append([t.file, self._now[t.file], t.name, digest] for t, digest in fresh)
        except MacpipeError as e:  # the tensors are hashed again next time
            log.warning("digests: cannot save digests reason=%s", e.sentence)
        self.known.update((t.name, digest) for t, digest in fresh)


def _state(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size}.{found.st_mtime_ns}.{found.st_ino}"
