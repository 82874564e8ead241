"""The process that makes batches: their order, what it refuses, and its end in the middle of its work."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import make_tokenizer
from cluster.core.errors import BadCheckpoint, InvalidRequest
from cluster.core.training import TrainingOptions
from cluster.core.training_frames import DataBatch, Purpose
from cluster.model.tokenizer import load_tokenizer
from cluster.model.training_batches import read_training_data
from cluster.sandbox.training_data import TrainingData
from lora_reference import write_texts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    return folder


def options(**more: Any) -> TrainingOptions:
    given = {"iters": 4, "batch_size": 2, "max_seq_length": 32, "steps_per_eval": 3, "val_batches": 2}
    return TrainingOptions.of({**given, "train": True, **more})


async def all_batches(folder: Path, model: Path, chosen: TrainingOptions) -> tuple[TrainingData, list[DataBatch]]:
    data = await TrainingData.open(folder, model, chosen)
    try:
        found: list[DataBatch] = []
        while batch := await data.next():
            found.append(batch)
        return data, found
    finally:
        await data.close()


def test_batches_come_in_the_order_of_one_process_and_end(model: Path, tmp_path: Path) -> None:
    folder = write_texts(tmp_path, train=8, valid=6, test=4)
    data, found = asyncio.run(all_batches(folder, model, options(test=True)))
    assert [batch.number for batch in found] == list(range(1, len(found) + 1))
    train, validate, test = Purpose.TRAIN, Purpose.VALIDATE, Purpose.TEST
    evaluated = [(validate, False), (validate, True)]
    assert [(b.purpose, b.last) for b in found] == [
        *evaluated, (train, True), (train, True), *evaluated, (train, True), *evaluated, (train, True),
        (test, False), (test, True),
    ]  # fmt: skip
    assert [b.iteration for b in found if b.purpose is train] == [1, 2, 3, 4]
    assert all(len(b.tokens) == 4 * 2 * b.shape[1] and len(b.lengths) == 16 and b.shape[1] <= 32 for b in found)
    assert data.cut > 0
    assert data.longest > 32


def test_a_batch_is_cut_along_its_rows_without_those_that_teach_nothing(model: Path, tmp_path: Path) -> None:
    """Three micro-batches of four rows; a prompt that is longer than the limit leaves its row nothing to learn."""
    answers = [("a", "b c"), ("a " * 20, "b"), ("a", "b " * 30), ("a " * 200, "b")]
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in answers]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    given = {"batch_size": 4, "iters": 2, "mask_prompt": True, "max_seq_length": 128}
    (whole, _), (first, second, *rest) = (
        list(read_training_data(tmp_path, load_tokenizer(model), chosen).batches(chosen))
        for chosen in (options(**given), options(**given, micro_batches=3))
    )
    assert [(b.number, b.iteration, b.ends_batch) for b in (first, second, *rest)] == [
        (1, 1, False), (2, 1, True), (3, 2, False), (4, 2, True),
    ]  # fmt: skip
    assert (whole.shape, whole.weight, whole.ends_batch) == ((4, 128), 1.0, True)
    assert first.shape[0] == 2
    assert second.shape == (1, 97), "padded to its own longest row, as mlx-lm does"
    tokens = [np.frombuffer(b.tokens, np.int32).reshape(b.shape) for b in (whole, first, second)]
    lengths = [np.frombuffer(b.lengths, np.int32).reshape(-1, 2) for b in (whole, first, second)]
    cut = np.concatenate([np.pad(part, ((0, 0), (0, 128 - part.shape[1]))) for part in tokens[1:]])
    assert np.array_equal(cut, tokens[0][:3])
    assert np.array_equal(np.concatenate(lengths[1:]), lengths[0][:3])
    counted = [int((own[:, 1] - own[:, 0] + 1).sum()) for own in lengths[1:]]
    assert [first.weight, second.weight] == [count / sum(counted) for count in counted]


def test_it_ends_at_once_while_nobody_reads_its_batches(model: Path, tmp_path: Path) -> None:
    async def leave() -> int | None:
        data = await TrainingData.open(write_texts(tmp_path, train=8), model, options(iters=10**6))
        await data.next()
        await data.close()
        return data._child.exit_code

    assert asyncio.run(leave()) == -9


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (['{"text": "a b c"}', '{"prompt": "a"}'], r'train\.jsonl line 2 has no "text"; the first line has one'),
        (['{"text": "a b c"}', "", "[1]"], r"train\.jsonl line 3 is not a JSON object"),
        (['{"text": "a b c"}', '{"text": 5}'], r"train\.jsonl line 2 cannot be tokenized"),
        (['{"other": "a"}'], r"train\.jsonl line 1: Unsupported data format"),
        (['{"text": "a b c"}'], r"train\.jsonl has 1 sequences, fewer than the batch size of 2"),
        ([], r"train\.jsonl is missing or empty"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(model: Path, tmp_path: Path, lines: list[str], why: str) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(InvalidRequest, match=why):
        read_training_data(tmp_path, load_tokenizer(model), options())


def test_what_the_process_refuses_reaches_its_caller(model: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a b c"}\n{"text": \n')
    with pytest.raises(InvalidRequest, match=r"train\.jsonl line 2 is not JSON"):
        asyncio.run(all_batches(tmp_path, model, options()))
    with pytest.raises(BadCheckpoint, match="has no tokenizer"):
        asyncio.run(all_batches(tmp_path, tmp_path, options()))
