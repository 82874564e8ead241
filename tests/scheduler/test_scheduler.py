"""The scheduler under every order of events: each request ends once, order holds, lanes and window are kept."""

from __future__ import annotations

from collections import defaultdict, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BadFrame, Busy, InvalidRequest, RequestNotFound
from cluster.frames import Compute, Failure, Frame, Join, Leave, Sample
from cluster.scheduler.outcome import Failed, Produced
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.sequence import Phase
from cluster.types import FinishReason, Request, SamplingParams

EOS = 0


def request(name: str, prompt: int = 5, max_tokens: int = 4, ignore_eos: bool = False) -> Request:
    return Request(name, tuple(range(1, prompt + 1)), SamplingParams(), max_tokens, ignore_eos=ignore_eos)


class Ring:
    """Stages that do as told: they keep what each sequence was fed, and answer frames in order."""

    def __init__(self) -> None:
        self.frames: deque[Frame] = deque()
        self.fed: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self.numbers = 0

    def take(self, frames: list[Frame]) -> None:
        for frame in frames:
            assert frame.number == self.numbers
            self.numbers += 1
            self.frames.append(frame)

    def give(self, token: int = 7, failure: Failure | None = None) -> Frame:
        frame = self.frames.popleft()
        for edit in frame.edits:
            if isinstance(edit, Join):
                assert edit.sequence not in self.fed
                self.fed[edit.sequence] = []
                self.lengths[edit.sequence] = edit.prompt_length
            elif isinstance(edit, Leave):
                del self.fed[edit.sequence]
        samples: tuple[Sample, ...] = ()
        if frame.step:
            (sequence,), (tokens,) = frame.step.sequences, frame.step.tokens
            self.fed[sequence].extend(tokens)
            if frame.step.compute is Compute.DECODE:
                samples = (Sample(sequence, len(self.fed[sequence]), token),)
            else:
                assert len(self.fed[sequence]) < self.lengths[sequence]
        return Frame(frame.epoch, frame.lane, frame.number, samples=samples, error=failure)


def run_dry(scheduler: Scheduler, ring: Ring, token: int = 7) -> list[Produced]:
    events = []
    ring.take(scheduler.next_frames(0.0))
    while ring.frames:
        event = scheduler.returned(ring.give(token)).event
        if isinstance(event, Produced):
            events.append(event)
        ring.take(scheduler.next_frames(0.0))
    return events


def test_a_prompt_goes_out_as_chunks_and_its_last_token_as_the_first_decode() -> None:
    scheduler = Scheduler(epoch=3, lanes=1, window=9, eos=frozenset({EOS}), chunk=4)
    scheduler.submit(request("a", prompt=10, max_tokens=1))
    frames = scheduler.next_frames(0.0)
    assert [(f.step.compute, f.step.tokens) for f in frames if f.step] == [
        (Compute.PREFILL, ((1, 2, 3, 4),)),
        (Compute.PREFILL, ((5, 6, 7, 8),)),
        (Compute.PREFILL, ((9,),)),
        (Compute.DECODE, ((10,),)),
    ]
    assert frames[0].edits == (Join(1, 10, SamplingParams()),)
    assert all(not f.edits for f in frames[1:])


def test_the_window_bounds_prefill_in_the_ring() -> None:
    scheduler, ring = Scheduler(1, 1, 3, frozenset(), chunk=2), Ring()
    scheduler.submit(request("a", prompt=21))
    ring.take(scheduler.next_frames(0.0))
    assert len(ring.frames) == 3
    scheduler.returned(ring.give())
    ring.take(scheduler.next_frames(0.0))
    assert len(ring.frames) == 3


def test_an_answer_ends_by_length_or_by_end_of_sequence() -> None:
    scheduler, ring = Scheduler(1, 1, 3, frozenset({EOS})), Ring()
    scheduler.submit(request("a", max_tokens=3))
    events = run_dry(scheduler, ring)
    assert [e.finish for e in events] == [None, None, FinishReason.LENGTH]
    scheduler.submit(request("b", max_tokens=3))
    (event,) = run_dry(scheduler, ring, token=EOS)
    assert event.finish is FinishReason.STOP
    assert not event.counts
    scheduler.submit(request("c", max_tokens=2, ignore_eos=True))
    assert [e.counts for e in run_dry(scheduler, ring, token=EOS)] == [True, True]
    assert ring.fed == {}


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    scheduler = Scheduler(1, 1, 3, frozenset(), queue=2)
    for name in "abc":
        scheduler.submit(request(name))
    with pytest.raises(Busy) as refusal:
        scheduler.submit(request("d"))
    assert refusal.value.retry_after_s


def test_an_id_that_is_live_is_refused_and_may_come_again_later() -> None:
    scheduler = Scheduler(1, 1, 3, frozenset())
    scheduler.submit(request("a"))
    with pytest.raises(InvalidRequest, match="already live"):
        scheduler.submit(request("a"))
    scheduler.end("a")
    with pytest.raises(RequestNotFound):
        scheduler.end("a")
    scheduler.submit(request("a"))


def test_a_failed_step_ends_its_request_alone() -> None:
    scheduler, ring = Scheduler(1, 2, 3, frozenset()), Ring()
    scheduler.submit(request("a", prompt=1, max_tokens=2))
    scheduler.submit(request("b", prompt=1, max_tokens=2))
    ring.take(scheduler.next_frames(0.0))
    event = scheduler.returned(ring.give(failure=Failure(1, "STAGE_FAILED", "no"))).event
    assert isinstance(event, Failed)
    assert event.request_id == "a"
    assert [e.request_id for e in run_dry(scheduler, ring)] == ["b", "b"]
    assert ring.fed == {}


def test_a_frame_out_of_turn_is_no_frame_of_ours() -> None:
    scheduler, ring = Scheduler(1, 1, 3, frozenset()), Ring()
    scheduler.submit(request("a"))
    ring.take(scheduler.next_frames(0.0))
    with pytest.raises(BadFrame, match="out of turn"):
        scheduler.returned(Frame(1, 0, 5))
    with pytest.raises(BadFrame, match="out of turn"):
        scheduler.returned(Frame(2, 0, 0))


events = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 30), st.integers(1, 6)),
        st.tuples(st.just("return"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("fail"), st.just(0), st.just(0)),
        st.tuples(st.just("end"), st.integers(0, 30), st.just(0)),
    ),
    max_size=60,
)


@given(events, st.integers(1, 4), st.integers(1, 5), st.integers(1, 7))
def test_whatever_happens_each_request_ends_once_and_nothing_is_left(
    history: list[tuple[str, int, int]], lanes: int, window: int, chunk: int
) -> None:
    scheduler, ring = Scheduler(1, lanes, window, frozenset({EOS}), chunk, queue=4), Ring()
    ended: dict[str, int] = defaultdict(int)
    produced: dict[str, int] = defaultdict(int)
    accepted: list[str] = []

    def returned(token: int, failure: Failure | None = None) -> None:
        event = scheduler.returned(ring.give(token, failure)).event
        if isinstance(event, Failed):
            ended[event.request_id] += 1
        elif event:
            assert event.index == produced[event.request_id]
            assert not ended[event.request_id]
            produced[event.request_id] += event.counts
            ended[event.request_id] += event.finish is not None

    for kind, number, tokens in history:
        if kind == "submit":
            name = f"r{len(accepted)}"
            try:
                scheduler.submit(request(name, number, tokens))
                accepted.append(name)
            except Busy:
                assert len(scheduler.sequences) >= lanes + 4
        elif kind == "end" and number < len(accepted):
            try:
                scheduler.end(accepted[number])
                ended[accepted[number]] += 1
            except RequestNotFound:
                assert ended[accepted[number]] == 1
        elif ring.frames and kind in ("return", "fail"):
            returned(number, Failure(0, "STAGE_FAILED", "") if kind == "fail" else None)
        ring.take(scheduler.next_frames(0.0))
        assert sum(1 for f in ring.frames if f.step and f.step.compute is Compute.PREFILL) <= window
        live = [s for s in scheduler.sequences if s.phase is not Phase.QUEUED]
        assert len({s.lane for s in live}) == len(live) <= lanes

    for _ in range(5000):
        if not ring.frames:
            break
        returned(7)
        ring.take(scheduler.next_frames(0.0))
    assert {name: ended[name] for name in accepted} == dict.fromkeys(accepted, 1)
    assert not scheduler.sequences
    assert not scheduler.in_flight
    assert ring.fed == {}
