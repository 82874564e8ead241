"""Coordinators that die: the next one reads no weights and continues every kind of answer where it stopped."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

import pytest

from cluster.client import AsyncClient, Client
from cluster.client.streams import Stream
from cluster.coordinator.identity import state_folder
from cluster.core.errors import MacpipeError, RequestEnded
from faults.fleet import Fleet
from integration.daemons import free_port

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("faults")]
KINDS: dict[str, Callable[[Client, str], Stream]] = {
    "greedy": lambda client, name: client.stream([5, 6, 7], max_tokens=60, ignore_eos=True, request_id=name),
    "samples": lambda client, name: client.stream(
        [8, 9], max_tokens=60, ignore_eos=True, samples=3, temperature=0.8, seed=4, request_id=name
    ),
    "grammar": lambda client, name: client.stream(
        "Once", max_tokens=60, regex="[a-z ]{150,200}", temperature=0.8, seed=5, request_id=name
    ),
    "chat": lambda client, name: client.stream_chat(
        [("user", "What is a pipeline?")], max_tokens=60, ignore_eos=True, logprobs=True, request_id=name
    ),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two workers without a spare, and a coordinator with a journal."""
    fleet = Fleet(tmp_path_factory.mktemp("small"), stages=2, names=("eve", "fay"), options=("--journal", "never"))
    try:
        yield fleet
    finally:
        fleet.close()


@pytest.fixture(scope="module")
def expected(small: Fleet) -> dict[str, list[list[int]]]:
    """The tokens of each kind of answer, undisturbed."""
    return {kind: Answer(ask(small.client, f"{kind}-undisturbed")).follow().whole for kind, ask in KINDS.items()}


class Answer:
    """The result of one request: the tokens of each sample, and their text."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.said: dict[int, list[int]] = {}
        self.texts: dict[int, str] = {}
        self.begun = threading.Event()

    def follow(self, each: Callable[[int], None] = lambda count: None) -> Answer:
        """Read to the end, or until the coordinator is gone."""
        with suppress(MacpipeError):
            for token in self.stream:
                self.said.setdefault(token.sample, []).append(token.token)
                self.begun.set()
                self.texts[token.sample] = self.texts.get(token.sample, "") + token.text
                each(len(self.said[0]) if 0 in self.said else 0)
        return self

    @property
    def whole(self) -> list[list[int]]:
        return [self.said[sample] for sample in sorted(self.said)]


def resumed(address: str, name: str, offsets: list[int]) -> list[list[int]]:
    """The rest of an answer by the asynchronous client, a list a sample."""
    rest: list[list[int]] = [[] for _ in offsets]

    async def read() -> None:
        async with AsyncClient(address, timeout_s=60) as client:
            async for token in client.resume(name, offsets if len(offsets) > 1 else offsets[0]):
                rest[token.sample].append(token.token)

    asyncio.run(read())
    return rest


def wait_recorded(small: Fleet, answers: Mapping[str, Answer]) -> None:
    """Wait until the journal has what has not ended: its own thread writes it, perhaps after the first tokens."""
    path = state_folder(small.cluster.folder / "coordinator", small.cluster.name) / "journal"
    while not all(a.stream.finish or request.encode() in path.read_bytes() for request, a in answers.items()):
        time.sleep(0.01)


def survives(small: Fleet, number: int, expected: dict[str, list[list[int]]]) -> None:
    """Kill the coordinator while an answer of every kind is under way, start it again, and resume them all."""
    kill_at = 3 + (9 * number) % 50
    port = int(small.address.rpartition(":")[2])
    answers = {kind: Answer(ask(small.client, f"{kind}-{number}")) for kind, ask in KINDS.items()}

    def struck(count: int) -> None:
        if count == kill_at:
            assert all(answer.begun.wait(60) for answer in answers.values())  # what was not accepted cannot be resumed
            wait_recorded(small, {f"{kind}-{number}": answer for kind, answer in answers.items()})
            small.serve.process.kill()
            for answer in answers.values():
                answer.stream.cancel()  # these clients go as well: they would wait for the next coordinator

    readers = [threading.Thread(target=a.follow) for kind, a in answers.items() if kind != "greedy"]
    for reader in readers:
        reader.start()
    answers["greedy"].follow(struck)
    for reader in readers:
        reader.join(60)
    small.serve.process.wait(10)
    small.client.close()
    small.start_coordinator(port)
    assert "reading, 0%" not in small.serve.said()
    for kind, answer in answers.items():
        if answer.stream.finish:
            assert answer.whole == expected[kind]
            continue
        said = [answer.said.get(sample, []) for sample in range(len(expected[kind]))]
        offsets = [max(0, len(s) - number % 3) for s in said]  # a client may have lost its last tokens, too
        rest = resumed(small.address, f"{kind}-{number}", offsets)
        assert [s[:n] + r for s, n, r in zip(said, offsets, rest, strict=True)] == expected[kind], kind
        assert resumed(small.address, f"{kind}-{number}", offsets) == rest, "its end may be lost as well"


def test_a_coordinator_that_dies_is_followed_by_one_that_reads_no_weight_and_resumes(
    small: Fleet, expected: dict[str, list[list[int]]]
) -> None:
    engines = [p.engine for p in small.parties.values()]
    survives(small, 1, expected)  # its client has lost the last token, too
    assert [p.engine for p in small.parties.values()] == engines


def test_a_client_with_two_addresses_does_not_notice_that_its_coordinator_dies(
    small: Fleet, expected: dict[str, list[list[int]]]
) -> None:
    port, struck = free_port(), threading.Event()
    with Client(f"{small.address},127.0.0.1:{port}", timeout_s=200) as client:
        answers = {f"{kind}-followed": Answer(ask(client, f"{kind}-followed")) for kind, ask in KINDS.items()}
        readers = [threading.Thread(target=a.follow) for i, a in answers.items() if i != "greedy-followed"]
        strike = threading.Thread(
            target=answers["greedy-followed"].follow, args=(lambda count: struck.set() if count == 5 else None,)
        )
        for reader in (*readers, strike):
            reader.start()
        assert struck.wait(120)
        assert all(answer.begun.wait(60) for answer in answers.values())
        wait_recorded(small, answers)
        small.serve.process.kill()
        small.serve.process.wait(10)
        small.client.close()
        small.start_coordinator(port)
        for reader in (*readers, strike):
            reader.join(120)
        for kind, said in expected.items():
            assert answers[f"{kind}-followed"].stream.finish, kind
            assert answers[f"{kind}-followed"].whole == said, kind


def test_an_answer_whose_call_breaks_is_kept_for_the_client_that_calls_again(small: Fleet) -> None:
    with Client(f"{small.address},127.0.0.1:1", timeout_s=60) as client:

        def ask(name: str) -> Stream:
            return client.stream([3, 4], max_tokens=200, ignore_eos=True, request_id=name)

        whole = ask("whole").completion().tokens
        lost = ask("lost")
        begun = [token.token for _, token in zip(range(5), lost, strict=False)]
        reading = iter(ask("live"))  # it stays open, as if the cable had been pulled
        first = next(reading)
        for name, has in (("lost", begun), ("live", [first.token])):
            rest = [token.token for token in small.client.resume(name, len(has))]
            assert (*has, *rest) == whole
        assert [t.token for t in small.client.resume("whole", 197)] == list(whole[197:]), "its end may be lost as well"
        ended = ask("ended")
        ended.wait_accepted()
        small.client.abort("ended")
        with pytest.raises(RequestEnded):
            list(small.client.resume("ended"))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_twenty_coordinators_die_and_no_answer_is_lost(small: Fleet, expected: dict[str, list[list[int]]]) -> None:
    engines = [p.engine for p in small.parties.values()]
    for number in range(2, 22):
        survives(small, number, expected)
    assert [p.engine for p in small.parties.values()] == engines
