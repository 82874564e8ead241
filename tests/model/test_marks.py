"""A sequence that starts from a mark, or goes back to one, is that of a fresh start, bit for bit, for every cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from cluster.core.errors import BadFrame
from cluster.core.frames import Compute, Drop, Failure, Frame, Join, Leave, Mark, Restore, Save, Step, Trim, Unmark
from cluster.core.plan import ModelShape
from cluster.core.request import SamplingParams
from effort import chosen, effort
from model.disks import Disks
from model.memory import settled_memory
from model.ring import ALL, PROMPT, Ring, logprobs, tokens

GREEDY = SamplingParams()
KINDS = ("llama", "llama_sliding", "gemma3_text", "qwen3_next", "mamba2", "rwkv7", "falcon_h1", "deepseek_v41")
"""Caches that grow, rotate, hold states, hold several in one, are of a class of their own; and mixtures."""
FRESH = 10**6
Rings = Callable[[str], Ring]
Chunks = tuple[tuple[int, ...], ...]


@pytest.fixture(scope="module")
def rings(checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape]) -> Rings:
    """Architecture -> a ring of two stages that tests leave empty."""
    return cache(lambda arch: Ring(shape(arch), checkpoint(arch), 2))


@dataclass
class Known:
    """What a sequence or a prefix holds: what it was fed, chunk by chunk, and where it is marked."""

    chunks: Chunks = ()
    marks: set[int] = field(default_factory=set)

    @property
    def length(self) -> int:
        return sum(map(len, self.chunks))

    def borders(self, trimmable: bool) -> list[int]:
        """Where a sequence can start from it."""
        ends = [sum(map(len, self.chunks[:i])) for i in range(1, len(self.chunks) + 1)]
        return [end for end in ends if trimmable or end in self.marks or end == self.length]

    def cut(self, length: int) -> Known:
        kept = tuple(c for i, c in enumerate(self.chunks) if sum(map(len, self.chunks[: i + 1])) <= length)
        return Known(kept, {at for at in self.marks if at <= length})


class Edits(RuleBasedStateMachine):
    """Any order of edits, steps, disk round trips and failures.

    ``ring``, ``trimmable`` and ``folder``, for files, are set by a subclass.
    """

    ring: Ring
    trimmable: bool
    folder: Path

    @initialize()
    def begin(self) -> None:
        self.disks = Disks(self.ring, Path(mkdtemp(dir=self.folder)))
        self.written: list[Known] = []
        self.live: dict[int, Known] = {}
        self.prefixes: dict[int, Known] = {}
        self.ids = 0

    def new_id(self) -> int:
        self.ids += 1
        return self.ids

    def pick(self, data: st.DataObject, of: dict[int, Known]) -> tuple[int, Known]:
        chosen_id = data.draw(st.sampled_from(sorted(of)))
        return chosen_id, of[chosen_id]

    @precondition(lambda self: len(self.live) < 4)
    @rule()
    def join(self) -> None:
        self.live[new := self.new_id()] = Known()
        self.ring.send(Join(new, 1, ALL))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), chunk=st.lists(st.integers(1, 249), min_size=1, max_size=24).map(tuple))
    def feed(self, data: st.DataObject, chunk: tuple[int, ...]) -> None:
        sequence, known = self.pick(data, self.live)
        self.ring.send(step=Step(Compute.PREFILL, (sequence,), (chunk,)))
        known.chunks += (chunk,)

    @precondition(lambda self: any(k.chunks for k in self.live.values()))
    @rule(data=st.data())
    def mark(self, data: st.DataObject) -> None:
        sequence, known = self.pick(data, {i: k for i, k in self.live.items() if k.chunks})
        self.ring.send(Mark(sequence, known.length))
        known.marks.add(known.length)

    @precondition(lambda self: any(k.marks for k in self.live.values()))
    @rule(data=st.data())
    def unmark(self, data: st.DataObject) -> None:
        sequence, known = self.pick(data, {i: k for i, k in self.live.items() if k.marks})
        at = data.draw(st.sampled_from(sorted(known.marks)))
        self.ring.send(Unmark(sequence, at))
        known.marks.remove(at)

    @precondition(lambda self: any(k.chunks for k in self.live.values()))
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        sequence, known = self.pick(data, {i: k for i, k in self.live.items() if k.chunks})
        self.ring.send(Save(sequence, new := self.new_id()))
        self.prefixes[new] = Known(known.chunks, set(known.marks))

    @precondition(lambda self: self.prefixes and len(self.live) < 4)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        prefix, known = self.pick(data, self.prefixes)
        length = data.draw(st.sampled_from(known.borders(self.trimmable)))
        self.ring.send(Join(new := self.new_id(), 1, ALL), Restore(new, prefix, length))
        self.live[new] = known.cut(length)

    @precondition(lambda self: any(k.chunks for k in self.live.values()))
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        sequence, known = self.pick(data, {i: k for i, k in self.live.items() if k.chunks})
        length = data.draw(st.sampled_from([0, *known.borders(self.trimmable)]))
        self.ring.send(Trim(sequence, length))
        self.live[sequence] = known.cut(length)

    @precondition(lambda self: self.prefixes)
    @rule(data=st.data())
    def persist(self, data: st.DataObject) -> None:
        prefix, known = self.pick(data, self.prefixes)
        self.disks.persist(prefix)
        self.written.append(known)

    @precondition(lambda self: self.written and len(self.prefixes) < 4)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        """Read what was written: at once, or after a restart, an eviction or a fault. It is whole, or it is a miss."""
        known = data.draw(st.sampled_from(self.written))
        length = data.draw(st.sampled_from(known.borders(self.trimmable)))
        cut = known.cut(length)
        errors = self.disks.read(new := self.new_id(), tuple(token for chunk in cut.chunks for token in chunk))
        if any(errors):
            self.ring.send(Drop(new))
        else:
            self.prefixes[new] = Known(cut.chunks)

    @rule()
    def restart(self) -> None:
        self.disks.restart()

    @precondition(lambda self: self.disks.files())
    @rule(data=st.data(), delete=st.booleans())
    def damage(self, data: st.DataObject, delete: bool) -> None:
        """A file is lost, or a bit of it flips."""
        path = data.draw(st.sampled_from(self.disks.files()))
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1
        if delete:
            path.unlink()
        else:
            path.write_bytes(content)

    @precondition(lambda self: self.prefixes)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        prefix, _ = self.pick(data, self.prefixes)
        self.ring.send(Drop(prefix))
        del self.prefixes[prefix]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), fails=st.booleans())
    def leave(self, data: st.DataObject, fails: bool) -> None:
        """It ends, perhaps since a step of it failed."""
        sequence, _ = self.pick(data, self.live)
        if fails:
            step = Step(Compute.PREFILL, (sequence,), ((1,),))
            frame = Frame(1, 0, 0, step=step, error=Failure(0, "STAGE_FAILED", "no"))
            for stage in self.ring.stages:
                stage.step(frame)
        self.ring.send(Leave(sequence))
        del self.live[sequence]

    def teardown(self) -> None:
        """Everything that can be started from goes on as a fresh sequence does; then nothing is left."""
        for prefix, known in self.prefixes.items():
            for length in known.borders(self.trimmable):
                self.ring.send(Join(new := self.new_id(), 1, ALL), Restore(new, prefix, length))
                self.check(new, known.cut(length))
        for sequence, known in self.live.items():
            self.check(sequence, known)
        self.ring.send(*(Drop(prefix) for prefix in self.prefixes))
        self.disks.close()
        assert all((s.sequences, s.prefixes, s.cache_bytes) == (0, 0, 0) for s in self.ring.stages)

    def check(self, sequence: int, known: Known) -> None:
        self.ring.send(Join(FRESH, 1, ALL))
        for chunk in known.chunks:
            self.ring.send(step=Step(Compute.PREFILL, (FRESH,), (chunk,)))
        for token in (3, 77):
            got, want = self.ring.decode(sequence, token), self.ring.decode(FRESH, token)
            assert mx.array_equal(logprobs(got), logprobs(want)).item(), known
        self.ring.send(Leave(sequence), Leave(FRESH))


@pytest.mark.timeout(effort(60, 600))
@pytest.mark.parametrize("arch", chosen(KINDS, "llama", "llama_sliding", "qwen3_next", "falcon_h1", "deepseek_v41"))
def test_any_order_of_edits_leaves_the_tokens_of_a_fresh_start(
    arch: str, rings: Rings, shape: Callable[[str], ModelShape], tmp_path: Path
) -> None:
    fields = {"ring": rings(arch), "trimmable": shape(arch).trimmable, "folder": tmp_path}
    machine = type("EditsOf", (Edits,), fields)
    run_settings = settings(
        max_examples=effort(4, 60),
        stateful_step_count=effort(20, 40),
        deadline=None,
        suppress_health_check=[*HealthCheck],
    )
    run_state_machine_as_test(machine, settings=run_settings)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("arch", ["llama_sliding", "qwen3_next", "falcon_h1"])
def test_a_row_of_a_lane_can_be_marked_and_go_back(arch: str, rings: Rings) -> None:
    ring = rings(arch)
    alone = tokens(ring.answer(GREEDY, 8))
    for sequence in (1, 2):
        ring.send(Join(sequence, len(PROMPT), GREEDY))
        ring.prefill(sequence, PROMPT[:-1] if sequence == 1 else PROMPT[5:-1])
    said = {1: [PROMPT[-1]], 2: [PROMPT[-1]]}

    def step() -> None:
        rows = tuple((said[s][-1],) for s in (1, 2))
        for sample in ring.send(step=Step(Compute.DECODE, (1, 2), rows)).samples:
            said[sample.sequence].append(sample.token)

    for _ in range(3):
        step()
    ring.send(Mark(1, at := len(PROMPT) + 2))
    for _ in range(3):
        step()
    ring.send(Trim(1, at))
    del said[1][4:]
    for _ in range(5):
        step()
    assert said[1][1:] == alone
    ring.send(Leave(1), Leave(2))


def test_a_cache_that_cannot_be_trimmed_goes_back_only_to_a_mark(rings: Rings) -> None:
    ring = rings("qwen3_next")
    ring.send(Join(1, 41, GREEDY))
    ring.prefill(1, PROMPT[:10])
    ring.send(Mark(1, 10))
    ring.prefill(1, PROMPT[10:30])
    ring.send(Save(1, 5), Leave(1))
    for stage in ring.stages:
        frame = Frame(1, 0, 0, (Join(2, 41, GREEDY), Restore(2, 5, 20)))
        with pytest.raises(BadFrame, match="prefix 5 has 30 tokens and cannot be cut to 20"):
            stage.step(frame)
        with pytest.raises(BadFrame, match="can only leave"):
            stage.step(replace(frame, edits=(), step=Step(Compute.PREFILL, (2,), ((1,),))))
    ring.send(Leave(2), Drop(5))


@pytest.mark.parametrize("arch", ["llama_sliding", "qwen3_next", "mamba2"])
def test_a_mark_holds_no_more_memory_than_it_counts(arch: str, rings: Rings) -> None:
    """Of a chunk of 300 tokens a state keeps the last few, and a window 16."""
    ring = rings(arch)

    def held(marked: bool) -> tuple[int, int]:
        """Active bytes, and those that the stages count."""
        before = settled_memory()
        ring.send(Join(1, 600, GREEDY))
        ring.prefill(1, (PROMPT * 8)[:300], (300,))
        ring.send(*([Mark(1, 300)] if marked else []))
        ring.prefill(1, PROMPT)
        found = settled_memory() - before, sum(stage.cache_bytes for stage in ring.stages)
        ring.send(Leave(1))
        return found

    plain, marked = held(marked=False), held(marked=True)
    spare = 16384  # 8 bytes a token of each tracker, and small arrays; a whole chunk's state takes more
    assert 0 < marked[0] - plain[0] <= 1.1 * (marked[1] - plain[1]) + spare


@pytest.mark.parametrize("arch", chosen(KINDS[1:], "llama_sliding", "qwen3_next", "falcon_h1", "deepseek_v41"))
def test_a_mark_is_within_what_the_survey_charges(arch: str, rings: Rings, shape: Callable[[str], ModelShape]) -> None:
    ring, known = rings(arch), shape(arch)
    for length in (5, 17, 100, 300):
        ring.send(Join(1, 600, GREEDY))
        ring.prefill(1, (PROMPT * 8)[:length], (length,))
        before = [stage.cache_bytes for stage in ring.stages]
        ring.send(Mark(1, length))
        for stage, plain in zip(ring.stages, before, strict=True):
            charged = known.stage_mark_bytes(stage.spec.layers, length)
            trackers = 8 * length * known.layers
            assert 0 < stage.cache_bytes - plain <= charged + trackers
            assert charged <= known.stage_cache_bytes(stage.spec.layers, length)
        ring.send(Leave(1))


def test_a_start_from_a_long_prefix_takes_the_memory_of_what_it_uses(rings: Rings) -> None:
    ring = rings("llama")
    ring.send(Join(1, 1200, GREEDY))
    ring.prefill(1, (PROMPT * 29)[:1100], (600, 500))
    ring.send(Save(1, 5), Leave(1))
    kept = sum(stage.prefix_bytes for stage in ring.stages)
    ring.send(Join(2, 1200, GREEDY), Restore(2, 5, 41), step=Step(Compute.PREFILL, (2,), ((1,),)))
    assert sum(stage.cache_bytes for stage in ring.stages) - kept <= kept / 4
    ring.send(Leave(2), Drop(5))
