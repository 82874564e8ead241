"""Tools, reasoning and constrained answers through the SDKs. The model is random, so the grammar decides its text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import StrEnum

import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI
from openai.types import CompletionUsage
from pydantic import BaseModel, ConfigDict

from compat.conftest import Served

pytestmark = [pytest.mark.xdist_group("compat"), pytest.mark.timeout(120)]


class Color(StrEnum):
    RED = "red"
    BLUE = "blue"


class Light(BaseModel):
    """Small, so that a random model comes to its end."""

    model_config = ConfigDict(extra="forbid")

    color: Color
    on: bool


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Lima"]}, "metric": {"type": "boolean"}},
    "required": ["city", "metric"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
ASK = [{"role": "user", "content": "How is it in Lima?"}]


@pytest.fixture
def client(tooled: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=tooled.openai, api_key=tooled.key, max_retries=0) as client:
        yield client


def test_a_round_trip(client: OpenAI) -> None:
    done = client.chat.completions.create(
        model="default", messages=ASK, tools=[WEATHER, CLOCK], temperature=0, parallel_tool_calls=False,
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )  # fmt: skip
    (choice,) = done.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Lima")
    back = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    said = client.chat.completions.create(
        model="default", messages=[*ASK, choice.message, back], tools=[WEATHER], tool_choice="none", max_tokens=8
    )
    assert said.choices[0].message.tool_calls is None
    assert said.choices[0].finish_reason in ("length", "stop")  # the call's id is random, and so is what follows it


def test_a_streamed_call(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="default", messages=ASK, tools=[WEATHER, CLOCK], tool_choice="required", temperature=0,
        parallel_tool_calls=False, stream=True,
    )  # fmt: skip
    deltas, reasons = [], []
    for chunk in stream:
        (choice,) = chunk.choices
        reasons += [choice.finish_reason] if choice.finish_reason else []
        assert "content" not in choice.delta.model_fields_set or choice.delta.content is not None
        deltas += choice.delta.tool_calls or []
    first, *rest = deltas
    assert reasons == ["tool_calls"]
    assert first.id
    assert first.type == "function"
    assert first.function
    assert first.function.name in ("weather", "clock")
    assert all(d.index == 0 and d.id is None and d.type is None for d in rest)
    assert all(d.function and d.function.name is None for d in rest)
    assert isinstance(json.loads("".join(d.function.arguments or "" for d in deltas if d.function)), dict)


def test_the_stream_helper_gathers_calls(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="default", messages=ASK, tools=[WEATHER], tool_choice="required", temperature=0, parallel_tool_calls=False
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls
    assert json.loads(final.choices[0].message.tool_calls[0].function.arguments).keys() == {"city", "metric"}


def test_parse(client: OpenAI) -> None:
    done = client.chat.completions.parse(model="default", messages=ASK, response_format=Light, temperature=1.5, seed=3)
    assert isinstance(done.choices[0].message.parsed, Light)


def test_json_schema_by_eight_at_once(client: OpenAI) -> None:
    bound = {"type": "json_schema", "json_schema": {"name": "light", "schema": Light.model_json_schema()}}
    done = client.chat.completions.create(
        model="default", messages=ASK, response_format=bound, temperature=1.5, n=8, seed=1
    )
    assert len({c.message.content for c in done.choices}) > 1
    assert all(Light.model_validate_json(c.message.content or "") for c in done.choices)


def test_regex_and_lark(client: OpenAI) -> None:
    def say(**bound: str) -> str | None:
        done = client.chat.completions.create(model="default", messages=ASK, extra_body={"response_format": bound})
        return done.choices[0].message.content

    assert say(type="regex", regex="(yes|no), (yes|no)") in ("yes, yes", "yes, no", "no, yes", "no, no")
    assert say(type="lark", lark='start: "on" | "off"') in ("on", "off")
    for mark in ("<|user|>", "<|end|>"):
        assert say(type="lark", lark=f'start: "a{mark}b"') == f"a{mark}b", "text that reads like a mark is text"
    with pytest.raises(openai.BadRequestError, match="allows no token"):
        say(type="lark", lark="start: <|end|>")


def test_a_schema_that_cannot_be_compiled(client: OpenAI) -> None:
    for bad in ({"type": "no-such-type"}, {"$ref": "#/nowhere"}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model="default", messages=ASK,
                response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": bad}},
            )  # fmt: skip
        assert caught.value.param == "response_format"


def test_a_tool_that_cannot_be_enforced_is_named(client: OpenAI) -> None:
    bad = {"name": "bad", "parameters": {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="default", messages=ASK, tools=[WEATHER, {"type": "function", "function": bad}],
            tool_choice="required",
        )  # fmt: skip
    assert caught.value.param == "tools[1].function.parameters"
    assert "'bad'" in caught.value.message
    assert "lark" not in caught.value.message


def reasoned(usage: CompletionUsage | None) -> int | None:
    assert usage
    assert usage.completion_tokens_details
    return usage.completion_tokens_details.reasoning_tokens


def test_reasoning(client: OpenAI) -> None:
    bound = {"response_format": {"type": "lark", "lark": 'start: <[263]> "hm, so" <[264]> "it rains"'}}
    done = client.chat.completions.create(model="default", messages=ASK, extra_body=bound)
    message = done.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("it rains", "hm, so", "hm, so")  # type: ignore[attr-defined]
    assert reasoned(done.usage) == 2 + len("hm, so"), "with its two marks, and a token a letter"
    *chunks, last = client.chat.completions.create(
        model="default", messages=ASK, extra_body=bound, stream=True, stream_options={"include_usage": True}
    )
    assert reasoned(last.usage) == reasoned(done.usage)
    thought, said = "", ""
    for chunk in chunks:
        delta = chunk.choices[0].delta
        thought += getattr(delta, "reasoning_content", "")
        said += delta.content or ""
    assert (thought, said) == ("hm, so", "it rains")
    again = client.chat.completions.create(
        model="default", messages=[*ASK, message.model_dump(), {"role": "user", "content": "x"}], max_tokens=1
    )
    assert again.usage


def test_responses_with_tools(client: OpenAI) -> None:
    tool = {"type": "function", **WEATHER["function"]}
    asked = {"model": "default", "input": ASK, "tools": [tool], "tool_choice": "required", "temperature": 0}
    done = client.responses.create(**asked, parallel_tool_calls=False)  # type: ignore[call-overload]
    (item,) = done.output
    assert (item.type, item.name) == ("function_call", "weather")
    with client.responses.stream(**asked, parallel_tool_calls=False) as stream:  # type: ignore[arg-type]
        pieces = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert "".join(pieces) == final.output[0].arguments == item.arguments  # type: ignore[union-attr]
    output = {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
    again = client.responses.create(model="default", input=[*ASK, item, output], max_output_tokens=4)
    assert again.status in ("incomplete", "completed")  # the call's id is random, and so is what follows it


def test_responses_parse(client: OpenAI) -> None:
    done = client.responses.parse(model="default", input=ASK, text_format=Light)
    assert isinstance(done.output_parsed, Light)


def test_anthropic_tools_and_thinking(tooled: Served) -> None:
    tool = {"name": "weather", "description": "Tells it.", "input_schema": SCHEMA}
    choice = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    with Anthropic(base_url=tooled.http, api_key=tooled.key, max_retries=0) as client:
        asked = {"model": "default", "max_tokens": 1000, "tools": [tool], "tool_choice": choice}
        asked["extra_body"] = {"temperature": 0}
        done = client.messages.create(**asked, messages=ASK)
        (block,) = done.content
        assert (done.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "weather")
        assert block.input["city"] in ("Paris", "Lima")
        with client.messages.stream(**asked, messages=ASK) as stream:
            final = stream.get_final_message()
        assert final.content[0].type == "tool_use"
        assert final.content[0].input.keys() == {"city", "metric"}
        result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "sunny"}]}
        turns = [*ASK, {"role": "assistant", "content": done.content}, {"role": "user", "content": [result]}]
        again = client.messages.create(model="default", max_tokens=4, messages=turns)
        assert again.stop_reason in ("max_tokens", "end_turn")  # the call's id is random, and so is what follows it
