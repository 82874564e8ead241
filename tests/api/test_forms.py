"""Request bodies of real clients: how they are read, and the sentence and field of every refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.api.http.body import Form, field_name, parse
from cluster.api.http.chat_form import ChatForm
from cluster.api.http.completions_form import CompletionsForm
from cluster.api.http.messages_form import MessagesForm
from cluster.api.http.openapi import BODIES, description
from cluster.api.http.responses_form import ResponsesForm
from cluster.api.requests import ChatParams, GenerateParams
from cluster.core.errors import InvalidRequest
from cluster.core.request import ToolChoice

TURN = {"role": "user", "content": "hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOLD = {"role": "tool", "tool_call_id": "call_1", "content": "4"}


def chat(**more: Any) -> ChatParams:
    return parse(json.dumps({"messages": [TURN], **more}).encode(), ChatForm).params("id")


def responses(**more: Any) -> ChatParams:
    return parse(json.dumps({"input": "hi", **more}).encode(), ResponsesForm).params("id")


def messages(**more: Any) -> ChatParams:
    body = {"model": "m", "max_tokens": 9, "messages": [TURN], **more}
    return parse(json.dumps(body).encode(), MessagesForm).params("id")


def refused(form: type[Form], body: object) -> InvalidRequest:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()

    def take_in() -> None:
        parse(sent, form).params("id")  # type: ignore[attr-defined]

    with pytest.raises(InvalidRequest) as caught:
        take_in()
    return caught.value


def test_defaults_are_openais() -> None:
    asked = chat()
    assert asked.sampling.temperature == 1
    assert asked.max_tokens is None
    assert asked.samples == 1


def test_every_sampling_field_arrives() -> None:
    asked = chat(
        temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.1, presence_penalty=-1,
        frequency_penalty=1, logit_bias={"7": -3}, seed=-1, logprobs=True, top_logprobs=2, stop=["a"], max_tokens=9,
    )  # fmt: skip
    s = asked.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty) == (0.5, 0.9, 40, 0.1, 1.1)
    assert (s.presence_penalty, s.frequency_penalty, s.logit_bias) == (-1, 1, {7: -3})
    assert (s.seed, s.logprobs, s.top_logprobs) == (2**64 - 1, True, 2)
    assert (asked.stop, asked.max_tokens) == (["a"], 9)


def test_predictions_are_text_or_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "file"}]
    for content in ("a file", parts):
        assert chat(prediction={"type": "content", "content": content}).prediction == "a file"
    assert chat().prediction == ""


def test_every_answer_is_speculated_for_unless_its_client_says_no() -> None:
    for asked in (chat, lambda **more: completions(**more)[0], responses, messages):
        assert asked().speculate
        assert asked(speculate=None).speculate
        assert not asked(speculate=False).speculate


@pytest.mark.parametrize(
    ("more", "field", "word"),
    [
        ({"temperature": "1"}, "temperature", "number"),
        ({"temperature": 2.5}, "temperature", "less than"),
        ({"top_p": 0}, "top_p", "greater"),
        ({"repetition_penalty": 1.401298464324817e-45}, "repetition_penalty", "0.01"),
        ({"logit_bias": {"1": 1e38}}, "logit_bias.1", "100"),
        ({"n": 0}, "n", "greater"),
        ({"n": True}, "n", "integer"),
        ({"made_up": 1}, "made_up", "not a parameter"),
        ({"functions": []}, "functions", "not supported"),
        ({"audio": {}}, "audio", "not supported"),
        ({"prediction": "a file"}, "prediction", "prediction: "),
        ({"prediction": {"type": "content"}}, "prediction.content", "missing"),
        ({"prediction": {"type": "image", "content": "x"}}, "prediction.type", "content"),
        ({"prediction": {"type": "content", "content": 5}}, "prediction.content", "prediction.content: "),
        ({"prediction": {"type": "content", "content": [{"type": "image_url"}]}}, "prediction.content[0]", "only text"),
        ({"speculate": "no"}, "speculate", "boolean"),
        ({"store": "yes"}, "store", "boolean"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token id"),
        ({"top_logprobs": 1}, "top_logprobs", "logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "one of them"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "requires stream"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": [5]}, "stop[0]", "string"),
        ({"stop": 5}, "stop", "stop: "),
        ({"str": 1}, "str", "not a parameter"),
        ({"Temperature": 1}, "Temperature", "not a parameter"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "no schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "json_object"),
        ({"tool_choice": "any"}, "tool_choice", "required"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
            "tool_choice",
            "not supported",
        ),
        ({"tool_choice": {"type": "function", "function": {"name": ""}}}, "tool_choice.function.name", "at least 1"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "no content"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "developer"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "only text"),
        ({"messages": [{**TURN, "tool_call_id": "x"}]}, "messages[0].tool_call_id", "only tool messages"),
        ({"messages": [TURN, {**TOLD, "tool_call_id": "y"}]}, "messages[1].tool_call_id", "no call"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL]}, {**TOLD, "tool_call_id": "y"}]},
            "messages[1].tool_call_id",
            "no call",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "foo"}}}]},
            "tools[0].function.parameters.type",
            "object",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "parameters": {"properties": {"type": {"anyOf": [{"type": ["null", "foo"]}]}}},
                        },
                    }
                ]
            },
            "tools[0].function.parameters.properties.type.anyOf[0].type",
            "null",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b!", "schema": {}}}},
            "response_format.json_schema.name",
            "letters",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "has no tool_call_id"),
        ({"messages": [{**TURN, "tool_calls": [CALL]}]}, "messages[0].tool_calls", "only assistant"),
    ],
)
def test_a_refusal_names_its_field(more: dict[str, Any], field: str, word: str) -> None:
    error = refused(ChatForm, {"messages": [TURN], **more})
    assert error.field == field
    assert word in error.sentence


@pytest.mark.parametrize(
    ("body", "word"),
    [(b"", "no body"), (b"{", "not JSON"), (b"[]", "JSON object"), (b'"x"', "JSON object"), (b"\xff", "not JSON"),
     (b'{"a":' * 500, "not JSON"), (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "not JSON")],
)  # fmt: skip
def test_what_is_no_json_object_is_told_so(body: bytes, word: str) -> None:
    assert word in refused(ChatForm, body).sentence


def test_our_own_answer_comes_back_whole() -> None:
    answer = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL], "reasoning": "hm",
              "reasoning_content": "hm", "audio": None, "function_call": None, "annotations": None}  # fmt: skip
    told = {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "4"}]}
    asked = chat(messages=[TURN, answer, told])
    _, assistant, tool = asked.conversation.messages
    assert (assistant.reasoning, assistant.tool_calls[0].arguments) == ("hm", '{"a": 1}')
    assert (tool.role, tool.tool_call_id, tool.content) == ("tool", "call_1", "4")


def test_names_of_speakers_go_to_the_template() -> None:
    said = chat(messages=[{"role": role, "content": "x", "name": "amy"} for role in ("system", "user", "assistant")])
    assert [m.name for m in said.conversation.messages] == ["amy"] * 3


def test_tools_and_choices() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}
    named = chat(tools=[tool], tool_choice={"type": "function", "function": {"name": "f"}}).conversation.options
    assert (named.tool_choice, named.tool_name) == (ToolChoice.NAMED, "f")
    assert named.tools[0].parameters == '{"type":"object"}'
    assert named.parallel_tool_calls
    assert chat(tools=[tool], tool_choice="none").conversation.options.tool_choice is ToolChoice.NONE
    assert chat(tools=[tool], parallel_tool_calls=False).conversation.options.parallel_tool_calls is False


def test_no_reasoning_is_no_thinking() -> None:
    assert chat(reasoning_effort="none").conversation.options.enable_thinking is False
    assert chat(reasoning_effort="none").conversation.options.thinking_is_hint
    assert not chat(chat_template_kwargs={"enable_thinking": False}).conversation.options.thinking_is_hint
    assert messages(thinking={"type": "disabled"}).conversation.options.thinking_is_hint
    assert chat(reasoning_effort="low").conversation.options.reasoning_effort == "low"
    assert chat(chat_template_kwargs={"x": 1}).conversation.options.template == '{"x":1}'


@pytest.mark.parametrize(
    ("more", "enable", "effort", "rest"),
    [({"enable_thinking": False}, False, "", ""), ({"enable_thinking": True}, True, "", ""),
     ({"thinking": True, "x": 1}, True, "", '{"x":1}'), ({"reasoning_effort": "high"}, None, "high", ""),
     ({"reasoning_effort": "none", "enable_thinking": None}, False, "", ""),
     ({"reasoning_effort": "low", "enable_thinking": True}, True, "low", "")],
)  # fmt: skip
def test_thinking_is_switched_among_the_arguments_of_the_template_too(
    more: dict[str, Any], enable: bool | None, effort: str, rest: str
) -> None:
    body = {"input": "x", "chat_template_kwargs": more}
    for asked in (chat(chat_template_kwargs=more), parse(json.dumps(body).encode(), ResponsesForm).params("id")):
        options = asked.conversation.options
        assert options.enable_thinking is enable
        assert (options.reasoning_effort, options.template) == (effort, rest)


@pytest.mark.parametrize(
    ("effort", "kwargs", "field", "word"),
    [("high", {"enable_thinking": False}, "chat_template_kwargs.enable_thinking", "reasoning_effort and chat_template"),
     ("none", {"enable_thinking": True}, "chat_template_kwargs.enable_thinking", "contradict"),
     ("low", {"reasoning_effort": "high"}, "chat_template_kwargs.reasoning_effort", "contradict"),
     (None, {"reasoning_effort": "much"}, "chat_template_kwargs.reasoning_effort", "minimal"),
     (None, {"enable_thinking": "no"}, "chat_template_kwargs.enable_thinking", "true or false"),
     (None, {"enable_thinking": True, "thinking": False}, "chat_template_kwargs.thinking", "contradict")],
)  # fmt: skip
def test_what_contradicts_itself_about_thinking_is_told(
    effort: str | None, kwargs: dict[str, Any], field: str, word: str
) -> None:
    error = refused(ChatForm, {"messages": [TURN], "reasoning_effort": effort, "chat_template_kwargs": kwargs})
    assert error.field == field
    assert word in error.sentence


def completions(**more: Any) -> list[GenerateParams]:
    return parse(json.dumps({"prompt": "x", **more}).encode(), CompletionsForm).params("id")


def test_prompts_of_every_kind() -> None:
    assert [p.prompt for p in completions(prompt=["a", "b"])] == ["a", "b"]
    assert [p.prompt for p in completions(prompt=[1, 2])] == [[1, 2]]
    assert [p.prompt for p in completions(prompt=[[1], [2]])] == [[1], [2]]
    assert [p.request_id for p in completions(prompt=["a", "b"])] == ["id-0", "id-1"]


@pytest.mark.parametrize(
    ("more", "field"),
    [({"best_of": 2}, "best_of"), ({"suffix": "x"}, "suffix"),
     ({"prompt": ["x"] * 64, "n": 2}, "n"), ({"prompt": ["x"] * 5000}, "prompt"),
     ({"prompt": [-1]}, "prompt[0]"), ({"prompt": ["a", 5]}, "prompt[1]"), ({"prompt": [[1, "a"]]}, "prompt[0][1]"),
     ({"prompt": 5}, "prompt")],
)  # fmt: skip
def test_completions_refuse(more: dict[str, Any], field: str) -> None:
    assert refused(CompletionsForm, {"prompt": "x", **more}).field == field


@pytest.mark.parametrize(
    ("more", "alternatives"),
    [({}, None), ({"logprobs": 2}, None), ({"echo": True}, None), ({"echo": True, "logprobs": 0}, 0),
     ({"echo": True, "logprobs": 2}, 2), ({"echo": False, "logprobs": 2}, None)],
)  # fmt: skip
def test_an_echoed_prompt_has_log_probabilities_as_its_answer(more: dict[str, Any], alternatives: int | None) -> None:
    (params,) = completions(**more)
    assert params.prompt_logprobs == alternatives


def test_responses_join_what_an_assistant_did_into_one_turn() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "4"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "four"}]},
    ]
    asked = parse(json.dumps({"input": items, "instructions": "be brief"}).encode(), ResponsesForm).params("id")
    assert [m.role for m in asked.conversation.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert (asked.conversation.messages[2].reasoning, asked.conversation.messages[2].tool_calls[0].name) == ("hm", "f")


@pytest.mark.parametrize(
    ("more", "field"),
    [({"previous_response_id": "resp_1"}, "previous_response_id"), ({"store": True}, "store"),
     ({"background": True}, "background"), ({"tools": [{"type": "local_shell"}]}, "tools[0].type"),
     ({"tools": [{"type": "web_search"}, {"type": "function", "name": "a b"}]}, "tools[1].name"),
     ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
     ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
     ({"input": [{"type": "function_call_output", "call_id": "c", "output": "4"}]}, "input[0].call_id"),
     ({"text": {"format": {"type": "json_schema", "name": "a b!", "schema": {}}}}, "text.format.name"),
     ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
     ({"truncation": "auto"}, "truncation"), ({"input": []}, "input"), ({"input": 5}, "input")],
)  # fmt: skip
def test_responses_refuse(more: dict[str, Any], field: str) -> None:
    assert refused(ResponsesForm, {"input": "x", **more}).field == field


def test_results_of_tools_come_before_what_the_user_says() -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": "4", "is_error": True}
    turns = [
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""},
                                          {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "text", "text": "so?"}, result]},
    ]  # fmt: skip
    body = {"model": "m", "max_tokens": 5, "system": "be brief", "messages": turns}
    asked = parse(json.dumps(body).encode(), MessagesForm).params("id")
    assert [m.role for m in asked.conversation.messages] == ["system", "assistant", "tool", "user"]
    assert (asked.conversation.messages[1].reasoning, asked.conversation.messages[1].tool_calls[0].arguments) == (
        "hm",
        '{"a":1}',
    )
    assert asked.conversation.messages[2].content == "Error: 4"


@pytest.mark.parametrize(
    ("more", "field"),
    [({"max_tokens": None}, "max_tokens"), ({"temperature": 1.5}, "temperature"), ({"mcp_servers": []}, "mcp_servers"),
     ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
     ({"tools": [{"name": "f", "type": "web_search_20250305x", "input_schema": {}}]}, "tools[0].type"),
     ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0].type"),
     ({"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": 2}]}},
      "context_management.edits[0].keep"),
     ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
     ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
     ({"messages": [TURN, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
      "messages[1].content[0].tool_use_id"),
     ({"messages": [TURN, {"role": "assistant", "content": "A hop"}]}, "messages[1].role"),
     ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
     ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id")],
)  # fmt: skip
def test_messages_refuse(more: dict[str, Any], field: str) -> None:
    assert refused(MessagesForm, {"model": "m", "max_tokens": 5, "messages": [TURN], **more}).field == field


@pytest.mark.parametrize(
    ("form", "tool"),
    [(MessagesForm, {"type": "bash_20250124", "name": "bash"}), (MessagesForm, {"type": "text_editor_20250728"}),
     (ResponsesForm, {"type": "local_shell"})],
)  # fmt: skip
def test_a_tool_without_a_schema_is_named_with_what_to_do(form: type[Form], tool: dict[str, Any]) -> None:
    body = {"model": "m", "max_tokens": 5, "messages": [TURN]} if form is MessagesForm else {"input": "x"}
    assert refused(form, {**body, "tools": [tool]}).sentence == (
        f"tools[0].type: {tool['type']} is not supported, because only the API's own models know its schema; "
        "define the tool with a name and a schema instead"
    )
    own = {"type": "custom" if form is MessagesForm else "function"}
    assert refused(form, {**body, "tools": [own]}).field in ("tools[0].name", "tools[0].input_schema")


def test_names_of_places() -> None:
    assert field_name(("messages", 0, "content", "list[Part]", 1, "text")) == "messages[0].content[1].text"
    assert field_name(("stop", "str")) == "stop"


def test_the_description_holds_every_form() -> None:
    document = description()
    json.dumps(document)
    assert {path for path, _, _ in BODIES} < set(document["paths"])
    assert document["components"]["schemas"]["ChatForm"]["additionalProperties"] is False
    assert document["components"]["schemas"]["ChatForm"]["properties"]["functions"] == {"default": None, "title": "Functions", "type": "null"}  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("arguments", ['{"a": 1', "[1]", '"a"', "a", "[" * 10_000])
def test_a_call_that_was_cut_does_not_end_its_session(arguments: str) -> None:
    """Agents send it back with an error as its result."""
    shown = json.dumps({"invalid_arguments": arguments}, separators=(",", ":"))
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [TURN, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "no"}]
    chat = parse(json.dumps({"messages": turns}).encode(), ChatForm).params("id").conversation.messages
    assert [one.arguments for one in chat[1].tool_calls] == [shown]
    items = [
        TURN,
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments},
        {"type": "function_call_output", "call_id": "c", "output": "no"},
    ]
    told = parse(json.dumps({"input": items}).encode(), ResponsesForm).params("id").conversation.messages
    assert [one.arguments for one in told[1].tool_calls] == [shown]


def test_cache_control_is_a_hint_wherever_clients_put_it() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    body = {"messages": [{**TURN, **mark}], "tools": [{"type": "function", "function": {"name": "f"}, **mark}]}
    assert parse(json.dumps(body).encode(), ChatForm).params("id").conversation.messages[0].content


def test_how_fast_an_answer_is_wanted_is_a_hint() -> None:
    assert chat(service_tier="priority") == chat()
    assert responses(service_tier="flex") == responses()
    assert messages(speed="fast") == messages()


def test_tools_that_a_client_found_are_text() -> None:
    call = {"type": "tool_use", "id": "t", "name": "ToolSearch", "input": {}}
    found = [{"type": "tool_reference", "tool_name": "WebFetch"}, {"type": "text", "text": "1 tool"}]
    result = {"type": "tool_result", "tool_use_id": "t", "content": found}
    turns = [TURN, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    assert messages(messages=turns).conversation.messages[-1].content == "WebFetch\n1 tool"
