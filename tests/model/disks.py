"""A ring whose stages have prefixes on disk, with the MLX thread's jobs run by the test."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from cluster.core.errors import MacpipeError
from cluster.core.frames import Persist
from cluster.core.prefix_keys import node_ids, owner_key
from cluster.worker.pipe_messages import ReadPrefix
from cluster.worker.prefix_disk import PrefixDisk
from model.ring import Ring

EDITION = "0" * 32
OWNER = owner_key("key:0123456789ab")
OTHER = owner_key("key:ba9876543210")
EVERY = 8
"""Tokens of a piece: fewer than a sliding window's 16."""
WAIT_S = 15.0


class Disks:
    """The disks of a ring's stages, each in a folder of its own below ``folder``."""

    def __init__(self, ring: Ring, folder: Path, limit: int = 2**30, every: int = EVERY) -> None:
        self.ring, self._folder, self._limit, self._every = ring, folder, limit, every
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.told: list[set[tuple[int, bytes]]] = []
        self.begin()

    def begin(self) -> None:
        """Start the disks, as new engines do, and open them."""
        self.disks = [
            PrefixDisk(self._folder / str(i), self._limit, self._jobs.put, self._every)
            for i in range(len(self.ring.stages))
        ]
        self.open()

    def open(self, edition: str = EDITION, owners: tuple[str, ...] = (OWNER, OTHER)) -> None:
        self.edition, self.told = edition, []
        for stage, disk in zip(self.ring.stages, self.disks, strict=True):
            self.told.append(set(disk.open(stage, edition, owners, anonymous=False)))
            stage._store = stage._table._store = disk

    def restart(self) -> None:
        """End them and start them anew. What was being written is lost."""
        self.close()
        self.begin()

    def persist(self, prefix: int, owner: str = OWNER, adapter: str = "") -> None:
        """Have a kept prefix written, and wait until it is."""
        self.ring.send(Persist(prefix, owner, adapter))
        self.finish_writing()

    def finish_writing(self) -> None:
        for disk in self.disks:
            assert disk._writer
            disk._writer.flush(WAIT_S)

    def read(
        self, prefix: int, tokens: tuple[int, ...], owner: str = OWNER, adapter: str = ""
    ) -> list[MacpipeError | None]:
        """Read the first tokens of a sequence as ``prefix``. -> each stage's error"""
        ((length, node),) = node_ids(self.edition, owner, adapter, tokens, [len(tokens)])
        order = ReadPrefix(0, 1, prefix, owner, adapter, node, length)
        answers: list[Future[MacpipeError | None]] = [Future() for _ in self.disks]
        for disk, answer in zip(self.disks, answers, strict=True):
            disk.read(order, answer.set_result)
        self.run_jobs(lambda: all(answer.done() for answer in answers))
        return [answer.result(0) for answer in answers]

    def run_jobs(self, until: Callable[[], bool]) -> None:
        """Be the MLX thread."""
        while not until():
            try:
                self._jobs.get(timeout=0.01)()
            except queue.Empty:
                continue

    def close(self) -> None:
        for stage, disk in zip(self.ring.stages, self.disks, strict=True):
            stage._store = stage._table._store = None
            disk.end_epoch()
            disk.close()

    def files(self) -> list[Path]:
        return sorted(path for path in self._folder.rglob("*") if path.is_file())
