"""Replay of the stored inputs in this process: the outcome of each is known and must not change.

This is for tests, which bound no time: outcomes are compared, and memory is. The search measures the rest.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fuzz.cost.measure import MEMORY_MIB, measured_here
from fuzz.cost.recipe import Recipe, build, shown
from fuzz.cost.stand_in import SANDBOX
from fuzz.cost.target import SANDBOX_CLOSED, TAKEN, CostTarget, Entry

CORPUS: Final = Path(__file__).parent.parent / "corpus" / "cost"


@dataclass(frozen=True, slots=True)
class Kept:
    """An input of a target. ``outcome`` is what becomes of it, ``SANDBOX_CLOSED`` where the sandbox decides;
    ``sandboxed`` is what the sandbox says then, ``TAKEN`` where nothing else is said.
    """

    name: str
    recipe: Recipe
    outcome: str
    sandboxed: str = ""

    @property
    def needs_sandbox(self) -> bool:
        return bool(self.sandboxed) or self.outcome == SANDBOX_CLOSED

    def wanted(self, *, closed: bool) -> str:
        """Return what becomes of it. ``closed``: without a sandbox."""
        return self.outcome if closed or not self.needs_sandbox else self.sandboxed or TAKEN


def kept(target: str) -> list[Kept]:
    """Return the stored inputs in the order of their names."""
    return [Kept(file.stem, **json.loads(file.read_text())) for file in sorted((CORPUS / target).glob("*.json"))]


def replay(target: CostTarget, *, closed: bool) -> dict[str, Any]:
    """Run a target's stored inputs and return facts, with what is wrong of each. ``closed``: no sandbox."""
    return asyncio.run(_replayed(target, closed))


async def _replayed(target: CostTarget, closed: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"target": target.name, "inputs": 0, "wrong": []}
    known = kept(target.name)
    if not known:
        return facts
    entry = target.prepare()
    if not closed and any(one.needs_sandbox for one in known):
        await SANDBOX.open()
    try:
        for one in known:
            facts["inputs"] += 1
            facts["wrong"] += [f"{one.name} ({shown(one.recipe)}): {why}" async for why in _wrong(entry, one, closed)]
    finally:
        await SANDBOX.close()
    return facts


async def _wrong(entry: Entry, one: Kept, closed: bool) -> AsyncIterator[str]:
    data = build(one.recipe)
    cost = await measured_here(lambda copy: entry.take(data))
    if cost.outcome != one.wanted(closed=closed):
        yield f"{cost.outcome}, not {one.wanted(closed=closed)}"
    if cost.mib > MEMORY_MIB:
        yield f"{cost.mib:.0f} MiB"


def names() -> Iterator[str]:
    """Return the targets that have stored inputs."""
    return (folder.name for folder in sorted(CORPUS.iterdir()) if folder.is_dir())
