"""Warming up a stage has no effect on it: nothing is held, and later tokens are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints import make
from cluster.core.frames import Compute, Frame, Join, Step
from cluster.core.plan import LayerRange, StageSpec
from cluster.core.request import SamplingParams
from cluster.model.checkpoint import model_ref
from cluster.model.stage import Stage, load_stage
from cluster.model.warmup import warm


def stages(folder: Path) -> list[Stage]:
    model = model_ref(str(folder))
    ranges = (LayerRange(0, 2), LayerRange(2, 4))
    return [
        load_stage(StageSpec(3, i, 2, model, r, 640), folder, lambda done, total: None) for i, r in enumerate(ranges)
    ]


def say(held: list[Stage]) -> list[int]:
    said, token = [], 5
    for number in range(6):
        edits = (Join(1, 1, SamplingParams()),) if number == 0 else ()
        frame = Frame(3, 0, number, edits, Step(Compute.DECODE, (1,), ((token,),)))
        for stage in held:
            frame = stage.step(frame)
        token = frame.samples[0].token
        said.append(token)
    return said


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3_next", "mamba2", "llama4_text"])
def test_a_warm_stage_is_as_a_new_one(architecture: str, tmp_path: Path) -> None:
    folder = make(architecture, tmp_path)
    cold, warmed = stages(folder), stages(folder)
    for stage in warmed:
        warm(stage)
        assert stage.sequences == 0
        assert stage.cache_bytes == 0
    assert say(warmed) == say(cold)
