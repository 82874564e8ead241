"""The stage host on one thread with a real one-stage model: frames in, frames out, and no harm by bad frames."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from checkpoints import make
from cluster.core.errors import LinkFailed, ModelDiffers, PrefixMissing, RankFailed, StageFailed, StaleEpoch
from cluster.core.frames import Compute, Frame, Join, Leave, Step, Tensor
from cluster.core.plan import LayerRange, StageSpec
from cluster.core.request import SamplingParams
from cluster.core.training import TrainingOptions
from cluster.core.training_frames import Task, TrainingCommand
from cluster.model.checkpoint import model_ref
from cluster.model.sharding import Seat
from cluster.transport.in_memory import MemoryNetwork
from cluster.transport.streams import Line, Outbox
from cluster.wire.frame_codec import decode, encode
from cluster.wire.message_split import pack
from cluster.wire.training_codec import decode_reply, encode_command
from cluster.worker import stage_host as slot_module
from cluster.worker.stage_host import StageHost

EPOCH = 11


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> StageSpec:
    folder = make("llama", tmp_path_factory.mktemp("llama"))
    return StageSpec(EPOCH, 0, 1, model_ref(str(folder)), LayerRange(0, 4), 64)


@pytest.fixture
def slot(spec: StageSpec) -> Iterator[StageHost]:
    slot = StageHost(lambda job: job(), MemoryNetwork())
    slot.load(spec, lambda done, total: None)
    yield slot
    slot.unload()


def outbox(slot: StageHost) -> Outbox:
    box = slot.outbox(EPOCH, Line.URGENT)
    assert box is not None
    return box


def replies(slot: StageHost, *messages: bytes) -> list[Frame]:
    """Return the frames that came out for these messages."""
    box = outbox(slot)
    for message in messages:
        slot.received(message)
    box.close()
    return [decode(message) for message in box]


def decode_step(number: int, sequence: int, token: int, *edits: Join | Leave) -> Frame:
    return Frame(EPOCH, 0, number, edits, Step(Compute.DECODE, (sequence,), ((token,),)))


JOIN = Join(1, 1, SamplingParams())


def test_a_frame_comes_back_as_a_token_with_its_timing(slot: StageHost) -> None:
    (reply,) = replies(slot, encode(decode_step(0, 1, 5, JOIN)))
    assert reply.number == 0
    assert [(s.sequence, s.position) for s in reply.samples] == [(1, 1)]
    assert [t.stage for t in reply.timings] == [0]
    assert reply.timings[0].compute_us > 0
    assert slot.sequences == 1


def test_stale_frames_are_dropped(slot: StageHost, caplog: pytest.LogCaptureFixture) -> None:
    stale = replace(decode_step(0, 1, 5, JOIN), epoch=EPOCH - 1)
    (reply,) = replies(slot, encode(stale), encode(decode_step(3, 1, 5, JOIN)))
    assert reply.number == 3
    assert "frame of another epoch dropped epoch=10 loaded=11" in caplog.text


def test_bytes_that_are_no_frame_break_the_ring_off(slot: StageHost, caplog: pytest.LogCaptureFixture) -> None:
    """A frame is missing then, so nothing after it could be right; the one who pulls sees the end at once."""
    box = outbox(slot)
    slot.received(encode(decode_step(0, 1, 5, JOIN)))
    slot.received(b"nonsense")
    assert [decode(message).number for message in box] == [0]
    assert "claims a header" in caplog.text


def test_a_step_that_fails_goes_on_as_an_error_and_harms_nobody_else(slot: StageHost) -> None:
    other = Join(2, 1, SamplingParams())
    failed, fine = replies(slot, encode(decode_step(0, 1, 10**6, JOIN)), encode(decode_step(1, 2, 5, other)))
    assert failed.error is not None
    assert (failed.error.stage, failed.error.reason) == (0, "BAD_FRAME")
    assert "1000000" in failed.error.sentence
    assert fine.error is None
    assert len(fine.samples) == 1


def prefill(number: int, sequence: int, tokens: int, *edits: Join | Leave) -> Frame:
    return Frame(EPOCH, 1, number, edits, Step(Compute.PREFILL, (sequence,), (tuple(range(tokens)),)))


def test_a_decode_frame_goes_before_prefill_frames_that_wait(spec: StageSpec) -> None:
    """Both are there before the stage gets to work; each sequence's tokens are what they are without the other."""

    def run(*messages: bytes) -> list[Frame]:
        jobs: list[Callable[[], None]] = []
        slot = StageHost(jobs.append, MemoryNetwork())
        slot.load(spec, lambda done, total: None)
        box = outbox(slot)
        for message in messages:
            slot.received(message)
        for job in jobs:
            job()
        slot.unload()
        return [decode(message) for message in box]

    joins = encode(Frame(EPOCH, 0, 0, (JOIN, Join(2, 9, SamplingParams()))))
    chunk, more = encode(prefill(1, 2, 4)), encode(prefill(2, 2, 4))
    token, last = encode(decode_step(3, 1, 5)), encode(decode_step(4, 2, 6))
    together = run(joins, chunk, more, token, last)
    assert [f.number for f in together] == [0, 3, 1, 2, 4]
    alone = {f.number: f.samples for f in (*run(joins, chunk, more, last), *run(joins, token))}
    assert {f.number: f.samples for f in together} == alone


def test_a_command_waits_for_one_frame_however_many_come(spec: StageSpec) -> None:
    """A saturated stage: for every frame that goes out another two come in. There is one job for all of them."""
    jobs: deque[Callable[[], None]] = deque()
    slot = StageHost(jobs.append, MemoryNetwork())
    slot.load(spec, lambda done, total: None)
    number, most = 0, 0
    carried_out: list[int] = []
    for turn in range(20):
        for _ in range(2):
            slot.received(encode(decode_step(number, 1, 5, *([] if number else [JOIN]))))
            number += 1
        if turn == 10:
            jobs.append(lambda: carried_out.append(1))
        most = max(most, len(jobs))
        jobs.popleft()()
        if turn == 11:
            assert carried_out
    slot.unload()
    assert most <= 2


def test_every_frame_is_run_whatever_came_between(slot: StageHost) -> None:
    frames = [decode_step(i, 1, 5, *([] if i else [JOIN])) for i in range(9)]
    assert [f.number for f in replies(slot, *map(encode, frames))] == list(range(9))


def test_large_tensors_travel_apart_and_are_put_together_again(spec: StageSpec) -> None:
    """Whichever arrives first, head or body; and a small frame that came meanwhile has been answered."""
    first = StageHost(lambda job: job(), MemoryNetwork())
    long = replace(spec, count=2, max_context=1024)
    first.load(replace(long, layers=LayerRange(0, 2)), lambda done, total: None)
    tokens = tuple(i % 50 for i in range(600))
    urgent, bulk = outbox(first), first.outbox(EPOCH, Line.BULK)
    assert bulk is not None
    first.received(encode(Frame(EPOCH, 0, 0, (JOIN, Join(2, 999, SamplingParams())))))
    first.received(encode(Frame(EPOCH, 1, 1, (), Step(Compute.PREFILL, (2,), (tokens,)))))
    first.received(encode(decode_step(2, 1, 5)))
    first.received(encode(decode_step(3, 2, 5)))
    first.unload()
    heads, (body,) = list(urgent), list(bulk)
    assert len(body) >= 600 * 32 * 4 > max(map(len, heads))
    orders = []
    for messages in ([body, *heads], [*heads, body]):
        second = StageHost(lambda job: job(), MemoryNetwork())
        second.load(replace(long, index=1, layers=LayerRange(2, 4)), lambda done, total: None)
        answers = replies(second, *messages)
        second.unload()
        orders.append([f.number for f in answers])
        assert all(f.error is None for f in answers)
        assert sorted(orders[-1]) == [0, 1, 2, 3]
    assert orders == [[0, 1, 2, 3], [0, 2, 1, 3]]


def test_a_body_that_fits_no_head_breaks_the_ring_off(slot: StageHost, caplog: pytest.LogCaptureFixture) -> None:
    box = outbox(slot)
    frame = replace(prefill(0, 1, 1, JOIN), tensors=(Tensor("float32", (40_000,), bytes(160_000)),))
    head, _ = pack(frame)
    _, body = pack(replace(frame, tensors=(Tensor("float32", (39_999,), bytes(159_996)),)))
    slot.received(head.message)
    slot.received(body.message)
    assert list(box) == []
    assert "tensors need" in caplog.text


def test_unloading_frees_everything_and_closes_the_outbox(slot: StageHost) -> None:
    box = outbox(slot)
    slot.unload()
    assert list(box) == []
    assert slot.epoch == 0
    assert slot.sequences == 0
    assert slot.outbox(EPOCH, Line.URGENT) is None
    slot.received(encode(decode_step(0, 1, 5, JOIN)))


def test_another_epoch_of_the_same_slice_reads_no_weight_and_forgets_every_sequence(
    slot: StageHost, spec: StageSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = outbox(slot)
    slot.received(encode(decode_step(0, 1, 5, JOIN)))
    monkeypatch.setattr(slot_module, "load_stage", None)
    steps: list[tuple[int, int]] = []
    slot.load(replace(spec, epoch=EPOCH + 1), lambda done, total: steps.append((done, total)))
    assert steps
    assert steps[0][0] == steps[0][1] > 0
    assert [decode(message).number for message in first] == [0]
    assert (slot.epoch, slot.sequences) == (EPOCH + 1, 0)
    with pytest.raises(StaleEpoch, match="epoch 12 is loaded"):
        slot.load(spec, lambda done, total: None)


def test_a_fence_drops_what_waits_and_keeps_the_weights(spec: StageSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: deque[Callable[[], None]] = deque()
    slot = StageHost(jobs.append, MemoryNetwork())
    slot.load(spec, lambda done, total: None, term=4)
    box = outbox(slot)
    assert slot.term == 4
    for number in range(3):
        slot.received(encode(decode_step(number, 1, 5, *([] if number else [JOIN]))))
    jobs.popleft()()
    slot.close_streams()
    assert (slot.epoch, slot.term, slot.outbox(EPOCH, Line.URGENT)) == (0, 0, None)
    while jobs:
        jobs.popleft()()
    slot.end_epoch()
    assert [decode(message).number for message in box] == [0]
    monkeypatch.setattr(slot_module, "load_stage", None)
    slot.load(replace(spec, epoch=EPOCH + 1), lambda done, total: None, term=5)
    assert (slot.epoch, slot.term, slot.sequences) == (EPOCH + 1, 5, 0)
    slot.unload()


def test_links_are_checked(slot: StageHost) -> None:
    with pytest.raises(StaleEpoch, match="epoch 11 is loaded"):
        slot.link(EPOCH + 1, "")
    with pytest.raises(LinkFailed, match="nothing listens there"):
        slot.link(EPOCH, "gone:1")


def test_a_model_that_is_not_here_is_said_so(spec: StageSpec) -> None:
    slot = StageHost(lambda job: job(), MemoryNetwork())
    elsewhere = replace(spec.model, name="no/such-model", path=str(Path("no") / "such" / "folder"))
    with pytest.raises(ModelDiffers, match="no copy of no/such-model"):
        slot.load(replace(spec, model=elsewhere), lambda done, total: None)
    with pytest.raises(ModelDiffers):
        slot.load(replace(spec, model=replace(spec.model, fingerprint="0" * 64)), lambda done, total: None)


def test_a_training_measures_its_own_peak_of_memory_and_the_engine_keeps_its(slot: StageHost) -> None:
    before = 2**26
    mx.eval(mx.zeros(before // 4))
    options = TrainingOptions.of({"train": True, "num_layers": 1}).to_json()
    tokens, lengths = Tensor("int32", (1, 4), bytes(16)), Tensor("int32", (1, 2), b"\1\0\0\0\3\0\0\0")
    prepare = TrainingCommand(EPOCH, 1, Task.PREPARE, options=options)
    forward = TrainingCommand(EPOCH, 2, Task.FORWARD, 1, train=True, update=True, tensors=(tokens, lengths))
    box = outbox(slot)
    for command in (prepare, forward):
        slot.received(encode_command(command))
    box.close()
    _, reply = [decode_reply(message) for message in box]
    assert reply.error is None
    assert 0 < reply.peak_bytes < before <= slot.memory_peak


def test_each_reader_of_a_stage_gets_every_frame(spec: StageSpec) -> None:
    slot = StageHost(lambda job: job(), MemoryNetwork())
    slot.load(replace(spec, readers=2), lambda done, total: None)
    boxes = [slot.outbox(EPOCH, Line.URGENT, reader) for reader in range(3)]
    assert boxes[2] is None
    slot.received(encode(decode_step(0, 1, 5, JOIN)))
    slot.unload()
    found = [list(box) for box in boxes if box]
    assert found[0] == found[1]
    assert len(found[0]) == 1


class Fails:
    """A stage of a group, at the wish of a test: one rank's step fails, or it only follows."""

    def __init__(self, spec: StageSpec, error: Exception | None = None) -> None:
        self.spec, self._error = spec, error
        self.sequences, self.adapters = 0, ()

    def step(self, frame: Frame) -> Frame:
        if self._error:
            raise self._error
        return replace(frame, edits=(), step=None)

    def close(self) -> None:
        """It holds nothing."""


@pytest.mark.parametrize(("rank", "error", "sent"), [(0, None, 1), (1, None, 0), (0, RankFailed("a peer is gone"), 0)])
def test_rank_0_alone_sends_on_and_a_rank_that_fails_ends_the_epoch(
    rank: int, error: Exception | None, sent: int, spec: StageSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that could not do what the others did must not go on, nor pass it off as a request's error."""
    seat, ranked = Seat(rank, 2), replace(spec, rank=rank, ranks=2)
    monkeypatch.setattr(slot_module, "load_stage", lambda *_: Fails(ranked, error))
    slot = StageHost(lambda job: job(), MemoryNetwork())
    with pytest.raises(StageFailed, match="not rank"):
        slot.load(ranked, lambda done, total: None)
    slot.load(ranked, lambda done, total: None, group=seat)
    box = outbox(slot)
    slot.received(encode(decode_step(0, 1, 5, JOIN)))
    if error is None:
        box.close()
    assert len(list(box)) == sent
    with pytest.raises(PrefixMissing):
        slot.open_prefixes(EPOCH, "e", (), anonymous=True)
    slot.unload()
