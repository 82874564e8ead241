"""Sequences that share a lane have the tokens that each has alone, whoever joins and leaves beside them."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest

from checkpoints import PECULIAR, SLICEABLE, make
from cluster.core.errors import BadFrame, StageFailed
from cluster.core.frames import Compute, Drop, Frame, Join, Leave, Restore, Sample, Save, SequenceFailure, Step, Trim
from cluster.core.plan import ModelShape
from cluster.core.request import SamplingParams
from cluster.model.model_shape import read_shape
from effort import chosen
from model.memory import settled_memory
from model.ring import ALL, PROMPT, Ring, logprobs, tokens

Checkpoints = Callable[[str], Path]
Shapes = Callable[[str], ModelShape]
Rings = Callable[[str, int], Ring]

GREEDY = SamplingParams()
LANES = 2
PLAIN = ("llama", "llama_sliding", "qwen3_next")
SHARING = [*SLICEABLE, "rwkv7", "hunyuan", "kimi_k3", "gemma4_text", "falcon_h1", "longcat_flash_ngram", "dbrx"]
MIXED = (
    GREEDY,
    GREEDY,
    SamplingParams(temperature=0.8, top_k=20, seed=7),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, logprobs=True, top_logprobs=2),
    SamplingParams(temperature=1.0, top_p=0.9, seed=2**40, logit_bias=((65, 2.0), (66, -3.0))),
)


@pytest.fixture(scope="module")
def rings(checkpoint: Checkpoints, shape: Shapes) -> Rings:
    """Architecture and stages -> a ring that tests leave empty."""
    return cache(lambda arch, stages: Ring(shape(arch), checkpoint(arch), stages))


@dataclass
class Talk:
    """One sequence of a schedule: it decodes in ``lane`` until it has said ``count`` tokens."""

    id: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    count: int
    lane: int = 0
    said: list[int] = field(default_factory=list)

    @property
    def next(self) -> int:
        return self.said[-1] if self.said else self.prompt[-1]

    def hear(self, sample: Sample) -> None:
        assert sample.position == len(self.prompt) + len(self.said)
        assert (sample.logprob is not None) == self.sampling.logprobs
        self.said.append(sample.token)


def talks(rng: random.Random) -> list[Talk]:
    """Prompts shorter and longer than the sliding windows (16) and than what a model remembers by tokens (2)."""
    lengths = rng.sample([1, 2, 9, 15, 16, 17, 23, 40, 61], len(MIXED))
    return [
        Talk(i, tuple(rng.randrange(250) for _ in range(length)), sampling, rng.randint(4, 9))
        for i, (length, sampling) in enumerate(zip(lengths, MIXED, strict=True), start=1)
    ]


def enter(ring: Ring, talk: Talk) -> None:
    ring.send(Join(talk.id, len(talk.prompt), talk.sampling))
    ring.prefill(talk.id, talk.prompt[:-1])


def decode(ring: Ring, lane: int, row: list[Talk]) -> Frame:
    step = Step(Compute.DECODE, tuple(t.id for t in row), tuple((t.next,) for t in row))
    return ring.send(step=step, lane=lane)


def say(ring: Ring, lane: int, row: list[Talk]) -> None:
    """One step of a lane; every sequence of it gets its own token."""
    samples = decode(ring, lane, row).samples
    assert [sample.sequence for sample in samples] == [talk.id for talk in row]
    for talk, sample in zip(row, samples, strict=True):
        talk.hear(sample)


def alone(ring: Ring, talk: Talk) -> list[int]:
    return tokens(ring.answer(talk.sampling, talk.count, talk.prompt))


def run_schedule(ring: Ring, all_talks: list[Talk], rng: random.Random) -> None:
    """Let them come, change lanes, swap rows, pause and go at random until all have said their tokens."""
    waiting, live = list(all_talks), list[Talk]()
    while waiting or live:
        if waiting and (not live or rng.random() < 0.6):
            live.append(waiting.pop())
            live[-1].lane = rng.randrange(LANES)
            enter(ring, live[-1])
        for talk in live:
            if rng.random() < 0.15:
                talk.lane = rng.randrange(LANES)
        if rng.random() < 0.2:
            rng.shuffle(live)
        for lane in range(LANES):
            row = [talk for talk in live if talk.lane == lane and rng.random() < 0.9]
            if row:
                say(ring, lane, row)
        for talk in [talk for talk in live if len(talk.said) >= talk.count]:
            live.remove(talk)
            ring.send(Leave(talk.id))


@pytest.mark.parametrize("stages", chosen([1, 3], 3))
@pytest.mark.parametrize("arch", chosen(SHARING, *PLAIN, "kimi_k3", "falcon_h1", "longcat_flash_ngram"))
def test_a_sequence_in_a_lane_says_what_it_says_alone(arch: str, stages: int, rings: Rings) -> None:
    seed = zlib.crc32(f"{arch} {stages}".encode())
    print("seed", seed)
    ring, rng = rings(arch, stages), random.Random(seed)
    everyone = talks(rng)
    run_schedule(ring, everyone, rng)
    assert all((s.sequences, s.cache_bytes) == (0, 0) for s in ring.stages)
    for talk in everyone:
        assert talk.said[: talk.count] == alone(ring, talk), (talk.id, len(talk.prompt))


def together(ring: Ring, first: int, second: int, count: int) -> list[tuple[list[Sample], list[Sample]]]:
    """Answer prompts of two lengths alone, then in one lane. Return the samples of each, alone and in the lane."""
    prompts = [PROMPT[:first], tuple((7 * token + 3) % 250 for token in PROMPT[:second])]
    lone = [ring.answer(ALL, count, prompt) for prompt in prompts]
    for i, prompt in enumerate(prompts):
        ring.send(Join(i, len(prompt), ALL))
        ring.prefill(i, prompt[:-1])
    lane: list[list[Sample]] = [[], []]
    fed = [prompt[-1] for prompt in prompts]
    for _ in range(count):
        step = Step(Compute.DECODE, (0, 1), tuple((token,) for token in fed))
        samples = ring.send(step=step).samples
        fed = tokens(samples)
        for row, sample in zip(lane, samples, strict=True):
            row.append(replace(sample, sequence=1))
    ring.send(Leave(0), Leave(1))
    return list(zip(lone, lane, strict=True))


@pytest.mark.parametrize("arch", chosen(PLAIN, "llama", "llama_sliding"))
def test_a_lane_changes_no_bit_of_a_distribution(arch: str, rings: Rings) -> None:
    for alone, lane in together(rings(arch, 1), 20, 40, 4):
        assert lane == alone


def test_a_window_that_fills_in_a_lane_adds_its_keys_in_another_order(rings: Rings) -> None:
    """Rows of a lane overwrite one slot of their windows (16) at a time, so the shorter row's keys are turned around.

    Its distributions are bit for bit the same until then, and its tokens always.
    """
    filled = 16 - 14
    (short, turned), (long, same) = together(rings("llama_sliding", 1), 10, 15, 4)
    assert same == long
    assert turned[:filled] == short[:filled]
    assert tokens(turned) == tokens(short)
    for one, other in zip(turned, short, strict=True):
        assert mx.allclose(logprobs(one), logprobs(other), rtol=0, atol=1e-4)


def test_which_models_can_share_a_lane(tmp_path: Path, shape: Shapes) -> None:
    assert {arch for arch in (*SLICEABLE, *PECULIAR) if shape(arch).batchable} == {*SHARING, "llama4_text"}
    chunked = read_shape(make("llama4", tmp_path, layers=4), "llama4", 64)
    assert (chunked.batchable, chunked.trimmable) == (False, False)


def test_which_models_can_be_trimmed(checkpoint: Checkpoints, shape: Shapes) -> None:
    kept = {
        "llama",
        "llama_untied",
        "llama_4bit",
        "qwen3",
        "qwen3_moe",
        "deepseek_v3",
        "hunyuan",
        "llama4_text",
        "dbrx",
    }
    assert {arch for arch in (*SLICEABLE, *PECULIAR) if shape(arch).trimmable} == kept
    assert read_shape(checkpoint("llama_sliding"), "llama_sliding", 15).trimmable  # it never fills its window
    assert not read_shape(checkpoint("llama_sliding"), "llama_sliding", 16).trimmable


def test_a_model_whose_caches_cannot_batch_refuses_to(rings: Rings) -> None:
    ring = rings("deepseek_v41", 1)
    for i in (1, 2):
        ring.send(Join(i, 2, GREEDY), step=Step(Compute.PREFILL, (i,), ((1, 2),)))
    with pytest.raises(BadFrame, match="cannot share a batch"):
        ring.send(step=Step(Compute.DECODE, (1, 2), ((3,), (4,))))
    ring.send(Leave(1), Leave(2))


@pytest.mark.parametrize("arch", ["llama", "llama_sliding", "qwen3_next", "falcon_h1"])
def test_edits_of_one_row_leave_the_others_alone(arch: str, rings: Rings, shape: Shapes) -> None:
    """Sequence 1 is saved, trimmed and restored from while 2 and 3 go on beside it."""
    ring = rings(arch, 3)
    one, two, three = (Talk(i, PROMPT[i : 20 * i], GREEDY, 12) for i in (1, 2, 3))
    for talk in (one, two, three):
        enter(ring, talk)
    for _ in range(4):
        say(ring, 0, [one, two, three])
    ring.send(Save(1, prefix=5))
    for _ in range(4):
        say(ring, 0, [one, two, three])
    again = replace(one, id=4, said=one.said[:4])
    ring.send(Join(4, len(one.prompt), GREEDY), Restore(4, 5, len(one.prompt) + 3))
    if shape(arch).trimmable:
        ring.send(Trim(1, len(one.prompt) + 1))
        del one.said[2:]
    for _ in range(4):
        say(ring, 0, [two, again, one, three])
    ring.send(Leave(2))
    for _ in range(4):
        say(ring, 0, [again, one, three])
    ring.send(Leave(1), Leave(3), Drop(5))
    for _ in range(4):
        say(ring, 0, [again])
    ring.send(Leave(4))
    assert all((s.sequences, s.prefixes, s.cache_bytes) == (0, 0, 0) for s in ring.stages)
    for talk in (one, two, three, again):
        assert talk.said == alone(ring, replace(talk, count=len(talk.said))), talk.id


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "qwen3_next"])
def test_rows_of_several_tokens_share_a_step_too(arch: str, rings: Rings) -> None:
    """Prompts of one length filled together."""
    ring = rings(arch, 3)
    pair = [Talk(1, PROMPT[:21], GREEDY, 5), Talk(2, PROMPT[20:], MIXED[2], 5)]
    want = [alone(ring, talk) for talk in pair]
    ring.send(*(Join(talk.id, 21, talk.sampling) for talk in pair))
    both = tuple(talk.id for talk in pair)
    for part in (slice(0, 3), slice(3, 20)):
        filled = Step(Compute.PREFILL, both, tuple(talk.prompt[part] for talk in pair))
        assert ring.send(step=filled).samples == ()
    last = tuple(talk.prompt[20:] for talk in pair)
    samples = ring.send(step=Step(Compute.DECODE, both, last)).samples
    assert [(s.sequence, s.position) for s in samples] == [(i, 21) for i in both]
    assert tokens(samples) == [want[0][0], want[1][0]]
    ring.send(Leave(1), Leave(2))


def test_a_row_that_is_not_a_number_fails_alone(rings: Rings) -> None:
    """One row's cache is damaged, as by a hardware fault; the rows beside it have the same tokens as before."""
    ring = rings("llama", 1)
    trio = [Talk(i, PROMPT[i:], GREEDY, 6) for i in (1, 2, 3)]
    for talk in trio:
        enter(ring, talk)
    say(ring, 0, trio)
    spoil(ring, row=1)
    reply = decode(ring, 0, trio)
    assert reply.failures == (
        SequenceFailure(2, StageFailed.reason, "the model's output at position 40 is not finite"),
    )
    assert [s.sequence for s in reply.samples] == [1, 3]
    trio[0].hear(reply.samples[0])
    trio[2].hear(reply.samples[1])
    with pytest.raises(BadFrame, match=r"sequence 2 is broken and can only leave"):
        ring.send(Save(2, 1))
    ring.send(Leave(2))
    for _ in range(4):
        say(ring, 0, [trio[0], trio[2]])
    ring.send(Leave(1), Leave(3))
    assert ring.stages[0].cache_bytes == 0
    for talk in (trio[0], trio[2]):
        assert talk.said == alone(ring, talk)


def spoil(ring: Ring, row: int) -> None:
    """Make the keys of one row of lane 0's batch not-a-number, in every layer."""
    (stage,) = ring.stages
    for held in stage._table.gather(0, (1, 2, 3)).view():
        held.keys[row] = mx.full(held.keys.shape[1:], float("nan"))


def test_where_every_row_is_not_a_number_the_step_fails(rings: Rings) -> None:
    ring = rings("llama", 1)
    pair = [Talk(i, PROMPT[i:], GREEDY, 6) for i in (1, 2)]
    for talk in pair:
        enter(ring, talk)
    say(ring, 0, pair)
    (stage,) = ring.stages
    for held in stage._table.gather(0, (1, 2)).view():
        held.keys = held.keys * float("nan")
    with pytest.raises(StageFailed, match="sequence 1, 2: the model's output at position"):
        decode(ring, 0, pair)
    assert stage.cache_bytes == 0  # what can only leave holds nothing
    ring.send(Leave(1), Leave(2))


def test_a_forward_that_fails_ends_its_rows_and_no_others(rings: Rings, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = rings("llama", 1)
    trio = [Talk(i, PROMPT[i:], GREEDY, 6) for i in (1, 2, 3)]
    for talk in trio:
        enter(ring, talk)
    say(ring, 0, trio)
    with monkeypatch.context() as patch:
        patch.setattr("cluster.model.stage.mx.eval", _out_of_memory)
        with pytest.raises(StageFailed, match=r"sequence 1, 2: RuntimeError: no memory"):
            decode(ring, 1, trio[:2])
    for _ in range(3):
        say(ring, 0, [trio[2]])
    ring.send(Leave(1), Leave(2), Leave(3))
    assert trio[2].said == alone(ring, replace(trio[2], count=4))


def _out_of_memory(*_arrays: object) -> None:
    raise RuntimeError("no memory")


def test_an_unchanged_lane_copies_nothing(rings: Rings) -> None:
    """The memory that a step of four sequences takes is far below that of their caches."""
    ring = rings("llama", 1)
    four = [Talk(i, PROMPT * 20, GREEDY, 6) for i in (1, 2, 3, 4)]
    for talk in four:
        enter(ring, talk)
    say(ring, 0, four)
    say(ring, 0, four)
    before = settled_memory()
    mx.reset_peak_memory()
    say(ring, 0, four)
    assert mx.get_peak_memory() - before < ring.stages[0].cache_bytes / 4
    ring.send(*(Leave(talk.id) for talk in four))
