"""Sends concurrent requests to a running coordinator over the public client API, and measures the answers.

Prompts are random tokens, so the prefix cache does not help. Each user then sends a second turn: its prompt and the
answer. The stages have cached all of it but the last token. So the second turn has one frame per token and measures
decoding alone, at the prompt's context length.
"""

from __future__ import annotations

import asyncio
import random
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.cli.throughput import (
    Arrivals,
    Roofline,
    StageActivity,
    StageTime,
    Turn,
    joules_per_token,
    prefill_rate,
    roofline,
    stage_times,
    turn,
)
from cluster.client import AsyncClient, ClusterState
from cluster.core.cluster_state import first_ranks
from cluster.core.errors import MacpipeError, NotServing
from cluster.platform.process import first_error

ALPHABET: Final = f"{string.printable} The layers of a large model on several Macs, streamed from stage to stage."
"""Text whose tokens make up random prompts. Every tokenizer can encode it."""
WARM_TOKENS: Final = 8
"""Tokens of a warm-up request, not measured: kernels are compiled at the first frame of each width."""


@dataclass(frozen=True, slots=True)
class LoadLevel:
    """Results for one number of users. ``prompts``: first turns, uncached. ``answers``: second turns, decoding only.

    ``joules_per_token`` is the energy of all stages' Macs for a token of ``answers``; None where one reports no power.
    """

    users: int
    prompts: Turn
    answers: Turn
    stages: tuple[StageTime, ...]
    joules_per_token: float | None = None


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All results. ``roofline`` and its predictions are for ``levels[0]``."""

    model: str
    version: str
    route: str
    prompt_tokens: int
    answer_tokens: int
    rounds: int
    prefill_tokens_per_second: float
    levels: tuple[LoadLevel, ...]
    roofline: tuple[Roofline, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """What to measure: tokens per prompt and per answer, rounds, and the numbers of users in order."""

    users: tuple[int, ...]
    prompt: int
    tokens: int
    rounds: int


def measure(address: str, trial: Trial, done: Callable[[LoadLevel], None], cluster: str | None = None) -> BenchReport:
    """Run the trial, and call ``done`` after each level. Raise the MacpipeError of the first request that fails."""
    try:
        return asyncio.run(_measure(address, trial, done, cluster))
    except BaseExceptionGroup as group:
        if not (errors := group.subgroup(MacpipeError)):
            raise
        raise first_error(errors) from None


async def _measure(address: str, trial: Trial, done: Callable[[LoadLevel], None], cluster: str | None) -> BenchReport:
    async with AsyncClient(address, cluster=cluster) as client:
        generator = LoadGenerator(client, await vocabulary(client), trial)
        await generator.ask_all([generator.prompt()], WARM_TOKENS)
        alone = [answer for _ in range(trial.rounds) for answer, _ in await generator.ask_all([generator.prompt()], 1)]
        levels: list[LoadLevel] = []
        stage_rooflines: list[Roofline] = []
        for users in trial.users:
            levels.append(await generator.level(users))
            state = await client.cluster()
            stage_rooflines = stage_rooflines or rooflines(levels[0], state)
            done(levels[-1])
        return BenchReport(
            model=state.model,
            version=state.version,
            route=state.route,
            prompt_tokens=trial.prompt,
            answer_tokens=trial.tokens,
            rounds=trial.rounds,
            prefill_tokens_per_second=prefill_rate(alone),
            levels=tuple(levels),
            roofline=tuple(stage_rooflines),
        )


async def vocabulary(client: AsyncClient) -> tuple[int, ...]:
    """Return ids of plain-text tokens, without special tokens. Tokenizing is the client API's only way to get ids."""
    found = await client.tokenize(ALPHABET)
    plain = {i for i, text in zip(found.ids, found.texts, strict=True) if text and text in ALPHABET}
    return tuple(plain) or found.ids


class LoadGenerator:
    """Sends requests as several users. Prompts come from the system's randomness, so runs share none."""

    def __init__(self, client: AsyncClient, vocabulary: Sequence[int], trial: Trial) -> None:
        self._client = client
        self._vocabulary = vocabulary
        self._trial = trial
        self._random = random.SystemRandom()

    def prompt(self, tokens: int | None = None) -> list[int]:
        """Return a random prompt. It is not in the prefix cache."""
        return self._random.choices(self._vocabulary, k=tokens or self._trial.prompt)

    async def level(self, users: int) -> LoadLevel:
        """Measure both turns of ``users`` users in every round."""
        await self.ask_all([self.prompt(WARM_TOKENS) for _ in range(users)], WARM_TOKENS)
        first: list[list[Arrivals]] = []
        second: list[list[Arrivals]] = []
        activity = []
        energies = []
        for _ in range(self._trial.rounds):
            prompts = [self.prompt() for _ in range(users)]
            answers = await self.ask_all(prompts, self._trial.tokens)
            first.append([answer for answer, _ in answers])
            before = await self._client.cluster()
            turns = [[*p, *tokens] for p, (_, tokens) in zip(prompts, answers, strict=True)]
            second.append([answer for answer, _ in await self.ask_all(turns, self._trial.tokens)])
            after = await self._client.cluster()
            activity.append((activities(before), activities(after)))
            energies.append((energy(before), energy(after)))
        decoded = turn(second)
        joules = joules_per_token(energies, decoded.tokens)
        return LoadLevel(users, turn(first), decoded, stage_times(second, activity), joules)

    async def ask_all(self, prompts: Sequence[list[int]], tokens: int) -> list[tuple[Arrivals, list[int]]]:
        """Send all prompts at once, for answers of ``tokens`` tokens. A failed request cancels the others."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._ask(prompt, tokens)) for prompt in prompts]
        return [task.result() for task in tasks]

    async def _ask(self, prompt: list[int], tokens: int) -> tuple[Arrivals, list[int]]:
        asked_at = time.perf_counter()
        async with self._client.stream(prompt, max_tokens=tokens, ignore_eos=True) as stream:
            received = [(time.perf_counter(), token.token) async for token in stream]
        if stream.finish is None or len(received) != tokens:
            raise NotServing(f"the request was for {tokens} tokens, but the answer has {len(received)}")
        usage = stream.finish.usage
        at = tuple(moment for moment, _ in received)
        arrivals = Arrivals(asked_at, at, usage.prompt_tokens, usage.cached_tokens, stream.finish.stages)
        return arrivals, [token for _, token in received]


def activities(state: ClusterState) -> list[StageActivity]:
    """Return each stage's current counters."""
    return [StageActivity(stage.busy_seconds, stage.active_seconds) for stage in first_ranks(state.stages)]


def energy(state: ClusterState) -> float | None:
    """Return the joules that the Macs of all stages have taken; None where one reports no power."""
    staged = [worker for worker in state.workers if worker.name in {stage.worker for stage in state.stages}]
    return sum(worker.energy_joules for worker in staged) if all(worker.power_watts for worker in staged) else None


def rooflines(level: LoadLevel, state: ClusterState) -> list[Roofline]:
    """Compare each stage's compute time to its bounds. A plan predicts one row, so it applies to one user only."""
    bandwidths = {worker.name: worker.bandwidth for worker in state.workers}
    return [
        roofline(
            time,
            stage.weight_bytes,
            bandwidths.get(stage.worker, 0.0),
            stage.expected_ms or (stage.predicted_ms if level.users == 1 else 0.0),
        )
        for time, stage in zip(level.stages, first_ranks(state.stages), strict=False)
    ]
