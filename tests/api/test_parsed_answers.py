"""Parsing of answers where their events are read: long calls in the sandbox, and resumed answers from their start."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest

from checkpoints import make_tokenizer
from cluster.api.metrics import Metrics
from cluster.api.request_service import RequestService
from cluster.coordinator.answer_queue import AnswerQueue, EventBatch
from cluster.coordinator.live_answers import LiveAnswers
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.frames import Sample
from cluster.core.limits import SMALL_CALL_CHARS
from cluster.core.plan import LayerRange, ModelRef, PlannedStage, StageSpec
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
from cluster.scheduler.outcome import Outcome, Produced
from fuzz.targets.asked import served
from in_process import InProcess

pytestmark = pytest.mark.anyio

TOOLS = (Tool("look"),)
STAGES = (PlannedStage(StageSpec(1, 0, 1, ModelRef("m", "", "f"), LayerRange(0, 1), 10), "ada", 0, 0),)
CALL = "<tool_call>\n<function=look>\n<parameter=at>\n{}\n</parameter>\n</function>\n</tool_call>"


class Letters:
    """A decoder of tokens that are letters."""

    def add(self, token: int) -> str:
        return chr(token)

    def flush(self) -> str:
        return ""


class Scheduling:
    """A scheduler that takes every request."""

    def submit(self, *samples: Request, answers: object) -> tuple[()]:
        return ()

    def end(self, sample: str) -> None: ...


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
        self._tokens = tuple(map(ord, text))
        self._known = known
        self.request = Request("r", (1,), SamplingParams(), 10**6, parsing=Parsing(TOOLS))

    async def accept(self, request: Request, checkpoint: ModelInfo) -> AnswerQueue:
        return self.resume("r", (0,), "")[1]

    def resume(self, request_id: str, offsets: tuple[int, ...], client: str) -> tuple[Request, AnswerQueue]:
        post = EventBatch()
        answer = AnswerQueue(post)
        live = LiveAnswers(Scheduling(), lambda: None, Letters, lambda: 0.0)  # type: ignore[arg-type]
        live.open(self.request, answer, (self._tokens[: self._known],), offsets, STAGES)
        for i in range(self._known, len(self._tokens)):
            token = Produced("r", i, Sample(0, 0, self._tokens[i]), None, counts=True, cached=0)
            live.handle(Outcome(("r",), (), 0.0, (token,)), 0.0, STAGES)
        end = Produced("r", len(self._tokens), Sample(0, 0, 0), FinishReason.STOP, counts=False, cached=0)
        live.handle(Outcome(("r",), (), 0.0, (end,)), 0.0, STAGES)
        post.deliver()
        return self.request, answer


async def read(
    answering: Answering, model: ModelInfo, offset: int = 0
) -> list[PromptLogprobs | TokenEvent | FinishEvent]:
    service = RequestService(answering, Metrics())  # type: ignore[arg-type]
    running = await service.resume("r", (offset,), "", model)
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
