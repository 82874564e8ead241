"""A crowd for minutes: 256 concurrent clients with random prompts, lengths and aborts. Each answer ends once."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from cluster.client import AsyncClient, Client
from cluster.core.errors import MacpipeError
from cluster.core.limits import MIB
from integration.daemons import Cluster, serve_model
from integration.reference import greedy

pytestmark = [pytest.mark.xdist_group("session-cluster"), pytest.mark.long, pytest.mark.timeout(600)]

CLIENTS = 256
SECONDS = 180
PROMPTS = 40
LONGEST = 48


class Crowd:
    """Clients that ask, read, and sometimes hang up; what each was owed and got."""

    def __init__(self, address: str, rng: random.Random, expected: dict[tuple[int, ...], tuple[int, ...]]) -> None:
        self._address, self._rng, self._expected = address, rng, expected
        self.ends: Counter[str] = Counter()
        self.wrong: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    async def run(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        async with AsyncClient(self._address, timeout_s=120) as client, asyncio.TaskGroup() as tasks:
            for _ in range(CLIENTS):
                tasks.create_task(self._visit(client, until))

    async def _visit(self, client: AsyncClient, until: float) -> None:
        while time.monotonic() < until:
            try:
                await self._ask(client)
            except MacpipeError as e:
                self.ends[e.reason] += 1
                await asyncio.sleep(self._rng.random())

    async def _ask(self, client: AsyncClient) -> None:
        prompt = self._rng.choice(list(self._expected))
        tokens = self._rng.randint(1, LONGEST)
        patience = self._rng.randint(0, tokens) if self._rng.random() < 0.2 else None
        hot = self._rng.random() < 0.2
        got: list[int] = []
        options = {"temperature": 1.0} if hot else {}
        async with client.stream(prompt, max_tokens=tokens, ignore_eos=True, **options) as stream:  # type: ignore[arg-type]
            async for token in stream:
                got.append(token.token)
                if patience is not None and len(got) > patience:
                    self.ends["hung up"] += 1
                    return
        self.ends["complete"] += 1
        if len(got) != tokens or (not hot and tuple(got) != self._expected[prompt][:tokens]):
            self.wrong.append((prompt, tuple(got)))


def test_a_crowd_is_answered_and_leaves_nothing_behind(
    session_cluster: Cluster, address: str, client: Client, llama: Path, rng: random.Random
) -> None:
    serve_model(client, llama, 2)
    prompts = [tuple(rng.randrange(250) for _ in range(rng.randint(1, 300))) for _ in range(PROMPTS)]
    crowd = Crowd(address, rng, {p: greedy(llama, p, LONGEST) for p in prompts})
    asyncio.run(crowd.run(10))
    before = session_cluster.footprints()
    asyncio.run(crowd.run(SECONDS))
    print(dict(crowd.ends))
    assert not crowd.wrong
    assert set(crowd.ends) <= {"complete", "hung up", "BUSY"}
    assert crowd.ends["complete"] > 500
    state = client.cluster()
    deadline = time.monotonic() + 20
    while state.requests or any(w.sequences for w in state.workers):
        assert time.monotonic() < deadline, state
        time.sleep(0.1)
        state = client.cluster()
    kept = max(stage.prefix_bytes for stage in state.stages)  # bounded by the plan, and worth their memory
    for old, new in zip(before, session_cluster.footprints(), strict=True):
        print(f"{old.resident >> 20} MiB, {old.files} files; then {new.resident >> 20} MiB, {new.files} files")
        assert new.resident <= old.resident + kept + 128 * MIB
        assert new.files <= old.files + CLIENTS
