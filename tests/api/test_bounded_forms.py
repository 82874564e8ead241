"""Bounded forms: every container of every form has a limit, and elements are counted before they are parsed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api.http import body as bodies
from cluster.api.http.body import Form, parse
from cluster.api.http.chat_form import ChatForm
from cluster.api.http.completions_form import CompletionsForm
from cluster.api.http.login import LoginForm
from cluster.api.http.messages_form import MessagesForm
from cluster.api.http.openapi import BODIES
from cluster.api.http.operations import JointPlanForm, PlanForm
from cluster.api.http.responses_form import ResponsesForm
from cluster.api.json_elements import ElementCounter, count_elements
from cluster.api.limits import MAX_ELEMENTS, MAX_NUMBER_BYTES
from cluster.core.errors import InvalidRequest, TooLarge
from cluster.core.limits import MAX_LOGIT_BIAS, MAX_MESSAGES, MAX_PROMPT_IDS
from effort import effort

TURN = {"role": "user", "content": "hi"}
BOUNDED = (bodies._refuse, bodies._refuse_set, bodies._drop, bodies._drop_hint, bodies._bound_values)
"""What may stand around a value of any kind."""


def schemas(schema: Any, path: str, seen: set[int]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every schema of pydantic's core inside of ``schema``; what a bounding function holds is left out."""
    if isinstance(schema, list | tuple):
        for i, one in enumerate(schema):
            yield from schemas(one, f"{path}.{i}", seen)
    if not isinstance(schema, dict) or id(schema) in seen:
        return
    seen.add(id(schema))
    function = schema.get("function")
    if isinstance(function, dict) and function.get("function") in BOUNDED:
        return
    if isinstance(schema.get("type"), str):
        yield schema, path
    for name, inner in schema.items():
        if name not in ("metadata", "serialization"):
            yield from schemas(inner, f"{path}.{name}", seen)


@pytest.mark.parametrize("form", [*(form for _, form, _ in BODIES), PlanForm, JointPlanForm, LoginForm])
def test_every_container_of_every_form_is_bounded(form: type[Form]) -> None:
    found = list(schemas(form.__pydantic_core_schema__, form.__name__, set()))
    kinds = {schema["type"] for schema, _ in found}
    assert {"model", "str"} < kinds
    for schema, path in found:
        match schema["type"]:
            case "list":
                assert schema.get("max_length"), f"{path} has no max_length"
                assert schema.get("fail_fast"), f"{path} goes on after its first error"
            case "dict":
                assert schema.get("max_length"), f"{path} has no max_length"
            case "any":
                pytest.fail(f"{path} takes anything: make it Ignored, Hint, Unsupported or JsonObject")
            case "tuple" | "set" | "frozenset" | "generator" | "typed-dict" | "dataclass":
                pytest.fail(f"{path} is a {schema['type']}, for which this test knows no bound")


def values() -> st.SearchStrategy[Any]:
    text = st.text(st.sampled_from('a"\\,:[]{} é\n\u2028😀'), max_size=8)
    leaf = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
    return st.recursive(leaf, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4))


def counted(value: Any) -> tuple[int, int]:
    """Return the commas and brackets of ``value`` as JSON, each bracket counted with its colons."""
    if isinstance(value, dict | list):
        inner = [counted(one) for one in (value.values() if isinstance(value, dict) else value)]
        commas = max(0, len(value) - 1) + sum(c for c, _ in inner)
        return commas, 1 + (len(value) if isinstance(value, dict) else 0) + sum(m for _, m in inner)
    return 0, 0


@settings(max_examples=effort(300, 300, 60), deadline=None, database=None)
@given(values(), st.booleans(), st.integers(1, 7))
def test_elements_are_counted_exactly_however_the_text_is_cut(value: Any, ascii_only: bool, step: int) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    counter = ElementCounter()
    for start in range(0, len(text), step):
        counter.feed(text[start : start + step])
    assert (counter._commas, counter._marks) == counted(value)
    assert not counter._quoted


@pytest.mark.parametrize(
    "text",
    ["[" + "0," * (MAX_ELEMENTS + 1), "[" * (MAX_ELEMENTS + 1), "[" + "{}," * (MAX_ELEMENTS + 1),
     '"' * (6 * MAX_ELEMENTS + 1), "[" + "9" * (MAX_NUMBER_BYTES + 1)],
    ids=["commas", "brackets", "objects", "quotes", "digits"],
)  # fmt: skip
def test_too_many_elements_are_refused_unparsed(text: str) -> None:
    with pytest.raises(TooLarge):
        count_elements(text)


def test_what_stands_in_strings_and_between_elements_is_not_counted() -> None:
    prompt = '{"a": [1, 2, "b"]},\n\\"' * 50_000
    assert (
        parse(json.dumps({"messages": [{**TURN, "content": prompt}]}).encode(), ChatForm).messages[0].content == prompt
    )
    count_elements("[" + " " * (2 * MAX_NUMBER_BYTES) + "1]")


def test_a_prompt_may_have_a_million_ids_and_no_more() -> None:
    body = b'{"prompt": [' + b"7, " * (MAX_PROMPT_IDS - 1) + b"7]}"
    assert len(parse(body, CompletionsForm).prompts[0]) == MAX_PROMPT_IDS
    with pytest.raises(InvalidRequest) as caught:
        parse(body.replace(b"7]", b"7, 7]"), CompletionsForm)
    assert caught.value.field == "prompt"


def many(item: str, count: int = 20_000) -> str:
    return ",".join([item] * count)


KEYS = ",".join(f'"{i:x}":1e99' for i in range(30_000))
CHAT = '"messages":[{"role":"user","content":"a"}]'
SCHEMA = '"response_format":{"type":"json_schema","json_schema":{"schema":{"enum":[%s]}}}'
COSTLY = [
    (ChatForm, f'{{"messages":[{many("{}")}]}}', "messages[0].role"),
    (ChatForm, f'{{"messages":[{many("0")}]}}', "messages[0]"),
    (ChatForm, f'{{"messages":[{many(json.dumps(TURN), MAX_MESSAGES + 1)}]}}', "messages"),
    (ChatForm, f"{{{CHAT},{KEYS}}}", "0"),
    (ChatForm, f'{{"messages":[{{{KEYS}}}]}}', "messages[0].role"),
    (ChatForm, f'{{{CHAT},"logit_bias":{{{KEYS}}}}}', "logit_bias.0"),
    (ChatForm, f'{{{CHAT},"tools":[{many("{}")}]}}', "tools[0].type"),
    (ChatForm, f'{{{CHAT},"chat_template_kwargs":{{"a":[{many("0")}]}}}}', "chat_template_kwargs"),
    (ChatForm, f"{{{CHAT},{SCHEMA % many('[]')}}}", "response_format.json_schema.schema"),
    (CompletionsForm, f'{{"prompt":[{many("{}")}]}}', "prompt[0]"),
    (CompletionsForm, f'{{"prompt":[{many("-1")}]}}', "prompt[0]"),
    (ResponsesForm, f'{{"input":[{many("0")}]}}', "input[0]"),
    (ResponsesForm, f'{{"input":"a","metadata":{{{KEYS}}}}}', "metadata.0"),
    (MessagesForm, f'{{"model":"a","max_tokens":1,"messages":[{{"role":"user","content":[{many("{}")}]}}]}}',
     "messages[0].content[0].type"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "body", "field"), COSTLY, ids=[f"{i}" for i in range(len(COSTLY))])
def test_one_error_is_made_where_a_hundred_thousand_could_be(
    form: type[Form], body: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object of bounded entries may have one error each; everything else stops at the first."""
    weighed = []

    def weigh(error: Any, weigh: Any = bodies._relevance) -> Any:
        weighed.append(error)
        return weigh(error)

    monkeypatch.setattr(bodies, "_relevance", weigh)
    with pytest.raises(InvalidRequest) as caught:
        parse(body.encode(), form)
    assert caught.value.field == field
    assert 0 < len(weighed) <= MAX_LOGIT_BIAS + 1


def test_an_unknown_field_is_named_and_a_long_name_is_cut() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(json.dumps({"messages": [TURN], "x" * 100_000: 1}).encode(), ChatForm)
    assert len(caught.value.field) < 300
    assert caught.value.details["code"] == "unknown_parameter"


def test_calls_are_bounded_in_their_arguments_together() -> None:
    """Their JSON is inside strings, which the count of the body's elements does not see."""
    arguments = json.dumps({"a": [[]] * 1000})
    call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
    body = {"messages": [{"role": "assistant", "tool_calls": [call] * 100}]}
    with pytest.raises(TooLarge):
        parse(json.dumps(body).encode(), ChatForm).params("id")
    body["messages"][0]["tool_calls"] = [call] * 10
    assert len(parse(json.dumps(body).encode(), ChatForm).params("id").conversation.messages[0].tool_calls) == 10


def test_an_assistants_turn_of_many_items_is_put_together_in_order() -> None:
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "q"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        *({"role": "assistant", "content": f"{i}"} for i in range(2000)),
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "4"},
        {"role": "assistant", "content": "end"},
    ]
    turns = parse(json.dumps({"input": items}).encode(), ResponsesForm).params("id").conversation.messages
    assert [t.role for t in turns] == ["user", "assistant", "tool", "assistant"]
    assert (turns[1].reasoning, turns[1].content) == ("hm", "".join(map(str, range(2000))))
    assert (len(turns[1].tool_calls), turns[3].content) == (1, "end")


def test_a_deep_schema_is_checked_without_a_path_for_each_of_its_parts() -> None:
    schema: dict[str, Any] = {"anyOf": [{"type": "text"}] * 5}
    for _ in range(150):
        schema = {"items": schema}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(InvalidRequest) as caught:
        parse(json.dumps({"messages": [TURN], "tools": [tool]}).encode(), ChatForm).params("id")
    assert len(caught.value.field) < 300
