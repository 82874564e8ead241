"""Several engine loops share a journal: each request comes back once, with what answered it, and no loop waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from cluster.coordinator.journal import Journal
from cluster.coordinator.journal_writer import JournalWriter, LoopJournal
from cluster.coordinator.request_records import HEADER, as_data, pack_record
from cluster.core.request import Request, SamplingParams


def request(name: str) -> Request:
    return Request(name, (1, 2, 3), SamplingParams(), 20, client="me")


@contextmanager
def writing(path: Path) -> Iterator[JournalWriter]:
    writer = JournalWriter(Journal(path))
    try:
        yield writer
    finally:
        writer.close()


def say(loop: LoopJournal, name: str, *tokens: int) -> None:
    for token in tokens:
        loop.record_token(name, token, 0)
    loop.flush()


def found(path: Path, name: str) -> tuple[str, str, list[list[int]]] | None:
    kept = Journal(path).take(name, "me")
    return (kept.answerer.deployment, kept.answerer.fingerprint, kept.tokens) if kept else None


def test_requests_of_two_loops_come_back_with_what_answered_them(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with writing(path) as writer:
        large, small = writer.open_loop("large", "f1"), writer.open_loop("small", "f2")
        for loop, name in ((large, "a"), (small, "b"), (small, "ended")):
            loop.record_opened(request(name), ())
        say(large, "a", 7, 8)
        say(small, "b", 9)
        small.record_ended("ended")
        say(small, "a", 1)
    assert found(path, "a") == ("large", "f1", [[7, 8]]), "a token of another loop was taken"
    assert found(path, "b") == ("small", "f2", [[9]])
    assert found(path, "ended") is None


def test_a_request_that_moves_to_another_loop_is_not_ended_by_the_first(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with writing(path) as writer:
        first, second = writer.open_loop("m", "f"), writer.open_loop("m", "f")
        first.record_opened(request("a"), ())
        say(first, "a", 7)
        second.record_opened(request("a"), ((7,),))
        say(second, "a", 8)
        first.record_ended("a")
        say(first, "a", 1)
        say(second, "a", 9)
    assert found(path, "a") == ("m", "f", [[7, 8, 9]])


def test_no_loop_waits_for_a_disk_and_what_lost_records_does_not_come_back(tmp_path: Path) -> None:
    path, reached, go_on = tmp_path / "j", Event(), Event()

    class Slow(Journal):
        def flush(self) -> None:
            reached.set()
            go_on.wait(10)
            super().flush()

    writer = JournalWriter(Slow(path), most_batches=2)
    slow, other = writer.open_loop("slow", "f"), writer.open_loop("other", "f")
    try:
        other.record_opened(request("other"), ())
        other.flush()
        assert reached.wait(10)
        slow.record_opened(request("gap"), ())
        say(slow, "gap", 1)
        say(slow, "gap", 2)
        assert writer.problem == ""
        say(slow, "gap", 3)
        assert "does not keep up" in writer.problem
    finally:
        go_on.set()
        while not writer._batches.empty():
            reached.clear()
            reached.wait(0.01)
    slow.record_opened(request("later"), ())
    say(slow, "gap", 4)
    say(slow, "later", 5)
    writer.close()
    assert found(path, "gap") is None, "an answer with a gap came back"
    assert found(path, "later") == ("slow", "f", [[5]])
    assert found(path, "other") == ("other", "f", [[]])


def test_a_record_of_an_older_version_names_no_model(tmp_path: Path) -> None:
    path = tmp_path / "j"
    now = 2.0**40
    old = pack_record(0, "a", now, as_data(request("a")), [[4]])
    path.write_bytes(HEADER + old)
    assert found(path, "a") == ("", "", [[4]])
    for wrong in ((5, "f"), ("m", None), ("m", "f", "more")):
        path.write_bytes(HEADER + pack_record(0, "b", now, as_data(request("b")), [[4]], *wrong))
        assert found(path, "b") is None
