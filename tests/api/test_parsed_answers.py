"""Parsing of answers where their events are read: long calls in the sandbox, and resumed answers from their start."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest

from answering import Generation
from checkpoints import make_tokenizer
from cluster.api.metrics import Metrics
from cluster.api.request_service import RequestService
from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.lead_change import LeadChange
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import Aborted
from cluster.core.known_tokens import KnownTokens
from cluster.core.limits import RESUMED_TOKENS, SMALL_CALL_CHARS
from cluster.core.request import (
    FinishEvent,
    FinishReason,
    Parsing,
    PromptLogprobs,
    Request,
    SamplingParams,
    TokenEvent,
    Tool,
    ToolCall,
)
from cluster.model.tokenizer import load_tokenizer
from fuzz.targets.asked import served
from in_process import InProcess

pytestmark = pytest.mark.anyio

TOOLS = (Tool("look"),)
CALL = "<tool_call>\n<function=look>\n<parameter=at>\n{}\n</parameter>\n</function>\n</tool_call>"


class Letters:
    """A decoder of tokens that are letters."""

    def add(self, token: int) -> str:
        return chr(token)

    def flush(self) -> str:
        return ""


class WatchedSandbox(InProcess):
    """Notes the texts that it reads calls from."""

    def __init__(self, model: ModelInfo) -> None:
        super().__init__(model.tokenizer)
        self.read: list[str] = []

    async def read_calls(self, body: str, tools: Sequence[Tool]) -> tuple[ToolCall, ...]:
        self.read.append(body)
        return await super().read_calls(body, tools)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    """A model whose calls are not JSON, so that they are read once they are complete."""
    folder = tmp_path_factory.mktemp("calls")
    make_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tool_parser_type": "qwen3_coder"}))
    return replace(served(), tokenizer=load_tokenizer(folder))


@pytest.fixture
def sandbox(model: ModelInfo) -> WatchedSandbox:
    return WatchedSandbox(model)


class Answering:
    """A coordinator whose answer is ``text``, of which an earlier one has journaled ``known`` tokens."""

    journal = None

    def __init__(self, text: str, known: int = 0) -> None:
        self.deployments = SimpleNamespace(lead_change=LeadChange())
        self._tokens = tuple(map(ord, text))
        self._known = known
        self.model: ModelInfo | None = None
        self.request = Request("r", (1,), SamplingParams(), 10**6, parsing=Parsing(TOOLS))

    async def accept(self, request: Request, model_info: ModelInfo) -> AnswerQueue:
        return self.resume("r", (KnownTokens(0),), "")[2]

    def resume(
        self, request_id: str, known: tuple[KnownTokens, ...], client: str
    ) -> tuple[Request, ModelInfo | None, AnswerQueue]:
        generation = Generation(self.request, Letters)
        for _ in generation.begin((self._tokens[: self._known],), known):
            pass
        for token in self._tokens[self._known :]:
            generation.say(token)
        generation.end()
        generation.deliver()
        return self.request, self.model, generation.answer


async def read(
    answering: Answering, model: ModelInfo, offset: int = 0
) -> list[PromptLogprobs | TokenEvent | FinishEvent]:
    answering.model = model
    service = RequestService(answering, Metrics())  # type: ignore[arg-type]
    running = await service.resume("r", (KnownTokens(offset),), "")
    return [event async for event in running.all_events]


def output(events: Iterable[object]) -> tuple[str, str, list[tuple[str, str]]]:
    """Return the content, the arguments of all calls, and the index and name of each call."""
    answer = [event for event in events if isinstance(event, TokenEvent | FinishEvent)]
    calls = [delta for event in answer for delta in event.calls]
    named = [(str(delta.index), delta.name) for delta in calls if delta.name]
    return "".join(event.text for event in answer), "".join(delta.arguments for delta in calls), named


async def test_only_long_calls_are_read_in_the_sandbox(model: ModelInfo, sandbox: WatchedSandbox) -> None:
    long = "x" * SMALL_CALL_CHARS
    text = f"so {CALL.format('here')}{CALL.format(long)} and on"
    events = await read(Answering(text), replace(model, text=sandbox))
    assert output(events) == (
        "soand on",
        json.dumps({"at": "here"}) + json.dumps({"at": long}),
        [("0", "look"), ("1", "look")],
    )
    assert [long in body for body in sandbox.read] == [True]
    assert isinstance(events[-1], FinishEvent)
    assert events[-1].reason is FinishReason.TOOL_CALLS


@pytest.mark.parametrize("known", [0, 40, 100])
async def test_a_resumed_answer_goes_on_in_the_middle_of_a_call(
    known: int, model: ModelInfo, sandbox: WatchedSandbox
) -> None:
    text = f"so {CALL.format('here')} then {CALL.format('there')} and on"
    model = replace(model, text=sandbox)
    whole = await read(Answering(text), model)
    for offset in range(0, len(text), 7):
        resumed = await read(Answering(text, known), model, offset)
        assert output(resumed) == output(whole[offset:])
        assert resumed[-1] == whole[-1]
        assert [type(event) for event in resumed] == [type(event) for event in whole[offset:]]


async def test_tokens_of_a_resumed_answer_are_decoded_in_steps() -> None:
    generation = Generation(Answering("").request, Letters)
    assert len(list(generation.begin([[65] * (3 * RESUMED_TOKENS)]))) == 3
    generation.end()
    generation.deliver()
    assert output([event async for event in generation.answer])[0] == "A" * 3 * RESUMED_TOKENS


async def test_a_request_may_end_while_its_tokens_are_decoded() -> None:
    generation = Generation(Answering("").request, Letters)
    for step, _ in enumerate(generation.begin([[65] * (9 * RESUMED_TOKENS)])):
        if step == 2:
            generation.fail(Aborted("the client hung up"))
    assert step == 2
    generation.deliver()
    with pytest.raises(Aborted, match="hung up"):
        await anext(generation.answer)
