"""The ranks of a group run the same frames in the same order, whatever reaches each of them when."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import BadFrame
from cluster.core.frames import Compute, Frame, Step, Tensor, Trim
from cluster.core.limits import MAX_FRAMES_WAITING
from cluster.scheduler.frame_order import FrameOrder
from cluster.wire.message_split import pack
from cluster.worker.inbox import Inbox

ROW = Tensor("float32", (1, 1, 4), bytes(16))
LONG = Tensor("float32", (1, 1, 2**18), bytes(2**20))


def frames(kinds: list[str]) -> list[Frame]:
    """A log: prompt chunks, whose tensors travel apart, decode steps, guesses, and edits that trim these away."""
    found: list[Frame] = []
    for number, kind in enumerate(kinds):
        if kind == "prefill":
            found.append(Frame(1, 9, number, (), Step(Compute.PREFILL, (number,), ((1, 2),)), (LONG,)))
        elif kind == "guess":
            step = Step(Compute.DECODE, (1,), ((3,),), guesses=1, start=5)
            found.append(Frame(1, 0, number, (), step, (ROW,)))
        elif kind == "trim":
            found.append(Frame(1, 0, number, (Trim(1, 5),), Step(Compute.DECODE, (1,), ((4,),)), (ROW,)))
        else:
            found.append(Frame(1, number % 3, number, (), Step(Compute.DECODE, (2,), ((1,),)), (ROW,)))
    return found


@given(st.data())
def test_no_arrival_changes_what_runs(data: st.DataObject) -> None:
    """Messages in any order, with frames taken in between whenever the rank is free."""
    log = frames(data.draw(st.lists(st.sampled_from(["prefill", "decode", "guess", "trim"]), min_size=1, max_size=6)))
    messages = data.draw(st.permutations([parcel.message for frame in log for parcel in pack(frame)]))
    inbox, ran = Inbox(1, in_order=True), list[Frame]()
    for message in messages:
        inbox.put(message)
        for _ in range(data.draw(st.integers(0, 2))):
            if arrival := inbox.take():
                ran.append(arrival.frame)
    while arrival := inbox.take():
        ran.append(arrival.frame)
    assert [replace(frame, tensors=()) for frame in ran] == [replace(frame, tensors=()) for frame in log]
    assert all(frame.tensors for frame in ran)


def test_the_logs_chunks_travel_in_two_messages() -> None:
    assert [len(list(pack(frame))) for frame in frames(["prefill", "decode"])] == [2, 1]


def test_a_frame_that_came_before_or_is_too_many_is_refused() -> None:
    order = FrameOrder()
    first, second = frames(["decode", "decode"])
    order.add(first, ready=True)
    assert order.take() == first
    order.add(second, ready=False)
    for frame in (first, second):
        with pytest.raises(BadFrame, match="arrived twice"):
            order.add(frame, ready=True)
    assert (order.take(), len(order), order.waiting_without_tensors(1)) == (None, 1, second)
    for number in range(2, MAX_FRAMES_WAITING + 1):
        order.add(replace(second, number=number), ready=True)
    with pytest.raises(BadFrame, match="too many"):
        order.add(replace(second, number=MAX_FRAMES_WAITING + 1), ready=True)
