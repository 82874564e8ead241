"""Edits of sequences and prefixes by frames, and frames that are refused before or after they had an effect."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from checkpoints import make
from cluster.core.errors import BadFrame, StageFailed, StaleEpoch
from cluster.core.frames import (
    Compute,
    Drop,
    Edit,
    Failure,
    Frame,
    Join,
    Leave,
    Mark,
    Restore,
    Sample,
    Save,
    Step,
    Tensor,
    Trim,
    Unmark,
)
from cluster.core.plan import LayerRange, ModelShape
from cluster.core.request import SamplingParams
from cluster.model.model_shape import read_shape
from cluster.model.stage import Stage
from model.memory import settled_memory
from model.ring import ALL, PROMPT, Ring, logprobs, open_stage, tokens

GREEDY = SamplingParams()
KINDS = ["llama", "llama_sliding", "qwen3_next", "mamba2"]
"""Caches that grow, that rotate, that hold states, and mixtures."""
Rings = Callable[..., Ring]


@pytest.fixture
def ring(checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape]) -> Rings:
    return lambda arch="llama", stages=2: Ring(shape(arch), checkpoint(arch), stages)


@pytest.fixture
def stage(checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape]) -> Stage:
    """The first half of a model."""
    return open_stage(shape("llama"), checkpoint("llama"), LayerRange(0, 3), 0, 2)


def frame(*edits: Edit, step: Step | None = None, epoch: int = 1, tensors: tuple[Tensor, ...] = ()) -> Frame:
    return Frame(epoch, 0, 0, edits, step, tensors)


def prefill(*row: int, sequence: int = 1) -> Step:
    return Step(Compute.PREFILL, (sequence,), (row,))


def same(a: list[Sample], b: list[Sample]) -> bool:
    """Token for token and bit for bit."""
    return tokens(a) == tokens(b) and all(
        mx.array_equal(logprobs(x), logprobs(y)).item() for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("arch", KINDS)
def test_a_restored_prefix_goes_on_where_it_was_saved(arch: str, ring: Rings) -> None:
    """The saved sequence, the prefix and two sequences restored from it never touch each other."""
    r = ring(arch)
    whole = r.answer(ALL, 12)
    r.send(Join(1, len(PROMPT), ALL))
    r.prefill(1, PROMPT[:-1])
    first = r.go_on(1, PROMPT[-1], 5)
    at = len(PROMPT) + 4
    r.send(Save(1, prefix=9))
    other = [r.decode(1, token) for token in (3, 1, 4, 1, 5, 9)]  # the live one goes another way
    r.send(Join(2, len(PROMPT), ALL), Restore(2, 9, at))
    assert same(first + r.go_on(2, first[-1].token, 7), whole)
    r.send(Join(3, len(PROMPT), ALL), Restore(3, 9, at))
    assert same([r.decode(3, token) for token in (3, 1, 4, 1, 5, 9)], other)
    r.send(Leave(1), Leave(2), Leave(3), Join(4, len(PROMPT), ALL), Restore(4, 9, at))
    assert same(first + r.go_on(4, first[-1].token, 7), whole)


@pytest.mark.parametrize("interleaved", [False, True])
def test_sequences_do_not_mix(interleaved: bool, ring: Rings) -> None:
    r = ring("llama_sliding")
    prompts = {1: PROMPT, 2: PROMPT[::-1]}
    alone = {i: r.answer(ALL, 6, prompt) for i, prompt in prompts.items()}
    for i, prompt in prompts.items():
        r.send(Join(i, len(prompt), ALL))
        r.prefill(i, prompt[:-1])
    turns = [1, 2] * 6 if interleaved else [1] * 6 + [2] * 6
    said: dict[int, list[Sample]] = {1: [], 2: []}
    for i in turns:
        said[i].append(r.decode(i, said[i][-1].token if said[i] else prompts[i][-1]))
    assert all(same(said[i], alone[i]) for i in prompts)


@pytest.mark.parametrize("length", [0, 1, 20, 44])
def test_trim_forgets_the_end(length: int, ring: Rings) -> None:
    r = ring("llama")
    whole = r.answer(ALL, 8)
    said = [*PROMPT, *tokens(whole)]
    r.send(Join(1, len(PROMPT), ALL))
    r.prefill(1, [*said[:length], *([7] * (48 - length))])
    r.send(Trim(1, length))
    r.prefill(1, said[length:44], chunks=())
    assert tokens(r.go_on(1, said[44], 4)) == tokens(whole)[4:]


@pytest.mark.parametrize(("arch", "stages"), [("llama_sliding", 1), ("llama_sliding", 6), ("qwen3_next", 2)])
def test_a_trim_that_a_cache_cannot_do_changes_nothing_on_any_stage(arch: str, stages: int, ring: Rings) -> None:
    """Of six stages only some hold a rotating cache, yet all of them refuse."""
    r = ring(arch, stages)
    whole = r.answer(ALL, 6)
    r.send(Join(1, len(PROMPT), ALL))
    r.prefill(1, PROMPT[:-1])
    for one in r.stages:
        with pytest.raises(BadFrame, match="cannot be trimmed"):
            one.step(frame(Trim(1, 10)))
    r.send(Trim(1, len(PROMPT) - 1))  # its own length: nothing to do
    assert same(r.go_on(1, PROMPT[-1], 6), whole)


def test_a_sequence_of_any_kind_can_start_over(ring: Rings) -> None:
    r = ring("mamba2")
    whole = r.answer(ALL, 4)
    r.send(Join(1, len(PROMPT), ALL))
    r.prefill(1, [9] * 30)
    r.send(Trim(1, 0))
    r.prefill(1, PROMPT[:-1])
    assert same(r.go_on(1, PROMPT[-1], 4), whole)


def test_a_row_of_right_guesses_is_sampled_at_every_position(ring: Rings) -> None:
    r = ring("llama")
    whole = r.answer(replace(ALL, temperature=1.0, seed=5), 6)
    row = (PROMPT[-1], *tokens(whole)[:-1])
    r.send(Join(1, len(PROMPT), replace(ALL, temperature=1.0, seed=5)))
    r.prefill(1, PROMPT[:-1])
    samples = r.send(step=Step(Compute.DECODE, (1,), (row,), guesses=5, start=len(PROMPT) - 1)).samples
    assert tokens(samples) == tokens(whole)
    assert [s.position for s in samples] == [s.position for s in whole]
    r.send(Trim(1, len(PROMPT) - 1))
    (last,) = r.send(step=Step(Compute.DECODE, (1,), (row,))).samples
    assert (last.position, last.token) == (whole[-1].position, whole[-1].token)


@pytest.mark.parametrize("arch", KINDS)
def test_memory_goes_back_when_sequences_leave(arch: str, ring: Rings, request: pytest.FixtureRequest) -> None:
    r = ring(arch)
    r.answer(GREEDY, 2)
    gc.collect()  # what other tests left; from here on nothing may need a collector
    gc.disable()
    request.addfinalizer(gc.enable)
    before = settled_memory()
    r.send(Join(1, 41, GREEDY))
    r.prefill(1, PROMPT)
    held = mx.get_active_memory() - before
    r.send(Save(1, prefix=1))
    assert mx.get_active_memory() - before - held < 1024  # shared until one grows
    assert sum(s.cache_bytes for s in r.stages) > 0
    assert held >= sum(s.cache_bytes for s in r.stages) / 2
    r.send(Leave(1))
    assert all((s.sequences, s.prefixes) == (0, 1) for s in r.stages)
    r.send(Drop(1))
    assert all((s.sequences, s.prefixes, s.cache_bytes) == (0, 0, 0) for s in r.stages)
    assert mx.get_active_memory() - before < 256


def test_leave_and_drop_of_unknown_ids_do_nothing(stage: Stage) -> None:
    stage.step(frame(Leave(77), Drop(78)))
    assert (stage.sequences, stage.prefixes) == (0, 0)


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ((Join(1, 3, GREEDY),), "cannot join again"),
        ((Join(2, 3, SamplingParams(logit_bias=((320, 1.0),))),), "logit_bias names token 320"),
        ((Trim(1, -1),), "cannot be trimmed to -1"),
        ((Mark(1, 1),), "has 3 tokens; it cannot be marked at 1"),
        ((Mark(5, 2),), "not live"),
        ((Unmark(5, 2),), "not live"),
        ((Join(2, 3, GREEDY), Save(1, 1), Restore(2, 1, 4)), "has 3 tokens and cannot be cut to 4"),
        ((Join(2, 3, GREEDY), Save(1, 1), Restore(2, 1, 0)), "has 3 tokens and cannot be cut to 0"),
        ((Trim(5, 1),), "not live"),
        ((Save(5, 1),), "not live"),
        ((Restore(1, 1, 2),), "only an empty one"),
        ((Join(2, 3, GREEDY), Restore(2, 1, 2)), "prefix 1 is not kept"),
    ],
)
def test_impossible_edits_are_refused(edits: tuple[Edit, ...], words: str, stage: Stage) -> None:
    stage.step(frame(Join(1, 3, GREEDY), step=prefill(1, 2, 3)))
    with pytest.raises(BadFrame, match=words):
        stage.step(frame(*edits, Join(9, 1, GREEDY)))
    stage.step(frame(step=prefill(4)))
    stage.step(frame(step=prefill(4, sequence=9)))  # the edit after the refused one was applied: other stages did too


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (prefill(1, sequence=5), "not live"),
        (prefill(), "no tokens"),
        (prefill(320), "320"),
        (prefill(-1), "tokens -1 to"),
        (prefill(*[1] * 2049), "2048"),
        (Step(Compute.PREFILL, (1, 1), ((1,), (2,))), "must be distinct"),
        (Step(Compute.PREFILL, (1, 2), ((1,), (2, 3))), r"rows of \[1, 2\]"),
        (Step(Compute.PREFILL, (1, 2), ((1,),)), "but 1 rows"),
        (Step(Compute.PREFILL, (), ()), "at least one"),
    ],
)
def test_impossible_steps_are_refused_with_their_edits_applied(step: Step, words: str, stage: Stage) -> None:
    """Earlier stages may have computed such a step, so its sequences must not continue as if they had not."""
    with pytest.raises(BadFrame, match=words):
        stage.step(frame(Join(1, 3, GREEDY), Join(2, 3, GREEDY), Join(3, 3, GREEDY), step=step))
    assert stage.sequences == 3
    stage.step(frame(step=prefill(1, 2, sequence=3)))
    if 1 in step.sequences:
        with pytest.raises(BadFrame, match="can only leave"):
            stage.step(frame(step=prefill(1, 2, 3)))
    stage.step(frame(Leave(1), Join(1, 3, GREEDY), step=prefill(1, 2, 3)))


def _tensor(dtype: str = "float32", shape: tuple[int, ...] = (1, 2, 32), nbytes: int = 256) -> Tensor:
    return Tensor(dtype, shape, bytes(nbytes))


@pytest.mark.parametrize(
    "tensors",
    [
        (),
        (_tensor(), _tensor()),
        (_tensor("float16", nbytes=128),),
        (_tensor(shape=(1, 3, 32)),),
        (_tensor(shape=(2, 1, 32)),),
        (_tensor(shape=(1, 2, 16)),),
        (_tensor(shape=(2, 32)),),
        (_tensor(nbytes=252),),
    ],
)
def test_tensors_are_checked_before_they_are_used(
    tensors: tuple[Tensor, ...], checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape]
) -> None:
    last = open_stage(shape("llama"), checkpoint("llama"), LayerRange(3, 6), 1, 2)
    with pytest.raises(BadFrame, match=r"tensor"):
        last.step(frame(Join(1, 2, GREEDY), step=prefill(1, 2), tensors=tensors))
    reply = last.step(frame(Leave(1), Join(1, 2, GREEDY), step=prefill(1, 2), tensors=(_tensor(),)))
    assert reply == Frame(1, 0, 0)


def test_the_first_stage_takes_no_tensors(stage: Stage) -> None:
    with pytest.raises(BadFrame, match="0 are expected at this cut"):
        stage.step(frame(Join(1, 2, GREEDY), step=prefill(1, 2), tensors=(_tensor(),)))


def test_another_epoch_is_refused_before_anything_happens(stage: Stage) -> None:
    with pytest.raises(StaleEpoch):
        stage.step(frame(Join(1, 2, GREEDY), epoch=2))
    assert stage.sequences == 0


def test_a_new_epoch_keeps_the_weights_and_nothing_else(ring: Rings) -> None:
    r = ring("llama", 1)
    (one,) = r.stages
    one.step(frame(Join(1, 2, GREEDY), step=prefill(1, 2)))
    one.begin_epoch(replace(one.spec, epoch=2))
    assert (one.sequences, one.cache_bytes) == (0, 0)
    with pytest.raises(StaleEpoch):
        one.step(frame())
    one.step(frame(Join(1, 2, GREEDY), step=prefill(1, 2), epoch=2))
    with pytest.raises(StaleEpoch, match="load it again"):
        one.begin_epoch(replace(one.spec, layers=LayerRange(0, 3)))


def test_a_failed_frame_passes_with_its_edits_and_breaks_its_sequence(ring: Rings) -> None:
    r = ring("llama")
    failed = replace(
        frame(Join(1, 2, GREEDY), Join(2, 2, GREEDY), step=prefill(1, 2)), error=Failure(0, "STAGE_FAILED", "Oh no.")
    )
    out = r.stages[0].step(failed)
    assert out == failed
    assert r.stages[1].step(out) == Frame(1, 0, 0, error=failed.error)
    for one in r.stages:
        assert one.sequences == 2
        with pytest.raises(BadFrame, match=r"can only leave: .*Oh no"):
            one.step(frame(step=prefill(1)))
    r.send(Leave(1), Join(1, 2, GREEDY), step=prefill(1, 2))
    r.send(step=prefill(1, 2, sequence=2))


def test_the_first_refusal_of_an_edit_is_the_one_that_is_told(ring: Rings) -> None:
    """Every stage refuses the same edit; the frame arrives with the error that it got on its first stage."""
    r = ring("llama")
    r.send(Join(1, 2, GREEDY))
    twice = frame(Join(1, 2, GREEDY), Join(2, 2, GREEDY), step=prefill(1, 2, sequence=2))
    with pytest.raises(BadFrame, match="cannot join again"):
        r.stages[0].step(twice)
    told = Failure(0, "BAD_FRAME", "sequence 1 is already live and cannot join again")
    assert r.stages[1].step(replace(twice, error=told)) == Frame(1, 0, 0, error=told)
    assert [one.sequences for one in r.stages] == [2, 2]


def test_a_forward_that_fails_breaks_its_sequence_alone(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.step(frame(Join(1, 2, GREEDY), Join(2, 2, GREEDY)))
    with monkeypatch.context() as patch:
        patch.setattr("cluster.model.stage.mx.eval", _out_of_memory)
        with pytest.raises(StageFailed, match=r"stage 0 \(layers 0-2\).*no memory"):
            stage.step(frame(step=prefill(1, 2)))
    with pytest.raises(BadFrame, match="can only leave"):
        stage.step(frame(step=prefill(1, 2)))
    with pytest.raises(BadFrame, match="can only leave"):
        stage.step(frame(Save(1, 1)))
    stage.step(frame(step=prefill(1, 2, sequence=2)))
    stage.step(frame(Leave(1), Join(1, 2, GREEDY), step=prefill(1, 2)))


def _out_of_memory(*_arrays: object) -> None:
    raise RuntimeError("no memory")


def test_a_closed_stage_has_given_everything_back(tmp_path: Path) -> None:
    path = make("llama", tmp_path, layers=6)
    gc.collect()
    before = settled_memory()
    one = open_stage(read_shape(path, "llama", None), path, LayerRange(0, 3), 0, 2)
    one.step(frame(Join(1, 2, GREEDY), step=prefill(1, 2)))
    assert mx.get_active_memory() > before + one.weight_bytes
    one.close()
    assert mx.get_active_memory() - before < 256
    with pytest.raises(StageFailed, match="closed"):
        one.step(frame(Join(1, 2, GREEDY)))


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_bfloat16_crosses_cuts_as_it_is(stages: int, tmp_path: Path) -> None:
    path = make("llama", tmp_path, layers=3, dtype=mx.bfloat16)
    shape = read_shape(path, "llama", None)
    r = Ring(shape, path, stages)
    sent = r.stages[0].step(frame(Join(8, 2, GREEDY), step=prefill(1, 2, sequence=8))).tensors
    assert [t.dtype for t in sent] == ["bfloat16"] * (stages > 1)
    assert same(r.answer(ALL, 6), Ring(shape, path, 1).answer(ALL, 6))


def test_a_refused_edit_ends_its_own_sequence_and_not_the_step_it_rides_on(stage: Stage) -> None:
    stage.step(frame(Join(1, 3, GREEDY), Join(2, 3, GREEDY), step=prefill(1, 2)))
    stage.step(frame(Restore(2, 77, 2), step=prefill(3)))
    with pytest.raises(BadFrame, match="can only leave: prefix 77 is not kept"):
        stage.step(frame(step=prefill(3, sequence=2)))
    stage.step(frame(Leave(2), step=prefill(4)))
    assert stage.sequences == 1
