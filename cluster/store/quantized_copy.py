"""A quantized copy of a model: a partial checkpoint whose tensors Macs compute themselves from the model's own files.

It is stored, listed and given to other Macs like any model. Beside its journal it records which of its tensors each
layer needs, and the digests of the tensors that it was made from. This module knows files and records; the worker's
engine computes the tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from operator import index
from pathlib import Path

from cluster.core.errors import BadCheckpoint
from cluster.core.plan import LayerRange, TensorMap
from cluster.core.quantization import MODES, Quantization
from cluster.model.weight_versions import RECORDS
from cluster.platform.json_file import encode_json, read_json, write_json
from cluster.platform.private_files import not_written
from cluster.store.append_log import AppendLog, Entry
from cluster.store.limits import MAX_TENSOR_MAP_BYTES, MAX_VERSION_BYTES
from cluster.store.model_files import ModelFiles, is_digest
from cluster.store.partial_checkpoint import PartialCheckpoint, Read, is_partial, place

__all__ = [
    "CopyKey",
    "CopyLabel",
    "QuantizedCopy",
    "agree",
    "find_copy",
    "place_copy",
    "read_label",
    "read_map",
    "read_sources",
    "require_copy",
]

_LABEL = "copy.json"
_MAP = "tensor_map.json"
_SOURCES = "sources.jsonl"


@dataclass(frozen=True, slots=True)
class CopyKey:
    """All that the bytes of a copy depend on: the model, how it is quantized, and what computes it.

    ``device`` names the chip and MLX's backend, ``versions`` those of MLX and mlx-lm: both may round differently.
    """

    fingerprint: str
    quantization: Quantization
    versions: str
    device: str

    @property
    def digest(self) -> str:
        """The key as a SHA-256 in hex."""
        return hashlib.sha256(encode_json(asdict(self))).hexdigest()


@dataclass(frozen=True, slots=True)
class CopyLabel:
    """What people know a copy by: the name of its model, and the bits of its weights."""

    model: str
    weight_bits: int


class QuantizedCopy:
    """The copy in ``partial``; ``needed`` names its tensors by layer.

    ``sources`` are the digests (SHA-256 in hex) of the tensors that it was made from, by their names in the model.
    """

    def __init__(self, partial: PartialCheckpoint, needed: TensorMap) -> None:
        self.partial = partial
        self.sources = read_sources(partial.folder)
        self._needed = needed
        self._log = AppendLog(partial.folder / RECORDS / _SOURCES)

    def needed(self, layers: LayerRange) -> tuple[str, ...]:
        """Return the names of the tensors that a stage with ``layers`` reads."""
        return tuple(sorted(self._needed.of(layers)))

    def missing(self, layers: LayerRange) -> list[str]:
        """Return those of the stage's tensors that are not here. Hash the ones whose file changed on disk."""
        names = self.needed(layers)
        for name in sorted(self.partial.awaiting_recheck(names)):
            self.partial.recheck(self.partial.tensors[name])
        verified = self.partial.verified
        return [name for name in names if name not in verified]

    def agrees(self, sources: Mapping[str, str]) -> bool:
        """Return whether the copy was made from none but these, as far as they are given."""
        return agree(sources, self.sources)

    def bind(self, sources: Mapping[str, str]) -> None:
        """Record what the copy's tensors are made from, before they are. If that was something else, drop them all.

        Raise DiskFull or InvalidOption.
        """
        entries: list[Entry] = []
        if not self.agrees(sources):
            for tensor in self.partial.tensors.values():
                self.partial.drop(tensor, forget=True)
            self.sources.clear()
            entries.append(["reset"])
        fresh = {name: digest for name, digest in sources.items() if name not in self.sources}
        entries += [[name, digest] for name, digest in fresh.items()]
        self._log.append(entries)
        self.sources |= fresh


def agree(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Return whether no tensor has a digest in both and differs."""
    return all(other.get(name, digest) == digest for name, digest in one.items())


def read_sources(folder: Path) -> dict[str, str]:
    """Return the digests of the tensors that the copy in ``folder`` was made from; none if it is not a copy."""
    found: dict[str, str] = {}
    for entry in AppendLog(folder / RECORDS / _SOURCES).entries():
        match entry:
            case ["reset"]:
                found.clear()
            case [str(name), str(digest)] if is_digest(digest):
                found[name] = digest
    return found


def place_copy(
    models: Path,
    key: str,
    origin: ModelFiles,
    read: Read,
    map_tensors: Callable[[Path], TensorMap],
    label: CopyLabel,
) -> None:
    """Create the copy with the files of ``origin`` in the folder ``models``. ``find_copy`` finds it by ``key``.

    ``map_tensors`` is called with its folder. Raise as ``place``.
    """
    folder = place(models, origin, read)
    try:
        write_json(folder / RECORDS / _LABEL, asdict(label))
        write_json(folder / RECORDS / _MAP, _encode_map(map_tensors(folder)))
        write_json(_reference(models, key), {"fingerprint": folder.name})
    except OSError as e:
        raise not_written(e, folder, "a model") from e


def find_copy(models: Path, key: str) -> QuantizedCopy | None:
    """Return the copy with this key; None if there is none, or its records are damaged.

    Raise BadCheckpoint if its files are damaged.
    """
    folder = _find_folder(models, key)
    needed = read_map(folder / RECORDS / _MAP) if folder else None
    if folder is None or needed is None:
        return None
    partial = PartialCheckpoint(folder)
    return QuantizedCopy(partial, needed) if needed.names <= partial.tensors.keys() else None


def require_copy(models: Path, key: str) -> QuantizedCopy:
    """Return the copy with this key, which was found or placed before. Raise BadCheckpoint if it has gone meanwhile."""
    copy = find_copy(models, key)
    if copy is None:
        raise BadCheckpoint("the quantized weights in the store were removed meanwhile; load again")
    return copy


def read_label(folder: Path) -> CopyLabel | None:
    """Return the label of the copy in ``folder``; None if it is not a copy, or the record is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = read_json(folder / RECORDS / _LABEL, MAX_VERSION_BYTES)
        label = CopyLabel(str(content["model"]), index(content["weight_bits"]))
        return label if label.model and label.weight_bits in MODES["affine"].bits else None
    return None


def _find_folder(models: Path, key: str) -> Path | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        folder = models / str(read_json(_reference(models, key), MAX_VERSION_BYTES)["fingerprint"])
        return folder if is_digest(folder.name) and is_partial(folder) else None
    return None


def _reference(models: Path, key: str) -> Path:
    return models / "quantized" / f"{key}.json"


def read_map(file: Path) -> TensorMap | None:
    """Return the record of the tensors that each layer needs; None if it is missing or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = read_json(file, MAX_TENSOR_MAP_BYTES)
        layers = tuple(frozenset(map(str, names)) for names in content["layers"])
        shared = [(frozenset(map(str, one["tensors"])), tuple(map(index, one["layers"]))) for one in content["shared"]]
        return TensorMap(layers, tuple(shared))
    return None


def _encode_map(tensors: TensorMap) -> dict[str, object]:
    shared = [{"tensors": sorted(names), "layers": list(layers)} for names, layers in tensors.shared]
    return {"layers": [sorted(names) for names in tensors.layers], "shared": shared}
