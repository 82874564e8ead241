"""Measures a group of workers as one stage, beside other ways to serve the same model on the same machine.

The ways are: mlx-lm in one process (``single``), mlx-lm sharded by itself over as many processes as the group has ranks
(``sharded``), one worker with all layers (``one``), a pipeline of as many workers (``stages``), and the group
(``group``). Each round measures one user's decode and the first token of a prompt in every way. Rounds have turned
orders. Weights are random, because speed does not depend on them; shapes are those of real Llamas in 4 bits.

Each worker has a GPU of its own, from 0 on; ``one`` has the last, because ``single`` has the first. ``--shape small
--cpu`` runs without a GPU. With ``--predict``, the group starts last, since its workers measure how fast they are, and
how fast they add up. Figures are in ``--record FILE`` as soon as they are measured.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from string import ascii_lowercase

from figures import options
from llama70b import first_difference
from loopback import start_cluster
from pipeline_rounds import EVERY, PROMPT, Measurement, OneUser, fresh_prompt, stage_times
from random_llama import SHAPES, write
from record import Record
from sharded_processes import ShardedProcesses
from single_process import SingleProcess

from cluster.client import Client

WAYS = ("single", "sharded", "one", "stages", "group")
SUM_BYTES = {"16_kib": 16 << 10, "1_mib": 1 << 20}
CHAIN = 160
"""Sums of a token of the 70B shape: two in each layer."""


@dataclass(frozen=True)
class Way:
    """One way to serve the model: how to measure one user's tokens/s, and the first token of a prompt in seconds.

    Both get the number of the round.
    """

    name: str
    decode: Callable[[int], float]
    first_token: Callable[[int], float]


class Served:
    """A way that our own daemons serve. Prompts of its figures share no beginning with earlier ones."""

    def __init__(self, name: str, client: Client, asked: Namespace) -> None:
        self.name, self.client, self._asked = name, client, asked
        self._prompts = count()
        self._one = OneUser(client, asked.tokens)

    def way(self) -> Way:
        return Way(self.name, lambda number: self._one.rate(number, None), lambda _: self._first_token_s())

    def _first_token_s(self) -> float:
        while self.client.cluster().requests:
            time.sleep(0.02)
        ids = fresh_prompt(f"prompt {next(self._prompts)} of {self.name}", self._asked.length)
        began = time.perf_counter()
        self.client.generate(ids, max_tokens=1, ignore_eos=True)
        return time.perf_counter() - began

    def facts(self) -> dict[str, object]:
        """Return who serves what, and each stage's milliseconds per token of one user."""
        ids, tokens = fresh_prompt(f"stages of {self.name}", PROMPT), self._asked.tokens
        self.client.generate(ids, max_tokens=1, ignore_eos=True)  # so that only decoding is measured
        times = stage_times(self.client.generate(ids, max_tokens=tokens, ignore_eos=True), tokens)
        state = self.client.cluster()
        peaks = {worker.name: worker.memory_peak for worker in state.workers}
        held = [
            {
                **{"worker": stage.worker, "layers": str(stage.layers), "rank": stage.rank, "ranks": stage.ranks},
                **{"slice": stage.weight_bytes, "peak": peaks[stage.worker]},
            }
            for stage in state.stages
        ]
        decode = [{"expected_ms": stage.expected_ms, "measured_ms": stage.measured_ms} for stage in state.stages]
        return {"held": held, "times": times, "recoveries": state.recoveries, "decode": decode}


def devices(asked: Namespace) -> list[Mapping[str, str]]:
    """Return each rank's environment: its own GPU, or nothing."""
    return [{} if asked.cpu else {"CUDA_VISIBLE_DEVICES": str(i)} for i in range(asked.ranks)]


def group_of(asked: Namespace) -> tuple[str, ...]:
    """Return the names of the group's workers, as ``start_cluster`` calls them."""
    return tuple(ascii_lowercase[: asked.ranks])


def serve(asked: Namespace, name: str, model: Path, stack: ExitStack) -> Served:
    """Start the daemons of one way."""
    environments, whole = devices(asked), asked.memory_limit_whole
    own = {
        "one": ((), environments[-1:], whole),
        "stages": ((), environments, asked.memory_limit),
        "group": (("--workers", "1", "--group", "+".join(group_of(asked))), environments, asked.memory_limit),
    }
    more, places, limit = own[name]
    folder = model.parent / name
    folder.mkdir(exist_ok=True)
    profile = ["--profile", "new"] if asked.predict and name == "group" else []
    client = start_cluster(
        stack,
        model,
        *("--max-context", str(asked.context), "--speculate", "off", *more),
        folder=folder,
        environments=places,
        worker_options=[*profile, *(["--memory-limit", limit] if limit else [])],
    )
    return Served(name, client, asked)


def serve_all(asked: Namespace, model: Path, stack: ExitStack) -> list[Served]:
    """Start the daemons of all ways at once, but the group's apart if they measure. Return the group last."""
    names = [name for name in ("one", "stages", "group") if name in asked.ways]
    apart = [name for name in names if asked.predict and name == "group"]
    served: list[Served] = []
    for batch in ([name for name in names if name not in apart], apart):
        stacks = [stack.enter_context(ExitStack()) for _ in batch]
        with ThreadPoolExecutor(len(batch) or 1) as starting:
            served += starting.map(lambda name, own: serve(asked, name, model, own), batch, stacks)
    return served


def start(asked: Namespace, stack: ExitStack, record: Record) -> list[Way]:
    """Write the checkpoint unless its folder has it, and start all ways at once."""
    folder = Path(asked.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="macpipe-groups-")))
    model, began = folder / "model", time.perf_counter()
    if not (model / "config.json").exists():
        write(model, SHAPES[asked.shape])
        record.facts["write_s"] = round(time.perf_counter() - began, 1)
        print(f"wrote the checkpoint in {record.facts['write_s']} s", file=sys.stderr, flush=True)
    environments, began = devices(asked), time.perf_counter()
    ways: list[Way] = []
    single = None
    if "single" in asked.ways:
        single = SingleProcess(model, environment=environments[0], core=None)
        stack.callback(single.close)
        ways.append(process_way("single", single, asked))
    sharded = None
    if "sharded" in asked.ways:
        sharded = ShardedProcesses(stack, model, folder, environments, "ring" if asked.cpu else "nccl")
        ways.append(process_way("sharded", sharded, asked))
    record.log = folder / "group" / "serve.log"
    served = serve_all(asked, model, stack)
    record.facts["serve_s"] = round(time.perf_counter() - began, 1)
    print(f"all ways serve after {record.facts['serve_s']} s", file=sys.stderr, flush=True)
    if sharded:
        sums = {name: sharded.sum_s(CHAIN, nbytes) for name, nbytes in SUM_BYTES.items()}
        record.facts["sum_us"] = {name: round(seconds * 1e6, 1) for name, seconds in sums.items()}
    if asked.predict and "group" in asked.ways:
        plan = served[-1].client.plan(str(model), workers=1, groups=[group_of(asked)], max_context=asked.context)
        record.facts["plan"] = list(plan.reasons)
    for one in served:
        if single:
            record.facts[f"first_difference_{one.name}"] = first_difference(one.client, single, asked.tokens)
        record.facts[one.name] = one.facts()
        record.keep()
    return [*ways, *(one.way() for one in served)]


def process_way(name: str, process: SingleProcess | ShardedProcesses, asked: Namespace) -> Way:
    return Way(
        name,
        lambda _: asked.tokens / process.decode(PROMPT, asked.tokens),
        lambda _: process.prefill(asked.length),
    )


def measurements(ways: Sequence[Way], length: int) -> list[Measurement]:
    found = [Measurement(f"decode1_{way.name}", "tokens/s", way.decode, EVERY) for way in ways]
    return found + [Measurement(f"ttft_{length}_{way.name}", "s", way.first_token, EVERY) for way in ways]


def measure(asked: Namespace, stack: ExitStack, record: Record) -> None:
    """Run all rounds, each in the order opposite to that of the one before. Nothing is warmed up but by round 1."""
    ways = start(asked, stack, record)
    for number in range(1, asked.rounds + 1):
        record.rounds.play(measurements(ways[:: 1 if number % 2 else -1], asked.length), number, first=number)
    record.facts["left_out"] = record.rounds.left_out


def ratios(medians: Mapping[str, float]) -> dict[str, float]:
    """Return how many times as fast the group is as each other way: more is better, also of times."""
    found = {}
    for name, median in medians.items():
        what, _, way = name.rpartition("_")
        ours = medians.get(f"{what}_group")
        if ours and way != "group":
            found[f"{what}_over_{way}"] = median / ours if what.startswith("ttft") else ours / median
    return found


def main() -> int:
    parser = options(str(__doc__))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="70b")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="what is measured")
    parser.add_argument("--ranks", type=int, default=2, help="of the group, each with a GPU of its own")
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU, over MLX's ring")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3600, help="begin no measurement that would end later")
    parser.add_argument("--tokens", type=int, default=64, help="of one user's answer")
    parser.add_argument("--length", type=int, default=2048, help="of the prompt")
    parser.add_argument("--predict", action="store_true", help="let the group's workers measure their speed and sums")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--memory-limit", help="of each stage and rank, like 28GiB: GPUs are shared by all ways")
    parser.add_argument("--memory-limit-whole", help="of the one worker that holds all layers, like 48GiB")
    parser.add_argument("--folder", help="keep the checkpoint here; else in a temporary folder")
    parser.add_argument("--record", type=Path, help="write the figures to this file as they come")
    asked = parser.parse_args()
    if asked.cpu:
        os.environ["MACPIPE_DEVICE"] = "cpu"
    record = Record(asked.record, asked.seconds, ratios, {"shape": asked.shape, "ranks": asked.ranks})
    return record.fill(lambda stack: measure(asked, stack, record), as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
