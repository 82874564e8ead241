"""Measures what guesses bring one user: a four-bit llama over two workers, one core each, guesses off and on by turns.

The guesser replays the answer just given, with a set share of right tokens (``replay_coordinator``), since random
weights give no honest one. Each speed-up stands beside the formula's, which uses the share of tokens that were guessed
right, and the stage times and the time of a token that the same run has measured without guesses. ``busy_formula`` uses
the stage times with guesses: stages that compute at the same time share the machine. Every other round has the reverse
order, because a core that has just been busy is faster. The greedy tokens of all answers are compared. ``sent`` has the
guesses of an answer. ``rows`` counts those that shared a frame with another token: none, unless ``--exact off`` or
``--rows`` asks for them.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median

from figures import Figure, options, print_figures
from loopback import make_llama, start_cluster

from cluster.client import Client, Completion
from cluster.core.lap_times import LapTimes, mean_token_time

RATES = (0.0, 0.7, 0.9)
NAMES = {None: "off", 0.0: "0", 0.7: "0_7", 0.9: "0_9"}
PROMPT = [(i * 31) % 250 for i in range(16)]
REPLAY = Path(__file__).with_name("replay_coordinator.py")


@dataclass(frozen=True)
class Run:
    """One answer: milliseconds per token, its tokens, and each stage's milliseconds per token.

    ``right`` is the share of its tokens that were guessed right, and ``sent`` how many guesses were sent.
    """

    token_ms: float
    tokens: tuple[int, ...]
    stage_ms: tuple[float, ...]
    right: float
    sent: int


class Bench:
    """Answers of one client's prompt, guessed or not."""

    def __init__(self, client: Client, tokens: int) -> None:
        self._client, self._tokens, self._numbers = client, tokens, count()

    def run(self, rate: float | None) -> Run:
        """Answer once; ``rate`` is the share of right guesses, None for no guesses."""
        name = f"off-{next(self._numbers)}" if rate is None else f"replay-{rate}-{next(self._numbers)}"
        before = self._sent()
        answer: Completion = self._client.generate(
            PROMPT, max_tokens=self._tokens, ignore_eos=True, request_id=name, timeout_s=600
        )
        stages = tuple(stage.compute_ms / self._tokens for stage in answer.stages)
        right = sum(bool(token.guess) for token in answer.events) / max(len(answer.tokens) - 1, 1)
        return Run(answer.timings.tpot_ms, tuple(answer.tokens), stages, right, self._sent() - before)

    def _sent(self) -> int:
        return sum(counts.guessed for counts in self._client.cluster().guesses)


def stage_times(runs: list[Run]) -> tuple[float, ...]:
    """Return the median of each stage's milliseconds per token."""
    return tuple(median(run.stage_ms[i] for run in runs) for i in range(len(runs[0].stage_ms)))


def formulas(off: list[Run], guessed: list[Run]) -> tuple[float, float]:
    """Return the speed-ups that the stage times without guesses, and those with guesses, let expect."""
    alone = stage_times(off)
    lap, right = median(run.token_ms for run in off), median(run.right for run in guessed)
    hop = max(lap - sum(alone), 0.0) / (len(alone) + 1)
    without, busy = (
        lap / min(mean_token_time(times, window, right) for window in (1, len(alone)))
        for times in (LapTimes(alone, hop), LapTimes(stage_times(guessed), hop))
    )
    return without, busy


def main() -> int:
    parser = options(str(__doc__))
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rates", type=float, nargs="+", choices=RATES, default=RATES, help="shares of right guesses")
    parser.add_argument("--cores", type=int, nargs=2, default=[0, 1], help="not two threads of one core, where it has")
    parser.add_argument("--exact", choices=("on", "off"), default="on", help="off: rows where the workers measure gain")
    parser.add_argument("--rows", type=int, default=0, help="tokens of every guessed frame, whatever it costs")
    asked = parser.parse_args()
    os.environ["REPLAY_ROWS"] = str(asked.rows)
    measured = ("--profile", "kept", "--speculate", "ngram", "--exact", "off") if asked.exact == "off" else ()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="macpipe-onefast-")))
        model = make_llama(
            folder / "model", asked.width, asked.width * 11 // 4, asked.layers, max(asked.width // 64, 1), 4096, bits=4
        )
        client = start_cluster(
            stack, model, *measured[2:], cores=asked.cores, coordinator=REPLAY, worker_options=measured[:2]
        )
        bench = Bench(client, asked.tokens)
        first = bench.run(None)
        for rate in asked.rates:
            bench.run(rate)
        runs: dict[float | None, list[Run]] = {rate: [] for rate in (None, *asked.rates)}
        for number in range(1, 1 + asked.rounds):
            for rate in list(runs)[:: 1 if number % 2 else -1]:
                runs[rate].append(bench.run(rate))
            took = (f"{NAMES[rate]} {found[-1].token_ms:.2f}" for rate, found in runs.items())
            print(f"round {number}, ms a token: {', '.join(took)}", file=sys.stderr, flush=True)
        rows = sum(counts.rows for counts in client.cluster().guesses)
    off = runs[None]
    differ = sum(run.tokens != first.tokens for found in runs.values() for run in found)
    figures = [Figure(NAMES[rate], "ms a token", [run.token_ms for run in found]) for rate, found in runs.items()]
    ratios = {}
    for rate in asked.rates:
        pairs = zip(off, runs[rate], strict=True)
        ratios[f"speedup_{NAMES[rate]}"] = median(before.token_ms / after.token_ms for before, after in pairs)
        ratios[f"formula_{NAMES[rate]}"], ratios[f"busy_formula_{NAMES[rate]}"] = formulas(off, runs[rate])
    facts = {
        "tokens_differ": differ,
        "stage_ms": {NAMES[rate]: [round(ms, 3) for ms in stage_times(found)] for rate, found in runs.items()},
        "right_share": {NAMES[rate]: round(median(run.right for run in runs[rate]), 3) for rate in asked.rates},
        "sent": {NAMES[rate]: median(run.sent for run in runs[rate]) for rate in asked.rates},
        "rows": rows,
    }
    print_figures("ms_per_token", figures, ratios, asked.json, facts)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
