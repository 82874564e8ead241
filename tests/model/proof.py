"""Prove an architecture: cut anywhere, in chunks, over bytes, it produces what mlx-lm does in one process.

``prove`` raises AssertionError if that fails, and returns a row of facts if it holds. Every stage is loaded from
a copy of the checkpoint in which every tensor that it must not read is not-a-number.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from architectures import Architecture
from checkpoints import mixed_quantization, poison, split_experts, write
from cluster.core.errors import BadCheckpoint, BadFrame
from cluster.core.frames import Compute, Frame, Join, Leave, Step
from cluster.core.plan import LayerRange, ModelShape
from cluster.core.request import SamplingParams
from cluster.model.checkpoint import open_checkpoint
from cluster.model.model_shape import read_shape
from cluster.model.module_tree import layer_prefixes
from cluster.model.skeleton import open_skeleton
from cluster.model.stage import Stage
from model.ring import ALL, PROMPT, Ring, cuts, edited, logprobs, open_stage, reference, tokens

ANSWER = 6
GREEDY = SamplingParams()
RAGGED = (PROMPT[:2], PROMPT[5:15], PROMPT[3:30])
"""Shorter than what any model remembers by tokens, shorter than the sliding windows (16), and longer."""
SAME = "same"
NO_KERNEL = "no CPU kernel"
OTHER_LAYOUT = "other layout"


@dataclass(frozen=True)
class Row:
    """What was proved of one architecture. ``crossing`` are the numbers of arrays that cross its clean cuts, ``lane``
    and ``trim`` what its caches can do. The others are how its variants fared: "same", or why there is nothing to say.
    """

    layers: int
    cuts: tuple[int, ...]
    crossing: tuple[int, ...]
    lane: bool
    trim: bool
    bfloat16: str
    mixed: str
    unstacked: str


Answer = tuple[list[int], list[mx.array]]
"""Tokens, and the log-probabilities that each was chosen from."""


class PoisonedRing(Ring):
    """A ring whose every stage was loaded from a copy with nothing in it but what the stage may read."""

    def __init__(self, shape: ModelShape, path: Path, layers: Sequence[LayerRange]) -> None:
        prefixes = layer_prefixes(open_skeleton(path))
        self.stages = [self._open(shape, path, own, i, len(layers), prefixes) for i, own in enumerate(layers)]
        self.crossing: set[int] = set()
        self._number = 0

    def passed(self, frame: Frame) -> Frame:
        if frame.tensors:
            self.crossing.add(len(frame.tensors))
        return super().passed(frame)

    @staticmethod
    def _open(shape: ModelShape, path: Path, own: LayerRange, i: int, count: int, prefixes: Sequence[str]) -> Stage:
        copy = shutil.copytree(path, path / "poisoned")
        local = tuple(f"{prefix}." for prefix in prefixes[own.start : own.end])
        shared = {w.name for w in shape.shared if any(own.start <= layer < own.end for layer in w.layers)}
        poison(copy, lambda name: not name.startswith(local) and name.rpartition(".")[0] not in shared)
        stage = open_stage(edited(shape, copy), copy, own, i, count)
        shutil.rmtree(copy)
        return stage


def prove(arch: Architecture, folder: Path) -> Row:
    """Everything, for one architecture: in 2, in 3 and at every clean cut; lanes; and the variants of its weights."""
    path = write(arch.config, folder / "float32")
    shape = read_shape(path, arch.name, None)
    assert shape.clean_cuts
    whole = len(shape.clean_cuts) + 1
    want = reference(path, ANSWER)
    rings = [PoisonedRing(shape, path, cuts(shape, n)) for n in sorted({2, 3, whole}) if n <= whole]
    for ring in rings:
        require_same(ring, want)
    require_lanes(rings[0], shape.batchable)
    return Row(
        layers=shape.layers,
        cuts=shape.clean_cuts,
        crossing=tuple(sorted(rings[-1].crossing)),
        lane=shape.batchable,
        trim=shape.trimmable,
        bfloat16=_variant(arch, folder / "bfloat16", dtype=mx.bfloat16),
        mixed=_variant(arch, folder / "mixed", quantize=mixed_quantization),
        unstacked=_unstacked(arch, path),
    )


def prove_quickly(arch: Architecture, folder: Path) -> ModelShape:
    """Prove the core: cut in two, poisoned, in chunks, over bytes. Return the row's summary."""
    path = write(arch.config, folder)
    shape = read_shape(path, arch.name, None)
    require_same(PoisonedRing(shape, path, cuts(shape, 2)), reference(path, ANSWER))
    return shape


def _variant(arch: Architecture, path: Path, **how: Any) -> str:
    """Prove the same with other weights, in two stages, if the uncut model can run on them."""
    if "quantization" in arch.config:
        return "as it is packed"
    try:
        write(arch.config, path, **how)
    except TypeError:  # afm7's layers, which mlx-lm cannot quantize in the way of today
        return "not in mlx-lm"
    try:
        want = reference(path, ANSWER)
    except RuntimeError as error:
        assert "Currently only supports float32" in str(error), error
        return NO_KERNEL
    shape = read_shape(path, arch.name, None)
    require_same(PoisonedRing(shape, path, cuts(shape, 2)), want)
    return SAME


def _unstacked(arch: Architecture, path: Path) -> str:
    """Prove the same of a checkpoint as published, with one tensor per expert, in two stages.

    Changes the checkpoint.
    """
    if not split_experts(path, arch.stacks):
        return OTHER_LAYOUT if any("expert" in name for name in open_checkpoint(path).tensors) else "no experts"
    try:
        shape = read_shape(path, arch.name, None)
    except BadCheckpoint:
        return OTHER_LAYOUT
    require_same(PoisonedRing(shape, path, cuts(shape, 2)), reference(path, ANSWER))
    return SAME


def require_same(ring: Ring, want: Answer) -> None:
    """The ring's answer is ``want``: the same tokens, and every log-probability bit for bit."""
    samples = ring.answer(ALL, len(want[0]))
    assert tokens(samples) == want[0]
    for sample, expected in zip(samples, want[1], strict=True):
        assert mx.all(mx.isfinite(expected)).item()
        assert mx.array_equal(logprobs(sample), expected).item()


def require_lanes(ring: Ring, batchable: bool) -> None:
    """Require that three sequences of different lengths in one lane have their own tokens, or a refusal."""
    alone = [tokens(ring.answer(GREEDY, ANSWER, prompt)) for prompt in RAGGED]
    ids = (1, 2, 3)
    for i, prompt in zip(ids, RAGGED, strict=True):
        ring.send(Join(i, len(prompt), GREEDY))
        ring.prefill(i, prompt[:-1])
    said: list[tuple[int, ...]] = [tuple(prompt[-1] for prompt in RAGGED)]
    try:
        for _ in range(ANSWER):
            reply = ring.send(step=Step(Compute.DECODE, ids, tuple((token,) for token in said[-1])))
            said.append(tuple(tokens(reply.samples)))
    except BadFrame as refusal:
        assert not batchable, refusal
        assert "cannot share a batch" in refusal.sentence
    else:
        assert batchable
        assert [list(row) for row in zip(*said[1:], strict=True)] == alone
    ring.send(*(Leave(i) for i in ids))
