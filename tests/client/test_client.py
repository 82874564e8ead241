"""Both clients against a scripted coordinator on a real socket."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from client.scripted import Coordinator, answer_of, finish_event, prompt_event, token_event
from cluster.client import (
    AsyncClient,
    ChatMessage,
    Client,
    ClusterState,
    FinishReason,
    LayerRange,
    LoadProgress,
    Stream,
    Token,
    follow_schedule,
)
from cluster.core import errors
from cluster.core.request import StageFigures
from cluster.v1 import cluster_pb2, inference_pb2

Ask = Callable[..., Any]


def blocking(address: str, method: str, *given: Any, **options: Any) -> Any:
    with Client(address) as client:
        result = getattr(client, method)(*given, **options)
        return list(result) if hasattr(result, "__iter__") and method in {"stream", "stream_chat", "load"} else result


def awaited(address: str, method: str, *given: Any, **options: Any) -> Any:
    async def ask() -> Any:
        async with AsyncClient(address) as client:
            result = getattr(client, method)(*given, **options)
            return [event async for event in result] if hasattr(result, "__aiter__") else await result

    return asyncio.run(ask())


@pytest.fixture(params=[blocking, awaited], ids=["sync", "async"])
def ask(request: pytest.FixtureRequest, coordinator: Coordinator) -> Ask:
    """Call a client's method and return its result; a stream's events as a list."""
    return lambda *given, **options: request.param(coordinator.address, *given, **options)


def test_generate_returns_the_whole_answer(ask: Ask, coordinator: Coordinator) -> None:
    done = ask("generate", "Why?", request_id="mine")
    assert done.text == str(done) == "Macs pass layers on."
    assert done.tokens == (100, 101, 102, 103, 104)
    assert [token.text for token in done.events] == ["Mac", "s", " pass", " layers", " on"]
    assert done.finish_reason is FinishReason.STOP
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.cached_tokens) == (4, 5, 1)
    assert (done.timings.ttft_ms, done.timings.tpot_ms, done.timings.tokens_per_second) == (12.5, 2.5, 400.0)
    assert [(stage.worker, stage.layers) for stage in done.stages] == [
        ("mac-a", LayerRange(0, 4)),
        ("mac-b", LayerRange(4, 8)),
    ]
    assert (done.seed, done.request_id, done.model) == (7, "mine", "faq")


def test_every_option_is_sent(ask: Ask, coordinator: Coordinator) -> None:
    sampling = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 40,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.75,
        "seed": 2**64 - 1,
        "logprobs": True,
        "top_logprobs": 3,
    }
    ask(
        "generate",
        [1, 2, 3],
        model="faq",
        max_tokens=9,
        stop=["a", "b"],
        ignore_eos=True,
        logit_bias={5: -1},
        stage_timings=True,
        prediction="a file",
        speculate=False,
        **sampling,
    )
    (request,) = coordinator.script.seen
    assert request.stage_timings
    assert (request.prediction, request.HasField("speculate"), request.speculate) == ("a file", True, False)
    assert {name: getattr(request.sampling, name) for name in sampling} == sampling
    assert dict(request.sampling.logit_bias) == {5: -1.0}
    assert (request.model, list(request.tokens.ids), request.WhichOneof("prompt")) == ("faq", [1, 2, 3], "tokens")
    assert (request.stop.max_tokens, list(request.stop.stop), request.stop.ignore_eos) == (9, ["a", "b"], True)


def test_what_is_not_given_is_not_sent(ask: Ask, coordinator: Coordinator) -> None:
    ask("generate", "", temperature=None, stop=None)
    (request,) = coordinator.script.seen
    assert not request.sampling.ListFields()
    assert not request.stop.HasField("max_tokens")
    assert not request.stage_timings
    assert not request.HasField("speculate")
    assert request.WhichOneof("prompt") == "text"


def test_messages_have_three_forms(ask: Ask, coordinator: Coordinator) -> None:
    ask("chat", [ChatMessage("system", "Be short."), {"role": "user", "content": "Why?"}, ("assistant", "So.")])
    (request,) = coordinator.script.seen
    said = [(message.role, message.content) for message in request.messages]
    assert said == [("system", "Be short."), ("user", "Why?"), ("assistant", "So.")]


@pytest.mark.parametrize(
    ("method", "given", "options", "field"),
    [
        ("generate", ["Hi"], {"max_tokens": -1}, "max_tokens"),
        ("generate", ["Hi"], {"temperature": float("nan")}, "temperature"),
        ("generate", ["Hi"], {"temperature": "hot"}, "temperature"),
        ("generate", ["Hi"], {"seed": 2**64}, "seed"),
        ("generate", ["Hi"], {"seed": -1}, "seed"),
        ("generate", ["Hi"], {"top_k": 1.5}, "top_k"),
        ("generate", ["Hi"], {"prediction": 5}, "prediction"),
        ("generate", ["Hi"], {"speculate": "no"}, "speculate"),
        ("generate", ["Hi"], {"logprobs": 3}, "logprobs"),
        ("generate", ["Hi"], {"logit_bias": {-1: 1.0}}, "logit_bias"),
        ("generate", ["Hi"], {"stop": [3]}, "stop"),
        ("generate", ["Hi"], {"timeout_s": 0}, "timeout_s"),
        ("generate", ["half \ud83d"], {}, "prompt"),
        ("generate", [b"bytes"], {}, "prompt"),
        ("generate", [[1, -2]], {}, "prompt"),
        ("generate", [None], {}, "prompt"),
        ("generate", ["x" * (17 << 20)], {}, "prompt"),
        ("chat", ["Hi"], {}, "messages"),
        ("chat", [[{"role": "user"}]], {}, "messages[0]"),
        ("chat", [[{"role": "user", "content": "x", "shoe": "y"}]], {}, "messages[0]"),
        ("chat", [[("user", None)]], {}, "messages[0].content"),
        ("load", ["faq"], {"route": "pigeon"}, "route"),
        ("load", ["faq"], {"workers": -1}, "workers"),
    ],
)
def test_what_cannot_be_sent_is_refused_here(
    ask: Ask, coordinator: Coordinator, method: str, given: list[Any], options: dict[str, Any], field: str
) -> None:
    with pytest.raises(errors.InvalidRequest) as refused:
        ask(method, *given, **options)
    assert refused.value.field == field
    assert not coordinator.script.seen


def test_an_unknown_option_is_a_type_error(ask: Ask) -> None:
    with pytest.raises(TypeError, match="max_new_tokens"):
        ask("generate", "Hi", max_new_tokens=3)


def test_stream_gives_tokens_then_the_finish(coordinator: Coordinator) -> None:
    with Client(coordinator.address) as client, client.stream("Why?") as stream:
        assert stream.accepted is None
        assert stream.wait_accepted().seed == 7
        assert stream.finish is None
        tokens = list(stream)
        assert [token.index for token in tokens] == [0, 1, 2, 3, 4]
        assert stream.finish is not None
        assert stream.finish.text == "."
        assert stream.completion().text == "Macs pass layers on."


def test_texts_hold_back_nothing(coordinator: Coordinator) -> None:
    async def gather() -> str:
        async with AsyncClient(coordinator.address) as client:
            return "".join([text async for text in client.stream_chat([("user", "Why?")]).texts()])

    with Client(coordinator.address) as client:
        assert "".join(client.stream("Why?").texts()) == asyncio.run(gather()) == "Macs pass layers on."


def test_logprobs_come_through(ask: Ask, coordinator: Coordinator) -> None:
    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        yield prompt_event()
        top = [inference_pb2.TopLogprob(token=5, text="a", logprob=-0.5)]
        yield token_event(0, "a", logprob=-0.5, top=top)
        yield token_event(1, "b")
        yield finish_event(2)

    coordinator.script.answer = answer
    first, second = ask("stream", "Why?", logprobs=True)
    assert (first.logprob, first.top[0].token, first.top[0].text) == (-0.5, 5, "a")
    assert second.logprob is None


def test_stage_timings_come_through(ask: Ask, coordinator: Coordinator) -> None:
    told = inference_pb2.StageFigures(worker="mac-a", end_layer=4, compute_ms=2.5, wire_ms=0.5, wait_ms=0.25)

    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        yield prompt_event()
        yield token_event(0, "a", stages=[told])
        yield finish_event(1)

    coordinator.script.answer = answer
    (token,) = ask("stream", "Why?", stage_timings=True)
    assert token.stages == (StageFigures("mac-a", LayerRange(0, 4), 2.5, 0.5, 0.25),)


BROKEN = {
    "no prompt": [token_event(0, "a"), finish_event(1)],
    "two prompts": [prompt_event(), prompt_event(), finish_event(0)],
    "a missing token": [prompt_event(), token_event(0, "a"), token_event(2, "c"), finish_event(2)],
    "a repeated token": [prompt_event(), token_event(0, "a"), token_event(0, "a"), finish_event(2)],
    "no finish": [prompt_event(), token_event(0, "a")],
    "no event": [],
    "a token after the finish": [prompt_event(), finish_event(0), token_event(0, "a")],
    "an unknown event": [prompt_event(), inference_pb2.GenerateResponse(), finish_event(0)],
    "an unknown reason": [prompt_event(), finish_event(0, reason=77)],
}


@pytest.mark.parametrize("events", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_answer_is_an_error_and_never_a_shorter_one(
    ask: Ask, coordinator: Coordinator, events: list[Any]
) -> None:
    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        for event in events:
            yield event

    coordinator.script.answer = answer
    with pytest.raises(errors.MacpipeError):
        ask("generate", "Why?")


async def endless(request: Any, context: Any) -> AsyncIterator[Any]:
    first, token, *_ = answer_of(request)
    yield first
    yield token
    index = 0
    while True:
        await asyncio.sleep(0.005)
        index += 1
        yield token_event(index, "and ")


async def silent(request: Any, context: Any) -> AsyncIterator[Any]:
    yield prompt_event()
    await asyncio.sleep(3600)


def leave_loop(client: Client) -> None:
    stream = client.stream("Why?")
    for token in stream:
        if token.index == 2:
            break


def leave_context(client: Client) -> None:
    with client.stream("Why?") as stream:
        stream.wait_accepted()


def leave_texts(client: Client) -> None:
    for _ in client.stream("Why?").texts():
        return


def drop(client: Client) -> None:
    client.stream("Why?").wait_accepted()
    gc.collect()


def raise_inside(client: Client) -> None:
    with pytest.raises(ZeroDivisionError):
        sum(1 / token.index for token in client.stream("Why?"))


@pytest.mark.parametrize("leave", [leave_loop, leave_context, leave_texts, drop, raise_inside])
def test_who_stops_listening_cancels_the_call(coordinator: Coordinator, leave: Callable[[Client], None]) -> None:
    coordinator.script.answer = endless
    with Client(coordinator.address) as client:
        leave(client)
        assert coordinator.script.cancelled.wait(5)
        assert client.models()


async def async_loop(client: AsyncClient, coordinator: Coordinator) -> None:
    stream = client.stream("Why?")
    async for _ in stream:
        break


async def async_context(client: AsyncClient, coordinator: Coordinator) -> None:
    async with client.stream("Why?") as stream:
        await stream.wait_accepted()


async def async_texts(client: AsyncClient, coordinator: Coordinator) -> None:
    async for _ in client.stream("Why?").texts():
        break


async def async_task(client: AsyncClient, coordinator: Coordinator) -> None:
    task = asyncio.create_task(client.generate("Why?"))
    while not coordinator.script.seen:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("leave", [async_loop, async_context, async_texts, async_task])
def test_who_stops_listening_asynchronously_cancels_the_call(coordinator: Coordinator, leave: Any) -> None:
    async def run() -> None:
        async with AsyncClient(coordinator.address) as client:
            await leave(client, coordinator)
            assert await asyncio.to_thread(coordinator.script.cancelled.wait, 5)
            assert await client.models()

    coordinator.script.answer = endless
    asyncio.run(run())


def test_cancel_from_another_thread_is_told_as_aborted(coordinator: Coordinator) -> None:
    coordinator.script.answer = silent
    with Client(coordinator.address) as client:
        stream = client.stream("Why?")
        stream.wait_accepted()
        threading.Timer(0.1, stream.cancel).start()
        with pytest.raises(errors.Aborted):
            list(stream)


def test_cancel_from_another_task_is_told_as_aborted(coordinator: Coordinator) -> None:
    async def run() -> None:
        async with AsyncClient(coordinator.address) as client:
            stream = client.stream("Why?")
            asyncio.get_running_loop().call_later(0.1, stream.cancel)
            with pytest.raises(errors.Aborted):
                await stream.completion()

    coordinator.script.answer = silent
    asyncio.run(run())


@pytest.mark.parametrize("method", ["generate", "chat", "tokenize", "models", "abort", "cluster", "load", "unload"])
def test_a_refusal_comes_back_as_the_class_it_was(ask: Ask, coordinator: Coordinator, method: str) -> None:
    coordinator.script.refusal = errors.Busy("256 requests wait", retry_after_s=2.0, queued="256")
    given = {"generate": ["Hi"], "chat": [[("user", "Hi")]], "tokenize": ["Hi"], "abort": ["r"], "load": ["faq"]}
    with pytest.raises(errors.Busy, match="256 requests wait") as refused:
        ask(method, *given.get(method, []))
    assert refused.value.retry_after_s == 2.0
    assert refused.value.details == {"queued": "256"}


def test_an_error_in_mid_answer_follows_its_tokens(coordinator: Coordinator) -> None:
    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        yield prompt_event()
        yield token_event(0, "a")
        coordinator.script.refusal = errors.WorkerLost("mac-b stopped answering", worker="mac-b")
        await coordinator.script._meet(request, context)

    coordinator.script.answer = answer
    seen: list[Token] = []
    with Client(coordinator.address) as client, pytest.raises(errors.WorkerLost, match="mac-b") as lost:
        seen.extend(client.stream("Why?"))
    assert lost.value.details == {"worker": "mac-b"}


def test_nobody_there_is_unreachable_and_says_what_to_do() -> None:
    for ask in (blocking, awaited):
        with pytest.raises(errors.Unreachable, match=r"127\.0\.0\.1:1 .*macpipe serve") as refused:
            ask("127.0.0.1:1", "generate", "Hi")
        assert "--coordinator" in refused.value.sentence


def test_a_coordinator_that_goes_away_ends_the_answer(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_schedule, "PASS_WAIT_S", 0.2)
    coordinator.script.answer = endless
    with Client(coordinator.address) as client, client.stream("Why?") as stream:
        stream.wait_accepted()
        coordinator.stop()
        with pytest.raises(errors.Unreachable):
            list(stream)


@pytest.mark.parametrize("kind", [blocking, awaited], ids=["sync", "async"])
def test_a_long_silence_breaks_nothing(coordinator: Coordinator, kind: Ask) -> None:
    async def slow(request: Any, context: Any) -> AsyncIterator[Any]:
        first, *others = answer_of(request)
        yield first
        await asyncio.sleep(4)  # more pings than a server takes that was not told about them
        for event in others:
            yield event

    coordinator.script.answer = slow
    assert kind(coordinator.address, "generate", "Why?").text == "Macs pass layers on."


@pytest.mark.parametrize("kind", [blocking, awaited], ids=["sync", "async"])
def test_deadlines_end_an_answer(coordinator: Coordinator, kind: Ask) -> None:
    coordinator.script.answer = silent
    start = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded, match="timed out"):
        kind(coordinator.address, "generate", "Why?", timeout_s=0.3)
    assert 0.2 < time.monotonic() - start < 3
    assert coordinator.script.cancelled.wait(5)


def test_the_clients_own_deadline_holds_for_every_call(coordinator: Coordinator) -> None:
    async def never(request: Any, context: Any) -> None:
        await asyncio.sleep(3600)

    coordinator.script.answer = silent
    coordinator.script._meet = never
    with Client(coordinator.address, timeout_s=0.2) as client:
        for call in (client.models, client.cluster, client.unload, lambda: client.generate("Hi")):
            with pytest.raises(errors.DeadlineExceeded):
                call()


def test_control_calls(ask: Ask, coordinator: Coordinator) -> None:
    assert ask("tokenize", "ab").ids == (1, 2)
    assert len(ask("tokenize", [("user", "ab")])) == 2
    assert [model.id for model in ask("models")] == ["faq"]
    assert ask("abort", "r1") is None
    assert ask("unload") == ("faq",)
    state = ask("cluster")
    assert (state.state, state.model, state.layers) == ("serving", "faq", 8)
    assert [worker.name for worker in state.workers] == ["mac-a", "mac-b"]
    assert [stage.layers for stage in state.stages] == [LayerRange(0, 4), LayerRange(4, 8)]
    assert [(request.state, request.lane) for request in state.requests] == [("decode", 1), ("queued", None)]


def test_load_tells_its_progress_and_ends_with_the_state(ask: Ask, coordinator: Coordinator) -> None:
    *progress, state = ask("load", "faq", workers=2, layers="0-3,4-7", route="relay", max_context=256)
    assert progress[0] == LoadProgress("mac-a", LayerRange(0, 4), 0, 100, "")
    assert len(progress) == 6
    assert isinstance(state, ClusterState)
    (request,) = coordinator.script.seen
    assert (request.model, request.workers, request.layers, request.max_context) == ("faq", 2, "0-3,4-7", 256)
    assert request.route == cluster_pb2.ROUTE_RELAY
    assert not coordinator.script.cancelled.is_set()


async def unready(request: Any, context: Any) -> AsyncIterator[Any]:
    yield cluster_pb2.LoadModelResponse(progress=cluster_pb2.StageProgress(worker="a", start_layer=0, end_layer=4))


def test_a_load_that_does_not_end_serving_is_an_error(ask: Ask, coordinator: Coordinator) -> None:
    coordinator.script.load = unready
    with pytest.raises(errors.MacpipeError, match="final state"):
        ask("load", "faq")


async def stuck(request: Any, context: Any) -> AsyncIterator[Any]:
    async for event in unready(request, context):
        yield event
    await asyncio.sleep(3600)


def test_a_stuck_load_is_given_up(coordinator: Coordinator) -> None:
    async def load() -> None:
        async with AsyncClient(coordinator.address) as client:
            loading = client.load("faq")
            loading._stall_s = 0.3
            await loading.wait()

    coordinator.script.load = stuck
    with pytest.raises(errors.DeadlineExceeded, match="no progress"):
        asyncio.run(load())
    assert coordinator.script.cancelled.wait(5)
    coordinator.script.cancelled.clear()
    with Client(coordinator.address) as client:
        loading = client.load("faq")
        loading._stall_s = 0.3
        with pytest.raises(errors.DeadlineExceeded, match="no progress"):
            loading.wait()
    assert coordinator.script.cancelled.wait(5)


@pytest.mark.parametrize(
    ("argument", "variable", "address"),
    [
        (None, None, "127.0.0.1:7700"),
        (None, "127.0.0.2:9", "127.0.0.2:9"),
        ("127.0.0.3:8", "127.0.0.2:9", "127.0.0.3:8"),
        ("localhost", None, "localhost:7700"),
        ("[::1]:5", None, "[::1]:5"),
        ("[::1]", None, "[::1]:7700"),
    ],
)
def test_the_address_comes_from_the_argument_then_the_environment(
    monkeypatch: pytest.MonkeyPatch, argument: str | None, variable: str | None, address: str
) -> None:
    monkeypatch.delenv("MACPIPE_COORDINATOR", raising=False)
    if variable:
        monkeypatch.setenv("MACPIPE_COORDINATOR", variable)
    with Client(argument) as client:
        assert client.address == AsyncClient(argument).address == address


@pytest.mark.parametrize("wrong", ["http://mac:1", "mac:0", "mac:99999", "mac:port", "a b", ":7700", "::1"])
def test_what_is_no_address_is_told(wrong: str) -> None:
    with pytest.raises(errors.InvalidOption, match="--coordinator: "):
        Client(wrong)


def test_a_coordinator_that_went_away_is_unreachable(coordinator: Coordinator) -> None:
    with Client(coordinator.address) as client:
        assert client.models()
        coordinator.stop()
        with pytest.raises(errors.Unreachable):
            client.models()


def test_the_client_needs_no_mlx_and_no_model_library() -> None:
    code = (
        "import sys, cluster.client; print([m for m in ('mlx', 'numpy', 'transformers', 'typer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"


def test_a_stream_is_a_stream(coordinator: Coordinator) -> None:
    with Client(coordinator.address) as client:
        assert isinstance(client.stream("Hi"), Stream)


@pytest.mark.parametrize("method", ["generate", "stream", "cluster", "models", "unload"])
def test_a_closed_client_says_so(coordinator: Coordinator, method: str) -> None:
    given = ("Why?",) if method in {"generate", "stream"} else ()
    client = Client(coordinator.address)
    client.close()
    with pytest.raises(errors.MacpipeError, match="this client is closed"):
        getattr(client, method)(*given)

    async def ask() -> None:
        client = AsyncClient(coordinator.address)
        await client.close()
        result = getattr(client, method)(*given)
        if hasattr(result, "__await__"):
            await result

    with pytest.raises(errors.MacpipeError, match="this client is closed"):
        asyncio.run(ask())


class Hanging:
    """A coordinator's answer that never comes; ``arrived`` says that the request is there."""

    def __init__(self) -> None:
        self.arrived = threading.Event()

    async def meet(self, request: Any, context: Any) -> None:
        self.arrived.set()
        await asyncio.sleep(3600)


def test_closing_a_client_ends_its_running_call(coordinator: Coordinator) -> None:
    hanging = Hanging()
    coordinator.script._meet = hanging.meet
    client = Client(coordinator.address)

    def close() -> None:
        hanging.arrived.wait(5)
        client.close()

    closing = threading.Thread(target=close)
    closing.start()
    with pytest.raises(errors.Aborted):
        client.models()
    closing.join()


def test_closing_an_asynchronous_client_ends_its_running_call(coordinator: Coordinator) -> None:
    hanging = Hanging()

    async def run() -> None:
        client = AsyncClient(coordinator.address)
        call = asyncio.create_task(client.models())
        assert await asyncio.to_thread(hanging.arrived.wait, 5)
        await client.close()
        with pytest.raises(errors.Aborted):
            await call

    coordinator.script._meet = hanging.meet
    asyncio.run(run())
