"""Measures training over two stages on two cores, compared with mlx_lm.lora in one process on one core.

Both train the same random llama on the same sequences of one length, with k = 8 steps before each update. Stages
overlap only between updates, so two of them are at best 2k/(k+1) times as fast as one. ``over_bound`` is the share of
that which is reached. It is measured without and with checkpointing. ``micro_batches_over_bound`` is the same share for
a batch of k sequences without accumulation, cut into k micro-batches, beside the same batch in one piece. A figure is
the median over updates, without the first one.

mlx-lm compiles its step, which takes 15 s and more on a CPU and makes no step faster there. So it runs uncompiled, as
stages do; ``--compile`` leaves it as it is. ``--json`` prints one JSON object on one line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

STEPS = 8
"""Steps before each update (k)."""
TOKENS = 96
"""Tokens of each sequence. A step has one sequence, or k where batches are cut."""
OPTIONS: dict[str, Any] = {
    "train": True, "batch_size": 1, "num_layers": -1, "max_seq_length": TOKENS + 1, "learning_rate": 1e-4,
    "grad_accumulation_steps": STEPS, "steps_per_report": STEPS, "steps_per_eval": 10**6, "save_every": 10**6,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"grad_checkpoint": True},
    "whole_batch": {"batch_size": STEPS, "grad_accumulation_steps": 1, "steps_per_report": 1},
    "micro_batches": {"batch_size": STEPS, "grad_accumulation_steps": 1, "steps_per_report": 1, "micro_batches": STEPS},
}
"""What two stages train, by name."""


def make(folder: Path) -> None:
    """Write the model and its data into ``folder``."""
    from loopback import make_llama

    make_llama(folder / "model", hidden=256, intermediate=704, layers=8, heads=4, context=512)
    words = ["the red fox ran over a blue hill"] * TOKENS
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text((json.dumps({"text": " ".join(words)}) + "\n") * STEPS)


def one_process(folder: Path, updates: int, checkpoint: bool, compiled: bool) -> list[float]:
    """Train with mlx-lm in this process. Return the tokens per second of each update."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm import lora
    from mlx_lm.tuner.callbacks import TrainingCallback

    speeds: list[float] = []

    class Speeds(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            speeds.append(train_info["tokens_per_second"])

    if not compiled:
        mx.disable_compile()
    given = {**lora.CONFIG_DEFAULTS, **OPTIONS, "iters": updates * STEPS, "grad_checkpoint": checkpoint}
    places = {"model": str(folder / "model"), "data": str(folder / "data"), "adapter_path": str(folder / "adapters")}
    options = SimpleNamespace(**{**given, **places})
    np.random.seed(0)
    model, tokenizer = lora.load(options.model)
    train, _, _ = lora.load_dataset(options, tokenizer)
    lora.train_model(options, model, train, [], Speeds())
    return speeds


def two_stages(folder: Path, updates: int) -> dict[str, list[float]]:
    """Train over two workers, each on a core. Return the tokens per second of each update of each run."""
    from loopback import start_cluster

    from cluster.core.training import TrainingOptions
    from cluster.core.training_events import TrainingReport

    speeds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        client = start_cluster(stack, folder / "model", cores=(0, 1))
        for name, more in RUNS.items():
            given = {**OPTIONS, **more, "val_batches": 0}
            options = TrainingOptions.of({**given, "iters": updates * given["grad_accumulation_steps"]})
            run = client.train(str(folder / "model"), options, {"train": folder / "data" / "train.jsonl"}, workers=2)
            speeds[name] = [e.tokens_per_second for e in run if isinstance(e, TrainingReport)]
            while client.cluster().state != "serving":
                time.sleep(0.2)
    return speeds


def apart(folder: Path, updates: int, checkpoint: bool, compiled: bool) -> list[float]:
    """Return the speeds of ``one_process`` in a new process on one core."""
    from loopback import pinned

    command = [sys.executable, __file__, "--one", str(folder), str(updates), str(int(checkpoint)), str(int(compiled))]
    with pinned(0):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    speeds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return speeds


def main() -> int:
    from figures import Figure, options, print_figures

    parser = options("training over two stages on two cores, beside mlx_lm.lora on one core")
    parser.add_argument("--updates", type=int, default=5, help="updates of the adapters; the first is not counted")
    parser.add_argument("--compile", action="store_true", help="let mlx-lm compile its step")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        folder, updates, checkpoint, compiled = asked.one
        print(json.dumps(one_process(Path(folder), int(updates), checkpoint == "1", compiled == "1")))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        alone = {
            name: apart(folder, asked.updates, name == "checkpointed", asked.compile)[1:]
            for name in ("plain", "checkpointed")
        }
        staged = {name: speeds[1:] for name, speeds in two_stages(folder, asked.updates).items()}
    bound = 2 * STEPS / (STEPS + 1)
    figures = [
        Figure(f"{where}_{name}", "tokens/s", tuple(of_updates))
        for where, speeds in (("one_process", alone), ("two_stages", staged))
        for name, of_updates in speeds.items()
    ]
    over = {name: median(staged[name]) / median(alone[name]) for name in alone}
    ratios = {f"speedup_{name}": value for name, value in over.items()}
    ratios["over_bound"] = min(over.values()) / bound
    ratios["speedup_micro_batches"] = median(staged["micro_batches"]) / median(staged["whole_batch"])
    ratios["micro_batches_over_bound"] = ratios["speedup_micro_batches"] / bound
    more = {"bound": round(bound, 4), "steps": STEPS, "load": round(os.getloadavg()[0], 1), "compiled": asked.compile}
    print_figures("tokens_per_second", figures, ratios, asked.json, more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
