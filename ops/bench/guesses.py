"""Measures what guesses bring one user on real text: a file to rewrite, a summary, a chat; guesses off and on by turns.

Two workers serve the model, one core each. Every text is asked once without guesses and once with them, greedily, and
each text only once, so no answer is guessed from an earlier one to the same question. With ``--draft`` the guesses come
from that model on a third worker, otherwise from n-grams. A task's acceptance is the share of its guesses that were
right, and covered is the share of its tokens that were right guesses. The tokens of all answers are compared.
"""

from __future__ import annotations

import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from figures import Figure, options, print_figures
from loopback import start_cluster

from cluster.client import Client
from cluster.core.lap_times import run_token_time

TASKS = Path(__file__).with_name("guess_tasks.toml")
BUNDLED = "faq"
"""A bundled model that can answer the task ``questions`` and no other."""


@dataclass(frozen=True)
class Answer:
    """Milliseconds per token, the tokens, and the tokens that were guessed, guessed rightly, and each stage's ms."""

    token_ms: float
    tokens: tuple[int, ...]
    guessed: int
    accepted: int
    stage_ms: tuple[float, ...]


class Bench:
    """Answers of one client, guessed or not."""

    def __init__(self, client: Client, tokens: int) -> None:
        self._client, self._tokens = client, tokens

    def ask(self, text: str, *, speculate: bool) -> Answer:
        """Answer ``text`` once."""
        before = self._counts()
        answer = self._client.chat(
            [("user", text)], max_tokens=self._tokens, temperature=0.0, speculate=speculate, timeout_s=600
        )
        guessed, accepted = (after - was for after, was in zip(self._counts(), before, strict=True))
        steps = max(len(answer.tokens), 1)
        stages = tuple(stage.compute_ms / steps for stage in answer.stages)
        return Answer(answer.timings.tpot_ms, tuple(answer.tokens), guessed, accepted, stages)

    def _counts(self) -> tuple[int, int]:
        counts = self._client.cluster().guesses
        return sum(c.guessed for c in counts), sum(c.accepted for c in counts)


@dataclass(frozen=True)
class Task:
    """The answers to one task's texts, without guesses and with them."""

    name: str
    off: list[Answer]
    on: list[Answer]

    @property
    def speedups(self) -> list[float]:
        """How much faster each answer was with guesses."""
        return [off.token_ms / on.token_ms for off, on in zip(self.off, self.on, strict=True)]

    @property
    def facts(self) -> dict[str, float]:
        """The speed-up beside the formula's, the share of right guesses, and the share of tokens that they were.

        By the formula a covered token takes the time of the slowest stage, and another one as long as without guesses.
        """
        guessed, accepted = (sum(getattr(a, name) for a in self.on) for name in ("guessed", "accepted"))
        covered = accepted / sum(len(a.tokens) for a in self.on)
        lap, slowest = median(a.token_ms for a in self.off), median(max(a.stage_ms) for a in self.off)
        return {
            f"speedup_{self.name}": median(self.speedups),
            f"formula_{self.name}": lap / run_token_time(lap, slowest, covered),
            f"acceptance_{self.name}": accepted / guessed if guessed else 0.0,
            f"covered_{self.name}": covered,
        }

    @property
    def figures(self) -> list[Figure]:
        """Return the milliseconds per token without and with guesses."""
        return [
            Figure(f"{self.name} {name}", "ms a token", [a.token_ms for a in answers])
            for name, answers in (("off", self.off), ("on", self.on))
        ]


def measure(bench: Bench, name: str, prompts: Sequence[str]) -> Task:
    """Ask each prompt twice. Which of the two comes first changes from prompt to prompt."""
    task = Task(name, [], [])
    for i, prompt in enumerate(prompts):
        for guessed in (False, True) if i % 2 else (True, False):
            (task.on if guessed else task.off).append(bench.ask(prompt, speculate=guessed))
    return task


def prompts_of(task: Mapping[str, object], most: int | None) -> list[str]:
    """Return the prompts of a task: its instruction before each of its texts, at most ``most``."""
    instruction, texts = str(task["instruction"]), task["texts"]
    assert isinstance(texts, list)
    return [f"{instruction}\n\n{text}" if instruction else str(text) for text in texts[:most]]


def main() -> int:
    parser = options(str(__doc__))
    parser.add_argument("--model", default=BUNDLED, help="a chat model: a folder, or the bundled one")
    parser.add_argument("--draft", default="", help="a draft model with the same tokenizer")
    parser.add_argument("--tokens", type=int, default=160, help="of an answer at most")
    parser.add_argument("--texts", type=int, help="of a task at most")
    asked = parser.parse_args()
    known = tomllib.loads(TASKS.read_text())["tasks"]
    names = ["questions"] if asked.model == BUNDLED else [name for name in known if name != "questions"]
    source = ["draft", "--draft", asked.draft] if asked.draft else ["ngram"]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="macpipe-guesses-")))
        spares = ("c",) if asked.draft else ()
        client = start_cluster(stack, asked.model, "--speculate", *source, folder=folder, cores=(0, 1), spares=spares)
        bench = Bench(client, asked.tokens)
        bench.ask("Hello", speculate=True)
        tasks = [measure(bench, name, prompts_of(known[name], asked.texts)) for name in names]
    differ = sum(off.tokens != on.tokens for task in tasks for off, on in zip(task.off, task.on, strict=True))
    figures = [figure for task in tasks for figure in task.figures]
    ratios = {name: fact for task in tasks for name, fact in task.facts.items()}
    off = [answer for task in tasks for answer in task.off]
    stage_ms = [round(median(a.stage_ms[i] for a in off), 3) for i in range(len(off[0].stage_ms))]
    more = {
        "tokens_differ": differ,
        "stage_ms": stage_ms,
        "answer_tokens": {task.name: [len(a.tokens) for a in task.on] for task in tasks},
    }
    print_figures("ms_per_token", figures, ratios, asked.json, more)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
