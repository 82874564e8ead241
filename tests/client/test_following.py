"""Clients whose coordinator is lost or hands over: they find who leads, and their answers continue there."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest

from client.scripted import Coordinator, Script, answer_of, finish_event, prompt_event, token_event
from cluster.client import AsyncClient, Client, follow_schedule
from cluster.client.follow_schedule import FollowSchedule
from cluster.client.received_answer import ReceivedAnswer
from cluster.core import errors
from cluster.core.follow_limits import FOLLOW_PAUSE_S, FOLLOW_S, MAX_COORDINATORS, MAX_FOLLOW_PAUSE_S, PASS_WAIT_S
from cluster.core.known_tokens import TokenDigest
from cluster.transport.rich_errors import abort
from cluster.v1 import inference_pb2 as pb

Ask = Callable[..., Any]
NOBODY = "127.0.0.1:1"


def blocking(addresses: str, method: str, *given: Any, **options: Any) -> Any:
    with Client(addresses) as client:
        result = getattr(client, method)(*given, **options)
        return result.wait() if method == "load" else result


def awaited(addresses: str, method: str, *given: Any, **options: Any) -> Any:
    async def ask() -> Any:
        async with AsyncClient(addresses) as client:
            result = getattr(client, method)(*given, **options)
            return await (result.wait() if method == "load" else result)

    return asyncio.run(ask())


@pytest.fixture(params=[blocking, awaited], ids=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    kind: Ask = request.param
    return kind


@pytest.fixture
def other() -> Iterator[Coordinator]:
    with Coordinator() as running:
        yield running


def both(first: Coordinator, second: Coordinator) -> str:
    return f"{first.address}, {second.address}"


def digest(*tokens: int) -> bytes:
    found = TokenDigest()
    for token in tokens:
        found.add(token)
    return found.digest()


def breaks_after(
    count: int, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    """A whole answer, but the connection breaks after so many events."""

    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        for event in answer_of(request)[:count]:
            yield event
        await context.abort(code, "recvmsg: Connection reset by peer")

    return answer


async def rest(request: Any, context: Any) -> AsyncIterator[Any]:
    """The rest of the whole answer."""
    begun = pb.GenerateRequest(request_id=request.request_id)
    prompt, *tokens, finish = answer_of(begun)
    yield prompt
    for token in tokens[(request.offsets or [0])[0] :]:
        yield token
    yield finish


def requests(coordinator: Coordinator) -> list[str]:
    return [type(seen).__name__ for seen in coordinator.script.seen]


@pytest.mark.parametrize("method", ["generate", "chat"])
def test_an_answer_continues_at_the_next_coordinator(
    ask: Ask, coordinator: Coordinator, other: Coordinator, method: str
) -> None:
    coordinator.script.answer, other.script.rest = breaks_after(3), rest
    prompt = "Why?" if method == "generate" else [("user", "Why?")]
    done = ask(both(coordinator, other), method, prompt)
    assert done.text == "Macs pass layers on."
    assert done.tokens == (100, 101, 102, 103, 104)
    (sent,), (resumed,) = coordinator.script.seen, other.script.seen
    assert sent.resumable
    assert len(sent.request_id) == 32
    assert resumed == pb.ResumeRequest(request_id=sent.request_id, offsets=[2], digests=[digest(100, 101)])


def test_an_answer_continues_if_a_coordinator_that_stops_cancels_its_call(
    ask: Ask, coordinator: Coordinator, other: Coordinator
) -> None:
    coordinator.script.answer, other.script.rest = breaks_after(3, grpc.StatusCode.CANCELLED), rest
    assert ask(both(coordinator, other), "generate", "Why?").text == "Macs pass layers on."
    assert requests(other) == ["ResumeRequest"]


def test_it_continues_at_the_same_coordinator_once_that_is_back(ask: Ask, coordinator: Coordinator) -> None:
    coordinator.script.answer, coordinator.script.rest = breaks_after(2), rest
    assert ask(f"{coordinator.address},{NOBODY}", "generate", "Why?", request_id="mine").text == "Macs pass layers on."
    assert requests(coordinator) == ["GenerateRequest", "ResumeRequest"]


def test_a_request_that_reached_nobody_is_sent_to_the_next_address(ask: Ask, coordinator: Coordinator) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        assert ask(f"{address},{coordinator.address}", "generate", "Why?").text == "Macs pass layers on."
    assert requests(coordinator) == ["GenerateRequest"]


def test_a_request_that_was_lost_before_it_was_accepted_is_sent_anew_if_no_coordinator_has_it(
    ask: Ask, coordinator: Coordinator, other: Coordinator
) -> None:
    coordinator.script.answer = breaks_after(0)
    assert ask(both(coordinator, other), "generate", "Why?", request_id="mine").text == "Macs pass layers on."
    assert requests(other) == ["ResumeRequest", "GenerateRequest"]
    assert other.script.seen[0] == pb.ResumeRequest(request_id="mine")


def test_a_request_to_a_single_address_is_sent_again_once_somebody_leads(ask: Ask, coordinator: Coordinator) -> None:
    async def refuses(request: Any, context: Any) -> AsyncIterator[Any]:
        coordinator.script.answer = Script().answer
        await abort(context, errors.NotLeader("mac-2 takes its place"))
        yield

    for method, prompt in (("generate", "Why?"), ("chat", [("user", "Why?")])):
        coordinator.script.answer = refuses
        assert ask(coordinator.address, method, prompt).text == "Macs pass layers on."
    assert requests(coordinator) == [
        *("GenerateRequest", "ResumeRequest", "GenerateRequest"),
        *("ChatRequest", "ResumeRequest", "ChatRequest"),
    ]


def test_an_answer_continues_at_a_single_address_that_is_bound_anew(ask: Ask, coordinator: Coordinator) -> None:
    """Nobody listens there for a moment, as when a leader that has handed over begins to stand by."""
    refused = threading.Event()

    async def hands_over(request: Any, context: Any) -> AsyncIterator[Any]:
        for event in answer_of(request)[:3]:
            yield event
        refused.set()
        await abort(context, errors.NotLeader("mac-2 takes its place"))

    coordinator.script.answer = hands_over
    port = int(coordinator.address.rpartition(":")[2])
    done: list[str] = []
    asking = threading.Thread(target=lambda: done.append(ask(coordinator.address, "generate", "Why?").text))
    asking.start()
    assert refused.wait(10)
    coordinator.stop()
    time.sleep(0.5)  # in which calls are refused
    with Coordinator(port) as again:
        again.script.rest = rest
        asking.join(10)
        assert done == ["Macs pass layers on."]
        assert requests(again) == ["ResumeRequest"]


def test_an_answer_that_no_coordinator_has_ends_with_that_error(
    ask: Ask, coordinator: Coordinator, other: Coordinator
) -> None:
    coordinator.script.answer = breaks_after(3)
    with pytest.raises(errors.RequestNotFound, match="mine"):
        ask(both(coordinator, other), "generate", "Why?", request_id="mine")
    assert requests(other) == ["ResumeRequest"]


def test_an_answer_that_the_next_leader_lacks_is_lost_unless_it_had_not_begun(
    ask: Ask, coordinator: Coordinator, other: Coordinator
) -> None:
    async def lost(request: Any, context: Any) -> AsyncIterator[Any]:
        await abort(context, errors.AnswerLost("send the request again"))
        yield

    coordinator.script.answer, other.script.rest = breaks_after(3), lost
    with pytest.raises(errors.AnswerLost, match="send the request again"):
        ask(both(coordinator, other), "generate", "Why?")
    coordinator.script.answer = breaks_after(0)
    assert ask(both(coordinator, other), "generate", "Why?").text == "Macs pass layers on."
    assert requests(other) == ["ResumeRequest", "ResumeRequest", "GenerateRequest"]


def test_a_coordinator_with_other_tokens_continues_nothing(
    ask: Ask, coordinator: Coordinator, other: Coordinator
) -> None:
    async def differs(request: Any, context: Any) -> AsyncIterator[Any]:
        await abort(context, errors.AnswerDiffers("other tokens"))
        yield

    coordinator.script.answer, other.script.rest = breaks_after(3), differs
    with pytest.raises(errors.AnswerDiffers):
        ask(both(coordinator, other), "generate", "Why?")


@pytest.mark.parametrize("error", [errors.NotServing("it loads"), errors.Busy("full", retry_after_s=0.01)])
def test_a_new_leader_is_given_time_to_load_and_to_answer(
    ask: Ask, coordinator: Coordinator, other: Coordinator, error: errors.MacpipeError
) -> None:
    async def soon(request: Any, context: Any) -> AsyncIterator[Any]:
        if len(other.script.seen) < 3:
            await abort(context, error)
        async for event in rest(request, context):
            yield event

    coordinator.script.answer, other.script.rest = breaks_after(3), soon
    assert ask(f"{coordinator.address},{other.address}", "generate", "Why?").text == "Macs pass layers on."


def test_a_leader_that_serves_no_model_is_not_asked_again(
    ask: Ask, coordinator: Coordinator, other: Coordinator
) -> None:
    coordinator.script.refusal = errors.NotServing("no model is loaded")
    for method, given in (("generate", ["Hi"]), ("tokenize", ["Hi"])):
        with pytest.raises(errors.NotServing):
            ask(both(coordinator, other), method, *given)
    assert not other.script.seen


@pytest.mark.parametrize("method", ["models", "cluster", "tokenize", "abort", "unload", "load"])
def test_every_call_finds_who_leads(ask: Ask, coordinator: Coordinator, other: Coordinator, method: str) -> None:
    coordinator.script.refusal = errors.NotLeader("mac-1 stands by", leader=other.address)
    given = ["Hi"] if method in ("tokenize", "abort", "load") else []
    ask(both(coordinator, other), method, *given)
    assert other.script.seen


def test_a_change_that_may_have_been_made_is_not_made_twice(
    ask: Ask, coordinator: Coordinator, other: Coordinator
) -> None:
    coordinator.script.refusal = errors.ConnectionLost("gone")
    with pytest.raises(errors.ConnectionLost):
        ask(both(coordinator, other), "unload")
    assert not other.script.seen
    assert ask(both(coordinator, other), "models")


def test_nobody_at_any_address_is_told_after_one_round(ask: Ask) -> None:
    with pytest.raises(errors.Unreachable, match=r"127\.0\.0\.1:2 "):
        ask(f"{NOBODY},127.0.0.1:2", "generate", "Why?")
    with pytest.raises(errors.Unreachable):
        ask(f"{NOBODY},127.0.0.1:2", "models")


@pytest.mark.parametrize("method", ["cluster", "generate"])
def test_what_a_standby_says_is_told_and_not_that_nobody_answers_elsewhere(
    ask: Ask, coordinator: Coordinator, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_schedule, "FOLLOW_S", 0.3)
    coordinator.script.refusal = errors.NotLeader("none leads now; this Mac cannot read the model")
    given = ["Why?"] if method == "generate" else []
    with pytest.raises(errors.NotLeader, match="cannot read the model"):
        ask(f"{NOBODY},{coordinator.address}", method, *given)


def test_later_calls_go_where_the_last_one_was_answered(coordinator: Coordinator) -> None:
    with Client(f"{NOBODY},{coordinator.address}") as client:
        assert client.address == NOBODY
        client.models()
        assert client.address == coordinator.address


def test_a_client_that_looks_for_a_leader_can_be_stopped(coordinator: Coordinator, other: Coordinator) -> None:
    coordinator.script.answer = breaks_after(2)
    other.script.refusal = errors.NotLeader("nobody leads")
    with Client(f"{other.address},{coordinator.address}") as client:
        other.script.refusal = None
        client.models()
        client._connection.leave(other.address)
        stream = client.stream("Why?")
        stream.wait_accepted()
        coordinator.script.refusal = other.script.refusal = errors.NotLeader("nobody leads")
        stopping = threading.Timer(0.3, stream.cancel)
        stopping.start()
        with pytest.raises(errors.Aborted):
            list(stream)
        stopping.join()


def test_a_deadline_is_that_of_the_whole_answer(ask: Ask, coordinator: Coordinator, other: Coordinator) -> None:
    coordinator.script.answer = breaks_after(2)
    other.script.refusal = coordinator.script.refusal
    other.script.rest = breaks_after(0)
    coordinator.script.rest = breaks_after(0)
    with pytest.raises(errors.DeadlineExceeded):
        ask(both(coordinator, other), "generate", "Why?", timeout_s=0.5)


def test_too_many_and_wrong_addresses_are_told() -> None:
    with pytest.raises(errors.InvalidOption, match=f"at most {MAX_COORDINATORS}"):
        Client(",".join(f"mac-{i}" for i in range(MAX_COORDINATORS + 1)))
    with pytest.raises(errors.InvalidOption, match="not an address"):
        Client("mac-1,")


@pytest.mark.parametrize(("offset", "offsets"), [(2, [4]), (0, [2])])
def test_an_answer_that_is_resumed_continues_at_the_next_coordinator(
    coordinator: Coordinator, other: Coordinator, offset: int, offsets: list[int]
) -> None:
    async def begins(request: Any, context: Any) -> AsyncIterator[Any]:
        prompt, *tokens, _ = answer_of(pb.GenerateRequest(request_id=request.request_id))
        yield prompt
        for token in tokens[offset : offset + 2]:
            yield token
        await context.abort(grpc.StatusCode.UNAVAILABLE, "recvmsg: Connection reset by peer")

    coordinator.script.rest, other.script.rest = begins, rest
    with Client(both(coordinator, other)) as client:
        assert [token.token for token in client.resume("mine", offset)] == list(range(100 + offset, 105))
        known = [b""] if offset else [digest(100, 101)]
        assert other.script.seen == [pb.ResumeRequest(request_id="mine", offsets=offsets, digests=known)]
        coordinator.script.rest = other.script.rest = Script().rest
        with pytest.raises(errors.RequestNotFound):
            list(client.resume("mine", offset))


# The schedule and what an answer has, without a network


def test_all_addresses_are_tried_at_once_and_again_after_a_pause_for_a_minute() -> None:
    now = [0.0]
    schedule = FollowSchedule(3, lambda: now[0])
    pauses = []
    while (pause_s := schedule.pause_s(errors.Unreachable("no"), patient=True)) is not None:
        pauses.append(pause_s)
        now[0] += pause_s
    assert {*pauses[::3], *pauses[1::3]} == {0.0}
    assert all(FOLLOW_PAUSE_S <= pause_s <= MAX_FOLLOW_PAUSE_S for pause_s in pauses[2::3])
    assert FOLLOW_S <= now[0] <= FOLLOW_S + 1.0


def test_an_answer_resets_the_schedule_and_an_impatient_call_makes_one_round() -> None:
    now = 0.0
    schedule = FollowSchedule(2, lambda: now)
    assert schedule.pause_s(errors.NotServing("no"), patient=True) is None
    assert schedule.pause_s(errors.NotLeader("no"), patient=False) == 0.0
    assert schedule.pause_s(errors.NotServing("no"), patient=False)
    for _ in range(4):
        assert schedule.pause_s(errors.Unreachable("no"), patient=False) is not None, "the next one may come yet"
    now = PASS_WAIT_S
    assert schedule.pause_s(errors.Unreachable("no"), patient=False) is None
    never = FollowSchedule(2, lambda: now)
    assert never.pause_s(errors.Unreachable("no"), patient=False) == 0.0
    assert never.pause_s(errors.Unreachable("no"), patient=False) is None, "no coordinator was ever there"
    schedule.reset()
    assert schedule.pause_s(errors.Busy("no"), patient=True) is None
    assert schedule.pause_s(errors.WorkerLost("no"), patient=True) is None


@pytest.mark.parametrize("lost", [errors.ConnectionLost("gone"), errors.NotLeader("it stops")])
def test_nobody_at_a_single_address_is_told_at_once_unless_a_coordinator_was_there(lost: errors.MacpipeError) -> None:
    now = 0.0
    assert FollowSchedule(1, lambda: now).pause_s(errors.Unreachable("no"), patient=False) is None
    schedule = FollowSchedule(1, lambda: now)
    assert schedule.pause_s(lost, patient=True)
    now = PASS_WAIT_S - 0.1
    assert schedule.pause_s(errors.Unreachable("no"), patient=True)
    now = PASS_WAIT_S
    assert schedule.pause_s(errors.Unreachable("no"), patient=True) is None


def test_a_single_coordinator_is_asked_for_a_minute_who_leads() -> None:
    now = 0.0
    schedule = FollowSchedule(1, lambda: now)
    while now < FOLLOW_S:
        assert schedule.pause_s(errors.NotLeader("nobody leads"), patient=False)
        now += 1.0
    assert schedule.pause_s(errors.NotLeader("nobody leads"), patient=False) is None


def test_a_call_ends_with_the_last_error_if_no_coordinator_answered_in_the_last_round() -> None:
    schedule, said, gone = FollowSchedule(2, lambda: 0.0), errors.NotLeader("nobody leads"), errors.Unreachable("no")
    for error, result in ((gone, gone), (said, said), (gone, said), (gone, gone)):
        schedule.pause_s(error, patient=True)
        with pytest.raises(errors.MacpipeError) as raised:
            schedule.end(error)
        assert raised.value is result


def test_what_came_before_is_left_out_of_a_resumed_answer() -> None:
    def piece(start: int, *tokens: int) -> pb.GenerateResponse:
        return pb.GenerateResponse(
            prompt_logprobs=pb.PromptLogprobs(start=start, tokens=[pb.PromptToken(token=t) for t in tokens])
        )

    progress = ReceivedAnswer("r")
    assert progress.resume_request() == pb.ResumeRequest(request_id="r")
    for event in (prompt_event(), piece(0, 1, 2), token_event(0, "Mac"), finish_event(1)):
        assert progress.take(event) is event
    assert progress.resume_request() == pb.ResumeRequest(request_id="r", offsets=[1], digests=[digest(100)])
    assert progress.take(prompt_event()) is None
    assert progress.take(prompt_event()) == prompt_event(), "one call has one prompt"
    assert progress.take(piece(0, 1)) is None
    assert progress.take(piece(1, 2, 3)) == piece(2, 3)
    assert progress.take(finish_event(1)) is None
    with pytest.raises(errors.AnswerDiffers):
        progress.take(prompt_event(seed=8))
