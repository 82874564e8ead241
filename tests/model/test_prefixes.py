"""A prefix kept at a chunk's border continues as a new run would, with any caches, whatever its donor did since."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import accumulate
from pathlib import Path

import mlx.core as mx
import pytest

from checkpoints import SLICEABLE
from cluster.core.frames import Compute, Drop, Join, Leave, Restore, Save, Step, Trim
from cluster.core.plan import ModelShape
from cluster.core.request import SamplingParams
from effort import chosen
from model.ring import ALL, CHUNKS, PROMPT, Ring, logprobs, tokens

GREEDY = SamplingParams()
OTHER = tuple((i * 53 + 29) % 250 for i in range(60))
"""What the donor says after the border: nothing that the prompt holds there."""
TRIMMABLE = ("llama", "llama_untied", "llama_4bit", "qwen3", "qwen3_moe", "deepseek_v3")
PLAIN = ("llama_sliding", "gemma3_text", "qwen3_next", "rwkv7")
ANSWER = 6
Rings = Callable[[str], Ring]


@pytest.fixture(scope="module")
def rings(checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape]) -> Rings:
    """Architecture -> a ring of three stages that tests leave empty."""
    return cache(lambda arch: Ring(shape(arch), checkpoint(arch), 3))


def emptied(ring: Ring) -> bool:
    return all((s.sequences, s.prefixes, s.cache_bytes, s.prefix_bytes) == (0, 0, 0, 0) for s in ring.stages)


@pytest.mark.parametrize("donor_decodes", [False, True])
@pytest.mark.parametrize("arch", chosen([*SLICEABLE, "rwkv7", "falcon_h1", "deepseek_v41"], *PLAIN))
def test_a_prefix_from_a_chunks_border_goes_on_as_a_fresh_run(arch: str, donor_decodes: bool, rings: Rings) -> None:
    """Borders before and behind the sliding windows' end (16); the donor then runs far past it, or not at all."""
    ring = rings(arch)
    whole = ring.answer(ALL, ANSWER)
    borders = list(accumulate(CHUNKS))[:2]
    ring.send(Join(1, len(PROMPT), GREEDY))
    for start, end in zip([0, *borders], borders, strict=False):
        ring.send(step=Step(Compute.PREFILL, (1,), (PROMPT[start:end],)))
        ring.send(Save(1, prefix=end))
    if donor_decodes:
        ring.prefill(1, OTHER[:30], (30,))
        ring.go_on(1, OTHER[30], 20)
    ring.send(Leave(1))
    for number, border in enumerate(borders, start=1):
        ring.send(Join(2, len(PROMPT), ALL), Restore(2, border, border))
        ring.prefill(2, PROMPT[border:-1], CHUNKS[number:])
        samples = ring.go_on(2, PROMPT[-1], ANSWER)
        assert tokens(samples) == tokens(whole), border
        assert all(mx.array_equal(logprobs(a), logprobs(b)).item() for a, b in zip(samples, whole, strict=True))
        ring.send(Leave(2))
    ring.send(*(Drop(border) for border in borders))
    assert emptied(ring)


@pytest.mark.parametrize("in_a_lane", [False, True])
@pytest.mark.parametrize("arch", chosen(TRIMMABLE, "llama_4bit", "deepseek_v3"))
def test_a_restored_prefix_can_be_trimmed(arch: str, in_a_lane: bool, rings: Rings) -> None:
    """The prefix is a whole turn, kept while its sequence decodes (perhaps beside another); only its start is used."""
    ring = rings(arch)
    whole = ring.answer(GREEDY, ANSWER)
    for sequence in (1, 3):
        ring.send(Join(sequence, len(PROMPT), GREEDY))
        ring.prefill(sequence, (*PROMPT[: 30 + sequence], *OTHER))
    for _ in range(4):
        lane = (1, 3) if in_a_lane else (1,)
        ring.send(step=Step(Compute.DECODE, lane, ((5,),) * len(lane)))
    ring.send(Save(1, prefix=7), Leave(1), Leave(3))
    ring.send(Join(2, len(PROMPT), GREEDY), Restore(2, 7, 31))
    ring.prefill(2, PROMPT[31:-1])
    assert tokens(ring.go_on(2, PROMPT[-1], ANSWER)) == tokens(whole)
    ring.send(Leave(2), Drop(7))
    assert emptied(ring)


def test_one_state_kept_twice_takes_and_counts_its_memory_once(rings: Rings) -> None:
    ring = rings("llama")
    ring.send(Join(1, 41, GREEDY))
    ring.prefill(1, PROMPT)
    one = [stage.cache_bytes for stage in ring.stages]
    ring.send(Save(1, 5), Save(1, 6))
    ring.send(Join(2, 41, GREEDY), Restore(2, 5, 41), Save(2, 7))
    assert [stage.prefix_bytes for stage in ring.stages] == one
    ring.decode(1, 3)
    ring.send(Save(1, 8))  # it has moved on: another state
    assert [stage.prefix_bytes for stage in ring.stages] == [2 * size for size in one]
    ring.send(Trim(2, 9), Save(2, 9))
    assert [stage.prefix_bytes for stage in ring.stages] == [3 * size for size in one]
    ring.send(Drop(5), Drop(6))
    assert [stage.prefix_bytes for stage in ring.stages] == [3 * size for size in one]
    ring.send(Drop(7), Drop(8), Drop(9), Leave(1), Leave(2))
    assert emptied(ring)


def test_an_id_that_is_kept_anew_holds_the_new_state(rings: Rings) -> None:
    ring = rings("llama")
    whole = ring.answer(GREEDY, ANSWER)
    ring.send(Join(1, 41, GREEDY))
    ring.prefill(1, OTHER)
    ring.send(Save(1, 5), Join(2, 41, GREEDY))
    ring.prefill(2, PROMPT[:-1])
    ring.send(Save(2, 5), Save(1, 6), Leave(1), Leave(2), Join(3, 41, GREEDY), Restore(3, 5, 40))
    assert tokens(ring.go_on(3, PROMPT[-1], ANSWER)) == tokens(whole)
    ring.send(Leave(3), Drop(5), Drop(6))
    assert emptied(ring)
