"""Runs mlx-lm in one process, to compare a pipeline with. Reads commands from stdin, writes JSON lines to stdout.

With BENCH_BACKEND, it is a rank of one of MLX's groups, and holds its part of the model (``sharded_processes``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STEP = 512
"""Tokens per chunk of a prompt. mlx-lm's own default is 2,048."""
SUM_ROUNDS = 5


class SingleProcess:
    """A child process with the model, pinned to ``core`` unless that is None. Times are in seconds."""

    def __init__(self, model: Path, *, core: int | None = 0, environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(model), "free" if core is None else str(core)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def batch(self, users: int, prompt: int, tokens: int) -> float:
        """Decode ``tokens`` for each of ``users`` with mlx-lm's BatchGenerator. Return seconds, without prefill."""
        return float(self._ask(f"batch {users} {prompt} {tokens}"))

    def prefill(self, prompt: int, step: int = STEP) -> float:
        """Return the time from a prompt to its first token. It is read in chunks of ``step`` tokens."""
        return float(self._ask(f"prefill 1 {prompt} 1 {step}"))

    def decode(self, prompt: int, tokens: int) -> float:
        """Decode ``tokens`` for one user with mlx-lm's ``generate_step``. Return seconds without the first one."""
        return float(self._ask(f"decode 1 {prompt} {tokens}"))

    def greedy(self, prompt: int, tokens: int) -> list[tuple[int, float]]:
        """Return greedy tokens, each with the distance to the second best logit."""
        return [(int(token), float(gap)) for token, gap in self._ask(f"greedy 1 {prompt} {tokens}")]

    def sum_s(self, count: int, nbytes: int) -> float:
        """Return the seconds of one sum over all ranks, in a chain of ``count``. All ranks have to be asked at once."""
        return float(self._ask(f"sums {count} {nbytes}"))

    def _ask(self, command: str) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"mlx-lm's process ended during '{command}'; its output says why")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate(timeout=30)


def prompt_ids(user: int, length: int) -> list[int]:
    """Return a prompt that differs between users from the first token on."""
    return [(i * 31 + user * 7) % 250 for i in range(length)]


def _batch(model: Any, users: int, prompt: int, tokens: int) -> float:
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(model, max_tokens=tokens + 1, completion_batch_size=users, prefill_batch_size=users)
    generator.insert([prompt_ids(user, prompt) for user in range(users)])
    counts, began = 0, 0.0
    while counts < users * (tokens + 1):
        responses = generator.next_generated()
        began = began or (time.perf_counter() if responses else 0.0)
        counts += len(responses)
    return time.perf_counter() - began


def _steps(model: Any, prompt: int, tokens: int, step: int = STEP) -> Any:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    return generate_step(mx.array(prompt_ids(0, prompt)), model, max_tokens=tokens, prefill_step_size=step)


def _prefill(model: Any, users: int, prompt: int, tokens: int, step: int) -> float:
    began = time.perf_counter()
    next(iter(_steps(model, prompt, tokens, step)))
    return time.perf_counter() - began


def _decode(model: Any, users: int, prompt: int, tokens: int) -> float:
    steps = iter(_steps(model, prompt, tokens + 1))
    next(steps)
    began = time.perf_counter()
    for _ in steps:
        pass
    return time.perf_counter() - began


def _greedy(model: Any, users: int, prompt: int, tokens: int) -> list[tuple[int, float]]:
    import mlx.core as mx

    said = []
    for token, logprobs in _steps(model, prompt, tokens):
        best = mx.topk(logprobs.astype(mx.float32), 2)
        said.append((int(token), abs(float(best[0] - best[1]))))
    return said


def _sums(model: Any, count: int, nbytes: int) -> float:
    """Add bfloat16 arrays of ``nbytes`` of all ranks, ``count`` times in a chain. Return the seconds of one sum."""
    import mlx.core as mx

    took = []
    for _ in range(SUM_ROUNDS):
        array = mx.zeros((nbytes // 2,), mx.bfloat16)
        mx.eval(mx.distributed.all_sum(array))
        began = time.perf_counter()
        for _ in range(count):
            array = mx.distributed.all_sum(array)
        mx.eval(array)
        took.append((time.perf_counter() - began) / count)
    return sorted(took)[SUM_ROUNDS // 2]


COMMANDS = {"batch": _batch, "prefill": _prefill, "decode": _decode, "greedy": _greedy, "sums": _sums}


def main(model_folder: str, where: str) -> None:
    if where != "free" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(where)})
    import mlx.core as mx

    if os.environ.get("MACPIPE_DEVICE") == "cpu":
        mx.set_default_device(mx.cpu)  # before mlx-lm makes its stream, which stays where it was made
    from mlx_lm.utils import load_model

    backend = os.environ.get("BENCH_BACKEND", "")
    group = mx.distributed.init(strict=True, backend=backend) if backend else None
    model, _ = load_model(Path(model_folder), lazy=group is not None)
    if group is not None:
        model.shard(group)
        mx.eval(model.parameters())
    for line in sys.stdin:
        kind, *figures = line.split()
        print(json.dumps(COMMANDS[kind](model, *map(int, figures))), flush=True)
        mx.clear_cache()  # a stage may share the device's memory


if __name__ == "__main__":
    main(*sys.argv[1:])
