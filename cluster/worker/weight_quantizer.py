"""Computes the tensors of a quantized copy in the engine, one at a time, and writes them into the store.

It lays the copy out as a conversion would write it, but with a file for each layer. It knows models and files, nothing
of where the model's own tensors come from.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path, PurePath
from typing import Final

from cluster.codec.safetensors_header import encode_header
from cluster.core.plan import LayerRange, SharedWeight, TensorMap
from cluster.core.quantization import choose_weight_quantization
from cluster.model.checkpoint import TOKENIZER_FILES, TensorInfo
from cluster.model.converted_weights import ConvertedTensor, ConvertedWeights
from cluster.model.skeleton import open_skeleton
from cluster.model.tensor_map import tensor_map
from cluster.model.trace import trace
from cluster.model.weight_conversion import Conversion
from cluster.store.limits import MAX_MODEL_FILES
from cluster.store.model_files import ModelFiles, StoredFile
from cluster.store.partial_checkpoint import PartialCheckpoint, is_partial, read_origin
from cluster.store.quantized_copy import CopyLabel, place_copy, require_copy

__all__ = ["lay_out_copy", "quantize_layers"]

_LAYER: Final = re.compile(r".*?\.\d+\.")


def lay_out_copy(models: Path, key: str, source: Path, weight_bits: int, model: str) -> None:
    """Create the copy of the checkpoint in ``source``, without tensors, in the folder ``models``.

    ``model`` is the checkpoint's name: an id of the hub, or a folder of the coordinator's Mac.
    Raise DiskFull or InvalidOption (the folder cannot be written), and the errors of ``ConvertedWeights``.
    """
    weights = _open_weights(source, weight_bits)
    small = {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).is_file()}
    small["config.json"] = _config(weights)
    groups = _group_tensors(weights.tensors)
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    headers = [encode_header((t.name, t.dtype, t.shape, t.nbytes) for t in group) for group in groups]
    contents = {**small, **dict(zip(names, headers, strict=True))}
    sizes = [len(header) + sum(t.nbytes for t in group) for header, group in zip(headers, groups, strict=True)]
    files = [StoredFile(name, len(content)) for name, content in small.items()]
    files += [StoredFile(name, size, edition=key) for name, size in zip(names, sizes, strict=True)]
    repo = read_origin(source).repo if is_partial(source) else ""
    label = CopyLabel(repo or _short_name(model, source), weight_bits)
    place_copy(models, key, ModelFiles(tuple(files), repo), lambda file: contents[file.name], _map_tensors, label)


def _short_name(model: str, source: Path) -> str:
    """Return the name of the folder ``source`` if ``model`` is a path, and ``model`` if it is an id of the hub."""
    return source.name if PurePath(model).name in ("", source.name) else model


def quantize_layers(
    models: Path,
    key: str,
    source: Path,
    weight_bits: int,
    layers: LayerRange,
    progress: Callable[[int, int], None],
) -> None:
    """Compute the tensors of the copy that a stage with ``layers`` lacks, and put them into it.

    ``progress(done_bytes, total_bytes)`` is called before the first tensor and after each one. What was written is
    kept if this fails. Raise DiskFull or InvalidOption, BadCheckpoint if the model's files cannot be read, and the
    other errors of ``ConvertedWeights``.
    """
    copy = require_copy(models, key)
    partial = copy.partial
    missing = frozenset(copy.missing(layers))
    weights = _open_weights(source, weight_bits)
    for tensor in weights.tensors:
        if tensor.name not in missing:
            weights.drop(tensor.name)
    wanted = [partial.tensors[tensor.name] for tensor in weights.tensors if tensor.name in missing]
    done, total = 0, sum(tensor.nbytes for tensor in wanted)
    progress(done, total)
    for _, tensors in groupby(wanted, lambda tensor: tensor.file):
        for nbytes in _write_tensors(partial, weights, list(tensors)):
            done += nbytes
            progress(done, total)
        partial.seal()


def _open_weights(source: Path, weight_bits: int) -> ConvertedWeights:
    return ConvertedWeights(source, Conversion(choose_weight_quantization(bits=weight_bits)))


def _write_tensors(
    partial: PartialCheckpoint, weights: ConvertedWeights, tensors: Sequence[TensorInfo]
) -> Iterator[int]:
    """Compute and write tensors of one file, and record them at the end. Yield the bytes of each as it is written."""
    sums: list[tuple[str, str]] = []
    name = tensors[0].file
    file = partial.writer(name)
    try:
        for tensor in tensors:
            data = weights.take(tensor.name)
            partial.write(file, data, tensor.offset)
            sums.append((tensor.name, hashlib.sha256(data).hexdigest()))
            del data  # before the next tensor is computed
            yield tensor.nbytes
        for tensor in tensors:
            partial.note(file, name, tensor.offset, tensor.end)
    finally:
        os.close(file)
    partial.accept(sums)


def _group_tensors(tensors: Sequence[ConvertedTensor]) -> list[list[ConvertedTensor]]:
    """Distribute the tensors over files: one for each layer and each run of tensors between layers."""
    groups = [list(group) for _, group in groupby(tensors, lambda tensor: _layer_of(tensor.name))]
    return groups if len(groups) < MAX_MODEL_FILES // 2 else [list(tensors)]


def _layer_of(name: str) -> str:
    found = _LAYER.match(name)
    return found[0] if found else ""


def _config(weights: ConvertedWeights) -> bytes:
    with tempfile.TemporaryDirectory(prefix="macpipe-config-") as folder:
        file = Path(folder) / "config.json"
        weights.save_config(file)
        return file.read_bytes()


def _map_tensors(folder: Path) -> TensorMap:
    shared = trace(open_skeleton(folder)).shared
    return tensor_map(folder, [SharedWeight(name, 0, tuple(sorted(layers))) for name, layers in shared.items()])
