"""mlx-lm's own fine-tuning in one process, to compare with, and small data sets for it."""

from __future__ import annotations

import json
import random
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import lora
from mlx_lm.tuner.callbacks import TrainingCallback

WORDS = ("red", "fox", "ran", "over", "blue", "hill", "and", "saw", "one", "old", "dog", "by", "two", "green", "trees")


def write_texts(folder: Path, **counts: int) -> Path:
    """Write data sets of so many random texts, by name, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in counts.items():
        chosen = random.Random(name)
        texts = [" ".join(chosen.choices(WORDS, k=chosen.randint(5, 30))) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


class _Reports(TrainingCallback):
    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.made.append({k: train_info[k] for k in ("iteration", "train_loss", "learning_rate")})

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        self.made.append({k: val_info[k] for k in ("iteration", "val_loss")})


def fine_tune(model: Path, data: Path, adapters: Path, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train as ``mlx_lm.lora`` does. Return its reports, and the adapters by name as they are on disk."""
    chosen = {**lora.CONFIG_DEFAULTS, "model": str(model), "data": str(data), "adapter_path": str(adapters)}
    chosen |= {"train": True, "steps_per_report": 1, **options}
    chosen["lora_parameters"] = dict(chosen["lora_parameters"])
    arguments = types.SimpleNamespace(**chosen)
    np.random.seed(arguments.seed)
    loaded, tokenizer = lora.load(arguments.model)
    train, valid, _ = lora.load_dataset(arguments, tokenizer)
    reports = _Reports()
    with _one_use(type(loaded.layers[0])):
        lora.train_model(arguments, loaded, train, valid, reports)
    return reports.made, dict(mx.load(str(adapters / "adapters.safetensors")))


@contextmanager
def _one_use(layer: type) -> Iterator[None]:
    """Leave no trace: checkpointing changes the layer's class for good, and compiling takes 15 s without a gain."""
    call = layer.__call__
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()
        layer.__call__ = call  # type: ignore[method-assign]
