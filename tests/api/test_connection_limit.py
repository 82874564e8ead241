"""The connection limit: which connection gives up its place, and that every new one takes another's."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api.http.connection_limit import ConnectionLimit, ConnectionSlot


def taken(seats: ConnectionLimit, address: str, closed: list[str], name: str = "") -> ConnectionSlot:
    seat = seats.take(address)
    assert seat
    seat.close = lambda: closed.append(name or address)
    return seat


def test_each_newcomer_takes_another_ones_place_oldest_first() -> None:
    seats, closed = ConnectionLimit(3), list[str]()
    for i in range(6):
        taken(seats, "10.0.0.1", closed, f"{i}")
    assert closed == ["0", "1", "2"]
    assert len(seats) == 3


def test_silent_ones_go_before_idle_ones_and_those_with_a_request_stay() -> None:
    seats, closed = ConnectionLimit(3), list[str]()
    busy, idle = taken(seats, "10.0.0.1", closed, "busy"), taken(seats, "10.0.0.1", closed, "idle")
    for seat in (busy, idle):
        seats.serve(seat)
    seats.wait(idle, idle=True)
    for i in range(5):
        taken(seats, "10.0.0.1", closed, f"{i}")
    assert closed == ["0", "1", "2", "3"]
    seats.serve(next(seat for seat in seats._taken if seat.queue is not None and seat is not idle))
    taken(seats, "10.0.0.1", closed)
    assert closed[-1] == "idle"


def test_where_all_have_requests_a_newcomer_is_turned_away() -> None:
    seats = ConnectionLimit(2)
    for _ in range(2):
        seats.serve(taken(seats, "10.0.0.1", []))
    assert seats.take("10.0.0.2") is None
    assert seats.take_counts() == {"turned_away": 1}
    assert seats.take_counts() == {}


def test_a_flood_from_one_network_costs_the_others_nothing() -> None:
    seats, closed = ConnectionLimit(10), list[str]()
    for address in ("10.0.0.1", "10.0.0.2", "2001:db8:1::1"):
        taken(seats, address, closed, "other")
    for i in range(100):
        taken(seats, f"2001:db8:2::{i:x}", closed, "flood")
    assert "other" not in closed
    assert len(closed) == 93


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "serve", "wait", "leave"]), st.integers(0, 5)), max_size=60))
def test_no_more_places_are_taken_than_there_are(steps: list[tuple[str, int]]) -> None:
    seats, held = ConnectionLimit(4), list[ConnectionSlot]()
    for step, i in steps:
        if step == "take":
            seat = seats.take(f"10.0.0.{i % 3}")
            if seat:
                held.append(seat)
                seat.close = lambda seat=seat: held.remove(seat)  # type: ignore[misc]
        elif held:
            seat = held[i % len(held)]
            match step:
                case "serve":
                    seats.serve(seat)
                case "wait":
                    seats.wait(seat, idle=True)
                case "leave":
                    seats.leave(seat)
                    held.remove(seat)
        assert set(held) == seats._taken
        assert len(seats) <= 4
        assert sum(map(len, seats._waiting.values())) == sum(seat.queue is not None for seat in held)
        assert all(map(len, seats._waiting.values()))
