"""A long prompt is cut after many users as on a cluster that has done nothing else."""

from __future__ import annotations

import pytest

from cluster.core.frames import Compute
from cluster.core.request import Request, SamplingParams
from cluster.scheduler.scheduler import Scheduler
from scheduler.stages import Stages, capacity

LONG = Request("long", tuple(range(10_000, 12_048)), SamplingParams(), 1)


def steps(scheduler: Scheduler, stages: Stages) -> list[tuple[Compute, int, int]]:
    """Let everything end. Return each step's purpose, its rows, and its tokens per row."""
    found = []
    stages.take(scheduler.next_frames(0.0))
    while stages.frames:
        frame = next(iter(stages.frames))
        if frame.step:
            found.append((frame.step.compute, len(frame.step.sequences), len(frame.step.tokens[0])))
        scheduler.on_frame(stages.give())
        stages.take(scheduler.next_frames(0.0))
    return found


@pytest.mark.parametrize("prefixes", [0, 2_000, 50_000])
@pytest.mark.parametrize("trimmable", [True, False])
def test_after_sixteen_users_a_prompt_takes_the_same_steps(prefixes: int, trimmable: bool) -> None:
    offer = capacity(
        lanes=2, rows=8, budget=100_000, prefixes=prefixes, chunk=512, max_step_ms=100.0, trimmable=trimmable
    )
    fresh, used = Scheduler(1, offer, frozenset()), Scheduler(1, offer, frozenset())
    fresh_stages, used_stages = Stages(trimmable), Stages(trimmable)
    for user in range(16):
        prompt = tuple(range(100 * user + 1, 100 * user + 17))
        used.submit(Request(f"user{user}", prompt, SamplingParams(), 32))
    assert len(steps(used, used_stages)) > 2 * 32
    fresh.submit(LONG)
    used.submit(LONG)
    alone = steps(fresh, fresh_stages)
    assert alone == [(Compute.PREFILL, 1, 256)] * 7 + [(Compute.PREFILL, 1, 255), (Compute.DECODE, 1, 1)]
    assert steps(used, used_stages) == alone
