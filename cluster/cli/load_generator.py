"""Users who ask a running coordinator at the same time, over the public client API, and what came of it.

Prompts are random tokens, so that no kept prefix serves them. Each user then takes a second turn: its prompt and the
answer. The stages have kept all of that but its last token, so the second turn has one frame a token, and is decoding
and nothing else, at the length of context that the prompt made.
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
    prefill_rate,
    roofline,
    stage_times,
    turn,
)
from cluster.client import AsyncClient, ClusterState
from cluster.core.errors import MacpipeError, NotServing
from cluster.platform.process import first_error

ALPHABET: Final = f"{string.printable} The layers of a large model on several Macs, streamed from stage to stage."
"""What random prompts are drawn from: its tokens are in every vocabulary, whatever the tokenizer."""
WARM_TOKENS: Final = 8
"""Kernels are compiled at the first frame of each width; these tokens are thrown away."""


@dataclass(frozen=True, slots=True)
class LoadLevel:
    """So many users. ``prompts`` is their first turn, nothing of it kept; ``answers`` their second, all but decode."""

    users: int
    prompts: Turn
    answers: Turn
    stages: tuple[StageTime, ...]


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Everything that was measured. ``roofline`` and the predictions are for ``levels[0]``."""

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
    """What is asked: prompts and answers of so many tokens, so often, by so many users in turn."""

    users: tuple[int, ...]
    prompt: int
    tokens: int
    rounds: int


def measure(address: str, trial: Trial, done: Callable[[LoadLevel], None], cluster: str | None = None) -> BenchReport:
    """Run the trial; ``done`` is told each level as it ends. Raises the MacpipeError that ended any of its requests."""
    try:
        return asyncio.run(_measure(address, trial, done, cluster))
    except BaseExceptionGroup as group:
        if not (errors := group.subgroup(MacpipeError)):
            raise
        raise first_error(errors) from None


async def _measure(address: str, trial: Trial, done: Callable[[LoadLevel], None], cluster: str | None) -> BenchReport:
    async with AsyncClient(address, cluster=cluster) as client:
        crowd = LoadGenerator(client, await vocabulary(client), trial)
        await crowd.ask_all([crowd.prompt()], WARM_TOKENS)
        alone = [answer for _ in range(trial.rounds) for answer, _ in await crowd.ask_all([crowd.prompt()], 1)]
        levels: list[LoadLevel] = []
        lines: list[Roofline] = []
        for users in trial.users:
            levels.append(await crowd.level(users))
            state = await client.cluster()
            lines = lines or rooflines(levels[0], state)
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
            roofline=tuple(lines),
        )


async def vocabulary(client: AsyncClient) -> tuple[int, ...]:
    """Ids of plain tokens, so no end of sequence; the client API has no other way to learn any."""
    found = await client.tokenize(ALPHABET)
    plain = {i for i, text in zip(found.ids, found.texts, strict=True) if text and text in ALPHABET}
    return tuple(plain) or found.ids


class LoadGenerator:
    """Asks as several users do. Its randomness is the system's: two runs share no prompt."""

    def __init__(self, client: AsyncClient, vocabulary: Sequence[int], trial: Trial) -> None:
        self._client, self._vocabulary, self._trial = client, vocabulary, trial
        self._random = random.SystemRandom()

    def prompt(self, tokens: int | None = None) -> list[int]:
        """A prompt that nobody has asked before."""
        return self._random.choices(self._vocabulary, k=tokens or self._trial.prompt)

    async def level(self, users: int) -> LoadLevel:
        """Both turns of so many users, in every round."""
        await self.ask_all([self.prompt(WARM_TOKENS) for _ in range(users)], WARM_TOKENS)
        first: list[list[Arrivals]] = []
        second: list[list[Arrivals]] = []
        activity = []
        for _ in range(self._trial.rounds):
            prompts = [self.prompt() for _ in range(users)]
            said = await self.ask_all(prompts, self._trial.tokens)
            first.append([answer for answer, _ in said])
            before = activities(await self._client.cluster())
            turns = [[*p, *tokens] for p, (_, tokens) in zip(prompts, said, strict=True)]
            second.append([answer for answer, _ in await self.ask_all(turns, self._trial.tokens)])
            activity.append((before, activities(await self._client.cluster())))
        return LoadLevel(users, turn(first), turn(second), stage_times(second, activity))

    async def ask_all(self, prompts: Sequence[list[int]], tokens: int) -> list[tuple[Arrivals, list[int]]]:
        """An answer of so many tokens to each prompt, all asked at once; a failure of one ends them all."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._ask(prompt, tokens)) for prompt in prompts]
        return [task.result() for task in tasks]

    async def _ask(self, prompt: list[int], tokens: int) -> tuple[Arrivals, list[int]]:
        asked_at = time.perf_counter()
        async with self._client.stream(prompt, max_tokens=tokens, ignore_eos=True) as stream:
            came = [(time.perf_counter(), token.token) async for token in stream]
        if stream.finish is None or len(came) != tokens:
            raise NotServing(f"an answer of {tokens} tokens was asked for, and {len(came)} came")
        usage, at = stream.finish.usage, tuple(moment for moment, _ in came)
        arrivals = Arrivals(asked_at, at, usage.prompt_tokens, usage.cached_tokens, stream.finish.stages)
        return arrivals, [token for _, token in came]


def activities(state: ClusterState) -> list[StageActivity]:
    """Each stage's counters now."""
    return [StageActivity(stage.busy_seconds, stage.active_seconds) for stage in state.stages]


def rooflines(level: LoadLevel, state: ClusterState) -> list[Roofline]:
    """Each stage's measured compute beside its bounds. A plan predicts for one row, so only one user is held to it."""
    bandwidths = {worker.name: worker.bandwidth for worker in state.workers}
    return [
        roofline(
            time,
            stage.weight_bytes,
            bandwidths.get(stage.worker, 0.0),
            stage.expected_ms or (stage.predicted_ms if level.users == 1 else 0.0),
        )
        for time, stage in zip(level.stages, state.stages, strict=False)
    ]
