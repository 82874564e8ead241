"""Converts one checkpoint folder: tensor by tensor, in the order of the files that it writes.

At any time one tensor is computed, so memory does not grow with the model. What is on disk is recorded now and then;
the same conversion continues from the last record.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from cluster import __version__
from cluster.conversion.shards import SHARD_BYTES, ShardLayout, ShardWriter, lay_out, write_index
from cluster.conversion.work_folder import WorkFolder, open_work_folder, report_write_errors
from cluster.core.limits import MIB
from cluster.model.checkpoint import TOKENIZER_FILES, open_checkpoint
from cluster.model.converted_weights import ConvertedTensor, ConvertedWeights
from cluster.model.device import device_facts
from cluster.model.sentence_embedding import MODULES, POOLING
from cluster.model.weight_conversion import Conversion
from cluster.store.disk_space import free_bytes, require_room

__all__ = ["ConversionProgress", "Converted", "convert_checkpoint", "convert_into"]

RECORD_BYTES: Final = 256 * MIB
"""After this many bytes the files are synced and the progress is recorded: the most that an interruption can lose."""


@dataclass(frozen=True, slots=True)
class ConversionProgress:
    """Bytes of the result that are written, of all that it will have. ``resumed`` were written by an earlier run."""

    done: int
    total: int
    resumed: int


@dataclass(frozen=True, slots=True)
class Converted:
    """The result: its folder, fingerprint, number and bytes of tensors, and bits per weight.

    ``resumed_bytes`` were written by an earlier run.
    """

    folder: str
    fingerprint: str
    tensors: int
    bytes: int
    bits_per_weight: float
    resumed_bytes: int


Report = Callable[[ConversionProgress], None]
Prepare = Callable[[str], None]
"""Called with a tensor's name before it is computed, to make the source's bytes available."""


def convert_checkpoint(
    source: Path, target: Path, conversion: Conversion, report: Report, *, shard_bytes: int = SHARD_BYTES
) -> Converted:
    """Convert the checkpoint in ``source`` into the new folder ``target``.

    Raises InvalidOption (``target`` exists), DiskFull, and the errors of ``open_checkpoint`` and ``ConvertedWeights``.
    """
    fingerprint = open_checkpoint(source).fingerprint
    with open_work_folder(target) as work:
        return convert_into(work, source, fingerprint, conversion, report, shard_bytes=shard_bytes)


def convert_into(
    work: WorkFolder,
    source: Path,
    fingerprint: str,
    conversion: Conversion,
    report: Report,
    prepare: Prepare = lambda _: None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Converted:
    """Convert ``source``, whose content ``fingerprint`` identifies, in an open work folder. See convert_checkpoint."""
    weights = ConvertedWeights(source, conversion)
    layouts = lay_out(weights.tensors, shard_bytes)
    key = _key(fingerprint, conversion, layouts)
    with report_write_errors(work.path):
        done = work.resume(key)
        if not _holds(work.model, layouts, done):
            work.restart()
            done = 0
    resumed = sum(tensor.nbytes for tensor in weights.tensors[:done])
    total = sum(tensor.nbytes for tensor in weights.tensors)
    left = max(total - resumed, 1)  # the small files are written even if all tensors are there
    require_room(work.path, left, free_bytes(work.path), "the converted model", "give a folder on another disk")
    for tensor in weights.tensors[:done]:
        weights.drop(tensor.name)
    _write_tensors(work, key, weights, layouts, done, report, prepare)
    with report_write_errors(work.path):
        write_index(work.model, layouts, weights.parameters)
        weights.save_config(work.model / "config.json")
        _copy_tokenizer(source, work.model)
        found = open_checkpoint(work.model).fingerprint
        work.finish()
    return Converted(str(work.target), found, len(weights.tensors), total, weights.bits_per_weight, resumed)


def _write_tensors(
    work: WorkFolder,
    key: str,
    weights: ConvertedWeights,
    layouts: Sequence[ShardLayout],
    done: int,
    report: Report,
    prepare: Prepare,
) -> None:
    """Compute and write the tensors after the first ``done``. What was written is recorded also if this fails."""
    total = sum(tensor.nbytes for tensor in weights.tensors)
    written = resumed = sum(tensor.nbytes for tensor in weights.tensors[:done])
    recorded = written
    writer = ShardWriter(work.model, layouts, done)
    report(ConversionProgress(written, total, resumed))
    try:
        for tensor in weights.tensors[done:]:
            prepare(tensor.name)
            data = weights.take(tensor.name)
            with report_write_errors(work.path):
                writer.write(data)
                written += tensor.nbytes
                if written - recorded >= RECORD_BYTES:
                    work.record(key, writer.sync())
                    recorded = written
            del data  # before the next tensor is computed
            report(ConversionProgress(written, total, resumed))
    finally:
        with report_write_errors(work.path):
            work.record(key, writer.sync())
            writer.close()


def _key(fingerprint: str, conversion: Conversion, layouts: Sequence[ShardLayout]) -> str:
    """Hash everything on which the result's bytes depend. Libraries and devices may round differently."""
    device = device_facts()
    facts = {
        "source": fingerprint,
        "conversion": asdict(conversion),
        "versions": (__version__, device.mlx_version, device.mlx_lm_version),
        "device": (device.chip, device.backend),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for layout in layouts:
        digest.update(layout.file.encode() + b"\0" + layout.header)
    return digest.hexdigest()


def _holds(folder: Path, layouts: Sequence[ShardLayout], done: int) -> bool:
    """Return whether the files in ``folder`` are long enough for the first ``done`` tensors."""
    for layout in layouts:
        own = layout.tensors[:done]
        if not own:
            return True
        file = folder / layout.file
        if not file.is_file() or file.stat().st_size < _end(layout, own):
            return False
        done -= len(own)
    return done == 0


def _end(layout: ShardLayout, tensors: Sequence[ConvertedTensor]) -> int:
    return len(layout.header) + sum(tensor.nbytes for tensor in tensors)


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer, its chat template, the end-of-text tokens and how states become embeddings unchanged."""
    for name in (*TOKENIZER_FILES, MODULES, POOLING):
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
