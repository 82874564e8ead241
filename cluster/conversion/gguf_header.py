"""Reads what a GGUF file says of its model, in a process of its own: ``python -m cluster.conversion.gguf_header``.

A vocabulary takes hundreds of megabytes while it is read, and what a file of unknown origin makes the reader do is not
bounded, so this process is separate and can be killed. It writes a checkpoint whose tensors are holes, and prints
where the file has them, or an error, as one line of JSON.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderField, ReaderTensor, dequantize
from gguf.constants import GGML_QUANT_SIZES

from cluster.conversion.gguf_config import build_config, require_supported
from cluster.conversion.gguf_tensors import GgufTensor, StoredTensor, group_of, map_tensors
from cluster.conversion.shards import lay_out
from cluster.core.errors import BadCheckpoint, MacpipeError, ModelUnsupported
from cluster.model.converted_weights import ConvertedTensor
from cluster.model.gguf_tokenizer import write_tokenizer

DTYPES: Final[Mapping[str, tuple[str, int]]] = {"float16": ("F16", 2), "bfloat16": ("BF16", 2), "float32": ("F32", 4)}
"""MLX's type -> the safetensors format's name of it, and bytes of a number."""
FILE_TYPES: Final[Mapping[int, str]] = {0: "float32", 1: "float16"}
"""``general.file_type`` -> the type of the model's numbers, for files without quantized ones."""


class WholeFileReader(GGUFReader):
    """Raises BadCheckpoint for a file that ends too early, where the package would fail to reshape what is there."""

    def __init__(self, file: Path) -> None:
        self._name = file.name
        super().__init__(file)

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise BadCheckpoint(
                f"{self._name} is cut off or damaged: it ends at byte {len(self.data)}, inside its header; "
                "download it again"
            )
        return super()._get(offset, dtype, count, override_order)

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        """Compare the file's size with the last tensor's end, before any tensor is read."""
        end = max((start_offs + _end_of(field) for field in fields), default=0)
        if end > len(self.data):
            raise BadCheckpoint(
                f"{self._name} is cut off: it ends at {len(self.data)} of {end} bytes; download it again"
            )
        super()._build_tensors(start_offs, fields)


def _end_of(field: ReaderField) -> int:
    """Return where a tensor ends, counted from the first tensor's begin."""
    *_, dims, kind, offset = field.parts
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind[0])]
    return int(offset[0]) + int(math.prod(dims.tolist())) * block_bytes // block


def main(file: str, folder: str, dtype: str) -> None:
    """Write the checkpoint into ``folder``. ``dtype`` is the weights' type; "" means the file's, or bfloat16."""
    try:
        answer = {"tensors": [asdict(tensor) for tensor in write_checkpoint(Path(file), Path(folder), dtype)]}
    except MacpipeError as error:
        answer = {"reason": error.reason, "sentence": error.sentence}  # type: ignore[dict-item]
    except OSError as error:
        answer = {"reason": BadCheckpoint.reason, "sentence": f"{file} cannot be read: {error.strerror}"}  # type: ignore[dict-item]
    print(json.dumps(answer))  # noqa: T201  # the answer to the process that started this one


def write_checkpoint(file: Path, folder: Path, dtype: str) -> Sequence[GgufTensor]:
    """Write config, tokenizer and safetensors headers. Return the tensors. Raises MacpipeError and OSError."""
    try:
        reader = WholeFileReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, MacpipeError):
        raise
    except Exception as error:  # a damaged file makes the reader raise anything
        raise BadCheckpoint(
            f"{file.name} is not a usable GGUF file: {type(error).__name__}: {str(error)[:200]}; get the file again"
        ) from error
    architecture = require_supported(metadata)
    stored = [_describe(tensor) for tensor in reader.tensors]
    dtype = dtype or FILE_TYPES.get(metadata.get("general.file_type", -1), "bfloat16")
    shapes = {tensor.name: tensor.shape for tensor in stored}
    vocabulary = shapes.get("token_embd.weight", (0,))[0]
    factors = [float(x) for tensor in reader.tensors if tensor.name == "rope_freqs.weight" for x in tensor.data]
    config = build_config(metadata, shapes.keys(), vocabulary, factors, dtype)
    tensors = map_tensors(architecture, config, stored)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    write_tokenizer(architecture, metadata, folder)
    _write_holes(folder, tensors, dtype)
    return tensors


def _describe(tensor: ReaderTensor) -> StoredTensor:
    """Describe a tensor, and raise ModelUnsupported if the gguf package cannot dequantize its type."""
    kind = tensor.tensor_type
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise ModelUnsupported(
            f"the GGUF file's tensor {tensor.name[:80]!r} has the type {GGMLQuantizationType(kind).name}, which the "
            "gguf package cannot dequantize; convert another quantization of the model"
        ) from error
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    return StoredTensor(tensor.name, int(kind), shape, int(tensor.data_offset), int(tensor.n_bytes))


def _write_holes(folder: Path, tensors: Sequence[GgufTensor], dtype: str) -> None:
    """Write a safetensors file for each group of tensors, with a hole in place of the numbers."""
    name, size = DTYPES[dtype]
    groups: dict[str, list[ConvertedTensor]] = {}
    for tensor in tensors:
        shape = tensor.stored.shape
        one = ConvertedTensor(tensor.name, name, shape, int(np.prod(shape)) * size)
        groups.setdefault(group_of(tensor.name), []).append(one)
    for group, members in groups.items():
        (layout,) = lay_out(members, sum(member.nbytes for member in members))
        path = folder / f"model-{group}.safetensors"
        path.write_bytes(layout.header)
        os.truncate(path, len(layout.header) + sum(member.nbytes for member in members))


if __name__ == "__main__":
    main(*sys.argv[1:])
