"""Measures a served pipeline and mlx-lm in one process by turns, and keeps each result as soon as it is there."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from figures import Figure
from single_process import SingleProcess
from throughput import LOOP, batch_rate

from cluster.client import AsyncClient, Client, Completion

PROMPT, USERS_PROMPT = 64, 16
"""Tokens of the prompt of one user, and of each of several."""
RATES = (0.0, 0.7, 0.9)
"""Shares of right guesses."""
EVERY, LONG_ROUNDS = sys.maxsize, 2
"""How many rounds take a measurement; the longest prompt takes a minute."""
WARM = 4
"""Tokens of each user who is about to leave."""
DEFAULT_STEP = 2048
"""Tokens per chunk of a prompt in mlx-lm, unless told otherwise."""
LONGEST_AGAIN = 8192
"""Tokens of the longest prompt that mlx-lm also reads in such chunks: a longer one takes a minute more."""


def rate_name(rate: float | None) -> str:
    """Return the name of one user's figure with guesses of this ``rate``; None: with none."""
    return "decode1" if rate is None else f"decode1_at_{rate:g}".replace(".", "_")


def fresh_prompt(name: str, length: int) -> list[int]:
    """Return a prompt of random tokens, which shares no beginning with one of another name."""
    return random.Random(name).choices(range(250), k=length)


def stage_times(answer: Completion, tokens: int) -> list[dict[str, float]]:
    """Return each stage's compute, wait and wire time of one request, in milliseconds per token."""
    return [
        {
            "compute_ms": round(s.compute_ms / tokens, 2),
            "wire_ms": round(s.wire_ms / tokens, 2),
            "wait_ms": round(s.wait_ms / tokens, 2),
        }
        for s in answer.stages
    ]


@dataclass(frozen=True)
class Sizes:
    """What is measured: tokens of one user's answer and of each of several, users at once, and prompt lengths."""

    tokens: int
    users_tokens: int
    users: Sequence[int]
    lengths: Sequence[int]
    context: int


@dataclass(frozen=True)
class Measurement:
    """One figure. ``take`` gets the number of the round, and returns its value. It is taken in ``rounds`` rounds.

    ``after`` names the figure without which it means nothing in the same round; "" for none.
    """

    name: str
    unit: str
    take: Callable[[int], float]
    rounds: int
    after: str = ""


@dataclass
class OneUser:
    """One user's answers. A round's prompt is answered without guesses first, so that a guesser knows its answer."""

    client: Client
    tokens: int
    said: dict[int, tuple[int, ...]] = field(default_factory=dict)
    differ: int = 0
    """Guessed answers whose tokens are not those without guesses."""
    guessed: dict[str, list[float]] = field(default_factory=dict)
    """The share of tokens that were guessed right, by rate: chance moves it in a short answer."""

    def rate(self, number: int, rate: float | None) -> float:
        """Return tokens per second from the first token on. ``rate`` is the share of right guesses; None: no guess."""
        ids = fresh_prompt(f"one user {number}", PROMPT)
        name = f"off-{number}" if rate is None else f"replay-{rate:g}-{number}"
        arrivals, tokens, guessed = [], [], 0
        with self.client.stream(ids, max_tokens=self.tokens + 1, ignore_eos=True, request_id=name) as stream:
            for token in stream:
                arrivals.append(time.perf_counter())
                tokens.append(token.token)
                guessed += bool(token.guess)
        said = self.said.setdefault(number, tuple(tokens))
        self.differ += said != tuple(tokens)
        if rate is not None:
            self.guessed.setdefault(f"{rate:g}", []).append(round(guessed / self.tokens, 3))
        return self.tokens / (arrivals[-1] - arrivals[0])


class Rounds:
    """Takes measurements round by round. ``keep`` is called after each, so that no result depends on a later one.

    ``most_s``: no measurement begins that would end later than this many seconds from now.
    """

    def __init__(self, keep: Callable[[], None], most_s: float) -> None:
        self._keep, self._ends = keep, time.monotonic() + most_s
        self._found: dict[str, Figure] = {}
        self._took: dict[str, float] = {}
        self._taken: set[tuple[str, int]] = set()
        self.left_out: list[str] = []

    @property
    def figures(self) -> list[Figure]:
        return list(self._found.values())

    @property
    def medians(self) -> dict[str, float]:
        return {f.name: f.median for f in self.figures}

    def play(self, measurements: Sequence[Measurement], rounds: int, first: int = 1) -> None:
        """Take all measurements once per round, up to round ``rounds``."""
        for number in range(first, 1 + rounds):
            for one in measurements:
                if number <= one.rounds:
                    self._take(one, number)

    def _take(self, one: Measurement, number: int) -> None:
        began = time.monotonic()
        missing = one.after and (one.after, number) not in self._taken
        if missing or began + self._took.get(one.name, 0.0) > self._ends:
            self.left_out.append(f"{one.name} of round {number}")
            return
        value = one.take(number)
        self._took[one.name] = time.monotonic() - began
        self._taken.add((one.name, number))
        known = self._found[one.name].rounds if one.name in self._found else ()
        self._found[one.name] = Figure(one.name, one.unit, (*known, value))
        print(f"round {number}: {one.name} {value:.3f} {one.unit}", file=sys.stderr, flush=True)
        self._keep()


class Pair:
    """The measurements of a pipeline, and of mlx-lm in one process beside it."""

    def __init__(self, client: Client, single: SingleProcess, sizes: Sizes) -> None:
        self.client, self.sizes, self._single = client, sizes, single
        self._salt, self._prompts = 0, count()
        self.one = OneUser(client, sizes.tokens)
        self.prompts: dict[str, list[list[dict[str, float]]]] = {}
        """Each stage's time for each prompt that was measured, by figure."""

    def first_tokens_before(self) -> list[Measurement]:
        """Return the first token of the shortest prompt, to be measured before anybody has decoded."""
        length = min(self.sizes.lengths)
        name = f"ttft_{length}_before"
        return [Measurement(name, "s", lambda _: self._ttft(name, length), EVERY)]

    def all(self) -> list[Measurement]:
        """Return what a round measures."""
        lengths = sorted(self.sizes.lengths)
        found = [self._one(rate) for rate in (None, *RATES)]
        found.append(Measurement("single_decode1", "tokens/s", self._single_one, EVERY))
        for users in self.sizes.users:
            found += self._several(users)
        least, name = lengths[0], f"ttft_{lengths[0]}_at_once"
        found.append(Measurement(name, "s", lambda _: self._ttft_at_once(name, least), EVERY))
        for length in lengths:
            found += self._prompt(length, LONG_ROUNDS if length == lengths[-1] and len(lengths) > 1 else EVERY)
        return found

    def _one(self, rate: float | None) -> Measurement:
        after = "" if rate is None else rate_name(None)
        return Measurement(rate_name(rate), "tokens/s", lambda number: self.one.rate(number, rate), EVERY, after)

    def _single_one(self, number: int) -> float:
        return self.sizes.tokens / self._single.decode(PROMPT, self.sizes.tokens)

    def _several(self, users: int) -> list[Measurement]:
        tokens = self.sizes.users_tokens

        def ours(_: int) -> float:
            return self._rate_of(users, tokens)

        def theirs(_: int) -> float:
            return users * tokens / self._single.batch(users, USERS_PROMPT, tokens)

        return [
            Measurement(f"decode{users}", "tokens/s", ours, EVERY),
            Measurement(f"single_decode{users}", "tokens/s", theirs, EVERY),
        ]

    def _rate_of(self, users: int, tokens: int) -> float:
        """Return the tokens per second of several users together. Their prompts have not been sent before."""
        self._salt += users
        address, context = self.client.address, self.sizes.context
        return batch_rate(address, users, USERS_PROMPT, tokens, self._salt, context)

    def _prompt(self, length: int, rounds: int) -> list[Measurement]:
        def default_step(_: int) -> float:
            return self._single.prefill(length, DEFAULT_STEP)

        name = f"ttft_{length}"
        found = [
            Measurement(name, "s", lambda _: self._ttft(name, length), rounds),
            Measurement(f"single_{name}", "s", lambda _: self._single.prefill(length), rounds),
        ]
        if DEFAULT_STEP < length <= LONGEST_AGAIN:
            found.append(Measurement(f"single_{name}_step_{DEFAULT_STEP}", "s", default_step, 1))
        return found

    def _ttft(self, name: str, length: int) -> float:
        """Measure a prompt once nobody else is served."""
        while self.client.cluster().requests:
            time.sleep(0.02)
        return self._first_token_s(name, length)

    def _ttft_at_once(self, name: str, length: int) -> float:
        """Measure a prompt that arrives while the last steps of users who have just left are under way."""
        self._rate_of(max(self.sizes.users), WARM)
        return self._first_token_s(name, length)

    def _first_token_s(self, name: str, length: int) -> float:
        ids = fresh_prompt(f"prompt {next(self._prompts)}", length)
        began = time.perf_counter()
        answer = self.client.generate(ids, max_tokens=1, ignore_eos=True)
        took = time.perf_counter() - began
        self.prompts.setdefault(name, []).append(stage_times(answer, 1))
        return took

    # Where the time goes

    def stages(self) -> dict[str, list[dict[str, float]]]:
        """Return each stage's compute, wait and wire time in milliseconds per token, by figure.

        Of several users it is the first one's token.
        """
        found = {"decode1": self._stages_of_one()}
        found |= {f"decode{users}": self._stages_of_several(users) for users in self.sizes.users}
        return found

    def _stages_of_one(self) -> list[dict[str, float]]:
        ids, tokens = fresh_prompt("stages of one", PROMPT), self.sizes.tokens
        self.client.generate(ids, max_tokens=1, ignore_eos=True)  # so that only decoding is measured
        return stage_times(self.client.generate(ids, max_tokens=tokens, ignore_eos=True), tokens)

    def _stages_of_several(self, users: int) -> list[dict[str, float]]:
        tokens = self.sizes.users_tokens

        async def ask() -> Completion:
            async with AsyncClient(self.client.address, timeout_s=300) as client:
                prompts = [fresh_prompt(f"stages of {user} of {users}", USERS_PROMPT) for user in range(users)]
                await asyncio.gather(*(client.generate(ids, max_tokens=1, ignore_eos=True) for ids in prompts))
                answers = (client.generate(ids, max_tokens=tokens, ignore_eos=True) for ids in prompts)
                return (await asyncio.gather(*answers))[0]

        return stage_times(LOOP.run(ask()), tokens)
