"""The scheduler under every order of events: each request ends once, lanes are balanced, budgets are kept."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.errors import BadFrame, Busy, InvalidRequest, PromptTooLong, RequestNotFound
from cluster.core.frames import Compute, Failure, Frame, Join, Leave, Restore, Save
from cluster.core.limits import GRAMMAR_WAIT_S, MAX_JOINED_BYTES
from cluster.core.request import FinishReason, Grammar, GrammarKind, Request, SamplingParams
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.outcome import Produced, SampleFailed
from cluster.scheduler.scheduler import Scheduler
from cluster.scheduler.sequence import Phase
from effort import effort
from scheduler.stages import EOS, Stages, capacity, continuation

FAILURE = Failure(1, "STAGE_FAILED", "no")
GRAMMAR = Grammar(GrammarKind.REGEX, "a")


def request(
    name: str, prompt: int | tuple[int, ...] = 5, max_tokens: int = 4, client: str = "", **more: object
) -> Request:
    ids = tuple(range(1, prompt + 1)) if isinstance(prompt, int) else prompt
    return Request(name, ids, SamplingParams(), max_tokens, client=client, **more)  # type: ignore[arg-type]


def bound(asked: Request, grammar: Grammar = GRAMMAR) -> Request:
    return replace(asked, sampling=SamplingParams(grammar=grammar))


def run_dry(scheduler: Scheduler, stages: Stages) -> dict[str, list[int]]:
    """Let everything end; the tokens of each request."""
    said: dict[str, list[int]] = defaultdict(list)
    stages.take(scheduler.next_frames(0.0))
    while stages.frames:
        for event in scheduler.on_frame(stages.give()).events:
            if isinstance(event, Produced):
                said[event.request_id].append(event.sample.token)
        stages.take(scheduler.next_frames(0.0))
    return said


def test_a_prompt_goes_out_as_chunks_and_its_last_token_as_the_first_decode() -> None:
    scheduler = Scheduler(3, capacity(), frozenset({EOS}))
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
    scheduler, stages = Scheduler(1, capacity(window=3, chunk=2), frozenset()), Stages()
    scheduler.submit(request("a", prompt=21))
    stages.take(scheduler.next_frames(0.0))
    assert len(stages.frames) == 3
    scheduler.on_frame(stages.give())
    stages.take(scheduler.next_frames(0.0))
    assert len(stages.frames) == 3


def test_sequences_of_a_lane_decode_in_one_frame_and_lanes_are_even() -> None:
    scheduler, stages = Scheduler(1, capacity(lanes=3), frozenset()), Stages()
    for i in range(8):
        scheduler.submit(request(f"r{i}", prompt=1, max_tokens=3))
    frames = scheduler.next_frames(0.0)
    assert sorted(len(f.step.sequences) for f in frames if f.step) == [2, 3, 3]
    assert len({f.lane for f in frames}) == 3
    stages.take(frames)
    said = run_dry(scheduler, stages)
    assert {name: len(tokens) for name, tokens in said.items()} == {f"r{i}": 3 for i in range(8)}


def test_lanes_are_rebalanced_when_they_drift_apart() -> None:
    scheduler, stages = Scheduler(1, capacity(lanes=2, rows=4), frozenset()), Stages()
    for i in range(8):
        scheduler.submit(request(f"r{i}", prompt=1, max_tokens=50))
    stages.take(scheduler.next_frames(0.0))
    lane = {s.request.id: s.lane for s in scheduler.sequences}
    for name in [n for n, at in lane.items() if at == 0]:
        scheduler.end(name)
    for _ in range(2):
        scheduler.on_frame(stages.give())
    stages.take(scheduler.next_frames(0.0))
    assert scheduler.lane_sizes == (2, 2)
    run_dry(scheduler, stages)
    assert stages.fed == {}


def test_decode_goes_between_the_chunks_of_somebody_elses_prompt() -> None:
    scheduler, stages = Scheduler(1, capacity(lanes=2, window=2, chunk=8, max_step_ms=5.0), frozenset()), Stages()
    scheduler.submit(request("talks", prompt=1, max_tokens=40))
    stages.take(scheduler.next_frames(0.0))
    scheduler.submit(request("reads", prompt=200, max_tokens=1))
    stages.take(scheduler.next_frames(0.0))
    order = []
    while stages.frames:
        reply = stages.give()
        order.append(Compute.DECODE if reply.samples else Compute.PREFILL)
        scheduler.on_frame(reply)
        stages.take(scheduler.next_frames(0.0))
    longest = max(len(run) for run in "".join("P" if c is Compute.PREFILL else "D" for c in order[:60]).split("D"))
    assert longest <= 1


def test_an_answer_ends_by_length_or_by_end_of_sequence() -> None:
    prompt = (3, 4, 5)
    token = continuation(prompt, 1)[0]
    scheduler, stages = Scheduler(1, capacity(), frozenset({token})), Stages()
    scheduler.submit(request("a", prompt=prompt, max_tokens=3))
    stages.take(scheduler.next_frames(0.0))
    scheduler.on_frame(stages.give())
    (event,) = scheduler.on_frame(stages.give()).events
    assert isinstance(event, Produced)
    assert event.finish is FinishReason.STOP
    assert not event.counts
    scheduler.submit(request("b", prompt=prompt, max_tokens=2, ignore_eos=True))
    assert len(run_dry(scheduler, stages)["b"]) == 2
    assert stages.fed == {}


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    scheduler = Scheduler(1, capacity(rows=1, queue=2), frozenset())
    for name in "abc":
        scheduler.submit(request(name))
    with pytest.raises(Busy) as refusal:
        scheduler.submit(request("d"))
    assert refusal.value.retry_after_s


def test_what_can_never_fit_is_refused_at_once_with_figures() -> None:
    scheduler = Scheduler(1, capacity(budget=50), frozenset())
    with pytest.raises(PromptTooLong, match=r"51 tokens of prompt and answer need .* on stage 0"):
        scheduler.submit(request("a", prompt=47, max_tokens=4))
    scheduler.submit(request("b", prompt=46, max_tokens=4))


def test_a_request_waits_until_every_stage_has_room() -> None:
    scheduler, stages = Scheduler(1, capacity(lanes=2, budget=30), frozenset()), Stages()
    scheduler.submit(request("a", prompt=10, max_tokens=10))
    scheduler.submit(request("b", prompt=5, max_tokens=6))
    assert [s.phase for s in scheduler.sequences] == [Phase.PREFILL, Phase.QUEUED]
    assert {n: len(t) for n, t in run_dry(scheduler, stages).items()} == {"a": 10, "b": 6}


def test_clients_take_turns() -> None:
    scheduler = Scheduler(1, capacity(rows=1), frozenset())
    scheduler.submit(request("first"))
    for i in range(5):
        scheduler.submit(request(f"greedy{i}", client="greedy"))
    scheduler.submit(request("modest", client="modest"))
    order = []
    for _ in range(7):
        live = next(s for s in scheduler.sequences if s.phase is not Phase.QUEUED)
        order.append(live.request.id)
        scheduler.end(live.request.id)
    assert order.index("modest") <= 2
    assert [n for n in order if n.startswith("greedy")] == [f"greedy{i}" for i in range(5)]


def test_a_higher_priority_comes_sooner_but_not_alone() -> None:
    scheduler = Scheduler(1, capacity(rows=1), frozenset())
    scheduler.submit(request("first"))
    for i in range(12):
        scheduler.submit(request(f"urgent{i}", client="urgent", priority=3))
        scheduler.submit(request(f"plain{i}", client="plain"))
    order = []
    while scheduler.sequences:
        live = next(s for s in scheduler.sequences if s.phase is not Phase.QUEUED)
        order.append(live.request.id.rstrip("0123456789"))
        scheduler.end(live.request.id)
    early = order[:13]
    assert early.count("urgent") > 2 * early.count("plain") > 0


def test_the_next_turn_of_a_chat_starts_from_what_is_kept() -> None:
    scheduler, stages = Scheduler(1, capacity(prefixes=500), frozenset()), Stages()
    first = tuple(range(100, 140))
    scheduler.submit(request("turn1", prompt=first, max_tokens=10))
    said = run_dry(scheduler, stages)["turn1"]
    second = (*first, *said, 7, 8, 9)
    scheduler.submit(request("turn2", prompt=second, max_tokens=5))
    (sequence,) = scheduler.sequences
    assert sequence.cached == len(first) + len(said) - 1
    assert run_dry(scheduler, stages)["turn2"] == continuation(second, 5)
    assert stages.fed == {}


def test_another_clients_prefix_is_never_used() -> None:
    scheduler, stages = Scheduler(1, capacity(prefixes=500), frozenset()), Stages()
    prompt = tuple(range(100, 140))
    scheduler.submit(request("a", prompt=prompt, client="one"))
    run_dry(scheduler, stages)
    scheduler.submit(request("b", prompt=prompt, client="two"))
    assert [s.cached for s in scheduler.sequences] == [0]
    scheduler.submit(request("c", prompt=prompt, client="one"))
    assert [s.cached for s in scheduler.sequences] == [0, 39]


def test_caches_that_cannot_be_trimmed_are_used_whole_or_not() -> None:
    scheduler, stages = Scheduler(1, capacity(prefixes=500, trimmable=False), frozenset()), Stages(trimmable=False)
    prompt = tuple(range(100, 140))
    scheduler.submit(request("a", prompt=prompt, max_tokens=6))
    said = run_dry(scheduler, stages)["a"]
    scheduler.submit(request("fork", prompt=(*prompt[:20], 1, 2, 3)))
    assert [s.cached for s in scheduler.sequences] == [0]
    run_dry(scheduler, stages)
    longer = (*prompt, *said, 1, 2)
    scheduler.submit(request("longer", prompt=longer, max_tokens=3))
    assert [s.cached for s in scheduler.sequences] == [len(prompt) + len(said) - 1]
    assert run_dry(scheduler, stages)["longer"] == continuation(longer, 3)


def test_an_id_that_is_live_is_refused_and_may_come_again_later() -> None:
    scheduler = Scheduler(1, capacity(), frozenset())
    scheduler.submit(request("a"))
    with pytest.raises(InvalidRequest, match="already live"):
        scheduler.submit(request("a"))
    scheduler.end("a")
    with pytest.raises(RequestNotFound):
        scheduler.end("a")
    scheduler.submit(request("a"))


def test_a_failed_step_ends_the_requests_of_its_lane_alone() -> None:
    scheduler, stages = Scheduler(1, capacity(lanes=2), frozenset()), Stages()
    for name in "abc":
        scheduler.submit(request(name, prompt=1, max_tokens=2))
    stages.take(scheduler.next_frames(0.0))
    failed = scheduler.on_frame(stages.give(FAILURE)).events
    assert {e.request_id for e in failed if isinstance(e, SampleFailed)} == {"a", "c"}
    assert set(run_dry(scheduler, stages)) == {"b"}
    assert stages.fed == {}


def test_deadlines_are_seen_in_the_queue_too() -> None:
    scheduler = Scheduler(1, capacity(rows=1), frozenset())
    scheduler.submit(request("a", deadline=10.0))
    scheduler.submit(request("b", deadline=5.0))
    assert scheduler.next_deadline() == 5.0
    assert scheduler.overdue(7.0) == ["b"]
    assert scheduler.overdue(10.0) == ["a", "b"]


def test_a_frame_out_of_turn_is_no_frame_of_ours() -> None:
    scheduler, stages = Scheduler(1, capacity(), frozenset()), Stages()
    scheduler.submit(request("a"))
    stages.take(scheduler.next_frames(0.0))
    with pytest.raises(BadFrame, match="not in the ring"):
        scheduler.on_frame(Frame(1, 0, 5))
    with pytest.raises(BadFrame, match="unexpected frame of epoch 2: the current epoch is 1"):
        scheduler.on_frame(Frame(2, 0, 0))


def test_a_lost_frame_is_noticed_by_the_next_that_cannot_have_overtaken_it() -> None:
    scheduler, stages = Scheduler(1, capacity(lanes=2, chunk=8), frozenset()), Stages()
    for name, prompt in (("a", 1), ("b", 30)):
        scheduler.submit(request(name, prompt=prompt, max_tokens=3))
    stages.take(scheduler.next_frames(0.0))
    stages.give()
    with pytest.raises(BadFrame, match="frame 0 was lost: frame 1 came back before it"):
        scheduler.on_frame(stages.give())


def samples(name: str, count: int, prompt: int = 21, max_tokens: int = 4, client: str = "") -> list[Request]:
    one = request(name, prompt, max_tokens, client, samples=count)
    return [replace(one, id=f"{name}#{i}") for i in range(count)]


@pytest.mark.parametrize("trimmable", [True, False])
@pytest.mark.parametrize(("rows", "prefixes"), [(4, 0), (1, 500)])
def test_samples_of_one_prompt_prefill_it_once(trimmable: bool, rows: int, prefixes: int) -> None:
    plan = capacity(lanes=2, rows=rows, prefixes=prefixes, trimmable=trimmable)
    scheduler, stages = Scheduler(1, plan, frozenset()), Stages(trimmable)
    scheduler.submit(*samples("a", 5))
    read = 0
    said: dict[str, list[int]] = defaultdict(list)
    stages.take(frames := scheduler.next_frames(0.0))
    while stages.frames:
        read += sum(len(f.step.tokens[0]) for f in frames if f.step and f.step.compute is Compute.PREFILL)
        for event in scheduler.on_frame(stages.give()).events:
            assert isinstance(event, Produced)
            said[event.request_id].append(event.sample.token)
        stages.take(frames := scheduler.next_frames(0.0))
    assert read == 20
    assert dict(said) == {f"a#{i}": continuation(tuple(range(1, 22)), 4) for i in range(5)}
    assert stages.fed == {}
    assert len(stages.prefixes) == len(scheduler.prefixes)


def test_the_next_sample_prefills_where_the_first_has_gone() -> None:
    scheduler, stages = Scheduler(1, capacity(lanes=2, window=1), frozenset()), Stages()
    scheduler.submit(*samples("a", 3))
    stages.take(frames := scheduler.next_frames(0.0))
    assert [type(e) for e in frames[0].edits] == [Join]
    scheduler.end("a#0")
    said = run_dry(scheduler, stages)
    assert dict(said) == {f"a#{i}": continuation(tuple(range(1, 22)), 4) for i in (1, 2)}
    assert stages.fed == {}


def test_samples_are_taken_all_or_none() -> None:
    scheduler = Scheduler(1, capacity(rows=1, queue=4), frozenset())
    scheduler.submit(*samples("a", 3))
    with pytest.raises(Busy):
        scheduler.submit(*samples("b", 3))
    assert [s.request.id for s in scheduler.sequences] == ["a#0", "a#1", "a#2"]
    scheduler.submit(*samples("c", 2))


def test_a_newcomer_gets_its_share_of_a_queue_that_another_client_fills() -> None:
    scheduler, stages = Scheduler(1, capacity(rows=1, queue=8), frozenset()), Stages()
    for name in "abcd":
        scheduler.submit(*samples(name, 2, client="greedy"))
    with pytest.raises(Busy):
        scheduler.submit(*samples("e", 2, client="greedy"))
    displaced = scheduler.submit(*samples("f", 3, client="modest"))
    assert sorted(refused.request_id for refused in displaced) == ["d#0", "d#1"]
    live = [s.request.id for s in scheduler.sequences]
    assert live == ["a#0", "a#1", "b#0", "b#1", "c#0", "c#1", "f#0", "f#1", "f#2"]
    assert [r.request_id for r in scheduler.submit(request("g", client="modest"))] == ["c#0", "c#1"]
    with pytest.raises(Busy):
        scheduler.submit(*samples("h", 3, client="modest"))
    said = run_dry(scheduler, stages)
    assert set(said) == {"a#0", "a#1", "b#0", "b#1", "f#0", "f#1", "f#2", "g"}
    assert stages.fed == {}


def test_a_request_that_has_begun_keeps_its_place_in_a_full_queue() -> None:
    scheduler = Scheduler(1, capacity(rows=1, queue=4), frozenset())
    scheduler.submit(*samples("a", 4, client="greedy"))
    scheduler.submit(request("resumed", client="greedy"), answers=((3,),))
    with pytest.raises(Busy):
        scheduler.submit(request("b", client="modest"))
    assert len(scheduler.sequences) == 5


def test_a_complete_grammar_ends_an_answer_even_at_its_longest() -> None:
    scheduler, stages = Scheduler(1, capacity(), frozenset()), Stages()
    scheduler.submit(request("a", prompt=1, max_tokens=1))
    stages.take(scheduler.next_frames(0.0))
    reply = stages.give()
    (event,) = scheduler.on_frame(replace(reply, samples=(replace(reply.samples[0], final=True),))).events
    assert isinstance(event, Produced)
    assert event.finish is FinishReason.STOP
    assert event.counts


def test_long_grammars_are_spread_over_frames_before_the_first_step() -> None:
    scheduler, stages = Scheduler(1, capacity(lanes=4, rows=4, prefixes=0), frozenset()), Stages()
    grammar = Grammar(GrammarKind.REGEX, "x" * (MAX_JOINED_BYTES // 3))
    for i in range(10):
        scheduler.submit(bound(request(f"r{i}", prompt=2, max_tokens=1), grammar))
    stages.take(scheduler.next_frames(0.0))
    sizes = [sum(isinstance(e, Join) for e in f.edits) for f in stages.frames]
    assert sum(sizes) == 10
    assert max(sizes) <= 3
    assert all(f.step is None for f in list(stages.frames)[:3])
    for _ in range(len(stages.frames)):
        scheduler.on_frame(stages.give())
    stages.compiling.clear()
    stages.take(scheduler.next_frames(1.0))
    assert len(run_dry(scheduler, stages)) == 10


def test_a_row_whose_grammar_is_not_compiled_sits_out_and_the_others_go_on() -> None:
    scheduler, stages = Scheduler(1, capacity(max_step_ms=5.0), frozenset()), Stages()
    scheduler.submit(bound(request("waits", prompt=1, max_tokens=3)))
    scheduler.submit(request("goes", prompt=1, max_tokens=6))
    stages.take(scheduler.next_frames(0.0))
    assert dict(run_dry(scheduler, stages)) == {"goes": continuation((1,), 6)}
    scheduler.submit(request("reads", prompt=9, max_tokens=2))
    assert dict(run_dry(scheduler, stages)) == {"reads": continuation(tuple(range(1, 10)), 2)}
    stages.compiling.clear()
    stages.take(frames := scheduler.next_frames(1.0))
    assert [(f.edits, f.step) for f in frames] == [((), None)]
    assert dict(run_dry(scheduler, stages)) == {"waits": continuation((1,), 3)}
    assert stages.fed == {}


def test_a_deferred_sample_comes_with_any_frame() -> None:
    scheduler, stages = Scheduler(1, capacity(), frozenset()), Stages()
    scheduler.submit(bound(request("waits", prompt=1, max_tokens=1)))
    scheduler.submit(request("goes", prompt=1, max_tokens=6))
    stages.take(scheduler.next_frames(0.0))
    scheduler.on_frame(stages.give())
    stages.take(scheduler.next_frames(0.0))
    stages.compiling.clear()
    events = scheduler.on_frame(stages.give()).events
    assert {event.request_id for event in events} == {"waits", "goes"}


def test_the_last_stage_is_asked_ever_less_often_and_only_while_nothing_passes_it() -> None:
    scheduler, stages = Scheduler(1, capacity(), frozenset()), Stages()
    scheduler.submit(bound(request("waits", prompt=1)))
    assert scheduler.ask_due() is None
    stages.take(scheduler.next_frames(0.0))
    assert scheduler.ask_due() is None
    scheduler.on_frame(stages.give())
    times = []
    while (due := scheduler.ask_due()) is not None and due < GRAMMAR_WAIT_S:
        assert scheduler.next_frames(due - 0.001) == []
        stages.take(scheduler.next_frames(due))
        assert scheduler.ask_due() == GRAMMAR_WAIT_S
        assert scheduler.on_frame(stages.give()).events == ()
        times.append(due)
    assert times[0] == pytest.approx(0.005)
    assert len(times) < 100
    assert scheduler.late(GRAMMAR_WAIT_S - 0.1) == []
    assert scheduler.late(GRAMMAR_WAIT_S) == [("waits", GRAMMAR)]
    scheduler.end("waits")
    assert scheduler.ask_due() is None
    run_dry(scheduler, stages)
    assert stages.fed == {}


def test_a_row_that_waits_for_a_grammar_is_prefilled_again_in_a_new_epoch() -> None:
    scheduler, stages = Scheduler(1, capacity(), frozenset()), Stages()
    scheduler.submit(bound(request("waits", prompt=9, max_tokens=2)))
    stages.take(scheduler.next_frames(0.0))
    run_dry(scheduler, stages)
    stages = Stages()
    assert scheduler.begin_epoch(2, capacity()) == ()
    assert scheduler.ask_due() is None
    assert not run_dry(scheduler, stages)
    stages.compiling.clear()
    stages.take(scheduler.next_frames(1.0))
    assert dict(run_dry(scheduler, stages)) == {"waits": continuation(tuple(range(1, 10)), 2)}


def test_a_row_without_a_grammar_has_to_be_answered() -> None:
    scheduler, stages = Scheduler(1, capacity(), frozenset()), Stages()
    scheduler.submit(request("a", prompt=1))
    stages.take(scheduler.next_frames(0.0))
    with pytest.raises(BadFrame, match="no answer for sequence 1"):
        scheduler.on_frame(replace(stages.give(), samples=()))


class World:
    """A scheduler, its stages, and what every request is owed."""

    def __init__(self, rng: random.Random, trimmable: bool) -> None:
        self.rng = rng
        self.queue = rng.choice([3, 50])
        self.plan = self.any_plan(trimmable)
        self.trimmable, self.epoch = trimmable, 1
        self.scheduler = Scheduler(1, self.plan, frozenset({EOS}))
        self.stages = Stages(trimmable)
        self.prompts: dict[str, Request] = {}
        self.said: dict[str, list[int]] = defaultdict(list)
        self.ended: dict[str, int] = defaultdict(int)
        self.complete: set[str] = set()
        self.histories: list[tuple[int, ...]] = [()]
        self.now = 0.0

    def any_plan(self, trimmable: bool) -> Capacity:
        rng = self.rng
        return capacity(
            lanes=rng.randint(1, 4),
            rows=rng.randint(1, 4),
            window=rng.randint(1, 5),
            budget=rng.choice([60, 200, 1000]),
            prefixes=rng.choice([0, 50, 150]),
            chunk=rng.randint(1, 16),
            queue=self.queue,
            trimmable=trimmable,
            max_step_ms=rng.choice([None, 1.0]),
        )

    def lose_the_ring(self) -> None:
        """Frames and stages are gone; other stages take over, with another plan perhaps."""
        self.epoch += 1
        self.plan = self.any_plan(self.trimmable)
        self.stages = Stages(self.trimmable)
        for refused in self.scheduler.begin_epoch(self.epoch, self.plan):
            self.ended[refused.request_id] += 1
            asked = self.prompts[refused.request_id]
            assert len(asked.prompt) + asked.max_tokens > self.plan.budget[0]

    def submit(self) -> None:
        rng, name = self.rng, f"r{len(self.prompts)}"
        start = rng.choice(self.histories)
        prompt = (*start[: rng.randint(0, 30)], *(rng.randint(1, 9) for _ in range(rng.randint(1, 20))))
        samples = rng.choice((1, 1, 1, 2, 5))
        asked = Request(
            name,
            prompt,
            SamplingParams(grammar=rng.choice((None, None, GRAMMAR))),
            rng.randint(1, 9),
            client=rng.choice("xyz"),
            priority=rng.choice((0, 2)),
            samples=samples,
        )
        all_asked = [replace(asked, id=f"{name}#{i}" if i else name) for i in range(samples)]
        try:
            displaced = self.scheduler.submit(*all_asked)
        except Busy:
            assert sum(s.phase is Phase.QUEUED for s in self.scheduler.sequences) + samples > self.queue
        except PromptTooLong:
            assert len(prompt) + asked.max_tokens > self.plan.budget[0]
        else:
            self.prompts.update((one.id, one) for one in all_asked)
            for refused in displaced:
                self.ended[refused.request_id] += 1
                assert self.prompts[refused.request_id].client != asked.client
                assert not self.said[refused.request_id]

    def cancel(self) -> None:
        live = [s.request.id for s in self.scheduler.sequences]
        if live:
            name = self.rng.choice(live)
            self.scheduler.end(name)
            self.ended[name] += 1

    def turn(self, fail: bool = False) -> None:
        if self.stages.compiling and self.rng.random() < 0.2:
            self.stages.compiling.remove(self.rng.choice(sorted(self.stages.compiling)))
        if not self.stages.frames:
            return
        for event in self.scheduler.on_frame(self.stages.give(FAILURE if fail else None)).events:
            if isinstance(event, SampleFailed):
                self.ended[event.request_id] += 1
                continue
            assert not self.ended[event.request_id]
            assert event.index == len(self.said[event.request_id])
            self.said[event.request_id].append(event.sample.token)
            if event.finish:
                self.ended[event.request_id] += 1
                self.complete.add(event.request_id)
                self.histories.append((*self.prompts[event.request_id].prompt, *self.said[event.request_id]))

    def check(self) -> None:
        self.now += 0.01
        self.stages.take(self.scheduler.next_frames(self.now))
        used = zip(self.scheduler.reserved, self.scheduler.prefixes.used, self.plan.budget, strict=True)
        assert all(reserved + kept <= budget for reserved, kept, budget in used)
        kept = zip(self.scheduler.prefixes.used, self.plan.prefix_budget, strict=True)
        assert all(used <= most for used, most in kept)
        assert max(self.scheduler.lane_sizes) <= self.plan.rows
        prefills = [f for f in self.stages.frames if f.step and f.step.compute is Compute.PREFILL]
        assert len(prefills) <= self.plan.window
        assert all(len(f.step.tokens[0]) <= self.plan.chunk for f in prefills if f.step)

    def finish(self) -> None:
        for _ in range(200_000):
            if not self.scheduler.sequences and not self.stages.frames:
                break
            self.turn()
            self.check()
        assert {name: self.ended[name] for name in self.prompts} == dict.fromkeys(self.prompts, 1)
        assert not self.scheduler.sequences
        assert not self.scheduler.in_flight
        assert self.stages.fed == {}
        assert len(self.stages.prefixes) == len(self.scheduler.prefixes)
        assert self.stages.kept_bytes == self.scheduler.prefixes.used[0]
        for name in self.complete:
            assert self.said[name] == continuation(self.prompts[name].prompt, len(self.said[name]))
            assert len(self.said[name]) == self.prompts[name].max_tokens


def simulate(seed: int, requests: int, trimmable: bool) -> World:
    world = World(random.Random(seed), trimmable)
    while len(world.prompts) < requests:
        kind = world.rng.random()
        if kind < 0.25:
            world.submit()
        elif kind < 0.28:
            world.cancel()
        elif kind < 0.285:
            world.lose_the_ring()
        else:
            world.turn(fail=kind > 0.995)
        world.check()
    world.finish()
    return world


@settings(max_examples=effort(20, 60, 5), deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_whatever_happens_each_request_ends_once_and_nothing_is_left(seed: int, trimmable: bool) -> None:
    simulate(seed, 60, trimmable)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("trimmable", [True, False])
def test_thousands_of_requests(rng: random.Random, trimmable: bool) -> None:
    requests = effort(1_500, 10_000, 500)
    world = simulate(rng.randrange(2**32), requests, trimmable)
    assert len(world.complete) > requests // 5


def test_edits_of_a_keep_come_before_the_leave() -> None:
    scheduler, stages = Scheduler(1, capacity(prefixes=500), frozenset()), Stages()
    scheduler.submit(request("a", prompt=12, max_tokens=1))
    stages.take(scheduler.next_frames(0.0))
    while len(stages.frames) > 1:
        scheduler.on_frame(stages.give())
    scheduler.on_frame(stages.give())
    (frame,) = scheduler.next_frames(0.0)
    assert [type(e) for e in frame.edits] == [Save, Leave]
    stages.take([frame])
    scheduler.submit(request("b", prompt=11, max_tokens=1))
    assert [type(e) for e in scheduler.next_frames(0.0)[0].edits] == [Join, Restore]


def test_a_new_epoch_goes_on_where_every_answer_was() -> None:
    scheduler, stages = Scheduler(1, capacity(lanes=2), frozenset()), Stages()
    prompts = {name: tuple(range(i, i + 9)) for i, name in enumerate("abc", 1)}
    for name, prompt in prompts.items():
        scheduler.submit(request(name, prompt=prompt, max_tokens=12))
    said: dict[str, list[int]] = defaultdict(list)
    stages.take(scheduler.next_frames(0.0))
    for _ in range(20):
        for event in scheduler.on_frame(stages.give()).events:
            assert isinstance(event, Produced)
            said[event.request_id].append(event.sample.token)
        stages.take(scheduler.next_frames(0.0))
    assert scheduler.in_flight
    stages = Stages()
    assert scheduler.begin_epoch(2, capacity(lanes=1, chunk=100)) == ()
    frames = scheduler.next_frames(0.0)
    assert {f.epoch for f in frames} == {2}
    joins = [e for f in frames for e in f.edits if isinstance(e, Join)]
    assert [j.prompt_length for j in joins] == [9, 9, 9]
    stages.take(frames)
    for name, more in run_dry(scheduler, stages).items():
        assert said[name] + more == continuation(prompts[name], 12)
    assert stages.fed == {}


def test_who_had_a_lane_goes_before_who_waited_and_what_can_never_fit_is_told() -> None:
    scheduler = Scheduler(1, capacity(lanes=2, rows=1), frozenset())
    for name in ("first", "large", "waiting"):
        scheduler.submit(request(name, prompt=40 if name == "large" else 5))
    scheduler.end("first")
    assert [s.request.id for s in scheduler.sequences] == ["large", "waiting"]
    scheduler.submit(request("late"))
    (refused,) = scheduler.begin_epoch(2, capacity(lanes=1, rows=1, budget=20))
    assert refused.request_id == "large"
    assert "44 tokens of prompt and answer" in refused.sentence
    assert [(s.request.id, s.phase) for s in scheduler.sequences] == [
        ("waiting", Phase.PREFILL),
        ("late", Phase.QUEUED),
    ]
    scheduler.end("waiting")
    scheduler.end("late")
    assert not scheduler.sequences


def test_prefixes_and_lanes_are_kept_apart_by_adapter() -> None:
    scheduler, stages = Scheduler(1, capacity(lanes=2, prefixes=1000), frozenset()), Stages()
    for adapter in ("", "a@1", "a@2"):
        scheduler.submit(request(f"first {adapter}", prompt=40, max_tokens=2, adapter=adapter))
    stages.take(scheduler.next_frames(0.0))
    assert len({s.lane for s in scheduler.sequences}) == 3
    joins = [e for f in stages.frames for e in f.edits if isinstance(e, Join)]
    assert [j.adapter for j in joins] == ["", "a@1", "a@2"]
    run_dry(scheduler, stages)
    scheduler.submit(request("again", prompt=40, max_tokens=2, adapter="a@1"))
    scheduler.submit(request("new", prompt=40, max_tokens=2, adapter="a@3"))
    run_dry_cached = {s.request.id: s.cached for s in scheduler.sequences}
    assert run_dry_cached == {"again": 39, "new": 0}
    run_dry(scheduler, stages)
    kept = len(scheduler.prefixes)
    scheduler.adapters.forget("a@1")
    assert len(scheduler.prefixes) == kept - 1
    run_dry(scheduler, stages)
    assert len(stages.prefixes) == kept - 1


def test_memory_for_adapters_is_taken_from_what_caches_may_use() -> None:
    scheduler, stages = Scheduler(1, capacity(lanes=1, rows=2, budget=100, prefixes=90), frozenset()), Stages()
    scheduler.submit(request("a", prompt=50, max_tokens=10))
    run_dry(scheduler, stages)
    assert len(stages.prefixes) == 1
    scheduler.submit(request("b", prompt=(9,) * 30, max_tokens=10))
    assert not scheduler.adapters.take((61, 0))  # b needs 40 of 100
    assert scheduler.adapters.take((50, 10))
    assert scheduler.reserved == (40, 80)
    with pytest.raises(PromptTooLong, match="stage 0"):
        scheduler.submit(request("c", prompt=50, max_tokens=10))
    run_dry(scheduler, stages)
    assert scheduler.prefixes.used[0] <= 50
    assert scheduler.adapters.take((0, 0))
    scheduler.submit(request("c", prompt=50, max_tokens=10))
    assert len(run_dry(scheduler, stages)["c"]) == 10
