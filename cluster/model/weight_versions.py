"""Editions: what tells weight files apart whose headers are alike, as those of two fine-tunes of one model are.

An edition is cheap where a hash of the whole file is not: the hub's own name for the file's content where that is
known, else a hash of samples. Files that differ in single numbers may be of one edition: digests of tensors tell those
apart.
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
"""The folder inside a partial checkpoint where its records are."""
ORIGIN: Final = "origin.json"
"""The record of where a partial checkpoint is from: its files, each with its edition."""
_BLOB: Final = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


def read_editions(folder: Path, shards: Iterable[Shard]) -> dict[str, str]:
    """File -> edition. Of a partial checkpoint they are on record, since most of its bytes may not be there."""
    shards, noted = list(shards), _read_noted(folder)
    step = 1 + sum(len(shard.tensors) for shard in shards) // MAX_SAMPLED_TENSORS
    return {
        shard.file: noted.get(shard.file)
        or _blob(folder / shard.file)
        or _sample_tensors(folder / shard.file, shard, step)
        for shard in shards
    }


def _read_noted(folder: Path) -> Mapping[str, str]:
    """From the record of a partial checkpoint; a damaged one says nothing here, and is refused where it is read."""
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
    """In the Hugging Face cache a file is a link to a blob, which has the hub's name for its content."""
    if not path.is_symlink():
        return ""
    target = path.readlink()
    return target.name if target.parent.name == "blobs" and _BLOB.fullmatch(target.name) else ""


def _sample_tensors(path: Path, shard: Shard, step: int) -> str:
    """Of every ``step``-th tensor, the bytes in its middle."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for tensor in shard.tensors[::step]:
            digest.update(os.pread(descriptor, *_middle(tensor)))
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _middle(tensor: TensorInfo) -> tuple[int, int]:
    """How many bytes, and where."""
    length = min(SAMPLE_BYTES, tensor.nbytes)
    return length, tensor.offset + (tensor.nbytes - length) // 2
