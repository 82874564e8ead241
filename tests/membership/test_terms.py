"""One worker's record, a candidate and a leadership, step by step."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise

from cluster.core.limits import HEARTBEAT_S, LAG_STEPS
from cluster.core.term_limits import ASK_AGAIN_S, LEASE_MARGIN_S, LEASE_S
from cluster.membership.candidacy import CandidatePhase, LeaderCandidate
from cluster.membership.in_sync import InSyncSet
from cluster.membership.leadership import Leadership
from cluster.membership.term_record import TermRecord
from cluster.membership.terms import NO_TERM, Denial, Process, Term, TermAnswer, TermCall, TermRequest

ADA, AGAIN, BOB = Process("ada", "1"), Process("ada", "2"), Process("bob", "1")
FIRST = Term(1, ADA)


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def grant(record: TermRecord, term: Term, *, written: bool = True) -> Denial | None:
    return record.begin(term) or record.finish(written=written)


def test_a_worker_grants_higher_numbers_alone_and_each_to_one_process() -> None:
    clock = Clock()
    record = TermRecord(None, clock)
    assert grant(record, FIRST) is None
    clock.now += LEASE_S
    assert grant(record, Term(1, BOB)) is Denial.OLD
    assert grant(record, Term(2, BOB)) is None
    clock.now += LEASE_S
    assert grant(record, FIRST) is Denial.OLD
    assert record.term == Term(2, BOB)


def test_a_lease_keeps_others_out_and_its_own_process_not() -> None:
    clock = Clock()
    record = TermRecord(None, clock)
    grant(record, FIRST)
    clock.now += LEASE_S - 0.01
    assert record.why_not(BOB) is record.why_not(AGAIN) is Denial.LEASED
    assert grant(record, Term(2, BOB)) is Denial.LEASED
    assert record.renew(FIRST) is grant(record, FIRST) is None
    clock.now += LEASE_S - 0.01
    assert grant(record, Term(2, ADA)) is None
    assert record.renew(FIRST) is Denial.OLD
    clock.now += LEASE_S
    assert record.why_not(BOB) is record.why_not(AGAIN) is None
    assert record.renew(Term(2, ADA)) is None, "nobody else came, so it goes on"
    record.give_back(FIRST)
    assert record.has_lease()
    record.give_back(Term(2, ADA))
    assert record.why_not(BOB) is None


def test_on_a_late_machine_others_wait_longer_and_a_restart_does_not() -> None:
    clock = Clock()
    record = TermRecord(None, clock)
    grant(record, FIRST)
    clock.now += LEASE_S
    assert record.why_not(BOB, lag_s=0.3) is Denial.LEASED
    assert record.why_not(AGAIN, lag_s=0.3) is None
    clock.now += LAG_STEPS * 0.3
    assert record.why_not(BOB, lag_s=0.3) is None


def test_what_is_not_written_is_not_granted_and_meanwhile_nothing_is_renewed() -> None:
    clock = Clock()
    record = TermRecord(FIRST, clock)
    clock.now += LEASE_S
    assert record.begin(Term(2, BOB)) is None
    assert record.renew(FIRST) is record.why_not(ADA) is record.begin(Term(3, ADA)) is Denial.BUSY
    assert record.finish(written=False) is Denial.NOT_WRITTEN
    assert record.term == FIRST
    assert record.renew(FIRST) is None


def test_a_restarted_worker_waits_one_whole_lease() -> None:
    clock = Clock()
    record = TermRecord(FIRST, clock)
    assert record.why_not(BOB) is record.why_not(AGAIN) is Denial.LEASED
    assert record.why_not(ADA) is None
    clock.now += LEASE_S
    assert record.why_not(BOB) is None
    assert TermRecord(None, clock).why_not(BOB) is None


def answer(call: TermCall, granted: Term, denial: Denial | None = None) -> TermAnswer:
    return TermAnswer(call, denial, granted)


def candidate(clock: Clock, needed: int = 2) -> LeaderCandidate:
    return LeaderCandidate(ADA, ("a", "b", "c"), lambda held: len(held) >= needed, clock, random.Random(0).random)


def test_a_candidate_takes_nothing_before_enough_workers_would_grant_it() -> None:
    clock = Clock()
    one = candidate(clock)
    asked = one.step()
    assert [(call.request, call.worker) for call in asked] == [(TermRequest.ASK, name) for name in "abc"]
    assert not one.on_answer(answer(asked[0], Term(6, BOB)))
    assert not one.on_answer(answer(asked[1], Term(7, BOB), Denial.LEASED))
    clock.now += 2 * HEARTBEAT_S
    asked = one.step()
    assert not one.on_answer(answer(asked[0], Term(6, BOB)))
    taken = one.on_answer(answer(asked[2], NO_TERM))
    assert [(call.request, call.worker, call.term) for call in taken] == [
        (TermRequest.GRANT, name, Term(8, ADA)) for name in "ac"
    ]
    older, newer = InSyncSet(6, 9, ("r1", "r2")), InSyncSet(7, 1, ("r2",))
    for call, named in zip(taken, (newer, older), strict=True):
        assert one.leadership is None
        one.on_answer(replace(answer(call, call.term), in_sync=named, newest_epoch=named.term))
    assert one.leadership
    assert one.leadership.held == {"a", "c"}
    assert (one.in_sync, one.newest_epoch) == (newer, 7), "the set of the highest term, among all its grants"


def test_a_new_candidate_asks_often_for_two_leases_and_then_each_heartbeat() -> None:
    clock = Clock()
    one, asked = candidate(clock), list[float]()
    while clock.now < 100.0 + 4 * LEASE_S:
        asked += [clock.now for call in one.step() if call.worker == "a"]
        clock.now += 0.01
    pauses = [after - before for before, after in pairwise(asked)]
    early = sum(at < 100.0 + 2 * LEASE_S for at in asked)
    assert max(pauses[: early - 1]) < 2 * ASK_AGAIN_S
    assert min(pauses[early:]) > HEARTBEAT_S / 2


def test_a_candidate_without_a_full_ring_gives_all_back_even_what_comes_late() -> None:
    clock = Clock()
    one = candidate(clock)
    asked = one.step()
    one.on_answer(answer(asked[0], NO_TERM))
    first, second = one.on_answer(answer(asked[1], NO_TERM))
    one.on_answer(answer(first, first.term))
    clock.now += LEASE_S
    back = one.step()
    assert [(call.request, call.worker) for call in back] == [(TermRequest.RETURN, "a"), (TermRequest.RETURN, "b")]
    assert one.phase is CandidatePhase.WAITING
    (late,) = one.on_answer(answer(second, second.term))
    assert (late.request, late.worker, late.term) == (TermRequest.RETURN, "b", first.term)
    assert not one.step(), "it waits for a random time"
    clock.now += 2 * LEASE_S
    assert one.step()[0].request is TermRequest.ASK


def test_a_candidate_asks_for_another_number_after_it_gave_one_back() -> None:
    """Its workers may hear of the return only after the next grant, and must not take that back."""
    clock, numbers = Clock(), list[int]()
    one = candidate(clock)
    for _ in range(2):
        asked = one.step()
        one.on_answer(answer(asked[0], NO_TERM))
        taken = one.on_answer(answer(asked[1], NO_TERM))
        numbers += {call.term.number for call in taken}
        clock.now += LEASE_S  # no answer comes
        one.step()
        clock.now += 2 * LEASE_S
    assert numbers == [1, 2]


def test_a_leader_counts_from_sending_and_stops_before_its_workers() -> None:
    clock = Clock()
    led = Leadership(FIRST, {"a": clock.now, "b": clock.now - 0.5}, lambda held: len(held) >= 2, clock)
    clock.now += LEASE_S - LEASE_MARGIN_S - 0.5 - 0.01
    assert led.leads
    clock.now += 0.02
    assert (led.held, led.leads) == ({"a"}, False)
    renewals = led.step()
    for call in renewals:
        led.on_answer(answer(call, FIRST))
    assert led.leads
    led.on_answer(answer(replace(renewals[0]), Term(2, BOB), Denial.OLD))
    assert led.workers == {"b"}
    led.step()
    clock.now += LEASE_S
    assert not led.step()
    assert led.ended


def test_a_leader_steps_down_for_a_higher_term_alone() -> None:
    clock = Clock()
    one = candidate(clock, needed=1)
    (call,) = one.on_answer(answer(one.step()[0], Term(4, BOB)))
    one.on_answer(answer(call, call.term))
    assert one.leadership
    assert not one.see(Term(4, BOB))
    assert one.leadership
    (back,) = one.see(Term(6, BOB))
    assert (back.request, back.worker) == (TermRequest.RETURN, "a")
    assert one.leadership is None
    assert not one.step()
