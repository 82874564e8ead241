"""Lists and removes the partial checkpoints in this Mac's store, and says when each was last used.

It knows ``MACPIPE_HOME/models`` alone. Whole folders, such as the user's own and those in the Hugging Face cache, stay
what they are: macpipe did not put them there. A model that a process of this Mac has open cannot be removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from cluster.core.errors import MacpipeError, ModelInUse, ModelNotFound
from cluster.core.plan import LayerRange
from cluster.core.stored_models import StoredModel
from cluster.platform.json_file import read_json
from cluster.platform.private_files import not_written
from cluster.store.limits import LEFTOVER_S, MAX_VERSION_BYTES
from cluster.store.model_files import is_digest
from cluster.store.partial_checkpoint import PartialCheckpoint, is_partial, lock_file, open_lock
from cluster.store.quantized_copy import read_label

_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def list_models(home: Path) -> tuple[StoredModel, ...]:
    """Return the models in the store of ``home``, the one that was used last first.

    A folder whose records are damaged is listed too, without names or layers, so that it can be removed.
    """
    names = _noted_names(home / "models" / "refs")
    folders = [folder for folder in _folders(home) if is_digest(folder.name) and is_partial(folder)]
    found = (_describe(folder, names.get(folder.name, ())) for folder in folders)
    return tuple(sorted(found, key=lambda one: (-one.last_used, one.fingerprint)))


def store_id(home: Path) -> str:
    """Return an id that all processes which use the store of ``home`` agree on; empty if there is no store yet."""
    try:
        facts = (home / "models").stat()
    except OSError:
        return ""
    return hashlib.sha256(f"{socket.gethostname()} {facts.st_dev} {facts.st_ino}".encode()).hexdigest()[:16]


def find_models(stored: Sequence[StoredModel], wanted: str) -> tuple[StoredModel, ...]:
    """Return the models that ``wanted`` names: a label, an id, or at least eight digits of a fingerprint.

    An id without a revision means every revision and quantized copy of it. Raise ModelNotFound if there is none.
    """
    found = tuple(
        one
        for one in stored
        if wanted == one.label
        or any(wanted in (name, name.partition("@")[0]) for name in one.names)
        or (len(wanted) >= 8 and one.fingerprint.startswith(wanted))
    )
    if not found:
        raise ModelNotFound(
            f"the store of this Mac has no model {wanted[:200]!r}; `macpipe store list` shows what it has"
        )
    return found


def choose_for_pruning(
    stored: Sequence[StoredModel], now: float, *, unused_s: float | None = None, keep_bytes: int | None = None
) -> tuple[StoredModel, ...]:
    """Return the models to remove, the one unused for longest first. Those in use are never among them.

    With ``unused_s``, these are the models that were not used for so long. With ``keep_bytes``, also as many others
    as it takes until the store has at most that size.
    """
    oldest = sorted((one for one in stored if not one.in_use), key=lambda one: one.last_used)
    total = sum(one.disk_bytes for one in stored)
    chosen = []
    for one in oldest:
        too_old = unused_s is not None and now - one.last_used > unused_s
        too_much = keep_bytes is not None and total > keep_bytes
        if too_old or too_much:
            chosen.append(one)
            total -= one.disk_bytes
    return tuple(chosen)


def remove_model(home: Path, fingerprint: str) -> None:
    """Remove a model from the store, and the records of the ids that mean it.

    Raise ModelInUse if a process reads or fetches it, ModelNotFound if it is gone, DiskFull or InvalidOption if its
    folder cannot be changed.
    """
    if not is_digest(fingerprint):
        raise ModelNotFound(f"{fingerprint[:200]!r} is not a model's fingerprint")
    models = home / "models"
    folder = models / fingerprint
    doomed = models / f".rm-{secrets.token_hex(4)}"
    try:
        with _lock_exclusively(folder):
            folder.rename(doomed)  # at once: a removal that is interrupted leaves no half of a model
    except FileNotFoundError:
        raise ModelNotFound(f"the store of this Mac has no model {fingerprint[:12]} any more") from None
    except BlockingIOError:
        label = _describe(folder, _noted_names(models / "refs").get(fingerprint, ())).label
        raise ModelInUse(
            f"a process of this Mac has the model {label} open; stop this Mac's worker and coordinator, and try again"
        ) from None
    except OSError as e:
        raise not_written(e, folder, "the store") from e
    for file, noted in _refs(models / "refs"):
        if noted == fingerprint:
            file.unlink(missing_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(home: Path, now: float | None = None) -> int:
    """Remove what interrupted fetches and removals have left, once it is a day old. Return the freed bytes."""
    before = (time.time() if now is None else now) - LEFTOVER_S
    freed = 0
    for folder in _folders(home):
        with contextlib.suppress(OSError):
            if folder.name.startswith((".new-", ".rm-")) and folder.stat().st_mtime < before:
                freed += _disk_bytes(folder)
                shutil.rmtree(folder, ignore_errors=True)
    return freed


def _describe(folder: Path, names: Sequence[str]) -> StoredModel:
    lock = lock_file(folder)
    used = max((file.stat().st_mtime for file in (folder, lock) if file.exists()), default=0.0)
    layers: tuple[LayerRange, ...] = ()
    size = 0
    with contextlib.suppress(MacpipeError, OSError):
        partial = PartialCheckpoint(folder, used=False)
        size = sum(tensor.nbytes for tensor in partial.tensors.values())
        layers = _complete_layers(partial)
        names = names or ((partial.origin.repo,) if partial.origin.repo else ())
    on_disk, bits = _disk_bytes(folder), 0
    if copy := read_label(folder):
        names, bits = names or (copy.model,), copy.weight_bits
    return StoredModel(folder.name, tuple(names), str(folder), on_disk, size, layers, used, _is_locked(folder), bits)


def _complete_layers(partial: PartialCheckpoint) -> tuple[LayerRange, ...]:
    """Return the runs of layers whose tensors are all present, by the layers' numbers in the tensors' names."""
    layers: dict[int, bool] = {}
    for name, tensor in partial.tensors.items():
        if found := _LAYER.search(name):
            number = int(found[1])
            layers[number] = layers.get(number, True) and not partial.missing_bytes(tensor)
    runs: list[LayerRange] = []
    for number in sorted(number for number, complete in layers.items() if complete):
        if runs and runs[-1].end == number:
            runs[-1] = LayerRange(runs[-1].start, number + 1)
        else:
            runs.append(LayerRange(number, number + 1))
    return tuple(runs)


def _folders(home: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(one for one in (home / "models").iterdir() if one.is_dir() and not one.is_symlink())
    return []


def _refs(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the records of ids, with the fingerprint that each means."""
    for file in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            yield file, str(read_json(file, MAX_VERSION_BYTES)["fingerprint"])


def _noted_names(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return the ids of each fingerprint, as they are written on the command line."""
    names: dict[str, tuple[str, ...]] = {}
    for file, fingerprint in _refs(folder):
        repo, _, revision = file.stem.rpartition("@")
        name = repo.replace("--", "/", 1) + ("" if revision == "main" else f"@{revision.replace('--', '/')}")
        names[fingerprint] = (*names.get(fingerprint, ()), name)
    return names


def _disk_bytes(folder: Path) -> int:
    """Return the bytes that a folder takes on disk: a hole in a file takes none."""
    total = 0
    for where, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += (Path(where) / name).lstat().st_blocks * 512
    return total


def _is_locked(folder: Path) -> bool:
    try:
        with _lock_exclusively(folder):
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


@contextlib.contextmanager
def _lock_exclusively(folder: Path) -> Iterator[None]:
    """Hold the model's lock against everybody who reads it. Raise BlockingIOError if somebody does, or OSError."""
    file = open_lock(folder)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)
