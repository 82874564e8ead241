"""Which replica answers: the one that keeps the prompt, until another one is predicted to be sooner."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.request import Request
from cluster.scheduler.offers import DecodeCost
from cluster.scheduler.routing import LinearCost, Offer, choose_replica, predict_s
from effort import effort
from scheduler.test_moved_samples import Copy
from scheduler.test_scheduler import request

READ, STEP = LinearCost(0.0, 1000.0, 2000.0), LinearCost(4000.0, 1000.0, 20.0)
IDLE = Offer(0, 100, 0, 1.0, 100.0, READ, STEP)
COST = st.builds(LinearCost, st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e4))
OFFERS = st.lists(
    st.builds(
        Offer,
        st.integers(0, 5000),
        st.integers(1, 9000),
        st.integers(0, 64),
        st.floats(1, 64),
        st.floats(1, 1e4),
        COST,
        COST,
        st.floats(0, 1),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=5,
)


@given(OFFERS)
@settings(max_examples=effort(150, 3000))
def test_no_other_fitting_replica_is_much_sooner(offers: list[Offer]) -> None:
    chosen = choose_replica(offers)
    fitting = [o for o in offers if o.fits] or offers
    candidates = [o for o in fitting if o.has_room] or fitting
    assert offers[chosen] in candidates
    predicted = dict(zip(map(id, candidates), predict_s(candidates), strict=True))
    assert predicted[id(offers[chosen])] <= min(predicted.values()) * 1.1 + 2e-3


def test_the_longest_beginning_wins_until_its_replica_is_much_busier() -> None:
    keeps = replace(IDLE, kept=4000, unread=10)
    reads = replace(IDLE, unread=4010)
    assert choose_replica([reads, keeps]) == 1
    assert choose_replica([reads, replace(keeps, live=3, rows=40.0)]) == 1, "reading takes as long"
    assert choose_replica([reads, replace(keeps, live=7, rows=48.0)]) == 0
    assert choose_replica([reads, replace(keeps, unread=9000)]) == 0, "others are read first"


def test_equal_replicas_share_the_requests() -> None:
    assert choose_replica([replace(IDLE, live=2), replace(IDLE, live=1), replace(IDLE, live=1)]) == 1
    assert choose_replica([replace(IDLE, filled=0.9), replace(IDLE, filled=0.2, unread=101)]) == 1, "room for prefixes"
    assert choose_replica([replace(IDLE, kept=3), IDLE]) == 0


def test_no_equal_replica_idles_while_one_that_was_measured_a_little_faster_has_all_requests() -> None:
    free_rows = LinearCost(4000.0, 0.0, 20.0)
    faster = replace(IDLE, read=LinearCost(0.0, 800.0, 2000.0), step=LinearCost(3000.0, 0.0, 20.0))
    slower = replace(IDLE, step=free_rows)
    assert choose_replica([replace(faster, live=1, rows=2.0), slower]) == 1
    assert choose_replica([replace(faster, live=1, rows=2.0), replace(slower, step=LinearCost(9000.0, 0.0, 20.0))]) == 0


def test_unmeasured_replicas_count_as_fast_as_the_others() -> None:
    new = Offer(0, 100, 0, 1.0, 100.0)
    assert choose_replica([replace(new, live=1), new]) == 1
    assert choose_replica([replace(IDLE, unread=900), new]) == 1
    assert choose_replica([replace(new, unread=900), IDLE]) == 1
    cold = replace(new, read=LinearCost(0.0, 50_000.0, 1.0), step=LinearCost(9000.0, 0.0, 1.0))
    assert choose_replica([cold, replace(cold, unread=400, read=READ, step=STEP)]) == 0, "one token tells little"
    slow = replace(new, read=READ._replace(unit_us=9000.0), step=STEP)
    assert choose_replica([slow, replace(IDLE, unread=300)]) == 1


def test_full_and_small_replicas_are_left_out_and_a_repeated_id_goes_where_it_is_live() -> None:
    assert choose_replica([replace(IDLE, fits=False), replace(IDLE, unread=99_000)]) == 1
    assert choose_replica([replace(IDLE, has_room=False), replace(IDLE, unread=99_000)]) == 1
    assert choose_replica([replace(IDLE, fits=False), replace(IDLE, fits=False, live=1)]) == 0
    assert choose_replica([IDLE, replace(IDLE, is_live=True, unread=99_000)]) == 1


def test_a_decode_costs_a_line_through_what_was_measured() -> None:
    cost = DecodeCost()
    assert cost.measured().weight == 0
    cost.learn(2, 99_000.0)
    assert cost.measured().weight == 0, "kernels were compiled"
    cost.learn(2, 3000.0)
    known = cost.measured()
    assert (known.us(2), known.weight) == (pytest.approx(3000.0), 1.0)
    assert 1.05 < known.us(2) / known.us(1) < 1.2, "what a further row costs is assumed until frames differ"
    for i in range(200):
        cost.learn(1 + i % 4, 1000.0 + 500.0 * (1 + i % 4))
    assert abs(cost.measured().us(8) - 5000.0) < 100.0


def test_a_shared_beginning_does_not_gather_all_requests_on_one_replica() -> None:
    costs = {"read": LinearCost(0.0, 500.0, 1000.0), "step": measured_alone(30_000.0)}
    busy = Offer(kept=200, unread=20, live=3, rows=4.0, steps=256.0, **costs)
    idle = Offer(kept=0, unread=220, live=0, steps=256.0, **costs)
    assert choose_replica([busy, idle]) == 1
    assert choose_replica([replace(busy, live=0, rows=1.0), idle]) == 0


def measured_alone(us: float) -> LinearCost:
    """The cost that a replica knows which has decoded one sequence at a time."""
    cost = DecodeCost()
    for _ in range(50):
        cost.learn(1, us)
    return cost.measured()


def test_an_offer_knows_what_is_kept_and_what_comes_first() -> None:
    copy = Copy(rows=1, prefixes=1000)
    fresh = offer(copy, request("new", prompt=40))
    assert (fresh.kept, fresh.unread, fresh.read.weight, fresh.step.weight, fresh.live) == (0, 40, 0, 0, 0)
    copy.scheduler.submit(request("old", prompt=30))
    assert offer(copy, request("new", prompt=40)).kept == 29, "once the live one has read it"
    assert offer(copy, request("new", prompt=40)).unread == 29 + 11
    assert offer(copy, request("new", prompt=40, client="b")).kept == 0, "another client's"
    copy.finish()
    known = offer(copy, request("new", prompt=40))
    assert (known.kept, known.unread, known.live, known.steps) == (30, 10, 0, 4)
    assert known.read.unit_us > 0
    assert known.step.us(1) > 0
    assert known.filled > 0
    later = offer(copy, request("new", prompt=40), now=120.0)
    assert later.step == known.step._replace(weight=known.step.weight / 4), "it may have become faster"
    for i in range(3):
        copy.scheduler.submit(request(f"r{i}", prompt=20, client="a"))
    theirs, own = (offer(copy, request("new", prompt=5, client=c)).unread for c in ("b", "a"))
    assert (theirs, own) == (19 + 5 + 5, 19 + 40 + 1), "a client waits for its own requests, not for all of another's"
    assert offer(copy, request("r1")).is_live


def offer(copy: Copy, asked: Request, now: float = 0.0) -> Offer:
    return copy.scheduler.offers.make(asked, now)
