"""The hidden states of a reply go to the samples of their sequences; other tensors are refused.

A request that embeds ends with its first token, and nothing is kept of it.
"""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from cluster.core.errors import BadFrame
from cluster.core.frames import Frame, Join, Sample, Save, Tensor
from cluster.core.request import FinishReason, Request, SamplingParams
from cluster.scheduler.hidden_states import attach_states
from cluster.scheduler.outcome import Produced
from cluster.scheduler.scheduler import Scheduler
from scheduler.stages import Stages, capacity

SAMPLES = (Sample(7, 1, 2), Sample(8, 1, 3))


def ids(*sequences: int, dtype: str = "int64") -> Tensor:
    return Tensor(dtype, (len(sequences),), struct.pack(f"<{len(sequences)}q", *sequences))


def states(rows: int, width: int = 2, dtype: str = "float32") -> Tensor:
    numbers = range(rows * width)
    return Tensor(dtype, (rows, width), struct.pack(f"<{len(numbers)}f", *numbers))


def reply(*tensors: Tensor) -> Frame:
    return Frame(1, 0, 0, tensors=tensors, samples=SAMPLES)


def test_states_find_their_samples() -> None:
    assert attach_states(reply()) == SAMPLES
    first, second = attach_states(reply(ids(9, 8), states(2)))  # 9 has left meanwhile
    assert (first.state, struct.unpack("<2f", second.state)) == (b"", (2.0, 3.0))


@pytest.mark.parametrize(
    "tensors",
    [
        (ids(7),),
        (ids(7), states(1), states(1)),
        (ids(7), states(2)),
        (ids(7, dtype="int32"), states(1)),
        (ids(7), states(1, dtype="float16")),
        (states(1), ids(7)),
        (ids(7), ids(8)),
        (Tensor("int64", (2,), bytes(8)), states(2)),
    ],
)
def test_tensors_that_are_no_states_are_refused(tensors: tuple[Tensor, ...]) -> None:
    with pytest.raises(BadFrame, match="no hidden states"):
        attach_states(reply(*tensors))


class EmbeddingStages(Stages):
    """Stages whose sequences that embed have a state: their id and length. They note joins and count saves."""

    def __init__(self) -> None:
        super().__init__()
        self.joins: dict[int, Join] = {}
        self.saves = 0

    def take(self, frames: list[Frame]) -> None:
        super().take(frames)
        edits = [edit for frame in frames for edit in frame.edits]
        self.joins |= {edit.sequence: edit for edit in edits if isinstance(edit, Join)}
        self.saves += sum(isinstance(edit, Save) for edit in edits)

    def give_with_states(self) -> Frame:
        frame = self.give()
        found = [s for s in frame.samples if self.joins[s.sequence].embeds]
        if not found:
            return frame
        numbers = [float(number) for s in found for number in (s.sequence, s.position)]
        held = Tensor("float32", (len(found), 2), struct.pack(f"<{len(numbers)}f", *numbers))
        return replace(frame, tensors=(ids(*(s.sequence for s in found)), held))


def test_a_request_that_embeds_ends_with_its_state_and_keeps_nothing() -> None:
    """Beside one that does not, in one lane, and again after the ring was lost."""
    limits = capacity(prefixes=1000)
    scheduler, stages = Scheduler(1, limits, frozenset()), EmbeddingStages()
    prompts = {"a": tuple(range(1, 30)), "b": tuple(range(40, 60)), "c": (5,)}
    for name, prompt in prompts.items():
        scheduler.submit(Request(name, prompt, SamplingParams(), 1, ignore_eos=True, embeds=name != "b"))
    stages.take(scheduler.next_frames(0.0))
    stages.give_with_states()
    scheduler.begin_epoch(2, limits)
    stages, produced = EmbeddingStages(), dict[str, Produced]()
    stages.take(scheduler.next_frames(0.0))
    while stages.frames:
        events = scheduler.on_frame(stages.give_with_states()).events
        produced |= {event.request_id: event for event in events if isinstance(event, Produced)}
        stages.take(scheduler.next_frames(0.0))
    assert {event.finish for event in produced.values()} == {FinishReason.LENGTH}
    lengths = {name: struct.unpack("<2f", event.sample.state)[1:] for name, event in produced.items() if name != "b"}
    assert lengths == {"a": (29.0,), "c": (1.0,)}
    assert produced["b"].sample.state == b""
    assert stages.saves == 1, "that of b"
