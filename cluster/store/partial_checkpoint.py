"""A partial checkpoint: a model or adapter folder that mlx-lm opens like any other, but with only some tensors' bytes.

The safetensors files have their full length and their real headers. The rest is holes until ranges are written; APFS,
ext4 and similar file systems allocate no blocks for holes. This module knows which bytes are present and verified, and
nothing of sources.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from threading import RLock

from cluster.core.errors import BadCheckpoint
from cluster.core.limits import MIB
from cluster.model.adapter_files import open_folder
from cluster.model.checkpoint import TensorInfo
from cluster.model.weight_versions import ORIGIN, RECORDS
from cluster.platform.private_files import create_private_file, make_private_folder, not_written, write_all
from cluster.store.append_log import AppendLog, Entry
from cluster.store.byte_ranges import ByteRanges
from cluster.store.limits import MAX_MODEL_BYTES, MAX_MODEL_READ_BYTES
from cluster.store.model_files import ModelFiles, StoredFile, is_digest, origin_of

READ_BYTES = 4 * MIB
Read = Callable[[StoredFile], bytes]


class PartialCheckpoint:
    """The partial checkpoint in ``folder``. Thread-safe. Several processes may fill the same one.

    Until ``release``, nobody removes the folder (``stored_models``); opening it records the time of its last use.
    """

    def __init__(self, folder: Path, *, used: bool = True) -> None:
        self.folder = folder
        self._end_hold: Callable[[], object] | None = None
        if used:
            self._hold()
        checkpoint = open_folder(folder)
        self.fingerprint, self.tensors = checkpoint.fingerprint, checkpoint.tensors
        self.origin = read_origin(folder)
        self._journal = AppendLog(folder / RECORDS / "journal.jsonl")
        self._lock = RLock()
        self._present = {tensor.file: ByteRanges() for tensor in self.tensors.values()}
        self._noted: dict[str, str] = {}
        self._whole: dict[str, str] = {}
        self._stats: dict[str, tuple[int, int]] = {}
        for entry in self._journal.entries():
            self._replay(entry)
        unchanged = {file for file in self._present if self._stats.get(file) == self._read_stat(file)}
        self._verified = {
            tensor: digest
            for tensor, digest in self._noted.items()
            if self._complete(tensor) and self.tensors[tensor].file in unchanged
        }
        self._damaged: set[str] = set()

    def _hold(self) -> None:
        """Share the folder's lock until ``release``, or the end of this object. Only a writable folder needs it."""
        try:
            file = open_lock(self.folder)
        except OSError:
            return
        self._end_hold = weakref.finalize(self, os.close, file)
        with contextlib.suppress(OSError):  # somebody removes the folder just now, and readers notice
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.utime(file)

    def release(self) -> None:
        """Let the folder be removed from now on, even while this object lives."""
        if self._end_hold:
            self._end_hold()

    def _replay(self, entry: Entry) -> None:
        match entry:
            case ["got", str(file), int(start), int(end)] if file in self._present and 0 <= start <= end:
                self._present[file].add(start, end)
            case ["lost", str(file), int(start), int(end)] if file in self._present and 0 <= start <= end:
                self._present[file].remove(start, end)
            case ["sum", str(tensor), ""]:
                self._noted.pop(tensor, None)
            case ["sum", str(tensor), str(digest)] if is_digest(digest):
                self._noted[tensor] = digest
            case ["whole", str(file), str(digest)]:
                self._whole[file] = digest
            case ["stat", str(file), int(size), int(mtime)]:
                self._stats[file] = (size, mtime)

    @property
    def verified(self) -> dict[str, str]:
        """The digests of the tensors that are present and verified; a copy."""
        with self._lock:
            return dict(self._verified)

    @property
    def damaged(self) -> frozenset[str]:
        """The tensors that ``recheck`` found damaged and that have not been fetched again since."""
        with self._lock:
            return frozenset(self._damaged)

    def awaiting_recheck(self, tensors: Iterable[str]) -> set[str]:
        """Return the tensors that are present and were verified once, but not since their file changed on disk."""
        with self._lock:
            return {t for t in tensors if t in self._noted and t not in self._verified and self._complete(t)}

    def recheck(self, tensor: TensorInfo) -> bool:
        """Hash a tensor again. Return whether it is verified; if not, it counts as damaged and missing."""
        try:
            digest = self.digest(tensor)
        except OSError:  # an unreadable tensor counts as damaged
            digest = ""
        with self._lock:
            if not self.awaiting_recheck([tensor.name]):
                return True  # a fetch has verified or dropped it meanwhile
            if digest == self._noted[tensor.name]:
                self.accept([(tensor.name, digest)])
                return True
            self.drop(tensor)
            self._damaged.add(tensor.name)
            return False

    def note_damaged(self, tensors: Iterable[str]) -> None:
        """Count tensors as damaged that another object found so in this folder, unless they are verified here."""
        with self._lock:
            self._damaged.update(tensor for tensor in tensors if tensor not in self._verified)

    def recorded_digest(self, tensor: str) -> str:
        """Return the digest from when the tensor was last verified, or an empty string if it never was."""
        return self._noted.get(tensor, "")

    def gaps(self, file: str, start: int, end: int) -> list[tuple[int, int]]:
        with self._lock:
            return self._present[file].gaps(start, end)

    def missing_bytes(self, tensor: TensorInfo) -> int:
        """Return how many bytes of the tensor are missing."""
        return sum(end - start for start, end in self.gaps(tensor.file, tensor.offset, tensor.end))

    def writer(self, file: str) -> int:
        """Return a file descriptor for ``write``, which the caller closes. Raise DiskFull or InvalidOption."""
        try:
            return os.open(self.folder / file, os.O_WRONLY)
        except OSError as e:
            raise not_written(e, self.folder / file, "the model") from e

    def write(self, descriptor: int, data: bytes | memoryview, at: int) -> None:
        """Write bytes at an offset of a file; ``note`` then records them. Raise DiskFull or InvalidOption."""
        left = memoryview(data)
        while left:
            try:
                count = os.pwrite(descriptor, left, at)  # raises if it can write nothing, so the loop ends
            except OSError as e:
                raise not_written(e, self.folder, "the model") from e
            left, at = left[count:], at + count

    def note(self, descriptor: int, file: str, start: int, end: int) -> None:
        """Sync written bytes to disk, then record them as present. Raise DiskFull or InvalidOption."""
        try:
            os.fsync(descriptor)
        except OSError as e:
            raise not_written(e, self.folder / file, "the model") from e
        with self._lock:
            self._journal.append([["got", file, start, end]])
            self._present[file].add(start, end)

    def digest(self, tensor: TensorInfo) -> str:
        """Return the SHA-256 of the tensor's bytes on disk, in hex."""
        return hash_range(self.folder / tensor.file, tensor.offset, tensor.end)

    def accept(self, sums: Iterable[tuple[str, str]]) -> None:
        """Record tensors as verified, given as pairs of name and digest."""
        with self._lock:
            sums = list(sums)
            self._journal.append(["sum", name, digest] for name, digest in sums)
            self._noted.update(sums)
            self._verified.update(sums)
            self._damaged.difference_update(name for name, _ in sums)

    def drop(self, tensor: TensorInfo, *, forget: bool = False) -> None:
        """Record a tensor's bytes as missing, because they are wrong. With ``forget``, also delete its digest."""
        with self._lock:
            self._present[tensor.file].remove(tensor.offset, tensor.end)
            self._verified.pop(tensor.name, None)  # first: the bytes are wrong even if the journal cannot be written
            lost: list[Entry] = [["lost", tensor.file, tensor.offset, tensor.end]]
            if forget:
                self._noted.pop(tensor.name, None)
                lost.append(["sum", tensor.name, ""])
            self._journal.append(lost)

    def seal(self) -> None:
        """Record the files' sizes and modification times. Verified tensors stay verified until these change.

        A file with a tensor that awaits a recheck keeps its previous record.
        """
        with self._lock:
            awaiting = {self.tensors[t].file for t in self.awaiting_recheck(self._noted)}
            now = {file: self._read_stat(file) for file in self._present if file not in awaiting}
            self._journal.append(["stat", file, *stat] for file, stat in now.items() if stat != self._stats.get(file))
            self._stats |= now

    def unproved_files(self) -> list[StoredFile]:
        """Return the complete files that have not been compared with the hub's hash yet."""
        whole = [f for f in self.origin.files if f.sha256 and f.name in self._present]
        return [f for f in whole if not self.gaps(f.name, 0, f.size) and self._whole.get(f.name) != f.sha256]

    def prove(self, file: StoredFile) -> bool:
        """Return whether the whole file matches the hub's hash, and record it if so."""
        if hash_range(self.folder / file.name, 0, file.size) != file.sha256:
            return False
        with self._lock:
            self._journal.append([["whole", file.name, file.sha256]])
            self._whole[file.name] = file.sha256
        return True

    def _complete(self, tensor: str) -> bool:
        return tensor in self.tensors and not self.missing_bytes(self.tensors[tensor])

    def _read_stat(self, file: str) -> tuple[int, int]:
        found = (self.folder / file).stat()
        return found.st_size, found.st_mtime_ns


def place(models: Path, origin: ModelFiles, read: Read, expected: str = "") -> Path:
    """Create the partial checkpoint of ``origin`` in the folder ``models``, unless it exists. Return its folder.

    ``read`` returns a small file's content, or a safetensors file's length field and header. Raise BadCheckpoint if
    these are not a model, or not the one with the fingerprint ``expected``; DiskFull or InvalidOption if the folder
    cannot be written.
    """
    try:
        make_private_folder(models)
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=models))
    except OSError as e:
        raise not_written(e, models, "a model") from e
    try:
        fingerprint = _fill(made, origin, read)
        if expected and fingerprint != expected:
            raise BadCheckpoint(
                f"the received headers are not those of this model (fingerprint {fingerprint[:12]}, "
                f"expected {expected[:12]}); load the model again"
            )
        folder = models / fingerprint
        if not is_partial(folder):
            _move(made, folder)
        return folder
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _move(made: Path, folder: Path) -> None:
    """Rename ``made`` to ``folder``. If another process has created ``folder`` meanwhile, use that one."""
    try:
        made.rename(folder)
    except OSError as e:
        if not is_partial(folder):
            raise not_written(e, folder, "a model") from e


def _fill(made: Path, origin: ModelFiles, read: Read) -> str:
    """Write small files, headers and holes. Return the fingerprint."""
    journal = AppendLog(made / RECORDS / "journal.jsonl")
    _require_bounds(origin)
    total = 0
    for file in origin.files:
        content = read(file)
        total += len(content)
        if total > MAX_MODEL_READ_BYTES or len(content) > file.size:
            raise BadCheckpoint(f"{file.name} does not match its source's description; load the model again")
        if not file.weights and not file.matches(content):
            raise BadCheckpoint(f"{file.name} does not match its source's description; load the model again")
        _write_file(made / file.name, content, file.size if file.weights else len(content))
        if file.weights:
            journal.append([["got", file.name, 0, len(content)]])
    _write_file(made / RECORDS / ORIGIN, json.dumps(asdict(origin)).encode())
    return open_folder(made).fingerprint


def _write_file(path: Path, content: bytes, size: int = 0) -> None:
    """Create a file that begins with ``content`` and is a hole up to ``size``. Raise DiskFull or InvalidOption."""
    try:
        make_private_folder(path.parent)
        file = create_private_file(path)
        try:
            write_all(file, content)
            os.ftruncate(file, max(size, len(content)))
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as e:
        raise not_written(e, path, "a model") from e


def _require_bounds(origin: ModelFiles) -> None:
    """Raise BadCheckpoint, before any file is created, if the files claim more than ``MAX_MODEL_BYTES`` in total."""
    claimed = sum(file.size for file in origin.files)
    if claimed > MAX_MODEL_BYTES:
        raise BadCheckpoint(f"the model's files claim {claimed} bytes; at most {MAX_MODEL_BYTES} are accepted")


def read_origin(folder: Path) -> ModelFiles:
    """Return the origin of a partial checkpoint: its files and its place on the hub. Raise BadCheckpoint if damaged."""
    try:
        return origin_of(json.loads((folder / RECORDS / ORIGIN).read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(
            f"the records of the model in {str(folder)!r} are damaged; remove that folder and load the model again"
        ) from error


def lock_file(folder: Path) -> Path:
    """Return the file whose lock users of the folder share. Its modification time is that of the last use."""
    return folder / RECORDS / "lock"


def open_lock(folder: Path) -> int:
    """Open the folder's lock file, which is created if there is none, and return its descriptor. Raise OSError."""
    return os.open(lock_file(folder), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def is_partial(folder: Path) -> bool:
    return (folder / RECORDS / ORIGIN).is_file()


def hash_range(path: Path, start: int, end: int) -> str:
    """Return the SHA-256 of the bytes ``[start, end)`` of a file, in hex; of fewer bytes if the file is too short."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (data := file.read(min(READ_BYTES, end - start))):
            digest.update(data)
            start += len(data)
    return digest.hexdigest()
