"""Ollama's API: how its bodies are read, and its answers, streamed and whole, from a coordinator with known tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from starlette.requests import Request as HttpRequest

from cluster.api.http import ollama
from cluster.api.http.app import application
from cluster.api.http.body import Form, parse
from cluster.api.http.model_names import ModelNames
from cluster.api.http.ollama_form import OllamaChatForm, OllamaGenerateForm
from cluster.api.http.ollama_models import INSTEAD, NEVER, VERSION, OllamaModels, format_parameters
from cluster.api.metrics import Metrics
from cluster.api.request_service import RequestService
from cluster.api.requests import ChatParams, GenerateParams
from cluster.coordinator.answer_queue import AnswerQueue, EventBatch
from cluster.coordinator.model_catalog import ModelCatalog, ModelEntry
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.on_demand import OnDemand
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import InvalidRequest, ModelNotFound, NotServing, StageFailed
from cluster.core.request import (
    Accepted,
    FinishEvent,
    FinishReason,
    GrammarKind,
    Request,
    TokenEvent,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from fuzz.targets.asked import served
from workerless import WorkerlessCoordinator

pytestmark = pytest.mark.anyio

TURN = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"function": {"name": "f", "arguments": {"a": 1}}}
CALLED = {"role": "assistant", "tool_calls": [CALL]}


def chat(**more: Any) -> ChatParams:
    return parse(json.dumps({"model": "faq", "messages": [TURN], **more}).encode(), OllamaChatForm).params("id")


def generate(**more: Any) -> Any:
    return parse(json.dumps({"model": "faq", "prompt": "hi", **more}).encode(), OllamaGenerateForm).params("id")


def test_defaults_are_ollamas() -> None:
    for asked in (chat(), generate(), chat(options={}), chat(options=None)):
        s = asked.sampling
        assert (s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.seed) == (
            0.8,
            40,
            0.9,
            None,
            None,
            None,
        )
        assert (asked.max_tokens, asked.stop, asked.grammar, asked.speculate) == (None, [], None, True)


def test_what_go_clients_send_for_fields_without_a_value_is_taken() -> None:
    empty = {"suffix": "", "system": "", "template": "", "raw": False, "images": [], "context": [], "format": ""}
    assert generate(**empty, options=None, _debug_render_only=False) == generate()
    assert chat(_debug_render_only=False, options=None, format="", tools=[], think=None) == chat()


def test_every_option_arrives() -> None:
    options = {
        "temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0.1, "repeat_penalty": 1.1, "presence_penalty": 1,
        "frequency_penalty": -1, "seed": 7, "stop": "a", "num_predict": 9, "draft_num_predict": 0,
    }  # fmt: skip
    asked = chat(options=options, logprobs=True, top_logprobs=2)
    s = asked.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty) == (0, 1, 0, 0.1, 1.1)
    assert (s.presence_penalty, s.frequency_penalty, s.seed, s.logprobs, s.top_logprobs) == (1, -1, 7, True, 2)
    assert (asked.stop, asked.max_tokens, asked.speculate) == (["a"], 9, False)


@pytest.mark.parametrize("length", [-2, -1, 0])
def test_an_answer_without_a_length_fills_the_context(length: int) -> None:
    assert chat(options={"num_predict": length}).max_tokens is None


def test_values_that_mean_a_default() -> None:
    assert chat(options={"seed": -1}).sampling.seed is None
    assert chat(options={"repeat_penalty": 2, "repeat_last_n": 0}).sampling.repetition_penalty is None
    assert chat(options={"repeat_penalty": 2, "repeat_last_n": -1}).sampling.repetition_penalty == 2


def test_formats_are_grammars() -> None:
    assert chat(format="json").grammar.kind is GrammarKind.JSON_OBJECT  # type: ignore[union-attr]
    schema = chat(format={"type": "object"}).grammar
    assert schema
    assert (schema.kind, schema.source) == (GrammarKind.JSON_SCHEMA, '{"type":"object"}')


def test_thinking_is_a_switch_or_an_effort() -> None:
    options = [chat(think=think).conversation.options for think in (None, True, False, "high")]
    assert [(o.enable_thinking, o.reasoning_effort) for o in options] == [
        (None, ""), (True, ""), (False, ""), (None, "high"),
    ]  # fmt: skip
    assert all(o.thinking_is_hint for o in options)


def test_a_prompt_is_a_turn_or_raw() -> None:
    messages = generate(system="be kind").conversation.messages
    assert [(m.role, m.content) for m in messages] == [("system", "be kind"), ("user", "hi")]
    raw = generate(raw=True, system="")
    assert isinstance(raw, GenerateParams)
    assert raw.prompt == "hi"


def test_results_find_their_calls_by_id_by_name_or_in_order() -> None:
    def call(name: str, **more: str) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": {}, "index": 0}, **more}

    turns = [
        TURN,
        {"role": "assistant", "tool_calls": [call("f"), call("g"), call("f"), call("g", id="own")]},
        {"role": "tool", "content": "1", "tool_name": "g"},
        {"role": "tool", "content": "2", "tool_call_id": "own"},
        {"role": "tool", "content": "3", "name": "f"},
        {"role": "tool", "content": "4"},
    ]
    _, assistant, *results = chat(messages=turns).conversation.messages
    first, second, third, own = (one.id for one in assistant.tool_calls)
    assert len({first, second, third, own}) == 4
    assert [r.tool_call_id for r in results] == [second, own, first, third]
    assert [r.name for r in results] == ["g", "", "f", ""]


def test_our_own_answer_comes_back_whole() -> None:
    answer = {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [{"id": "call_1", **CALL}]}
    told = {"role": "tool", "content": "4", "tool_name": "f"}
    _, assistant, tool = chat(messages=[TURN, answer, told]).conversation.messages
    assert (assistant.reasoning, assistant.tool_calls[0].arguments) == ("hm", '{"a":1}')
    assert (tool.tool_call_id, tool.name) == ("call_1", "f")


def test_types_that_pythons_client_joins_are_a_list() -> None:
    properties = {"x": {"type": "integer, string", "description": "d"}, "y": {"type": "null"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}
    (known,) = chat(tools=[tool]).conversation.options.tools
    assert json.loads(known.parameters)["properties"] == {
        "x": {"type": ["integer", "string"], "description": "d"}, "y": {"type": "null"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("form", "more", "field", "word"),
    [
        (OllamaChatForm, {"model": ""}, "model", "at least 1"),
        (OllamaChatForm, {"made_up": 1}, "made_up", "not a parameter"),
        (OllamaChatForm, {"options": {"made_up": 1}}, "options.made_up", "not a parameter"),
        (OllamaChatForm, {"options": {"temperature": "1"}}, "options.temperature", "number"),
        (OllamaChatForm, {"options": {"num_predict": -3}}, "options.num_predict", "greater"),
        (OllamaChatForm, {"options": {"stop": ["a"] * 17}}, "options.stop", "at most 16"),
        (OllamaChatForm, {"format": "yaml"}, "format", "json"),
        (OllamaChatForm, {"think": "a lot"}, "think", "low"),
        (OllamaChatForm, {"top_logprobs": 2}, "top_logprobs", "logprobs"),
        (OllamaChatForm, {"messages": [{**TURN, "images": ["aGk="]}]}, "messages[0].images", "not supported"),
        (OllamaChatForm, {"messages": [{**TURN, "role": "robot"}]}, "messages[0].role", "assistant"),
        (OllamaChatForm, {"messages": [{**TURN, "tool_calls": [CALL]}]}, "messages[0].tool_calls", "only assistant"),
        (OllamaChatForm, {"messages": [{"role": "tool", "content": "1"}]}, "messages[0]", "no call"),
        (
            OllamaChatForm,
            {"messages": [CALLED, {"role": "tool", "tool_name": "f"}, {"role": "tool", "tool_name": "f"}]},
            "messages[2]",
            "no call",
        ),
        (OllamaChatForm, {"messages": [CALLED, {"role": "tool", "tool_call_id": "x"}]}, "messages[1]", "no call"),
        (
            OllamaChatForm,
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "foo"}}}]},
            "tools[0].function.parameters.type",
            "object",
        ),
        (OllamaGenerateForm, {"suffix": "x"}, "suffix", "not supported"),
        (OllamaGenerateForm, {"template": "x"}, "template", "not supported"),
        (OllamaGenerateForm, {"context": [1]}, "context", "not supported"),
        (OllamaGenerateForm, {"images": ["aGk="]}, "images", "not supported"),
        (OllamaGenerateForm, {"raw": True, "system": "x"}, "system", "raw"),
    ],
)
def test_a_refusal_names_its_field(form: type[Form], more: dict[str, Any], field: str, word: str) -> None:
    body = {"model": "faq", **({"messages": [TURN]} if form is OllamaChatForm else {"prompt": "hi"}), **more}
    with pytest.raises(InvalidRequest) as refused:
        parse(json.dumps(body).encode(), form).params("id")  # type: ignore[attr-defined]
    assert refused.value.field == field
    assert word in refused.value.sentence


def test_numbers_of_parameters_are_short() -> None:
    assert [format_parameters(n) for n in (0, 512, 12_345, 360_000_000, 8_030_000_000)] == [
        "", "512", "12.3K", "360.0M", "8.0B",
    ]  # fmt: skip


# Answers


class Known(WorkerlessCoordinator):
    """A coordinator that serves one model, and answers with the events that a test chooses."""

    def __init__(self) -> None:
        self.model = served()
        self.catalog = ModelCatalog([ModelEntry("faq", LoadOrder("faq"), aliases=("gpt",))])
        self.resting: list[str] = []
        self.events: Sequence[TokenEvent | FinishEvent | StageFailed] = ()
        self.requests: list[Request] = []

    def served_model(self, model: str, adapter: str = "") -> ModelInfo:
        if model in ("", "faq", "gpt", "default") and self.model:
            return self.model
        if model in self.resting or not self.model:
            raise NotServing(f"the model {model} is not loaded")
        raise ModelNotFound(f"the model {model} is not served here", field="model")

    def loaded_models(self) -> list[ModelInfo]:
        return [self.model] if self.model else []

    def unloaded_names(self) -> list[str]:
        return self.resting

    def names_of(self, model_info: ModelInfo) -> tuple[str, ...]:
        return ("faq", "gpt")

    async def accept(self, request: Request, model_info: ModelInfo) -> AnswerQueue:
        self.requests.append(request)
        batch = EventBatch()
        answer = AnswerQueue(batch, samples=1)
        for event in (Accepted(), *self.events):
            answer.put(event)
        batch.deliver()
        return answer


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Known:
    """Its answers are told as they are, whatever the model's format of calls."""

    async def parsed(self: object, event: object) -> object:
        return event

    monkeypatch.setattr("cluster.api.request_service.ParsedAnswers.parse", parsed)
    return Known()


@pytest.fixture
async def client(known: Known) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(application(RequestService(known, Metrics())))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:
        yield client


def finish(reason: FinishReason = FinishReason.STOP, **more: Any) -> FinishEvent:
    return FinishEvent(reason, "", Usage(7, 3, 2), 12.5, 2.0, **more)


CALLS = (
    TokenEvent(0, 5, "so: "),
    TokenEvent(1, 5, "", calls=(ToolCallDelta(0, "call_a", "f"),)),
    TokenEvent(2, 5, "", calls=(ToolCallDelta(0, arguments='{"a": '),)),
    TokenEvent(3, 5, "", calls=(ToolCallDelta(0, arguments="1}"), ToolCallDelta(1, "call_b", "g", '{"b": "é'))),
    finish(FinishReason.TOOL_CALLS),
)
COUNTS = {"prompt_eval_count": 7, "prompt_eval_duration": 12_500_000, "eval_count": 3, "eval_duration": 4_000_000}


def lines(reply: httpx.Response) -> list[dict[str, Any]]:
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/x-ndjson")
    assert reply.text.endswith("\n")
    return [json.loads(line) for line in reply.text.splitlines()]


def without_times(one: dict[str, Any]) -> dict[str, Any]:
    """Without what differs each time; the times must be there, and of the right order."""
    assert datetime.fromisoformat(one.pop("created_at")).tzinfo
    if one["done"] and "eval_count" in one:
        assert one.pop("total_duration") >= one.pop("load_duration") >= 0
    return one


async def test_a_streamed_chat_has_a_line_per_token_and_its_counts_last(
    client: httpx.AsyncClient, known: Known
) -> None:
    known.events = (TokenEvent(0, 5, "", reasoning="hm"), TokenEvent(1, 6, "a"), TokenEvent(2, 7, ""), finish())
    reply = await client.post("/api/chat", json={"model": "gpt", "messages": [TURN]})
    thought, text, last = map(without_times, lines(reply))
    assert thought == {
        "model": "gpt", "message": {"role": "assistant", "content": "", "thinking": "hm"}, "done": False,
    }  # fmt: skip
    assert text == {"model": "gpt", "message": {"role": "assistant", "content": "a"}, "done": False}
    said = {"role": "assistant", "content": ""}
    assert last == {"model": "gpt", "message": said, "done": True, "done_reason": "stop", **COUNTS}


async def test_a_streamed_prompt_has_its_text_in_response(client: httpx.AsyncClient, known: Known) -> None:
    known.events = (TokenEvent(0, 5, "", reasoning="hm"), TokenEvent(1, 6, "a"), finish(FinishReason.LENGTH))
    thought, text, last = map(
        without_times, lines(await client.post("/api/generate", json={"model": "faq:latest", "prompt": "hi"}))
    )
    assert thought == {"model": "faq", "response": "", "thinking": "hm", "done": False}
    assert text == {"model": "faq", "response": "a", "done": False}
    assert last == {"model": "faq", "response": "", "done": True, "done_reason": "length", **COUNTS}


async def test_whole_answers_are_one_object(client: httpx.AsyncClient, known: Known) -> None:
    known.events = (TokenEvent(0, 5, "", reasoning="hm"), TokenEvent(1, 6, "a"), TokenEvent(2, 7, "b"), finish())
    body = {"model": "faq", "stream": False}
    whole = await client.post("/api/chat", json={**body, "messages": [TURN]})
    assert whole.headers["content-type"] == "application/json"
    message = {"role": "assistant", "content": "ab", "thinking": "hm"}
    ending = {"done": True, "done_reason": "stop", **COUNTS}
    assert without_times(whole.json()) == {"model": "faq", "message": message, **ending}
    whole = await client.post("/api/generate", json={**body, "prompt": "hi"})
    assert without_times(whole.json()) == {"model": "faq", "response": "ab", "thinking": "hm", **ending}


async def test_calls_are_told_whole(client: httpx.AsyncClient, known: Known) -> None:
    """The second one was cut: it has the fields that are complete."""
    known.events = CALLS
    calls = [
        {"id": "call_a", "function": {"index": 0, "name": "f", "arguments": {"a": 1}}},
        {"id": "call_b", "function": {"index": 1, "name": "g", "arguments": {}}},
    ]
    body = {"model": "faq", "messages": [TURN]}
    text, first, second, last = lines(await client.post("/api/chat", json=body))
    assert text["message"] == {"role": "assistant", "content": "so: "}
    assert [one["message"]["tool_calls"] for one in (first, second)] == [calls[:1], calls[1:]]
    assert (first["done"], last["done"], last["done_reason"]) == (False, True, "stop")
    whole = (await client.post("/api/chat", json={**body, "stream": False})).json()
    assert whole["message"] == {"role": "assistant", "content": "so: ", "tool_calls": calls}


async def test_log_probabilities_have_alternatives(client: httpx.AsyncClient, known: Known) -> None:
    token = known.model.tokenizer.encode(" hop", add_special_tokens=False)[-1]
    known.events = (TokenEvent(0, token, " hop", logprob=-0.5, top=(TopLogprob(token, -0.5),)), finish())
    body = {"model": "faq", "messages": [TURN], "logprobs": True, "top_logprobs": 1}
    text, last = lines(await client.post("/api/chat", json=body))
    one = {"token": " hop", "logprob": -0.5, "bytes": list(b" hop")}
    assert text["logprobs"] == [{**one, "top_logprobs": [one]}]
    assert "logprobs" not in last
    whole = (await client.post("/api/chat", json={**body, "stream": False})).json()
    assert whole["logprobs"] == text["logprobs"]
    assert known.requests[0].sampling.top_logprobs == 1


async def test_an_error_is_the_last_line_of_a_stream(client: httpx.AsyncClient, known: Known) -> None:
    known.events = (TokenEvent(0, 5, "a"), StageFailed("a stage failed"))
    _, last = lines(await client.post("/api/chat", json={"model": "faq", "messages": [TURN]}))
    assert last == {"error": "a stage failed"}
    whole = await client.post("/api/chat", json={"model": "faq", "messages": [TURN], "stream": False})
    assert (whole.status_code, whole.json()) == (500, {"error": "a stage failed"})


async def test_silence_is_broken_by_a_line_that_every_client_can_read(known: Known) -> None:
    head = ollama.AnswerHead("faq", True, 0, 0)
    idle = json.loads(ollama.OllamaEncoder(head, None, None, False).idle())  # type: ignore[arg-type]
    assert without_times(idle) == {"model": "faq", "message": {"role": "assistant", "content": ""}, "done": False}


async def test_without_a_question_a_model_is_only_loaded(client: httpx.AsyncClient, known: Known) -> None:
    for path, part in (
        ("/api/chat", {"message": {"role": "assistant", "content": ""}}),
        ("/api/generate", {"response": ""}),
    ):
        for more in ({}, {"keep_alive": "5m"}, {"keep_alive": -1}):
            reply = await client.post(path, json={"model": "faq", **more})
            assert without_times(reply.json()) == {"model": "faq", **part, "done": True, "done_reason": "load"}
        for zero in (0, "0", "0s"):
            reply = await client.post(path, json={"model": "faq", "keep_alive": zero})
            assert reply.status_code == 400
            assert "macpipe unload" in reply.json()["error"]
    assert not known.requests


async def test_hints_are_told(client: httpx.AsyncClient, known: Known) -> None:
    known.events = (finish(),)
    options = {"num_ctx": 10**6, "num_gpu": 99, "mirostat": 0, "typical_p": 1.0, "tfs_z": 0.5, "repeat_last_n": 64}
    body = {"model": "faq", "messages": [TURN], "options": options, "keep_alive": 0, "think": True, "shift": False}
    reply = await client.post("/api/chat", json=body)
    assert set(reply.headers["x-macpipe-ignored"].split(", ")) == {
        "options.num_ctx", "num_gpu", "options.tfs_z", "options.repeat_last_n", "keep_alive", "think",
    }  # fmt: skip
    quiet = await client.post("/api/chat", json={"model": "faq", "messages": [TURN], "options": {"num_ctx": 8}})
    assert "x-macpipe-ignored" not in quiet.headers


async def test_models_are_listed_under_each_name_and_shown(client: httpx.AsyncClient, known: Known) -> None:
    models = (await client.get("/api/tags")).json()["models"]
    assert [(m["name"], m["model"]) for m in models] == [("faq", "faq"), ("gpt", "gpt")]
    assert len({m["digest"] for m in models}) == 1
    assert all(len(m["digest"]) == 64 and m["size"] > 0 and datetime.fromisoformat(m["modified_at"]) for m in models)
    details = models[0]["details"]
    assert details.items() >= {"format": "safetensors", "family": "llama", "families": ["llama"]}.items()
    (running,) = (await client.get("/api/ps")).json()["models"]
    assert running["name"] == "faq"
    assert running["size_vram"] == running["size"] == models[0]["size"]
    assert running["context_length"] == known.model.shape.max_context
    for asked in ({"model": "faq"}, {"name": "faq:latest"}, {"model": "default", "verbose": True}):
        shown = (await client.post("/api/show", json=asked)).json()
        assert shown["details"] == details
        assert shown["capabilities"] == ["completion"]
        facts = shown["model_info"]
        assert facts["general.architecture"] == "llama"
        assert facts["llama.context_length"] == known.model.shape.max_context
        assert facts["general.parameter_count"] > 1000
    assert (await client.get("/api/version")).json() == {"version": VERSION}


async def test_weights_that_were_quantized_when_they_were_loaded_are_told_so(
    client: httpx.AsyncClient, known: Known
) -> None:
    known.catalog = ModelCatalog([ModelEntry("faq", LoadOrder("faq", quantize=4))])
    (running,) = (await client.get("/api/ps")).json()["models"]
    assert running["details"]["quantization_level"] == "4-bit"
    assert running["expires_at"] == NEVER


async def test_when_a_model_leaves_is_told(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnDemand, "idle_left_s", lambda self, entry: 60.0)
    names = ModelNames(known, OnDemand(known))  # type: ignore[arg-type]
    running = json.loads((await OllamaModels(names).running(HttpRequest({"type": "http"}))).body)
    left = datetime.fromisoformat(running["models"][0]["expires_at"]) - datetime.now(UTC)
    assert 50 < left.total_seconds() <= 60


async def test_a_model_that_is_not_loaded_is_listed(client: httpx.AsyncClient, known: Known) -> None:
    known.resting = ["big"]
    *_, big = (await client.get("/api/tags")).json()["models"]
    assert (big["name"], big["size"], big["details"]["family"]) == ("big", 0, "unknown")
    assert [m["name"] for m in (await client.get("/api/ps")).json()["models"]] == ["faq"]
    for name in ("big", "big:latest"):
        shown = await client.post("/api/show", json={"model": name})
        assert (shown.status_code, shown.json()["details"]) == (200, big["details"])


async def test_a_model_whose_files_are_gone_is_listed(client: httpx.AsyncClient, known: Known, tmp_path: Any) -> None:
    gone = replace(known.model.found, folder=tmp_path / "gone")
    known.model = replace(known.model, found=gone)
    (one, _) = (await client.get("/api/tags")).json()["models"]
    assert one["details"]["family"] == "unknown"


async def test_errors_are_a_sentence(client: httpx.AsyncClient, known: Known) -> None:
    for path, body in (("/api/chat", {"messages": [TURN]}), ("/api/generate", {"prompt": "hi"}), ("/api/show", {})):
        reply = await client.post(path, json={"model": "llama3", **body})
        assert reply.status_code == 404
        assert "llama3 is not served" in reply.json()["error"]
        assert "model is missing" in (await client.post(path, json=body)).json()["error"]
    long = await client.post("/api/generate", json={"model": "faq", "prompt": "hop " * 5000})
    assert (long.status_code, "context" in long.json()["error"]) == (400, True)
    known.model = None  # type: ignore[assignment]
    assert (await client.post("/api/chat", json={"model": "faq", "messages": [TURN]})).status_code == 503
    assert (await client.get("/api/tags")).json() == (await client.get("/api/ps")).json() == {"models": []}


@pytest.mark.parametrize("path", INSTEAD)
async def test_what_changes_models_says_what_to_do_here(client: httpx.AsyncClient, path: str) -> None:
    method = "DELETE" if path == "/api/delete" else "POST"
    reply = await client.request(method, path, json={"model": "faq", "source": "a", "destination": "b"})
    assert (reply.status_code, reply.json()) == (501, {"error": INSTEAD[path]})
    wrong = await client.get(path)
    assert wrong.status_code == 405
    assert "use" in wrong.json()["error"]
