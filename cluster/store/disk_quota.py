"""The disk quota of this Mac's store: how many bytes its models may take, and what is removed to stay below.

The quota is a file in the store's folder, so every process that fetches a model obeys it. The models that were used
least recently go first, never one that a process has open.
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path

from cluster.core.errors import DiskFull, ModelInUse, ModelNotFound
from cluster.platform.json_file import read_json, write_json
from cluster.platform.private_files import not_written
from cluster.store.disk_space import size_in_words
from cluster.store.limits import MAX_VERSION_BYTES
from cluster.store.stored_models import choose_for_pruning, list_models, remove_model

log = logging.getLogger(__name__)


def read_quota(home: Path) -> int | None:
    """Return the quota in bytes; None if there is none. A damaged file counts as none, and is logged."""
    file = _file(home)
    try:
        quota = read_json(file, MAX_VERSION_BYTES)["quota_bytes"]
        if type(quota) is not int or quota <= 0:
            raise ValueError("not a size")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        log.warning("store: the quota is ignored, set it again reason=%s path=%s", e, file)
        return None
    return quota


def set_quota(home: Path, quota: int | None) -> None:
    """Set the quota in bytes; None removes it. Removes no model. Raise DiskFull or InvalidOption if it cannot."""
    file = _file(home)
    try:
        if quota is None:
            file.unlink(missing_ok=True)
        else:
            write_json(file, {"quota_bytes": quota})
    except OSError as e:
        raise not_written(e, file, "the store's quota") from e


def make_room(home: Path, needed: int, what: str) -> None:
    """Remove the models used least recently until ``needed`` more bytes are within the quota.

    Removes nothing and raises DiskFull if they would not be within it even then.
    """
    quota = read_quota(home) if needed else None
    if quota is None:
        return
    stored = list_models(home)
    total = sum(one.disk_bytes for one in stored)
    chosen = choose_for_pruning(stored, time.time(), keep_bytes=max(0, quota - needed))
    left = total - sum(one.disk_bytes for one in chosen)
    if left + needed > quota:
        raise DiskFull(
            f"{what} needs {size_in_words(needed)} more on disk, but this Mac's store may take {size_in_words(quota)},"
            f" and {size_in_words(left)} of it are in use. Raise the quota with `macpipe store quota SIZE`, or stop"
            " what uses the other models",
            needed_bytes=str(needed),
            quota_bytes=str(quota),
            path=str(home / "models"),
        )
    for one in chosen:
        with contextlib.suppress(ModelInUse, ModelNotFound):  # another process was faster
            remove_model(home, one.fingerprint)
            log.info("store: removed a model to stay within the quota model=%s bytes=%d", one.label, one.disk_bytes)


def _file(home: Path) -> Path:
    return home / "models" / "quota.json"
