"""Measures what a second copy of a model brings: tokens per second of several users, and prefixes that are found again.

``rates``: two copies on one core each serve all users, beside one copy on one core, one copy cut into two stages, and
mlx-lm in two independent processes with half of the users each, which is the most that two cores can bring
(``over_independent``). Coordinator and client share those cores. Every other round has the reverse order.

``routing``: agents work at the same time, each turn of which begins with the one before. ``cached_share`` is how much
of what they send again needs not be read again, with requests routed by what the copies keep, and drawn at random.

``--gpus`` gives each worker a GPU of its own in place of a core. ``--shape`` serves a model of real shapes.

With several numbers of ``--users``, the names of figures end with theirs. What a copy brings depends on them: where a
batch of twice as many rows takes less than twice as long, one copy gains by its larger batches what two copies lose.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from agent_client import send
from agent_models import make_agent_model
from agent_sessions import Prompts, Script
from figures import Figure, options, print_figures
from loopback import start_cluster
from random_llama import SHAPES, write
from single_process import SingleProcess
from throughput import at_once, batch_rate, wide_llama

from cluster.cli.process_group import reserve_port
from cluster.client import Client
from cluster.model.tokenizer import Tokenizer, load_tokenizer

PARTS = ("rates", "routing")
COPIES = 2
WARM = 5
"""Tokens of each user for the warm-up, because first accesses to memory are slow."""
RANDOM = Path(__file__).with_name("random_coordinator.py")
ANSWER_TOKENS = 16
CONTEXT = 16384


class Rates:
    """The same users, served in each of four ways."""

    def __init__(self, stack: ExitStack, asked: Namespace, model: Path, places: Sequence[Mapping[str, str]]) -> None:
        self._asked = asked
        cores = () if asked.gpus else asked.cores
        self._singles = [
            SingleProcess(model, core=cores[i] if cores else None, environment=place) for i, place in enumerate(places)
        ]
        for single in self._singles:
            stack.callback(single.close)
        folder = model.parent
        self._copies, self._one, self._stages = (
            _start(stack, model, folder / name, count, cores, places, replicas=copies)
            for name, count, copies in (("copies", COPIES, COPIES), ("one", 1, 0), ("stages", COPIES, 0))
        )
        self._rates: dict[tuple[str, int], list[float]] = {
            (name, users): [] for users in asked.users for name in self._ways()
        }

    def _ways(self) -> dict[str, Callable[[int, int, int], float]]:
        return {
            "copies": lambda *what: self._rate(self._copies, *what),
            "one": lambda *what: self._rate(self._one, *what),
            "stages": lambda *what: self._rate(self._stages, *what),
            "independent": lambda users, tokens, salt: self._independent_rate(users, tokens),
        }

    def play(self, number: int) -> None:
        """Measure each way once with each number of users; round 0 warms up."""
        for users in self._asked.users:
            for name, measure in list(self._ways().items())[:: 1 if number % 2 else -1]:
                rate = measure(users, self._asked.tokens if number else WARM, 100 * number)
                if number:
                    self._rates[name, users].append(rate)
            if number:
                took = ", ".join(f"{name} {rates[-1]:.1f}" for (name, of), rates in self._rates.items() if of == users)
                print(f"round {number}, {users} users, tokens/s: {took}", file=sys.stderr, flush=True)

    def _rate(self, client: Client, users: int, tokens: int, salt: int) -> float:
        return batch_rate(client.address, users, self._asked.prompt, tokens, salt)

    def _independent_rate(self, users: int, tokens: int) -> float:
        half = users // COPIES
        return sum(
            at_once(self._singles, lambda single: half * tokens / single.batch(half, self._asked.prompt, tokens))
        )

    def _named(self, name: str, users: int) -> str:
        return name if len(self._asked.users) == 1 else f"{name}_{users}"

    def figures(self) -> list[Figure]:
        return [Figure(self._named(*of), "tokens/s", rates) for of, rates in self._rates.items()]

    def ratios(self) -> dict[str, float]:
        """Return the median ratios of the copies to each other way, round by round."""
        return {
            f"over_{self._named(name, users)}": median(
                ours / theirs for ours, theirs in zip(self._rates["copies", users], rates, strict=True)
            )
            for (name, users), rates in self._rates.items()
            if name != "copies"
        }


def _start(
    stack: ExitStack,
    model: Path,
    folder: Path,
    count: int,
    cores: Sequence[int],
    places: Sequence[Mapping[str, str]],
    *more: str,
    replicas: int = 0,
    coordinator: Path | None = None,
) -> Client:
    folder.mkdir()
    return start_cluster(
        stack,
        model,
        *more,
        folder=folder,
        cores=cores[:count],
        environments=places[:count],
        replicas=replicas,
        coordinator=coordinator,
    )


class Sessions:
    """Agents that send their turns to one cluster at the same time."""

    def __init__(self, port: int, tokenizer: Tokenizer, asked: Namespace) -> None:
        self._port, self._tokenizer, self._asked = port, tokenizer, asked
        self.reusable = self.cached = 0

    def play(self, number: int) -> None:
        """Send all turns of all agents; ``number`` makes their prompts differ from those of other rounds."""
        with ThreadPoolExecutor(self._asked.agents) as pool:
            for reusable, cached in pool.map(lambda agent: self._play_one(number, agent), range(self._asked.agents)):
                self.reusable += reusable
                self.cached += cached

    def _play_one(self, number: int, agent: int) -> tuple[int, int]:
        counts = list(self._turns(Script(self._tokenizer, self._asked.at), f"Agent {agent} of run {number}.\n"))
        return sum(reusable for reusable, _ in counts), sum(cached for _, cached in counts)

    def _turns(self, script: Script, salt: str) -> Iterator[tuple[int, int]]:
        """Yield what each turn could reuse of the turns before, and what it did."""
        sent = Prompts()
        for ask in script.short_turns(self._asked.at, self._asked.turns):
            prepared = ask.prepared(salt, ANSWER_TOKENS)
            conversation = prepared.conversation()
            ids = self._tokenizer.chat(conversation.messages, conversation.options)
            answer = send(self._port, prepared)
            yield sent.reusable(ids), answer.cached_tokens
            sent.add(ids)


def cached_share(asked: Namespace, folder: Path, coordinator: Path | None) -> list[float]:
    """Return the share of what was sent before that each round finds kept, over two copies of a small model."""
    with ExitStack() as stack:
        model = folder / "model"
        make_agent_model(model, "llama", CONTEXT)
        port = stack.enter_context(reserve_port("127.0.0.1"))
        more = ("--http", f"127.0.0.1:{port}", "--max-context", str(CONTEXT))
        cores = () if asked.gpus else asked.cores
        _start(
            stack,
            model,
            folder / "cluster",
            COPIES,
            cores,
            _places(asked),
            *more,
            replicas=COPIES,
            coordinator=coordinator,
        )
        shares = []
        for number in range(asked.sessions):
            sessions = Sessions(port, load_tokenizer(model), asked)
            sessions.play(number)
            shares.append(sessions.cached / sessions.reusable)
        return shares


def _places(asked: Namespace) -> list[Mapping[str, str]]:
    """Return each worker's environment: a GPU of its own, or nothing."""
    return [{"CUDA_VISIBLE_DEVICES": str(i)} if asked.gpus else {} for i in range(COPIES)]


def main() -> int:
    parser = options(str(__doc__))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which measurements")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--users", type=int, nargs="+", default=[8], help="how many at once")
    parser.add_argument("--prompt", type=int, default=4, help="tokens of each user's prompt")
    parser.add_argument("--tokens", type=int, default=24, help="of each user")
    parser.add_argument("--width", type=int, default=1536, help="of the random llama, in 4 bits")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="a llama of real shapes in its place")
    parser.add_argument("--cores", type=int, nargs=COPIES, default=[0, 1], help="not two threads of one core")
    parser.add_argument("--gpus", action="store_true", help="a GPU for each worker")
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--at", type=int, default=3000, help="tokens of each agent's first prompt")
    parser.add_argument("--turns", type=int, default=8, help="of each agent after its first prompt")
    parser.add_argument("--sessions", type=int, default=2, help="rounds of agents")
    asked = parser.parse_args()
    figures: list[Figure] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="macpipe-replicas-") as temporary:
        folder = Path(temporary)
        if "rates" in asked.parts:
            with ExitStack() as stack:
                model = (
                    write(folder / "model", SHAPES[asked.shape]) if asked.shape else wide_llama(folder, asked.width, 4)
                )
                rates = Rates(stack, asked, model, _places(asked))
                for number in range(asked.rounds + 1):
                    rates.play(number)
            figures += rates.figures()
            ratios |= rates.ratios()
        if "routing" in asked.parts:
            for name, coordinator in (("routed", None), ("random", RANDOM)):
                (folder / name).mkdir()
                shares = cached_share(asked, folder / name, coordinator)
                figures.append(Figure(f"{name}_share", "of 1", shares))
                ratios["cached_share" if coordinator is None else "random_cached_share"] = median(shares)
    print_figures("medians", figures, ratios, asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
