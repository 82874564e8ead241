"""Prompts that begin alike are read once, also while they are being read, and whoever reads them goes."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from cluster.core.frames import Compute, Failure
from cluster.core.limits import MARK_TOKENS
from cluster.core.request import Request, SamplingParams
from cluster.scheduler import saving
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.in_flight import InFlightFrame, InFlightFrames
from cluster.scheduler.outcome import Produced
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.sharing import Copies
from effort import effort
from scheduler.stages import Stages, capacity, continuation
from scheduler.test_ring import Row

LONG = tuple(range(100, 500))
BOOK = tuple(range(1000, 4000))
WINDOW = 3
KINDS = pytest.mark.parametrize("trimmable", [True, False])


class Ring:
    """A scheduler and its stages, counting the prompt tokens that are read."""

    def __init__(self, plan: Capacity, *, trimmable: bool) -> None:
        self.scheduler, self.stages = Scheduler(1, plan, frozenset()), Stages(trimmable)
        self.read = 0
        self.said: dict[str, list[int]] = defaultdict(list)
        self.first: dict[str, int] = {}
        """How many tokens had been read when a request said its first one."""
        self.prompts: dict[str, tuple[int, ...]] = {}

    def submit(self, name: str, prompt: tuple[int, ...], client: str = "one", max_tokens: int = 3) -> None:
        self.prompts[name] = prompt
        self.scheduler.submit(Request(name, prompt, SamplingParams(), max_tokens, client=client))

    def step(self, failure: Failure | None = None) -> None:
        self.stages.take(self.scheduler.next_frames(0.0))
        if not self.stages.frames:
            return
        waiting = {f.number: f for f in self.stages.frames}
        reply = self.stages.give(failure)
        step = waiting[reply.number].step
        if step and step.compute is Compute.PREFILL:
            self.read += len(step.tokens[0])
        for event in self.scheduler.on_frame(reply).events:
            if isinstance(event, Produced):
                self.said[event.request_id].append(event.sample.token)
                self.first.setdefault(event.request_id, self.read)

    def fail(self) -> None:
        """Let the next step fail."""
        while next(iter(self.stages.frames)).step is None:
            self.step()
        self.step(Failure(0, "STAGE_FAILED", "no"))

    def run(self) -> None:
        while self.scheduler.sequences or self.scheduler.in_flight:
            self.step()
        self.step()
        for name, tokens in self.said.items():
            assert tokens == continuation(self.prompts[name], len(tokens))
        assert self.stages.fed == {}
        assert len(self.stages.prefixes) == len(self.scheduler.prefixes)


def plan(*, trimmable: bool, **more: int) -> Capacity:
    options = {"lanes": 2, "rows": 8, "prefixes": 5000, "budget": 50_000, "chunk": 32, "window": WINDOW} | more
    return capacity(trimmable=trimmable, **options)


@KINDS
@pytest.mark.parametrize("prefixes", [0, 5000])
def test_one_beginning_of_several_requests_is_read_once(trimmable: bool, prefixes: int) -> None:
    ring = Ring(plan(trimmable=trimmable, prefixes=prefixes), trimmable=trimmable)
    for i in range(4):
        ring.submit(f"r{i}", (*LONG, *range(i, i + 20)))
    ring.run()
    assert len(ring.said) == 4
    assert ring.read == 400 + 4 * 19


@KINDS
def test_nobody_elses_beginning_is_used_or_waited_for(trimmable: bool) -> None:
    ring = Ring(plan(trimmable=trimmable), trimmable=trimmable)
    for i in range(3):
        ring.submit(f"r{i}", (*LONG, i), client=f"client {i}")
    ring.run()
    assert ring.read == 3 * 400


@KINDS
def test_a_request_joins_in_where_the_reader_is(trimmable: bool) -> None:
    """It comes when a part is read, and waits for the rest; another one parts from the reader where that has been."""
    ring = Ring(plan(trimmable=trimmable), trimmable=trimmable)
    ring.submit("first", (*LONG, 1))
    for _ in range(5):
        ring.step()
    assert 100 < ring.read < 300
    ring.submit("second", (*LONG, 2))
    ring.submit("third", (*LONG[:64], *range(60, 80)))
    ring.run()
    again = 0 if trimmable else 64
    assert ring.read == 400 + again + 19


@KINDS
def test_the_next_one_reads_on_where_a_reader_is_aborted(trimmable: bool) -> None:
    ring = Ring(plan(trimmable=trimmable, prefixes=0), trimmable=trimmable)
    for i in range(3):
        ring.submit(f"r{i}", (*LONG, i))
    for _ in range(5):
        ring.step()
    read = ring.read
    assert 0 < read < 400
    ring.scheduler.end("r0")
    ring.run()
    assert set(ring.said) == {"r1", "r2"}
    assert ring.read == 400


@KINDS
@pytest.mark.parametrize("fails_at", [2000, 2432])
def test_the_next_one_takes_over_where_a_reader_that_fails_was_last_saved(trimmable: bool, fails_at: int) -> None:
    """A chunk before the last save may be the one that fails: then it is the save before that."""
    ring = Ring(plan(trimmable=trimmable, chunk=128, budget=50_000, prefixes=20_000), trimmable=trimmable)
    for i in range(3):
        ring.submit(f"r{i}", (*BOOK, i))
    while ring.read < fails_at:
        ring.step()
    ring.fail()
    ring.run()
    assert set(ring.said) == {"r1", "r2"}
    unsaved = MARK_TOKENS + 2 * WINDOW * 128
    assert 3000 < ring.read <= 3000 + unsaved


@KINDS
def test_the_next_one_takes_over_where_a_copy_of_a_reader_that_fails_loses_its_turn(trimmable: bool) -> None:
    """The second request has just been copied from the first, and the third waits for it; a chunk from before fails."""
    ring = Ring(plan(trimmable=trimmable, chunk=128, budget=50_000, prefixes=20_000), trimmable=trimmable)
    for name, prompt in (("r0", (*BOOK[:2000], 0)), ("r1", (*BOOK, 1)), ("r2", (*BOOK, 2))):
        ring.submit(name, prompt)
    copied = ring.scheduler.sequences[1]
    while not copied.joined:
        ring.step()
    assert ring.scheduler.sequences[2].leader is copied
    lost = copied.id
    ring.fail()
    assert copied.id != lost
    ring.run()
    assert set(ring.said) == {"r1", "r2"}
    assert 3000 < ring.read <= 3000 + MARK_TOKENS + 2 * WINDOW * 128


@KINDS
def test_who_waits_reads_for_itself_where_a_reader_fails(trimmable: bool) -> None:
    ring = Ring(plan(trimmable=trimmable), trimmable=trimmable)
    for i in range(3):
        ring.submit(f"r{i}", (*LONG, i))
    for _ in range(5):
        ring.step()
    ring.step(Failure(0, "STAGE_FAILED", "no"))
    ring.run()
    assert set(ring.said) == {"r1", "r2"}
    assert 400 < ring.read < 800


@KINDS
@pytest.mark.parametrize("stage", [0, 1])
def test_a_copy_of_a_reader_that_fails_starts_again(trimmable: bool, stage: int, rng: random.Random) -> None:
    """The second stage still has chunks of the reader to do when the copy is made; one of them fails."""
    row = Row(rng, 2, lanes=2, rows=1, budget=10_000, prefixes=5_000, chunk=8, trimmable=trimmable)
    prompts = {"reads": (*LONG[:36], *range(1, 40)), "copies": (*LONG[:36], 7, 8, 9)}
    for name, prompt in prompts.items():
        row.scheduler.submit(Request(name, prompt, SamplingParams(), 3))
    row.write()
    while len(row.lines[0]) < 2 or not row.scheduler.sequences[1].joined:
        row.advance(0)
        row.advance(1)
        row.advance(2)
    copy = row.scheduler.sequences[1].id
    row.advance(0, fail=stage == 0)
    row.advance(1, fail=stage == 1)
    while "reads" not in row.ended:
        row.advance(0)
        row.advance(1)
        row.advance(2)
    assert [s.id for s in row.scheduler.sequences] != [copy]
    row.settle()
    assert row.ended == {"reads": "STAGE_FAILED", "copies": "finished"}
    assert row.said["copies"] == continuation(prompts["copies"], 3)


@KINDS
def test_a_start_from_a_save_of_a_reader_starts_again_if_an_earlier_step_fails(
    trimmable: bool, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader is saved after its first chunk, which the second stage has yet to do."""
    monkeypatch.setattr(saving, "MARK_TOKENS", 8)
    row = Row(rng, 2, lanes=3, rows=1, budget=10_000, prefixes=5_000, chunk=8, trimmable=trimmable)
    prompts = {"reads": (*LONG[:60], 1), "waits": (*LONG[:60], 2), "starts": (*LONG[:8], 7, 8, 9)}
    for name, prompt in prompts.items():
        if name == "starts":
            row.write()
        row.scheduler.submit(Request(name, prompt, SamplingParams(), 3))
    row.write()
    _, waits, starts = row.scheduler.sequences
    assert (waits.joined, starts.cached, starts.start is not None) == (False, 8, True)
    while row.lines[0]:
        row.advance(0)
    row.advance(1, fail=True)
    row.settle()
    assert row.ended == {"reads": "STAGE_FAILED", "waits": "finished", "starts": "finished"}
    assert all(row.said[name] == continuation(prompts[name], 3) for name in ("waits", "starts"))


def test_a_prompt_is_never_read_later_than_alone(rng: random.Random) -> None:
    """By the tokens that the ring reads before its first one, against the same requests that may not share.

    Its lane may have a decode frame behind the chunks in the ring, so its first decode frame waits for these.
    """
    for _ in range(effort(30, 300)):
        chunk, window = rng.choice([8, 32]), rng.randint(1, 4)
        prompts = [
            (*LONG[: rng.randint(0, 400)], *(rng.randint(1, 50) for _ in range(rng.randint(2, 60)))) for _ in range(4)
        ]
        pauses = [rng.randint(0, 6) for _ in prompts]
        rings = []
        for shares in (True, False):
            ring = Ring(plan(trimmable=True, chunk=chunk, window=window, prefixes=0), trimmable=True)
            for i, (prompt, pause) in enumerate(zip(prompts, pauses, strict=True)):
                ring.submit(f"r{i}", prompt, client="one" if shares else f"client {i}")
                for _ in range(pause):
                    ring.step()
            ring.run()
            rings.append(ring)
        shared, alone = rings
        assert shared.read <= alone.read
        assert all(shared.first[name] <= alone.first[name] + chunk * window for name in alone.first), (prompts, pauses)


def test_copies_of_copies_are_spoiled_too_but_not_those_made_before() -> None:
    copies, flights = Copies(), InFlightFrames()
    flights.add(InFlightFrame(3, 0, Compute.PREFILL, (1,), 8, 0.0, frozenset([("sequence", 1)])))
    flights.add(InFlightFrame(7, 0, Compute.PREFILL, (2,), 8, 0.0, frozenset([("sequence", 2)])))
    for source, copy, number in ((1, 2, 5), (2, 4, 9), (1, 3, 2)):
        copies.add(source, copy, number)
    assert copies.find_spoiled({1}, 3) == {2, 4}
    assert copies.find_spoiled({1}, 6) == set()
    assert copies.find_spoiled({2}, 7) == {4}
    copies.prune(flights)
    assert copies.find_spoiled({1}, 0) == {2, 4}
