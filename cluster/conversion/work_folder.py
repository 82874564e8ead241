"""The folder in which a conversion works: beside the result, with a record of how far it is.

``NAME.partial`` has the unfinished model in ``model``, and a record beside it. The finished model is renamed to
``NAME`` in one step, so ``NAME`` is never half-written. This module knows folders and the record, nothing of models.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from cluster.core.errors import InvalidOption, MacpipeError
from cluster.core.limits import KIB
from cluster.platform.json_file import read_json, write_json
from cluster.platform.private_files import not_written, sync_folder

__all__ = ["WorkFolder", "open_work_folder", "refuse_existing", "report_write_errors"]

SUFFIX: Final = ".partial"
MAX_RECORD_BYTES: Final = 4 * KIB


class WorkFolder:
    """The work folder of the result ``target``. One process at a time holds it (``open_work_folder``)."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + SUFFIX)
        self.model = self.path / "model"
        self.source = self.path / "source"
        self._record = self.path / "progress.json"

    def resume(self, key: str) -> int:
        """Return how many tensors an earlier conversion with the same ``key`` has written; 0 if there is none.

        Deletes what a conversion with another key has written.
        """
        found, tensors = self._read_record()
        if found == key and self.model.is_dir():
            return tensors
        self.restart()
        return 0

    def restart(self) -> None:
        """Delete what was written."""
        self._record.unlink(missing_ok=True)
        shutil.rmtree(self.model, ignore_errors=True)
        self.model.mkdir(exist_ok=True)

    def remove_source(self) -> None:
        """Delete what a conversion has made of its source."""
        shutil.rmtree(self.source, ignore_errors=True)

    def record(self, key: str, tensors: int) -> None:
        """Record that the first ``tensors`` tensors are on disk."""
        write_json(self._record, {"key": key, "tensors": tensors})

    def discard_unused(self) -> None:
        """Delete this folder if no progress is recorded: there is nothing from which to continue."""
        if self._record.exists():
            return
        self.remove_source()
        shutil.rmtree(self.model, ignore_errors=True)
        with suppress(OSError):  # it has a file that is not ours
            (self.path / "lock").unlink(missing_ok=True)
            self.path.rmdir()

    def finish(self) -> None:
        """Give the finished model its name, and delete the rest of this folder. Raises InvalidOption if it exists."""
        for file in self.model.iterdir():
            _sync_file(file)
        sync_folder(self.model)
        refuse_existing(self.target)
        self.model.rename(self.target)
        sync_folder(self.target.parent)
        shutil.rmtree(self.path, ignore_errors=True)

    def _read_record(self) -> tuple[str, int]:
        with suppress(OSError, ValueError):
            match read_json(self._record, MAX_RECORD_BYTES):
                case {"key": str(key), "tensors": int(tensors)} if tensors >= 0:
                    return key, tensors
        return "", 0


@contextmanager
def open_work_folder(target: Path) -> Iterator[WorkFolder]:
    """Create or open the work folder of ``target``, and hold it during the block.

    A block that fails before any progress is recorded leaves no folder. Raises InvalidOption if ``target`` exists,
    cannot be created, or another process writes it, and DiskFull.
    """
    refuse_existing(target)
    work = WorkFolder(target)
    with report_write_errors(work.path):
        work.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(work.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with report_write_errors(work.path):
            _lock(lock, target)
        try:
            yield work
        except BaseException:
            work.discard_unused()
            raise
    finally:
        os.close(lock)


def refuse_existing(target: Path) -> None:
    """Raise InvalidOption if there is anything at ``target``."""
    if target.exists() or target.is_symlink():
        raise InvalidOption(f"{target} exists already; remove it, or give another folder", field="folder")


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Raise DiskFull or InvalidOption, which name ``path``, for an OSError in the block."""
    try:
        yield
    except OSError as error:
        raise _write_error(error, path) from error


def _write_error(error: OSError, path: Path) -> MacpipeError:
    return not_written(error, path, "the converted model", advice="give a folder that you can write to")


def _lock(lock: int, target: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InvalidOption(
            f"another process is converting a model into {target}; wait for it, or give another folder", field="folder"
        ) from None


def _sync_file(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
