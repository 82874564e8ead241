"""Prompts start from the stages' disks where that is worth it, and are prefilled in every other case."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.core.frames import Drop, Frame, Persist, Step
from cluster.core.prefix_keys import node_ids, owner_key
from cluster.core.request import Request, SamplingParams
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.disk_prefixes import DiskContents, DiskRead, ReadOutcome
from cluster.scheduler.outcome import Produced
from cluster.scheduler.scheduler import Scheduler
from scheduler.stages import EOS, Stages, capacity, continuation

EDITION = "0" * 32
PROMPT = tuple(i % 40 + 1 for i in range(1300))
KEPT = 1024
HIT, MISS, LATE = ReadOutcome.HIT, ReadOutcome.MISS, ReadOutcome.LATE


def names(
    tokens: tuple[int, ...], *lengths: int, client: str = "a", adapter: str = ""
) -> tuple[tuple[int, bytes], ...]:
    return tuple(node_ids(EDITION, owner_key(client), adapter, tokens, lengths))


class Ring:
    """A scheduler with fake stages, whose disks have ``contents``."""

    def __init__(
        self, *contents: tuple[int, bytes], trimmable: bool = True, budget: int = 10_000, prefixes: int = 5_000
    ) -> None:
        self.stages = Stages(trimmable)
        self.limits: Capacity = capacity(budget=budget, prefixes=prefixes, chunk=256, trimmable=trimmable)
        self.scheduler = Scheduler(1, self.limits, frozenset([EOS]))
        self.scheduler.disk.open(DiskContents(EDITION, contents))
        self.answers: dict[str, list[int]] = {}
        self.edits: list[object] = []
        self.prefilled = 0

    def submit(self, name: str, prompt: tuple[int, ...], client: str = "a", adapter: str = "") -> list[DiskRead]:
        asked = Request(name, prompt, SamplingParams(), 3, client=client, ignore_eos=True, adapter=adapter)
        self.scheduler.submit(asked)
        self.answers[name] = []
        return self.send()

    def send(self) -> list[DiskRead]:
        frames: list[Frame] = self.scheduler.next_frames(0.0)
        self.edits += [edit for frame in frames for edit in frame.edits]
        steps: list[Step] = [frame.step for frame in frames if frame.step]
        self.prefilled += sum(len(step.tokens[0]) for step in steps if not step.compute)
        self.stages.take(frames)
        return self.scheduler.disk.take_orders()

    def run(self) -> None:
        """Until nothing is in flight."""
        while self.scheduler.in_flight:
            outcome = self.scheduler.on_frame(self.stages.give())
            for event in outcome.events:
                if isinstance(event, Produced):
                    self.answers[event.request_id].append(event.sample.token)
            assert self.send() == []

    def finish(self, order: DiskRead, outcome: ReadOutcome, tokens: tuple[int, ...] = PROMPT) -> None:
        assert self.finish_and_send(order, outcome, tokens) == []

    def finish_and_send(
        self, order: DiskRead, outcome: ReadOutcome, tokens: tuple[int, ...] = PROMPT
    ) -> list[DiskRead]:
        if outcome is HIT:
            self.stages.prefixes[order.prefix] = tokens[: order.length]
            self.stages._kept_marks[order.prefix] = {}
        else:
            self.stages.prefixes.setdefault(order.prefix, ())
            self.stages._kept_marks.setdefault(order.prefix, {})
        self.scheduler.disk.finish(order, outcome, 0.01)
        return self.send()


@pytest.mark.parametrize("trimmable", [True, False])
def test_a_prompt_starts_from_the_longest_beginning_on_disk(trimmable: bool) -> None:
    ring = Ring(*names(PROMPT, 512, KEPT), trimmable=trimmable)
    (order,) = ring.submit("x", PROMPT)
    assert (order.length, order.owner) == (KEPT, owner_key("a"))
    assert ring.scheduler.in_flight == 0
    ring.finish(order, HIT)
    ring.run()
    assert ring.answers["x"] == continuation(PROMPT, 3)
    assert ring.prefilled == len(PROMPT) - 1 - KEPT
    assert ring.scheduler.disk_use.reads == {HIT: 1}
    assert ring.scheduler.disk_use.tokens == KEPT


@pytest.mark.parametrize(("outcome", "shorter"), [(MISS, ()), (LATE, (512,))])
def test_a_read_that_fails_costs_nothing_but_its_time(outcome: ReadOutcome, shorter: tuple[int, ...]) -> None:
    ring = Ring(*names(PROMPT, *shorter, KEPT))
    (order,) = ring.submit("x", PROMPT)
    ring.finish(order, outcome)
    ring.run()
    assert ring.answers["x"] == continuation(PROMPT, 3)
    assert ring.prefilled == len(PROMPT) - 1
    assert Drop(order.prefix) in ring.edits
    assert ring.scheduler.disk_use.reads == {outcome: 1}
    ring.scheduler.disk.finish(order, HIT, 0.01)
    assert ring.scheduler.disk.reserved == (0, 0)


@pytest.mark.parametrize("most", [450, 0])
def test_a_prefix_that_a_stage_lacks_is_followed_by_shorter_ones(most: int) -> None:
    """First by the next one, then by ever fewer tokens, until one is read or none is left."""
    lengths = (256, 300, 400, 512, 600, 700, 800, 900, 1000, KEPT)
    ring = Ring(*names(PROMPT, *lengths))
    orders, tried = ring.submit("x", PROMPT), []
    while orders:
        (order,) = orders
        tried.append(order.length)
        orders = ring.finish_and_send(order, MISS if order.length > most else HIT)
    assert tried == [KEPT, 1000, 400]
    ring.run()
    assert ring.answers["x"] == continuation(PROMPT, 3)
    assert ring.prefilled == len(PROMPT) - 1 - (400 if most else 0)
    assert ring.scheduler.disk_use.reads == ({MISS: 2, HIT: 1} if most else {MISS: 3})
    assert ring.scheduler.disk.reserved == (0, 0)


def test_beginnings_on_disk_are_those_of_one_adapter() -> None:
    ring = Ring(*names(PROMPT, KEPT, adapter="legal@1"))
    assert ring.submit("base", PROMPT) == []
    assert ring.submit("other", PROMPT, adapter="legal@2") == []
    ring.run()
    (order,) = ring.submit("same", PROMPT, adapter="legal@1")
    assert (order.length, order.adapter) == (KEPT, "legal@1")
    ring.finish(order, HIT)
    ring.run()
    assert {e.adapter for e in ring.edits if isinstance(e, Persist)} == {"", "legal@1", "legal@2"}


def test_those_with_one_beginning_wait_for_one_read_and_others_go_on() -> None:
    ring = Ring(*names(PROMPT, KEPT))
    (order,) = ring.submit("x", PROMPT)
    assert ring.submit("y", (*PROMPT[:1200], 7, 7)) == []
    assert ring.submit("z", PROMPT, client="b") == []
    ring.run()
    assert ring.answers["z"] == continuation(PROMPT, 3)
    ring.finish(order, HIT)
    ring.run()
    assert ring.answers["x"] == continuation(PROMPT, 3)
    assert ring.answers["y"] == continuation((*PROMPT[:1200], 7, 7), 3)


def test_one_who_aborts_does_not_keep_the_prefix_from_others() -> None:
    ring = Ring(*names(PROMPT, KEPT))
    (order,) = ring.submit("x", PROMPT)
    ring.scheduler.end("x")
    ring.finish(order, HIT)
    assert ring.submit("y", PROMPT) == []
    ring.run()
    assert ring.prefilled == len(PROMPT) - 1 - KEPT
    assert ring.answers["y"] == continuation(PROMPT, 3)


def test_what_leaves_memory_is_read_again() -> None:
    ring = Ring(prefixes=1_400, budget=4_000)
    assert ring.submit("x", PROMPT) == []
    ring.run()
    assert [edit.owner for edit in ring.edits if isinstance(edit, Persist)] == [owner_key("a")]
    other = PROMPT[::-1]
    assert ring.submit("y", other) == []
    ring.run()
    (order,) = ring.submit("z", (*PROMPT, 5))
    assert order.length == KEPT
    assert order.node == names(PROMPT, KEPT)[0][1]
    ring.finish(order, HIT)
    ring.run()
    assert ring.answers["z"] == continuation((*PROMPT, 5), 3)


def test_memory_without_room_is_not_read_into() -> None:
    ring = Ring(*names(PROMPT, KEPT), prefixes=KEPT - 1)
    assert ring.submit("x", PROMPT) == []
    ring.run()
    assert ring.answers["x"] == continuation(PROMPT, 3)


def test_a_read_reserves_its_memory() -> None:
    """The second request does not fit beside the first and what is being read for it."""
    ring = Ring(*names(PROMPT, KEPT), budget=3_000, prefixes=1_500)
    (order,) = ring.submit("x", PROMPT)
    assert ring.scheduler.disk.reserved == (KEPT, 2 * KEPT)
    ring.submit("y", PROMPT[::-1])
    ring.run()
    assert ring.answers["y"] == []
    ring.finish(order, MISS)
    ring.run()
    assert ring.answers["x"] == continuation(PROMPT, 3)
    assert ring.answers["y"] == continuation(PROMPT[::-1], 3)


def test_a_slow_disk_is_not_read() -> None:
    ring = Ring(*names(PROMPT, KEPT))
    ring.submit("x", PROMPT[::-1])
    ring.run()
    ring.scheduler.disk_use.bandwidth = 1.0
    assert ring.submit("y", PROMPT) == []
    ring.scheduler.disk_use.bandwidth = 1e9
    assert len(ring.submit("z", (*PROMPT[:KEPT], 9, 9))) == 0, "y prefills it just now"
    ring.run()
    assert ring.answers["y"] == continuation(PROMPT, 3)


def test_without_disks_nothing_is_written_or_read() -> None:
    ring = Ring()
    ring.scheduler.disk.open(None)
    ring.submit("x", PROMPT)
    ring.run()
    assert not [edit for edit in ring.edits if isinstance(edit, Persist)]


def test_an_answer_of_another_epoch_changes_nothing() -> None:
    ring = Ring(*names(PROMPT, KEPT))
    (order,) = ring.submit("x", PROMPT)
    ring.stages = Stages()
    ring.scheduler.begin_epoch(2, ring.limits, DiskContents(EDITION, names(PROMPT, 512)))
    (again,) = ring.send()
    assert (again.epoch, again.length) == (2, 512)
    ring.scheduler.disk.finish(order, HIT, 0.01)
    assert len(ring.scheduler.prefixes) == 0
    ring.finish(replace(again), HIT)
    ring.run()
    assert ring.answers["x"] == continuation(PROMPT, 3)
