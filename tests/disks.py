"""Disks for tests: one that fails on request, and a tmpfs of a few MiB that a test can fill.

The second needs root and Linux; without them the fixture skips and says what is missing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WAIT_S = 20


class FailingDisk:
    """Replaces the real disk: accepts ``room`` more bytes, and fails on request."""

    def __init__(self) -> None:
        self.room: int | None = None
        self.short = self.fsync_fails = self.truncate_fails = False
        self.fsyncs = 0
        self._write, self._fsync, self._truncate = os.write, os.fsync, os.ftruncate

    def write(self, file: int, data: bytes) -> int:
        most = len(data) if self.room is None else min(self.room, len(data))
        if not most:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        most = min(most, 3) if self.short else most
        if self.room is not None:
            self.room -= most
        return self._write(file, bytes(data[:most]))

    def fsync(self, file: int) -> None:
        self.fsyncs += 1
        if self.fsync_fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fsync(file)

    def ftruncate(self, file: int, size: int) -> None:
        if self.truncate_fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._truncate(file, size)


@pytest.fixture
def failing_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[FailingDisk]:
    """Route this process's writes through a disk that fails when a test says so."""
    made = FailingDisk()
    with monkeypatch.context() as patched:
        for name in ("write", "fsync", "ftruncate"):
            patched.setattr(os, name, getattr(made, name))
        yield made


class SmallDisk:
    """A disk that is mounted at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self, leave: int = 0) -> None:
        """Take all room but ``leave`` bytes, in whole pages."""
        chunk = bytes(65536)
        with contextlib.suppress(OSError), self._filler.open("ab", buffering=0) as file:
            while file.write(chunk):
                pass
        if leave:
            os.truncate(self._filler, max(0, self._filler.stat().st_size - leave))

    def free(self) -> None:
        """Give all room back."""
        self._filler.unlink()


def missing() -> str:
    """Why this machine cannot mount a tmpfs; nothing when it can try."""
    if sys.platform != "linux":
        return "a small disk is a tmpfs, which needs Linux"
    return "" if os.geteuid() == 0 else "mounting a small disk needs root"


@contextlib.contextmanager
def mounted(path: Path, size: int) -> Iterator[SmallDisk]:
    """Mount a disk of ``size`` bytes at ``path`` during the block. The folder is created."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path)]
    subprocess.run(command, check=True, timeout=WAIT_S, capture_output=True, text=True)
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True, timeout=WAIT_S, capture_output=True)


@pytest.fixture
def small_disk(request: pytest.FixtureRequest) -> Iterator[Callable[[Path, int], SmallDisk]]:
    """Mount disks for the duration of the test; mark tests that use it ``small_disk``."""
    if reason := missing():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:

        def mount(path: Path, size: int) -> SmallDisk:
            try:
                return stack.enter_context(mounted(path, size))
            except subprocess.CalledProcessError as error:
                pytest.skip(f"this machine refuses to mount a tmpfs: {error.stderr.strip()}")

        yield mount
