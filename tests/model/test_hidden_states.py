"""A sequence that embeds is answered with the hidden state that mlx-lm's own forward has at the prompt's end."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from cluster.core.frames import Compute, Frame, Join, Leave, Step
from cluster.core.plan import ModelShape
from cluster.core.request import SamplingParams
from cluster.scheduler.hidden_states import attach_states
from model.ring import CHUNKS, PROMPT, Ring

Checkpoints = Callable[[str], Path]
Shapes = Callable[[str], ModelShape]
GREEDY = SamplingParams()
OTHER = PROMPT[::-1]


@pytest.fixture(scope="module")
def rings(checkpoint: Checkpoints, shape: Shapes) -> Callable[[str, int], Ring]:
    return cache(lambda arch, stages: Ring(shape(arch), checkpoint(arch), stages))


def forward(folder: Path, prompt: tuple[int, ...]) -> list[float]:
    """Return the last hidden state of a prompt in one forward of mlx-lm, after the model's norm."""
    model, _ = load_model(folder)
    body = model.model if hasattr(model, "model") else model.backbone
    found: list[float] = body(mx.array([prompt]))[0, -1].astype(mx.float32).tolist()
    return found


def prefill(
    ring: Ring, sequence: int, prompt: tuple[int, ...], *, embeds: bool, chunks: tuple[int, ...] = (40,)
) -> None:
    ring.send(Join(sequence, len(prompt), GREEDY, embeds=embeds))
    bounds = [0]
    for size in chunks:
        bounds.append(bounds[-1] + size)
    for start, end in pairwise(bounds):
        reply = ring.send(step=Step(Compute.PREFILL, (sequence,), (prompt[start:end],)))
        assert reply.tensors == ()


def states(reply: Frame) -> dict[int, list[float]]:
    found = {s.sequence: s.state for s in attach_states(reply)}
    return {sequence: list(struct.unpack(f"<{len(state) // 4}f", state)) for sequence, state in found.items()}


@pytest.mark.parametrize("chunks", [(40,), CHUNKS], ids=["whole", "uneven"])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("arch", ["llama", "llama_4bit", "qwen3", "gemma3_text", "mamba2"])
def test_a_state_is_that_of_one_forward(
    arch: str, stages: int, chunks: tuple[int, ...], rings: Callable[[str, int], Ring], checkpoint: Checkpoints
) -> None:
    ring = rings(arch, stages)
    prefill(ring, 1, PROMPT, embeds=True, chunks=chunks)
    reply = ring.send(step=Step(Compute.DECODE, (1,), (PROMPT[-1:],)))
    ring.send(Leave(1))
    assert states(reply)[1] == pytest.approx(forward(checkpoint(arch), PROMPT), abs=1e-4)


def test_only_rows_that_embed_have_a_state(rings: Callable[[str, int], Ring], checkpoint: Checkpoints) -> None:
    ring = rings("llama", 2)
    for sequence, embeds in ((1, True), (2, False), (3, True)):
        prefill(ring, sequence, OTHER if sequence == 3 else PROMPT, embeds=embeds)
    reply = ring.send(step=Step(Compute.DECODE, (2, 3, 1), (PROMPT[-1:], OTHER[-1:], PROMPT[-1:])))
    found = states(reply)
    assert found[2] == []
    assert found[1] == pytest.approx(forward(checkpoint("llama"), PROMPT), abs=1e-5)
    assert found[3] == pytest.approx(forward(checkpoint("llama"), OTHER), abs=1e-5)
    token = reply.samples[0].token
    assert ring.send(step=Step(Compute.DECODE, (2,), ((token,),))).tensors == ()
    ring.send(Leave(1), Leave(2), Leave(3))
