"""mlx-lm in one process on one core: what a pipeline has to beat. Commands come on stdin, seconds go to stdout."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


class SingleProcess:
    """A child that holds the model, pinned to core 0. ``batch`` and ``prefill`` return seconds."""

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def batch(self, users: int, prompt: int, tokens: int) -> float:
        """Decode ``tokens`` for each of so many users with mlx-lm's BatchGenerator; without their prefill."""
        return self._ask(f"batch {users} {prompt} {tokens}")

    def prefill(self, prompt: int) -> float:
        """From a prompt to its first token."""
        return self._ask(f"prefill 1 {prompt} 1")

    def _ask(self, command: str) -> float:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=10)


def _prompt(user: int, length: int) -> list[int]:
    return [(i * 31 + user * 7) % 250 for i in range(length)]


def _batch(model: object, users: int, prompt: int, tokens: int) -> float:
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(model, max_tokens=tokens + 1, completion_batch_size=users, prefill_batch_size=users)
    generator.insert([_prompt(user, prompt) for user in range(users)])
    counts, began = 0, 0.0
    while counts < users * (tokens + 1):
        responses = generator.next_generated()
        began = began or (time.perf_counter() if responses else 0.0)
        counts += len(responses)
    return time.perf_counter() - began


def _prefill(model: object, prompt: int) -> float:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    began = time.perf_counter()
    next(iter(generate_step(mx.array(_prompt(0, prompt)), model, max_tokens=1, prefill_step_size=512)))
    return time.perf_counter() - began


def main(model_folder: str) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {0})
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(model_folder))
    for line in sys.stdin:
        kind, users, prompt, tokens = line.split()
        took = _batch(model, int(users), int(prompt), int(tokens)) if kind == "batch" else _prefill(model, int(prompt))
        print(took, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
