"""What the tensors of a whole folder hash to, hashed once: results are kept by each file's size, time and inode."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from cluster.core.errors import MacpipeError
from cluster.core.limits import HASH_THREADS
from cluster.model.checkpoint import TensorInfo, open_checkpoint
from cluster.store.append_log import AppendLog
from cluster.store.partial_checkpoint import hash_range

log = logging.getLogger(__name__)
Stopped = Callable[[], bool]


def digests(home: Path, folder: Path, names: Iterable[str], stop: Event) -> dict[str, str]:
    """Name -> SHA-256 in hex of those tensors of the checkpoint in ``folder``; fewer where ``stop`` was set.

    Raises what ``open_checkpoint`` raises, and KeyError for a tensor that the model has not.
    """
    tensors = open_checkpoint(folder).tensors
    asked = [tensors[name] for name in names]
    cache = _Cache(home, folder, {tensor.file for tensor in asked})
    unknown = [tensor for tensor in asked if tensor.name not in cache.known]

    def hash_one(tensor: TensorInfo) -> tuple[TensorInfo, str]:
        done = "" if stop.is_set() else hash_range(folder / tensor.file, tensor.offset, tensor.end)
        return tensor, done

    with ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="hash") as pool:
        cache.keep((tensor, digest) for tensor, digest in pool.map(hash_one, unknown) if digest)
    return {tensor.name: cache.known[tensor.name] for tensor in asked if tensor.name in cache.known}


class _Cache:
    """Digests of one folder that were found while its files were as they are now."""

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
        except MacpipeError as e:  # they are hashed again the next time
            log.warning("digests: not kept reason=%s", e.sentence)
        self.known.update((t.name, digest) for t, digest in fresh)


def _state(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size}.{found.st_mtime_ns}.{found.st_ino}"
