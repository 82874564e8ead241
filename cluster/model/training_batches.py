"""Reads training data, tokenizes it and makes batches, with mlx-lm's data sets and in mlx-lm's order.

Files and lines are named in errors. It runs in a process of its own that can be killed, since the data's size bounds
neither its time nor its memory. It knows texts and tokens, nothing of layers or stages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.datasets import CacheDataset, ChatDataset, CompletionsDataset, create_dataset
from mlx_lm.tuner.trainer import iterate_batches
from numpy.typing import NDArray

from cluster.core.errors import InvalidRequest
from cluster.core.training import DATA_SETS, TrainingOptions
from cluster.core.training_frames import DataBatch, Purpose
from cluster.model.tokenizer import Tokenizer

__all__ = ["TrainingSets", "read_training_data"]


@dataclass(frozen=True, slots=True)
class TrainingSets:
    """Tokenized data sets by name; one that is missing is absent. ``cut`` counts sequences that are too long."""

    sets: dict[str, CacheDataset]
    cut: int
    longest: int

    def batches(self, options: TrainingOptions) -> Iterator[DataBatch]:
        """Yield all batches of a run, or their micro-batches, in the order in which one process would use them."""
        np.random.seed(options.seed)
        for number, batch in enumerate(self._iterate_run(options), 1):
            yield DataBatch(number, *batch)

    def _iterate_run(self, options: TrainingOptions) -> Iterator[_Made]:
        if options.train:
            steps = _iterate(self.sets["train"], options, loop=True)
            for iteration, batch in zip(range(1, options.iters + 1), steps, strict=False):
                if "valid" in self.sets and _is_due(iteration, options):
                    yield from self._iterate_evaluation(Purpose.VALIDATE, iteration, options)
                for part in batch:
                    yield Purpose.TRAIN, iteration, True, *part
        if options.test:
            yield from self._iterate_evaluation(Purpose.TEST, options.iters if options.train else 0, options)

    def _iterate_evaluation(self, purpose: Purpose, iteration: int, options: TrainingOptions) -> Iterator[_Made]:
        name, most = ("valid", options.val_batches) if purpose is Purpose.VALIDATE else ("test", options.test_batches)
        made = list(islice(_iterate(self.sets[name], options), most if most >= 0 else None))
        for i, batch in enumerate(made, 1):
            for part in batch:
                yield purpose, iteration, i == len(made), *part


_Part = tuple[tuple[int, int], bytes, bytes, float, bool]
"""The last five fields of ``DataBatch``."""
_Made = tuple[Purpose, int, bool, tuple[int, int], bytes, bytes, float, bool]
_PADDING: Final = 32
"""mlx-lm pads a batch to one more than a multiple of this."""


def read_training_data(folder: Path, tokenizer: Tokenizer, options: TrainingOptions) -> TrainingSets:
    """Read and tokenize the data sets in ``folder``. Raises InvalidRequest, which names file and line."""
    sets = {name: _read_set(folder / f"{name}.jsonl", tokenizer, options) for name in _list_needed_sets(options)}
    found = {name: data for name, data in sets.items() if data is not None}
    for name, needed in (("train", options.train), ("test", options.test)):
        if needed and name not in found:
            raise InvalidRequest(f"{name}.jsonl is missing or empty; --{name} needs it", field="data")
    for name, data in found.items():
        if len(data) < options.batch_size:
            raise InvalidRequest(
                f"{name}.jsonl has {len(data)} sequences, fewer than the batch size of {options.batch_size}; add some, "
                "or lower --batch-size",
                field="data",
            )
    lengths = [len(data[i][0]) for data in found.values() for i in range(len(data))]
    return TrainingSets(found, sum(length > options.max_seq_length for length in lengths), max(lengths, default=0))


def _list_needed_sets(options: TrainingOptions) -> list[str]:
    validates = options.train and options.val_batches != 0
    return [name for name, use in zip(DATA_SETS, (options.train, validates, options.test), strict=True) if use]


def _read_set(file: Path, tokenizer: Tokenizer, options: TrainingOptions) -> CacheDataset | None:
    if not file.is_file():
        return None
    records, lines = _read_records(file)
    if not records:
        return None
    config = SimpleNamespace(**options.model_dump())
    wrapper: Any = tokenizer.wrapper
    try:
        dataset = create_dataset(records, wrapper, config)
    except ValueError as error:
        raise InvalidRequest(f"{file.name} line {lines[0]}: {_first_line(error)}", field="data") from error
    keys = _required_keys(dataset, options)
    cached = CacheDataset(dataset)
    for i, record in enumerate(records):
        where = f"{file.name} line {lines[i]}"
        missing = [key for key in keys if key not in record]
        if missing:
            raise InvalidRequest(f'{where} has no "{missing[0]}"; the first line has one', field="data")
        _tokenize(cached, i, where)
    return cached


def _read_records(file: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the objects of a file and the numbers of their lines. Empty lines are skipped."""
    records, lines = list[dict[str, Any]](), list[int]()
    try:
        with file.open(encoding="utf-8") as text:
            for number, line in enumerate(text, 1):
                if line.strip():
                    records.append(_parse(line, f"{file.name} line {number}"))
                    lines.append(number)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{file.name} is not UTF-8: {error.reason}", field="data") from error
    return records, lines


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where} is not JSON: {error}", field="data") from error
    if not isinstance(record, dict):
        raise InvalidRequest(f"{where} is not a JSON object", field="data")
    return record


def _required_keys(dataset: Any, options: TrainingOptions) -> Sequence[str]:
    if isinstance(dataset, CompletionsDataset):
        return options.prompt_feature, options.completion_feature
    return (options.chat_feature,) if isinstance(dataset, ChatDataset) else (options.text_feature,)


def _tokenize(data: CacheDataset, index: int, where: str) -> None:
    try:
        tokens, offset = data[index]
    except Exception as error:  # the model's own template may raise anything for an unusual conversation
        raise InvalidRequest(f"{where} cannot be tokenized: {_first_line(error)}", field="data") from error
    if len(tokens) < 2 or offset >= len(tokens):
        raise InvalidRequest(f"{where} has {len(tokens)} tokens, none of which is to be learned", field="data")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]


def _is_due(iteration: int, options: TrainingOptions) -> bool:
    return iteration in (1, options.iters) or iteration % options.steps_per_eval == 0


def _iterate(data: CacheDataset, options: TrainingOptions, *, loop: bool = False) -> Iterator[list[_Part]]:
    """Yield the micro-batches of each batch."""
    made: Iterator[tuple[mx.array, mx.array]] = iterate_batches(  # type: ignore[no-untyped-call]
        data, options.batch_size, options.max_seq_length, loop=loop
    )
    for tokens, lengths in made:
        yield _cut_batch(np.array(tokens, np.int32), np.array(lengths, np.int32), options.micro_batches)


def _cut_batch(tokens: NDArray[np.int32], lengths: NDArray[np.int32], count: int) -> list[_Part]:
    """Cut a batch along its rows into ``count`` micro-batches, or one a row. Each is padded to its own longest row.

    A micro-batch without a counted token is left out, since its mean loss is undefined and its gradients are zero.
    """
    rows, width = tokens.shape
    first, last = np.maximum(lengths[:, 0], 1), np.minimum(lengths[:, 1], width - 1)
    counted = np.maximum(last - first + 1, 0)
    total = int(counted.sum())
    parts = [part for part in np.array_split(np.arange(rows), min(count, rows)) if counted[part].any()]
    if len(parts) <= 1:
        return [(tokens.shape, tokens.tobytes(), lengths.tobytes(), 1.0, True)]
    made: list[_Part] = []
    for part in parts:
        longest = -(-int(lengths[part, 1].max()) // _PADDING) * _PADDING
        own = tokens[part, : min(longest + 1, width)]
        weight = int(counted[part].sum()) / total
        made.append((own.shape, own.tobytes(), lengths[part].tobytes(), weight, part is parts[-1]))
    return made
