"""Fuzz targets of the data plane: frames, parcels, and the inbox that puts frames together."""

from __future__ import annotations

from dataclasses import replace

from cluster.core.errors import MacpipeError
from cluster.core.frames import (
    Compute,
    Drop,
    Failure,
    Frame,
    Join,
    Leave,
    Mark,
    Persist,
    PromptScoring,
    Restore,
    Sample,
    Save,
    SequenceFailure,
    StageTiming,
    Step,
    Tensor,
    Trim,
    Unmark,
)
from cluster.core.limits import BULK_BYTES
from cluster.core.request import Grammar, GrammarKind, PromptLogprobs, Request, SamplingParams, TopLogprob
from cluster.core.training_frames import Task, TrainingCommand, TrainingReply
from cluster.scheduler.capacity import Capacity
from cluster.scheduler.scheduler import Scheduler
from cluster.transport.rich_errors import from_status, to_status
from cluster.wire.frame_codec import decode, encode
from cluster.wire.message_split import pack, unpack
from cluster.wire.training_codec import decode_command, decode_reply, encode_command, encode_reply
from cluster.worker.inbox import Inbox
from fuzz.mutation import apart, joined, spoil_frame, spoil_parts, spoil_proto
from fuzz.targets.target import Prepared, Target

EPOCH = 7
BOUND = SamplingParams(
    temperature=0.7,
    top_k=40,
    logit_bias=((3, -1.5), (9, 2.0)),
    seed=2**63 + 5,
    logprobs=True,
    top_logprobs=2,
    grammar=Grammar(GrammarKind.REGEX, "[a-z]+", (5, 6)),
)
TENSOR = Tensor("bfloat16", (1, 3, 4), bytes(range(24)))
OTHER_TENSOR = Tensor("float32", (2,), bytes(8))
DECODE = Step(Compute.DECODE, (1, 2), ((11,), (12,)))
PREFILL = Step(Compute.PREFILL, (1,), ((5, 6, 7),))
FRAMES = (
    Frame(EPOCH, 0, 1, (Join(1, 3, BOUND, True, 768, "legal@" + 64 * "a", True), Restore(1, 9, 2)), PREFILL, (TENSOR,)),
    Frame(
        EPOCH, 1, 2, (Leave(3), Trim(1, 2), Mark(1, 2), Unmark(1, 2), Save(1, 4), Persist(4, "key-0", "a"), Drop(4)),
        DECODE, (TENSOR, OTHER_TENSOR),
    ),
    Frame(
        EPOCH, 1, 3, (), None, (),
        (Sample(1, 3, 42, -0.25, (TopLogprob(42, -0.25), TopLogprob(7, -2.0)), True), Sample(2, 1, 5, forced=(6, 7))),
        (SequenceFailure(2, "STAGE_FAILED", "no"),), (StageTiming(0, 1, 2, 3), StageTiming(1, 4, 5, 6)),
    ),
    Frame(EPOCH, 0, 4, error=Failure(1, "STAGE_FAILED", "it broke")),
    Frame(EPOCH, 0, 5, (), Step(Compute.PREFILL, (1,), ((5, 6, 7),), PromptScoring(1, (7, 8), 2)), (TENSOR,)),
    Frame(EPOCH, 0, 7, (Trim(1, 4),), Step(Compute.DECODE, (1,), ((5,),), None, 2, 4), (TENSOR,)),
    Frame(EPOCH, 0, 8, (), Step(Compute.DECODE, (1,), ((5,),), None, 1, 4), void=True),
    Frame(EPOCH, 0, 9, (), Step(Compute.DECODE, (1,), ((5,),), drafts=9), (TENSOR,)),
    Frame(EPOCH, 0, 10, (Trim(1, 4),), Step(Compute.DECODE, (1,), ((5, 6, 7),), None, 2, 4), (TENSOR,)),
    Frame(EPOCH, 0, 11, (), Step(Compute.DECODE, (1,), ((8, 9),), None, 4, 7), (TENSOR,)),
    Frame(EPOCH, 0, 10, (), None, (), (Sample(1, 5, 6, -0.25), Sample(1, 6, 9, -0.5)), (SequenceFailure(1, "R", "s"),)),
    Frame(EPOCH, 0, 6, prompt_logprobs=PromptLogprobs(2, (-0.5, -1.25), (7, 9, 8, 1), (-0.5, -1.0, -1.25, -2.0))),
)  # fmt: skip
BULKY = Frame(EPOCH, 0, 5, (), PREFILL, (Tensor("uint8", (BULK_BYTES + 4,), bytes(BULK_BYTES + 4)),))
SMALL_BULK = tuple(parcel.message for parcel in pack(BULKY))


def _frame(data: bytes) -> None:
    written = encode(decode(data))
    assert encode(decode(written)) == written, "a frame is not what it was, written and read again"


def _parcel(data: bytes) -> object:
    return unpack(data)


def frames() -> Prepared:
    return Prepared(_frame, tuple(map(encode, FRAMES)), spoil_frame)


def parcels() -> Prepared:
    heads = tuple(parcel.message for frame in FRAMES for parcel in pack(frame))
    return Prepared(_parcel, (*heads, SMALL_BULK[0], SMALL_BULK[1][:200]), spoil_frame)


def inboxes() -> Prepared:
    """Put a series of messages into a stage's inbox, and take out the frames whose turn came in between."""

    def run(data: bytes) -> None:
        inbox = Inbox(EPOCH)
        for message in apart(data):
            inbox.put(message)
            while inbox.take():
                pass

    head, body = _apart()
    whole = [encode(frame) for frame in FRAMES]
    return Prepared(
        run, (joined([*whole, head, body]), joined([body, head]), joined(whole[::-1])), spoil_parts(spoil_frame)
    )


def _apart() -> tuple[bytes, bytes]:
    """A head and a body that are small, though large ones alone travel apart."""
    from cluster.wire.frame_codec import pack_header
    from cluster.wire.message_split import _MARK, _NAME, checksum

    frame = replace(BULKY, tensors=(TENSOR,))
    name = _NAME.pack(frame.epoch, frame.number)
    data = bytes(TENSOR.data)
    return pack_header(frame, apart=True), _MARK.pack(0, checksum(name, data)) + name + data


def returns() -> Prepared:
    """Give the last stage's frames to a scheduler: a valid frame can still be nonsense."""
    room = Capacity(2, 4, 3, (2**40, 2**40), (2**30, 2**30), lambda tokens: (tokens, tokens))

    def begun() -> Scheduler:
        schedule = Scheduler(EPOCH, room, frozenset({0}))
        schedule.submit(Request("a", (1, 2, 3), SamplingParams(), max_tokens=4))
        return schedule

    def run(data: bytes) -> None:
        schedule = begun()
        for message in apart(data):
            schedule.next_frames(0.0)
            schedule.on_frame(decode(message))

    return Prepared(run, (joined(list(map(encode, _answered(begun())))),), spoil_parts(spoil_frame))


def _answered(schedule: Scheduler) -> list[Frame]:
    """Return the last stage's answers to the first frames of a schedule."""
    said: list[Frame] = []
    for position in range(3):
        for frame in schedule.next_frames(0.0):
            decodes = frame.step is not None and frame.step.compute is Compute.DECODE
            rows = frame.step.sequences if frame.step and decodes else ()
            samples = tuple(Sample(row, 2 + position, 42) for row in rows)
            said.append(Frame(EPOCH, frame.lane, frame.number, samples=samples, timings=(StageTiming(0, 1, 2, 3),)))
            schedule.on_frame(said[-1])
    return said


MARK = b"\xff" * 4
"""How a message of training begins; what follows has the layout of a frame."""
COMMANDS = (
    TrainingCommand(EPOCH, 1, Task.PREPARE, options='{"train": true}'),
    TrainingCommand(
        EPOCH, 2, Task.FORWARD, 3, True, True, False,
        tensors=(Tensor("int32", (2, 3), bytes(24)), Tensor("int32", (2, 2), bytes(16)), TENSOR), weight=0.25,
    ),
    TrainingCommand(EPOCH, 3, Task.BACKWARD, 3, update=True, tensors=(TENSOR,)),
    TrainingCommand(EPOCH, 4, Task.READ_STATE, part=2),
    TrainingCommand(EPOCH, 5, Task.WRITE_STATE, update=True, names=("adapter/a.lora_a",), tensors=(OTHER_TENSOR,)),
)  # fmt: skip
REPLIES = (
    TrainingReply(EPOCH, 1, names=("a.lora_a", "a.lora_b"), trained=64),
    TrainingReply(EPOCH, 2, (TENSOR,), loss=2.5, counted=7, learning_rate=1e-5, peak_bytes=2**33, compute_us=12),
    TrainingReply(EPOCH, 4, (OTHER_TENSOR,), ("adapter/a.lora_a",), parts=3),
    TrainingReply(EPOCH, 5, error=Failure(1, "STAGE_FAILED", "it broke")),
)


def _command(data: bytes) -> None:
    written = encode_command(decode_command(MARK + data))
    assert encode_command(decode_command(written)) == written, "a command is not what it was"


def _reply(data: bytes) -> None:
    written = encode_reply(decode_reply(MARK + data))
    assert encode_reply(decode_reply(written)) == written, "a reply is not what it was"


def commands() -> Prepared:
    return Prepared(_command, tuple(encode_command(c)[len(MARK) :] for c in COMMANDS), spoil_frame)


def replies() -> Prepared:
    return Prepared(_reply, tuple(encode_reply(r)[len(MARK) :] for r in REPLIES), spoil_frame)


def statuses() -> Prepared:
    """The details of a failed call."""
    from google.protobuf.message import DecodeError
    from google.rpc.status_pb2 import Status

    def run(data: bytes) -> None:
        error = from_status(Status.FromString(data))
        if error:
            to_status(error)

    errors = (
        MacpipeError("it broke", retry_after_s=2.5, field="prompt", worker="mac-1"),
        MacpipeError.of("PROMPT_TOO_LONG", "too long"),
    )
    seeds = tuple(to_status(error).SerializeToString() for error in errors)
    return Prepared(run, seeds, spoil_proto, (DecodeError,))


TARGETS = (
    Target("frame", 400, frames),
    Target("parcel", 300, parcels),
    Target("inbox", 60, inboxes),
    Target("returned", 60, returns),
    Target("training-command", 150, commands),
    Target("training-reply", 150, replies),
    Target("status", 60, statuses),
)
