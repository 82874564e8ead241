"""Computes content versions ("editions") of weight files, which distinguish files with equal headers.

Two fine-tunes of one model have equal headers, for example. Hashing whole files is too slow, so an edition is the hub's
name of the file's content if that is known, else a hash of samples. Files that differ only in a few numbers may have
the same edition; digests of tensors distinguish those.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from cluster.core.limits import MAX_SAMPLED_TENSORS, SAMPLE_BYTES
from cluster.model.safetensors import Shard, TensorInfo

RECORDS: Final = ".macpipe"
"""The folder inside a partial checkpoint that holds its records."""
ORIGIN: Final = "origin.json"
"""The record of a partial checkpoint's origin: its files, each with its edition."""
_BLOB: Final = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


def read_weight_versions(folder: Path, shards: Iterable[Shard]) -> dict[str, str]:
    """Return each file's edition. A partial checkpoint may lack most bytes, so its record has the editions."""
    shards = list(shards)
    recorded = read_recorded_versions(folder)
    step = 1 + sum(len(shard.tensors) for shard in shards) // MAX_SAMPLED_TENSORS
    return {
        shard.file: recorded.get(shard.file)
        or _blob(folder / shard.file)
        or _sample_tensors(folder / shard.file, shard, step)
        for shard in shards
    }


def read_recorded_versions(folder: Path) -> Mapping[str, str]:
    """Read the editions in a partial checkpoint's record. Return {} if it is damaged: its own reader reports that."""
    try:
        record = json.loads((folder / RECORDS / ORIGIN).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    files = record.get("files") if isinstance(record, dict) else None
    found: dict[str, str] = {}
    for file in files if isinstance(files, list) else ():
        match file:
            case {"name": str(name), "edition": str(edition)}:
                found[name] = edition
    return found


def _blob(path: Path) -> str:
    """Return the hub's name of the file's content, "" if unknown. In the hub's cache, files link to blobs so named."""
    if not path.is_symlink():
        return ""
    target = path.readlink()
    return target.name if target.parent.name == "blobs" and _BLOB.fullmatch(target.name) else ""


def _sample_tensors(path: Path, shard: Shard, step: int) -> str:
    """Hash the middle bytes of every ``step``-th tensor."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for tensor in shard.tensors[::step]:
            digest.update(os.pread(descriptor, *_middle(tensor)))
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _middle(tensor: TensorInfo) -> tuple[int, int]:
    """Return the length and file offset of a tensor's sample."""
    length = min(SAMPLE_BYTES, tensor.nbytes)
    return length, tensor.offset + (tensor.nbytes - length) // 2
