"""A scheduler over real stages: where the reader of a shared beginning fails, another one takes over its state."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.core.errors import MacpipeError
from cluster.core.frames import Compute, Failure, Frame
from cluster.core.plan import ModelShape
from cluster.core.request import Request, SamplingParams
from cluster.scheduler import marking, saving
from cluster.scheduler.outcome import Produced
from cluster.scheduler.scheduler import Scheduler
from integration.reference import greedy
from model.ring import Ring
from scheduler.stages import capacity

BEGINNING = tuple((i * 37 + 11) % 250 for i in range(200))
CHUNK, WINDOW = 16, 2


@pytest.mark.parametrize("arch", ["llama", "llama_sliding", "qwen3_next"])
def test_who_takes_over_gives_the_tokens_of_a_fresh_start(
    arch: str, checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (marking, saving):
        monkeypatch.setattr(module, "MARK_TOKENS", 2 * CHUNK)
    ring = Ring(shape(arch), checkpoint(arch), 2)
    plan = capacity(trimmable=shape(arch).trimmable, chunk=CHUNK, window=WINDOW, lanes=2, budget=10_000, prefixes=5_000)
    scheduler, prompts = Scheduler(1, plan, frozenset()), {f"r{i}": (*BEGINNING, i, 7) for i in range(3)}
    for name, prompt in prompts.items():
        scheduler.submit(Request(name, prompt, SamplingParams(), 4))
    said: dict[str, list[int]] = defaultdict(list)
    read, failed, waiting = 0, False, deque(scheduler.next_frames(0.0))
    while waiting:
        frame = waiting.popleft()
        prefill = frame.step is not None and frame.step.compute is Compute.PREFILL
        fails = not failed and prefill and read >= 120
        read, failed = read + (len(frame.step.tokens[0]) if frame.step and prefill else 0), failed or fails
        for event in scheduler.on_frame(_reply(ring, frame, fails)).events:
            if isinstance(event, Produced):
                said[event.request_id].append(event.sample.token)
        waiting += scheduler.next_frames(0.0)
    assert {name: tuple(tokens) for name, tokens in said.items()} == {
        name: greedy(checkpoint(arch), prompts[name], 4) for name in ("r1", "r2")
    }
    assert 201 < read <= 202 + 1 + 3 * CHUNK + WINDOW * CHUNK, "it did not start from a save"
    assert all(stage.sequences == 0 for stage in ring.stages)
    assert all(stage.prefixes == len(scheduler.prefixes) for stage in ring.stages)


def _reply(ring: Ring, frame: Frame, fails: bool) -> Frame:
    """Pass a frame through both stages, as workers do. If it ``fails``, only the first of them computes it."""
    for index, stage in enumerate(ring.stages):
        if fails and index == 1:
            frame = replace(frame, error=Failure(index, "STAGE_FAILED", "no"))
        try:
            frame = stage.step(frame)
        except MacpipeError as error:  # a step of a sequence that an earlier failure broke
            frame = replace(frame, error=Failure(index, error.reason, error.sentence), tensors=())
    return frame
