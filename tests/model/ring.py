"""A whole model as a row of stages in one process: each stage's result goes to the next one as bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from cluster.core.frames import Compute, Edit, Frame, Join, Leave, Sample, Step
from cluster.core.plan import LayerRange, ModelShape, StageSpec
from cluster.core.request import SamplingParams
from cluster.model.checkpoint import open_checkpoint
from cluster.model.sharding import Group
from cluster.model.stage import Stage, load_stage
from cluster.wire.frame_codec import decode, encode

PROMPT = tuple((i * 37 + 11) % 250 for i in range(41))
CHUNKS = (7, 19, 14)
"""How the prompt but its last token is cut; uneven, shorter and longer than the sliding windows (16)."""
ALL = SamplingParams(logprobs=True, top_logprobs=10**6)
"""Greedy, with the log-probability of every token of the vocabulary."""


def cuts(shape: ModelShape, stages: int) -> list[LayerRange]:
    """Split the layers at clean cuts, so that the largest stage is small."""
    choices = ((0, *inner, shape.layers) for inner in combinations(shape.clean_cuts, stages - 1))
    bounds = min(choices, key=lambda b: max(end - start for start, end in pairwise(b)))
    return [LayerRange(start, end) for start, end in pairwise(bounds)]


def nothing(_done: int, _total: int) -> None:
    """A progress callback."""


def open_stage(
    shape: ModelShape,
    path: Path,
    layers: LayerRange,
    index: int,
    count: int,
    kv_bits: int = 0,
    weight_bits: int = 0,
    group: Group | None = None,
) -> Stage:
    spec = StageSpec(1, index, count, shape.model, layers, shape.max_context, kv_bits, weight_bits)
    return load_stage(spec, path, nothing, group=group)


def edited(shape: ModelShape, copy: Path) -> ModelShape:
    """Return the shape of a copy with some changed bytes: that is another version of the model."""
    return replace(shape, model=replace(shape.model, fingerprint=open_checkpoint(copy).fingerprint))


class Ring:
    def __init__(self, shape: ModelShape, path: Path, stages: int, kv_bits: int = 0, weight_bits: int = 0) -> None:
        layers = cuts(shape, stages)
        self.stages = [open_stage(shape, path, own, i, stages, kv_bits, weight_bits) for i, own in enumerate(layers)]
        self._number = 0

    def send(self, *edits: Edit, step: Step | None = None, lane: int = 0) -> Frame:
        """One frame around the ring. -> the reply, with the samples that came late"""
        reply = self.send_alone(*edits, step=step, lane=lane)
        rows = step.sequences if step and step.compute is not Compute.PREFILL else ()
        while set(rows) - {s.sequence for s in reply.samples} - {f.sequence for f in reply.failures}:
            for sequence in rows:
                compilation = self.stages[-1]._table.get(sequence).sampler._compilation
                assert compilation is None or compilation.wait(10)
            late = self.send_alone(lane=lane)
            samples = sorted((*reply.samples, *late.samples), key=lambda s: rows.index(s.sequence))
            reply = replace(reply, samples=tuple(samples), failures=reply.failures + late.failures)
        return reply

    def send_alone(self, *edits: Edit, step: Step | None = None, lane: int = 0) -> Frame:
        """One frame around the ring. -> the reply"""
        frame = Frame(epoch=1, lane=lane, number=self._number, edits=edits, step=step)
        self._number += 1
        for stage in self.stages:
            frame = self.passed(stage.step(frame))
        return frame

    def passed(self, frame: Frame) -> Frame:
        """What the next stage gets: the frame from a peer's bytes, but for its edits, which may ask for more
        alternatives than the wire allows.
        """
        if not frame.tensors:
            return frame
        return replace(decode(encode(replace(frame, edits=()))), edits=frame.edits)

    def prefill(self, sequence: int, tokens: Sequence[int], chunks: Iterable[int] = CHUNKS) -> None:
        """Feed ``tokens`` in chunks of these sizes, the rest at once."""
        at = 0
        for size in (*chunks, len(tokens)):
            if part := tuple(tokens[at : at + size]):
                assert self.send(step=Step(Compute.PREFILL, (sequence,), (part,))).samples == ()
            at += size

    def decode(self, sequence: int, token: int) -> Sample:
        (sample,) = self.send(step=Step(Compute.DECODE, (sequence,), ((token,),))).samples
        return sample

    def go_on(self, sequence: int, token: int, count: int) -> list[Sample]:
        """Feed ``token`` and then each token that is picked, ``count`` times."""
        samples: list[Sample] = []
        for _ in range(count):
            samples.append(self.decode(sequence, samples[-1].token if samples else token))
        return samples

    def answer(
        self, sampling: SamplingParams, count: int, prompt: Sequence[int] = PROMPT, sequence: int = 1
    ) -> list[Sample]:
        """A whole request: join, prefill, decode ``count`` tokens, leave."""
        self.send(Join(1, len(prompt), sampling))
        self.prefill(1, prompt[:-1])
        samples = self.go_on(1, prompt[-1], count)
        self.send(Leave(1))
        return samples


def tokens(samples: Iterable[Sample]) -> list[int]:
    return [sample.token for sample in samples]


def logprobs(sample: Sample) -> mx.array:
    """The whole distribution, by token id."""
    return mx.array([top.logprob for top in sorted(sample.top, key=lambda top: top.token)])


def reference(path: Path, count: int, prompt: Sequence[int] = PROMPT) -> tuple[list[int], list[mx.array]]:
    """Run mlx-lm itself on the prompt in one process, in the same chunks. Return tokens and log-probabilities."""
    model, _ = load_model(path)
    caches = make_prompt_cache(model)
    at = 0
    for size in CHUNKS:
        if part := prompt[at : min(at + size, len(prompt) - 1)]:
            model(mx.array([part]), cache=caches)
            mx.eval([cache.state for cache in caches])
        at += size
    rest = mx.array(prompt[min(at, len(prompt) - 1) :])
    pairs = list(generate_step(rest, model, max_tokens=count, prompt_cache=caches))
    return [token for token, _ in pairs], [logprob for _, logprob in pairs]
