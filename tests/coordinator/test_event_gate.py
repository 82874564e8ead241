"""Events wait until the records before them are stored elsewhere: in order, whichever thread sent them."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from cluster.coordinator.answer_queue import AnswerQueue, EventBatch
from cluster.coordinator.event_gate import EventGate
from cluster.coordinator.journal import Journal
from cluster.coordinator.journal_writer import JournalWriter
from cluster.core.errors import MacpipeError, NotLeader
from cluster.core.request import Accepted, FinishEvent, FinishReason, Request, SamplingParams, TokenEvent, Usage

END = FinishEvent(FinishReason.LENGTH, "", Usage(3, 2), 1.0, 1.0)


def token(index: int) -> TokenEvent:
    return TokenEvent(index, 7, "a", 0.0, ())


async def turns() -> None:
    """Let everything run that is due on this loop."""
    for _ in range(5):
        await asyncio.sleep(0)


class Reader:
    """An answer whose events are written to ``post``, and what its reader got."""

    def __init__(self, post: EventBatch) -> None:
        self.queue, self.got = AnswerQueue(post), list[object]()
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for event in self.queue:
                self.got.append(event)
        except MacpipeError as e:
            self.got.append(e)


@pytest.mark.anyio
async def test_events_of_two_threads_pass_in_order_once_their_records_are_stored() -> None:
    newest = [0]
    gate = EventGate(lambda: newest[0])
    first, second = EventBatch(), EventBatch()
    first.gate = second.gate = gate
    reader = Reader(first)
    for number, event in ((1, Accepted()), (2, token(0))):
        newest[0] = number
        reader.queue.put(event)
        first.deliver()
    await turns()
    assert not reader.got
    gate.open_to(1)
    await turns()
    assert reader.got == [Accepted()]
    reader.queue.move(second, lambda _: None)
    newest[0] = 3

    def write() -> None:
        reader.queue.put(token(1))
        reader.queue.put(END)
        second.deliver()

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    gate.open_to(2)
    gate.open_to(1)
    await turns()
    assert reader.got == [Accepted(), token(0)]
    gate.open_to(3)
    await turns()
    assert reader.got == [Accepted(), token(0), token(1), END]


@pytest.mark.anyio
async def test_an_answer_that_fails_gets_its_tokens_first() -> None:
    gate = EventGate(lambda: 1)
    post = EventBatch()
    post.gate = gate
    reader, why = Reader(post), MacpipeError("the model left")
    reader.queue.put(token(0))
    post.deliver()
    reader.queue.fail(why)
    await turns()
    assert not reader.got
    gate.open_to(1)
    await turns()
    assert reader.got == [token(0), why]


@pytest.mark.anyio
async def test_once_it_has_ended_nothing_that_was_held_leaves_but_errors() -> None:
    gate, why, own = EventGate(lambda: 1), NotLeader("it does not lead any more"), MacpipeError("its own")
    post = EventBatch()
    post.gate = gate
    finished, failed, late = Reader(post), Reader(post), Reader(post)
    finished.queue.put(token(0))
    finished.queue.put(END)
    failed.queue.put(token(0))
    failed.queue.put(own)
    post.deliver()
    gate.end(why)
    late.queue.put(token(0))
    post.deliver()
    await turns()
    assert (finished.got, failed.got, late.got) == ([why], [own], [why])


class Elsewhere:
    """Copies of a journal that are stored when a test says so."""

    def __init__(self) -> None:
        self.records, self.numbers = list[bytes](), list[tuple[int, str]]()
        self.changed = threading.Condition()

    def append(self, records: bytes) -> None:
        self.records.append(records)

    def replace(self, content: bytes) -> None:
        raise AssertionError("it is small")

    def written(self, number: int, problem: str) -> None:
        with self.changed:
            self.numbers.append((number, problem))
            self.changed.notify_all()

    def wait_for(self, number: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: (number, "") in self.numbers, 10)


def test_a_batch_has_a_number_and_its_records_are_given_before_it(tmp_path: Path) -> None:
    elsewhere = Elsewhere()
    writer = JournalWriter(Journal(tmp_path / "j"), replication=elsewhere, gated=True)
    loop = writer.open_loop("m", "f")
    loop.record_opened(Request("a", (1, 2), SamplingParams(), 20, client="me"), ())
    loop.flush()
    elsewhere.wait_for(1)
    assert len(elsewhere.records) == 1
    taken = list[bytes]()
    assert writer.copy(taken.append)
    elsewhere.wait_for(2)
    writer.freeze()
    loop.record_ended("a")
    loop.flush()
    elsewhere.wait_for(4)
    writer.close()
    assert len(elsewhere.records) == 1, "what a leader ends when it stops is not ended for the next one"
    (tmp_path / "copy").write_bytes(taken[0])
    for path in (tmp_path / "j", tmp_path / "copy"):
        assert Journal(path).take("a", "me")


@pytest.mark.anyio
async def test_a_request_is_not_accepted_once_nothing_is_recorded_any_more(tmp_path: Path) -> None:
    """The next leader would not know it, though all copies have stored the batch, which is empty."""
    elsewhere, why = Elsewhere(), NotLeader("it hands over")
    writer = JournalWriter(Journal(tmp_path / "j"), replication=elsewhere, gated=True)
    loop, post = writer.open_loop("m", "f"), EventBatch()
    assert writer.gate
    post.gate = writer.gate
    early, late = Reader(post), Reader(post)
    for number, (name, reader) in enumerate((("early", early), ("late", late))):
        loop.record_opened(Request(name, (1, 2), SamplingParams(), 20, client="me"), ())
        loop.flush()
        reader.queue.put(Accepted())
        post.deliver()
        if not number:
            writer.freeze()
    await asyncio.to_thread(elsewhere.wait_for, 3)
    writer.gate.open_to(3)
    await turns()
    assert (early.got, late.got) == ([Accepted()], [])
    writer.gate.end(why)
    await turns()
    assert late.got == [why]
    writer.close()
    assert Journal(tmp_path / "j").take("early", "me")
    assert Journal(tmp_path / "j").take("late", "me") is None


def wait(event: threading.Event) -> None:
    assert event.wait(10)


def test_what_was_recorded_last_is_reported_when_the_writer_is_closed(tmp_path: Path) -> None:
    elsewhere, go_on = Elsewhere(), threading.Event()
    writer = JournalWriter(Journal(tmp_path / "j"), replication=elsewhere, gated=True)
    loop = writer.open_loop("m", "f")
    writer.queue([lambda _: wait(go_on)])  # so that the rest is written in one go with the end
    loop.record_opened(Request("a", (1, 2), SamplingParams(), 20, client="me"), ())
    loop.flush()
    closing = threading.Thread(target=writer.close)
    closing.start()
    go_on.set()
    closing.join(10)
    assert elsewhere.numbers[-1][0] >= 2
    assert elsewhere.records
