"""Opens and checks an adapter folder of mlx-lm: ``adapter_config.json`` and ``adapters.safetensors``.

It reads JSON and headers, hashes the file of tensors, and does not import MLX. It knows nothing of the model that the
adapter is for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from cluster.core.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from cluster.core.errors import BadCheckpoint, ModelNotFound, ModelUnsupported
from cluster.model.checkpoint import (
    Checkpoint,
    hash_parts,
    open_checkpoint,
    read_json_object,
)
from cluster.model.safetensors import read_shard
from cluster.model.weight_versions import read_recorded_versions

__all__ = ["AdapterConfig", "holds_adapter", "open_adapter", "open_folder", "read_adapter_config"]

READ_BYTES: Final = 1 << 22


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """How mlx-lm makes an adapter's layers: of the last ``num_layers`` layers (0: of all), with ``parameters``.

    ``parameters`` are those of ``linear_to_lora_layers``: rank, scale, dropout and perhaps keys.
    """

    num_layers: int
    parameters: Mapping[str, Any]
    dora: bool


def holds_adapter(folder: Path) -> bool:
    """Return whether the folder has an adapter. A folder with a config.json has a model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def open_folder(folder: Path) -> Checkpoint:
    """Return the model or the adapter in ``folder``. Raises as ``open_checkpoint`` or ``open_adapter``."""
    return open_adapter(folder) if holds_adapter(folder) else open_checkpoint(folder)


def open_adapter(folder: Path) -> Checkpoint:
    """Return the adapter in ``folder``; its fingerprint depends on every byte of the two files.

    Raises ModelNotFound (there is no adapter), BadCheckpoint (damaged files) and ModelUnsupported (another kind of
    fine-tuning).
    """
    if not holds_adapter(folder):
        raise ModelNotFound(_why_no_adapter(folder), field="adapter")
    weights = folder / ADAPTER_WEIGHTS
    try:
        if not weights.is_file():
            raise BadCheckpoint(f"{str(folder)!r} has no {ADAPTER_WEIGHTS}; copy the adapter again")
        config = read_json_object(folder / ADAPTER_CONFIG)
        read_adapter_config(config)
        shard = read_shard(weights)
        version = read_recorded_versions(folder).get(ADAPTER_WEIGHTS) or _hash_file(weights)
        parts = ((ADAPTER_CONFIG, (folder / ADAPTER_CONFIG).read_bytes()), (ADAPTER_WEIGHTS, version.encode()))
    except OSError as error:
        raise BadCheckpoint(f"a file of the adapter cannot be read: {error}") from error
    if not shard.tensors:
        raise BadCheckpoint(f"{ADAPTER_WEIGHTS} in {str(folder)!r} has no tensors; copy the adapter again")
    tensors = {tensor.name: tensor for tensor in shard.tensors}
    editions = {ADAPTER_WEIGHTS: version}
    return Checkpoint(
        folder, MappingProxyType(config), MappingProxyType(tensors), MappingProxyType(editions), hash_parts(parts)
    )


def read_adapter_config(config: Mapping[str, Any]) -> AdapterConfig:
    """Check an adapter_config.json. Raises BadCheckpoint, and ModelUnsupported for another kind of fine-tuning."""
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        raise ModelUnsupported(
            "the adapter is a full fine-tune, which replaces all weights: fuse it with its model "
            "(macpipe fuse) and serve the result instead"
        )
    if kind not in ("lora", "dora"):
        raise ModelUnsupported(f"the adapter's fine_tune_type is {str(kind)[:40]!r}; lora and dora are supported")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise _invalid_field_error(
            "lora_parameters", "an object with rank and scale; adapters of other programs need a conversion"
        )
    layers = config.get("num_layers")
    if type(layers) is not int:
        raise _invalid_field_error("num_layers", "a whole number")
    rank, scale, dropout = parameters.get("rank"), parameters.get("scale"), parameters.get("dropout", 0.0)
    if type(rank) is not int or rank < 1:
        raise _invalid_field_error("lora_parameters.rank", "a whole number above 0")
    if not _is_number(scale):
        raise _invalid_field_error(
            "lora_parameters.scale", "a number (mlx-lm's scale, not the alpha of other programs)"
        )
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise _invalid_field_error("lora_parameters.dropout", "a number from 0 to 1")
    keys = parameters.get("keys")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise _invalid_field_error("lora_parameters.keys", "a list of names")
    made = {"rank": rank, "scale": scale, "dropout": dropout, **({} if keys is None else {"keys": keys})}
    return AdapterConfig(max(layers, 0), MappingProxyType(made), dora=kind == "dora")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _invalid_field_error(field: str, wanted: str) -> BadCheckpoint:
    return BadCheckpoint(f"{field} in {ADAPTER_CONFIG} must be {wanted}", file=ADAPTER_CONFIG)


def _why_no_adapter(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no adapter folder {str(folder)!r} on this machine"
    if (folder / ADAPTER_CONFIG).is_file():
        return f"{str(folder)!r} has a model beside the adapter; put the adapter into a folder of its own"
    return f"{str(folder)!r} has no {ADAPTER_CONFIG}: it is not an adapter of mlx-lm"


def _hash_file(path: Path) -> str:
    found = path.stat()
    return _hash_content(path, (found.st_size, found.st_mtime_ns, found.st_ino))


@lru_cache(maxsize=256)
def _hash_content(path: Path, _state: tuple[int, int, int]) -> str:
    """Return the SHA-256 of a file in hex, hashed once for each state of the file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
