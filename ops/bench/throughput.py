"""Measures the gain of lanes, overlapping prefill and kept prefixes over mlx-lm in one process on one core.

Two stages, one core each, serve a random llama. It is large enough that compute takes most of the time, not messages.
It has enough layers for two equal halves: a prefill needs only the keys and values of the last layer, so with four
layers the second stage would have half of the first one's work. Prefill uses fp32 weights. Decode uses 4-bit weights,
as large models do, because fp32 weights would be limited by the memory bandwidth of two cores. MLX's CPU kernels
compute each row of such a step separately, so splitting a batch costs nothing here (see ``lanes_at_best``);
PERFORMANCE.md has models for which it does. A lane's frame takes half a second per stage. A hop takes 10 ms, because
both stages, the coordinator and the client share two busy cores. Each round runs every measurement; figures are
medians, and ratios are of medians.

The gain of two cores is measured too, with an independent process on each. A pipeline of two stages cannot gain more
over one core than these do (``cores_over_core``, ``prefill_at_best``), and two lanes cannot gain more than two
processes with half of the users each (``lanes_at_best``).
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

from figures import Figure, options, print_figures
from loopback import make_llama, start_cluster
from single_process import SingleProcess, prompt_ids

from cluster.client import AsyncClient, Client, Completion

LAYERS = 8
USERS = 8
PROMPT = 4
STREAMS = 4
MOST_TOKENS = 2000
LONG, LONGER = 2048, 4096
HISTORY, SECOND = 1000, 8
"""Tokens of a chat's first prompt, and of the answer to its second."""
CONTEXT = 8192
MAX_STEP_MS = 20.0
WARM = 5
"""Tokens of each user for the warm-up, because first accesses to memory are slow."""
PARTS = ("users", "prefill", "disturbed", "cached")
DECODE, PROMPTS = (1536, 4), (512, 0)
"""The models for decode and for long prompts: width (64 per head), and bits per weight (0: fp32)."""
STREAMED = 240
"""Tokens of each stream that is disturbed by a long prompt."""
LOOP = asyncio.Runner()
"""One event loop for all measurements, because gRPC does not work well with several loops in succession."""


class Crowd:
    """Streams of one salt, with the arrival times of their tokens. Each gets ``tokens`` more once all of them run."""

    def __init__(self, client: AsyncClient, users: int, prompt: int, tokens: int, salt: int, context: int) -> None:
        self.arrivals: list[list[float]] = [[] for _ in range(users)]
        self.running = asyncio.Event()
        self._client, self._prompt, self._tokens, self._salt = client, prompt, tokens, salt
        self._most = min(MOST_TOKENS, context - prompt)

    async def listen(self) -> None:
        await asyncio.gather(*(self._stream(user) for user in range(len(self.arrivals))))

    async def _stream(self, user: int) -> None:
        since = 0
        prompt = prompt_ids(user + self._salt, self._prompt)
        async with self._client.stream(prompt, max_tokens=self._most, ignore_eos=True) as stream:
            async for _ in stream:
                self.arrivals[user].append(time.perf_counter())
                if all(self.arrivals):
                    self.running.set()
                    since += 1
                if since == self._tokens:
                    return

    @property
    def together(self) -> tuple[float, float]:
        """Return the start and the end of the time in which all streams decoded."""
        return max(a[0] for a in self.arrivals), min(a[-1] for a in self.arrivals)


def listened(
    address: str, users: int, prompt: int, tokens: int, salt: int, beside: int = 0, context: int = CONTEXT
) -> Crowd:
    """Run the streams of this many users. Add a prompt of ``beside`` tokens once all of them run."""

    async def ask() -> Crowd:
        async with AsyncClient(address, timeout_s=300) as client:
            crowd = Crowd(client, users, prompt, tokens, salt, context)
            intruder = asyncio.create_task(intrude(client, crowd)) if beside else None
            await crowd.listen()
            if intruder:
                intruder.cancel()  # what is left of its prefill once the streams are over disturbs nobody
                await asyncio.gather(intruder, return_exceptions=True)
            return crowd

    async def intrude(client: AsyncClient, crowd: Crowd) -> None:
        await crowd.running.wait()
        await client.generate([salt % 250, *prompt_ids(salt, beside - 1)], max_tokens=1, ignore_eos=True)

    return LOOP.run(ask())


def batch_rate(address: str, users: int, prompt: int, tokens: int, salt: int, context: int = CONTEXT) -> float:
    """Return the tokens per second of all users together, while all of them decode."""
    crowd = listened(address, users, prompt, tokens, salt, context=context)
    began, ended = crowd.together
    return sum(began < t <= ended for a in crowd.arrivals for t in a) / (ended - began)


def first_token_s(client: Client, length: int, salt: int) -> float:
    began = time.perf_counter()
    client.generate([salt % 250, *prompt_ids(salt, length - 1)], max_tokens=1, ignore_eos=True)
    return time.perf_counter() - began


def disturbed_p99(address: str, tokens: int, salt: int, disturb: bool) -> float:
    """Return the p99 time between tokens of four streams in milliseconds, with or without a long prompt."""
    crowd = listened(address, STREAMS, PROMPT, tokens, salt, LONGER if disturb else 0)
    began, _ = crowd.together
    gaps = [b - a for answer in crowd.arrivals for a, b in pairwise(answer) if a >= began]
    return quantiles(gaps, n=100)[98] * 1e3


def second_turn(client: Client, salt: int) -> tuple[list[int], Completion]:
    """Return a chat's second prompt and its answer. The cluster has kept the prefix of the first turn."""
    history = [salt % 250, *prompt_ids(salt, HISTORY - 1)]
    said = client.generate(history, max_tokens=20, ignore_eos=True).tokens
    turn = [*history, *said, 3, 1, 4, 1, 5, 9]
    return turn, client.generate(turn, max_tokens=SECOND, ignore_eos=True)


def wide_llama(folder: Path, width: int, bits: int) -> Path:
    name = f"llama-{width}-{bits or 32}"
    return make_llama(folder / name, width, width * 11 // 4, LAYERS, heads=width // 64, context=CONTEXT, bits=bits)


def at_once(singles: Sequence[SingleProcess], ask: Callable[[SingleProcess], float]) -> list[float]:
    """Return the answers of all processes, which work at the same time."""
    with ThreadPoolExecutor(len(singles)) as asking:
        return list(asking.map(ask, singles))


class Contest:
    """One model on both sides: the pipeline, and mlx-lm's processes, one per core."""

    def __init__(self, stack: ExitStack, client: Client, model: Path, cores: Sequence[int]) -> None:
        self.client, self._model = client, model
        self.singles = [SingleProcess(model, core=core) for core in cores]
        for single in self.singles:
            stack.callback(single.close)
        self.single = self.singles[0]

    def load(self, lanes: int) -> None:
        """Load the model into the pipeline with this many lanes."""
        self.client.load(str(self._model), workers=2, lanes=lanes, max_step_ms=MAX_STEP_MS, max_context=CONTEXT).wait()
        batch_rate(self.client.address, USERS, PROMPT, WARM, 0)


class Rounds:
    """Runs every measurement and keeps the results: users with ``decode``, everything else with ``prompts``."""

    def __init__(self, decode: Contest, prompts: Contest, tokens: int) -> None:
        self._decode, self._prompts, self._tokens = decode, prompts, tokens
        self._client, self._address = decode.client, decode.client.address
        for contest in (decode, prompts):
            contest.single.batch(USERS, PROMPT, WARM)
        self.found: dict[str, list[float]] = {}

    def _note(self, name: str, value: float) -> None:
        self.found.setdefault(name, []).append(value)
        print(f"{name} {value:.4f}", file=sys.stderr, flush=True)

    def play(self, parts: Collection[str], salt: int) -> None:
        if "users" in parts:
            self._users(salt)
        if set(parts) - {"users"}:
            self._prompts.load(lanes=2)
        if "prefill" in parts:
            self._prefill(salt + 1)
        if "disturbed" in parts:
            self._disturbed(salt + 2)
        if "cached" in parts:
            self._cached(salt + 4)

    def _users(self, salt: int) -> None:
        contest, tokens = self._decode, self._tokens
        contest.load(lanes=1)
        self._note("clump", batch_rate(self._address, USERS, PROMPT, tokens, salt))
        contest.load(lanes=2)
        self._note("lanes", batch_rate(self._address, USERS, PROMPT, tokens, salt))
        self._note("single", USERS * tokens / contest.single.batch(USERS, PROMPT, tokens))
        for name, users in (("cores", USERS), ("halves", USERS // 2)):
            both = at_once(contest.singles, lambda s, users=users: s.batch(users, PROMPT, tokens))
            self._note(name, sum(users * tokens / s for s in both))

    def _prefill(self, salt: int) -> None:
        contest = self._prompts
        self._note("prefill", first_token_s(self._client, LONG, salt))
        self._note("single_prefill", contest.single.prefill(LONG))
        both = at_once(contest.singles, lambda s: s.prefill(LONG))
        self._note("cores_prefill", max(both) / len(both))

    def _disturbed(self, salt: int) -> None:
        self._note("undisturbed_p99", disturbed_p99(self._address, STREAMED, salt, disturb=False))
        self._note("disturbed_p99", disturbed_p99(self._address, STREAMED, salt + 1, disturb=True))

    def _cached(self, salt: int) -> None:
        """Return the cached share of a chat's second turn. Exit if its tokens differ from those without a cache."""
        turn, answer = second_turn(self._client, salt)
        self._note("cached_share", answer.usage.cached_tokens / answer.usage.prompt_tokens)
        self._prompts.load(lanes=2)
        fresh = self._client.generate(turn, max_tokens=SECOND, ignore_eos=True)
        if fresh.usage.cached_tokens or fresh.tokens != answer.tokens:
            sys.exit(f"{answer.tokens} with kept prefixes, {fresh.tokens} with {fresh.usage.cached_tokens} of them")


UNITS = {
    "prefill": "s",
    "single_prefill": "s",
    "cores_prefill": "s",
    "undisturbed_p99": "ms",
    "disturbed_p99": "ms",
}
"""Units of figures; all others are in tokens per second."""
RATIOS = {
    "lanes_over_single": ("lanes", "single"),
    "lanes_over_clump": ("lanes", "clump"),
    "cores_over_core": ("cores", "single"),
    "lanes_at_best": ("halves", "single"),
    "prefill_over_single": ("prefill", "single_prefill"),
    "prefill_at_best": ("cores_prefill", "single_prefill"),
    "itl_p99_over_undisturbed": ("disturbed_p99", "undisturbed_p99"),
}


def main() -> int:
    parser = options(str(__doc__))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=10, help="of each user")
    parser.add_argument("--decode", type=int, nargs=2, metavar=("WIDTH", "BITS"), default=DECODE, help="users' model")
    parser.add_argument("--prompts", type=int, nargs=2, metavar=("WIDTH", "BITS"), default=PROMPTS, help="all else's")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which measurements")
    parser.add_argument("--cores", type=int, nargs=2, default=[0, 1], help="not two threads of one core, where it has")
    asked = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="macpipe-throughput-")))
        decode, prompts = tuple(asked.decode), tuple(asked.prompts)
        models = {m: wide_llama(folder, *m) for m in {decode, prompts}}
        client = start_cluster(stack, models[decode], cores=asked.cores)
        contests = {m: Contest(stack, client, model, asked.cores) for m, model in models.items()}
        rounds = Rounds(contests[decode], contests[prompts], asked.tokens)
        for salt in range(1000, 1000 + 50 * asked.rounds, 50):
            rounds.play(asked.parts, salt)
    shares = rounds.found.pop("cached_share", [])
    figures = {n: Figure(n, UNITS.get(n, "tokens/s"), values) for n, values in rounds.found.items()}
    ratios = {n: figures[a].median / figures[b].median for n, (a, b) in RATIOS.items() if a in figures}
    if shares:
        ratios["cached_share"] = median(shares)
    print_figures("medians", list(figures.values()), ratios, asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
