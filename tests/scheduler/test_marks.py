"""Where prompts are marked whose caches cannot be trimmed, and what later prompts gain by it."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.frames import Compute, Drop, Mark, Unmark
from cluster.core.limits import MARK_TOKENS
from cluster.core.request import Request, SamplingParams
from cluster.scheduler.chunk_cost import ChunkCost, ChunkCosts
from cluster.scheduler.kept_marks import KeptMark, MarkMemory, space_out, surplus
from cluster.scheduler.scheduler import Scheduler
from scheduler.stages import MARK_BYTES, Stages, capacity, continuation

PROMPT = tuple(range(100, 160))


class Chat:
    """One scheduler whose caches cannot be trimmed, with its stages; requests run one after the other."""

    def __init__(self, *, prefixes: int = 2000, budget: int = 10_000, chunk: int = 16) -> None:
        plan = capacity(prefixes=prefixes, budget=budget, chunk=chunk, trimmable=False)
        self.scheduler, self.stages = Scheduler(1, plan, frozenset()), Stages(trimmable=False)
        self.made = 0
        self.chunks: list[int] = []
        self.edits: list[object] = []

    def submit(
        self, prompt: tuple[int, ...], *split_points: int, max_tokens: int = 3, borders: tuple[int, ...] = ()
    ) -> int:
        """-> how much of the prompt need not be read"""
        self.made += 1
        request = Request(f"r{self.made}", prompt, SamplingParams(), max_tokens, client="one")
        self.scheduler.submit(replace(request, split_points=split_points, borders=borders))
        return self.scheduler.sequences[-1].cached

    def step(self) -> None:
        frames = self.scheduler.next_frames(0.0)
        self.edits += [e for f in frames for e in f.edits]
        self.chunks += [len(f.step.tokens[0]) for f in frames if f.step and f.step.compute is Compute.PREFILL]
        self.stages.take(frames)
        if self.stages.frames:
            self.scheduler.on_frame(self.stages.give())

    def run(self) -> None:
        while self.scheduler.sequences or self.scheduler.in_flight:
            self.step()
        self.step()

    def ask(
        self, prompt: tuple[int, ...], *split_points: int, max_tokens: int = 3, borders: tuple[int, ...] = ()
    ) -> int:
        cached = self.submit(prompt, *split_points, max_tokens=max_tokens, borders=borders)
        self.run()
        return cached


def test_a_prompt_starts_from_the_longest_marked_beginning() -> None:
    chat = Chat()
    assert chat.ask(PROMPT, 20, 50) == 0
    assert chat.chunks == [16, 4, 16, 14, 9]
    assert chat.ask((*PROMPT[:55], 1, 2, 3)) == 50
    assert chat.ask((*PROMPT[:49], 4, 5, 6)) == 20
    assert chat.ask((*PROMPT, 7)) == 59
    said = tuple(continuation(PROMPT, 3))
    assert chat.ask((*PROMPT, *said, 8, 9)) == 62
    assert chat.ask((*PROMPT, *said, 8, 9, 7)) == 64


def test_a_later_turn_keeps_the_marks_of_the_turns_before() -> None:
    """Its prefix replaces theirs, so that what they share takes memory once."""
    chat = Chat()
    prompt = PROMPT
    for _ in range(4):
        chat.ask(prompt, 20, len(prompt) - 4)
        prompt = (*prompt, *continuation(prompt, 3), *PROMPT[:10])
    assert len(chat.scheduler.prefixes) == 1
    assert chat.ask((*PROMPT[:30], 1)) == 20
    assert chat.ask((*PROMPT[:57], 1)) == 56


def test_a_turn_takes_the_place_of_the_last_one_though_its_answer_is_rendered_anew() -> None:
    chat = Chat()
    prompt = (*PROMPT, *range(200, 500))
    for turn in range(3):
        chat.ask(prompt, 20, len(prompt) - 1)
        prompt = (*prompt, turn, 7, 8, 9)
    assert len(chat.scheduler.prefixes) == 1
    chat.ask((*prompt[:40], 1, 2), 20)
    assert len(chat.scheduler.prefixes) == 2


def test_where_two_prompts_parted_the_third_starts() -> None:
    chat = Chat()
    chat.ask(PROMPT)
    assert chat.ask((*PROMPT[:33], 1, 2, 3)) == 0
    assert chat.ask((*PROMPT[:33], 4, 5, 6)) == 33


def test_a_long_prompt_is_marked_at_its_chunks_and_ever_more_thinly_behind() -> None:
    chat = Chat(prefixes=200_000, budget=400_000, chunk=256)
    prompt = tuple(i * 7919 % 40_000 for i in range(30_000))
    chat.ask(prompt)
    marked = [e.length for e in chat.edits if isinstance(e, Mark)]
    kept = sorted({*marked} - {e.length for e in chat.edits if isinstance(e, Unmark)})
    assert len(marked) >= len(prompt) // MARK_TOKENS
    assert len(kept) <= 2 * math.log2(len(marked)) + 3
    assert set(chat.chunks[:-1]) == {256}
    other = (*prompt[:20_000], 1, 2)
    assert chat.ask(other) == max(at for at in kept if at <= 20_000)
    assert chat.ask((*prompt[:20_000], 3, 4)) == 20_000


LONG = tuple(i * 7919 % 40_000 for i in range(1000))


def test_a_prompt_is_marked_at_the_borders_that_are_far_apart() -> None:
    chat = Chat(prefixes=100_000, budget=200_000, chunk=2000)
    chat.ask(LONG, 500, borders=(30, 100, 130, 300, 480, 520, 700, 990))
    assert [e.length for e in chat.edits if isinstance(e, Mark)] == [100, 300, 500, 700, 999]
    for length, cached in ((320, 300), (499, 320), (699, 500)):
        assert chat.ask((*LONG[:length], 1)) == cached


def test_a_prompt_that_parts_at_any_border_reads_little_of_what_it_shares() -> None:
    """However long the first one is: its system message changes, or its last tools."""
    chat = Chat(prefixes=10**7, budget=2 * 10**7, chunk=512)
    prompt, borders = tuple(i * 7919 % 40_000 for i in range(30_000)), tuple(range(150, 30_000, 150))
    chat.ask(prompt, borders=borders)
    kept = sorted(e.length for e in chat.edits if isinstance(e, Mark) and e.length in borders)
    assert len(kept) < len(borders)
    for border in borders:
        assert max(at for at in kept if at <= border) >= (1 - 1 / 64) * border - 150


def test_a_later_turn_keeps_the_marks_at_borders_and_is_not_cut_where_little_is_new() -> None:
    chat = Chat(prefixes=100_000, budget=200_000, chunk=2000)
    prompt, borders = LONG, (100, 300, 700)
    for turn in range(5):
        chat.chunks = []
        chat.ask(prompt, borders=borders)
        assert not turn or chat.chunks == [90]
        prompt = (*prompt, *continuation(prompt, 3), *range(90))
        borders = (*borders, len(prompt) - 80)
    assert len(chat.scheduler.prefixes) == 1
    assert chat.ask((*LONG[:310], 1)) == 300


def test_marks_at_borders_take_a_part_of_the_memory() -> None:
    borders = tuple(range(100, 1000, 100))
    for most in (9, 4, 1):
        budget = 16 * MARK_BYTES[0] * most
        chat = Chat(prefixes=budget, budget=100_000, chunk=2000)
        chat.ask(LONG, borders=borders)
        assert 0 < sum(isinstance(e, Mark) for e in chat.edits) <= most + 1


def test_borders_are_no_reason_for_chunks_that_cost_much() -> None:
    chat = Chat(prefixes=100_000, budget=200_000, chunk=2000)
    costs = ChunkCosts()
    costs._known = ChunkCost(token_us=100, fixed=30, pair=0, others=1)
    chat.scheduler._prefill_budget._costs = costs
    chat.ask(LONG, borders=tuple(range(100, 1000, 100)))
    assert [e.length for e in chat.edits if isinstance(e, Mark)] == [300, 600, 999]


@given(st.sets(st.integers(1, 2000)), st.sets(st.integers(1, 2000)), st.integers(1, 500), st.floats(0, 1))
def test_what_is_spaced_out_is_far_from_all_others(
    lengths: set[int], fixed: set[int], least: int, share: float
) -> None:
    def gap(length: int) -> float:
        return max(least, share * length)

    chosen = space_out(lengths, gap, fixed)
    assert chosen <= lengths
    for length in chosen:
        assert min(abs(length - other) for other in {0, *fixed, *chosen} - {length}) >= gap(length)
    for length in lengths - chosen:
        assert min(abs(length - other) for other in {0, *fixed, *chosen}) < gap(length)


def test_marks_stay_within_the_budget_of_prefixes() -> None:
    chat = Chat(prefixes=20, chunk=4)
    chat.submit(PROMPT, 10, 20, 30, 40, 50, max_tokens=30)
    while chat.scheduler.sequences:
        chat.step()
        assert all(u <= m for u, m in zip(chat.scheduler.prefixes.used, (20, 40), strict=True))
    assert sum(isinstance(e, Mark) for e in chat.edits) == 20 // MARK_BYTES[0]


def test_a_request_does_not_wait_for_memory_that_marks_hold() -> None:
    chat = Chat(prefixes=60, budget=125)
    chat.submit(PROMPT[:40], 10, 20, 30, max_tokens=20)
    for _ in range(6):
        chat.step()
    assert chat.scheduler.prefixes.used[0] == 4 * MARK_BYTES[0]
    chat.submit(PROMPT[:25], max_tokens=10)
    assert all(s.lane >= 0 for s in chat.scheduler.sequences)
    chat.run()
    assert [e.length for e in chat.edits if isinstance(e, Unmark)] == [10, 20, 30]
    assert not chat.scheduler.sequences


def test_a_prefix_that_goes_takes_its_marks_along() -> None:
    chat = Chat(prefixes=110)
    chat.ask(PROMPT, 20)
    chat.ask(PROMPT[::-1], 20)
    assert sum(isinstance(e, Drop) for e in chat.edits) == 1
    assert chat.stages.kept_bytes == chat.scheduler.prefixes.used[0] <= 110
    assert chat.ask((*PROMPT[:30], 1)) == 0
    assert chat.ask((*PROMPT[::-1][:30], 1)) == 20


@settings(deadline=None)
@given(st.integers(1, 800), st.frozensets(st.integers(1, 800), max_size=4))
def test_gaps_grow_with_the_distance_and_marks_with_its_logarithm(now: int, fixed: frozenset[int]) -> None:
    held: list[int] = []
    for length in range(1, now + 1):
        held = [at for at in held if at not in set(surplus(held, length, fixed))] + [length]
    assert fixed & set(range(1, now + 1)) <= set(held)
    assert len(held) <= 2 * math.log2(now) + 3 + 2 * len(fixed)
    for older, newer in zip([0, *held], held, strict=False):
        assert newer - older <= max(now - newer, 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=40))
def test_a_mark_counts_once_whoever_holds_it(steps: list[tuple[bool, int]]) -> None:
    memory, marks, held = MarkMemory(2), [KeptMark((i, 2 * i)) for i in range(6)], list[int]()
    for take, which in steps:
        if take:
            held.append(which)
            memory.hold([marks[which]])
        elif which in held:
            held.remove(which)
            memory.release([marks[which]])
        assert memory.used == (sum(set(held)), 2 * sum(set(held)))
