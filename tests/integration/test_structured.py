"""Structured answers through real daemons: with random weights, only the grammar makes a document valid."""

from __future__ import annotations

import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from checkpoints import make, make_tokenizer
from cluster.client import ChatMessage, Client
from cluster.core.errors import Aborted, InvalidGrammar, InvalidRequest
from effort import effort
from integration.daemons import serve_model

pytestmark = [pytest.mark.xdist_group("session-cluster"), pytest.mark.timeout(300)]


def closed(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


WORD = {"type": "string", "maxLength": 6}
SMALL = {"type": "integer", "minimum": 0, "maximum": 99}
COLOUR = {"enum": ["red", "green", "blue"]}
SCHEMAS: tuple[dict[str, Any], ...] = (
    closed(name=WORD),
    closed(name=WORD, age=SMALL),
    closed(colour=COLOUR),
    closed(colour=COLOUR, again=COLOUR),
    closed(yes={"type": "boolean"}),
    closed(nothing={"type": "null"}, yes={"type": "boolean"}),
    closed(list={"type": "array", "items": SMALL, "maxItems": 3}),
    closed(list={"type": "array", "items": COLOUR, "minItems": 2, "maxItems": 2}),
    closed(inner=closed(name=WORD, age=SMALL)),
    closed(inner=closed(deeper=closed(yes={"type": "boolean"}))),
    closed(either={"anyOf": [SMALL, COLOUR]}),
    closed(code={"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}),
    closed(day={"type": "string", "format": "date"}),
    closed(kind={"const": "cat"}, age=SMALL),
    {"type": "array", "items": closed(age=SMALL), "minItems": 1, "maxItems": 2},
    {"enum": ["one", 2, None, True]},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "integer", "minimum": -5, "maximum": 5},
    {"$defs": {"leaf": closed(age=SMALL)}, **closed(left={"$ref": "#/$defs/leaf"}, right={"$ref": "#/$defs/leaf"})},
    {"type": "object", "properties": {"age": SMALL}, "additionalProperties": False},
)


def documents(client: Client, count: int, first: int = 0) -> list[tuple[dict[str, Any], str]]:
    """Documents of every schema in turn, 8 users at once; each must end by its grammar."""

    def one(seed: int) -> tuple[dict[str, Any], str]:
        schema = SCHEMAS[seed % len(SCHEMAS)]
        answer = client.generate(
            f"document {seed % 7}", json_schema=schema, seed=seed, temperature=(seed % 4) * 0.5, max_tokens=400
        )
        assert answer.finish_reason == "stop", answer.text
        return schema, answer.text

    with ThreadPoolExecutor(8) as users:
        return list(users.map(one, range(first, first + count)))


def require_valid(made: list[tuple[dict[str, Any], str]]) -> None:
    for schema, text in made:
        Draft202012Validator(schema).validate(json.loads(text))


def test_documents_are_valid_with_eight_users_at_once(client: Client) -> None:
    serve_model(client, "faq", 2)
    made = documents(client, effort(len(SCHEMAS), 40))
    require_valid(made)
    assert len({text for _, text in made}) > len(made) // 3


@pytest.mark.long
@pytest.mark.parametrize("first", [0, 125, 250, 375])
def test_five_hundred_documents_over_twenty_schemas(client: Client, first: int) -> None:
    serve_model(client, "faq", 2)
    require_valid(documents(client, 125, first))


@pytest.mark.long
@pytest.mark.parametrize("stages", [1, 3])
def test_random_weights_write_valid_documents(client: Client, llama: Path, stages: int) -> None:
    serve_model(client, llama, stages)
    require_valid(documents(client, 100))


def test_regex_lark_and_any_object(client: Client, llama: Path) -> None:
    serve_model(client, llama, 2)
    for seed in range(4):
        options: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_tokens": 80}
        assert re.fullmatch("[a-f]{3}-[0-9]{4}", client.generate("x", regex="[a-f]{3}-[0-9]{4}", **options).text)
        assert client.generate("x", lark='start: "a" | "bc"', **options).text in {"a", "bc"}
    assert client.generate("x", json_object=True, temperature=1.0, max_tokens=60).text.startswith("{")
    cut = client.generate("x", json_schema=closed(name=WORD), temperature=1.0, max_tokens=3)
    assert cut.finish_reason == "length"


def test_a_grammar_holds_with_logprobs_stop_lists_biases_and_penalties(client: Client) -> None:
    serve_model(client, "faq", 2)
    schema = closed(name=WORD, age=SMALL)
    answer = client.generate(
        "x",
        json_schema=schema,
        temperature=1.5,
        seed=4,
        max_tokens=300,
        logprobs=True,
        top_logprobs=5,
        logit_bias={3: 100.0, 40: 50.0},
        repetition_penalty=1.3,
        presence_penalty=1.0,
        frequency_penalty=0.5,
    )
    Draft202012Validator(schema).validate(json.loads(answer.text))
    assert all(t.logprob is not None and t.logprob <= 0 for t in answer.events)
    stopped = client.generate("x", json_schema=schema, stop='"name"', max_tokens=300)
    assert '"name"' not in stopped.text
    assert stopped.finish_reason == "stop"


def test_a_grammar_that_cannot_be_compiled_is_refused_before_acceptance(client: Client) -> None:
    serve_model(client, "faq", 2)
    stream = client.stream("x", regex="a(")
    with pytest.raises(InvalidGrammar, match="unclosed group"):
        stream.wait_accepted()
    with pytest.raises(InvalidGrammar, match="the limit is 65536"):
        client.generate("x", lark=f'start: "{"a" * 70_000}"')
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        client.generate("x", regex="a", ignore_eos=True)
    with pytest.raises(InvalidRequest, match="does not support tools"):
        client.chat([("user", "x")], tools=[{"name": "clock"}])


def test_samples_share_the_prompt_and_differ_by_their_seeds(client: Client, llama: Path) -> None:
    serve_model(client, llama, 3)
    prompt = [(i * 31 + 7) % 250 for i in range(300)]
    asked: dict[str, Any] = {"temperature": 1.0, "seed": 11, "max_tokens": 12, "ignore_eos": True}
    alone = client.generate(prompt, **asked)
    answer = client.generate(prompt, samples=4, **asked)
    assert answer.tokens == alone.tokens == answer.choices[0].tokens
    assert len({choice.tokens for choice in answer.choices}) == 4
    assert all(len(c.tokens) == 12 and c.finish_reason == "length" for c in answer.choices)
    again = client.generate(prompt, samples=4, **asked)
    assert [c.tokens for c in again.choices] == [c.tokens for c in answer.choices]
    fresh = [(i * 17 + 3) % 250 for i in range(300)]
    assert [c.usage.cached_tokens for c in client.generate(fresh, samples=3, **asked).choices] == [0, 299, 299]


def test_aborting_a_request_ends_all_of_its_samples(client: Client, llama: Path) -> None:
    serve_model(client, llama, 2)
    stream = client.stream("x", samples=3, max_tokens=2000, ignore_eos=True, request_id="many")
    seen = {token.sample for token in itertools.islice(stream_tokens(stream), 12)}
    assert seen == {0, 1, 2}
    client.abort("many")
    with pytest.raises(Aborted):
        stream.completion()
    assert client.cluster().requests == ()


TOOLS = [
    {
        "type": "function",
        "function": {"name": "paint", "description": "Paint it", "parameters": closed(colour=COLOUR, coats=SMALL)},
    },
    {"name": "stop_work"},
]
TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for tool_call in m.tool_calls or [] %}<tool_call>{{ tool_call.name }}</tool_call>{% endfor %}{% endfor %}"
)


def test_tools_that_must_be_called_are_called_and_answered(client: Client, models: Path) -> None:
    folder = make("llama", models / "tools")
    make_tokenizer(folder, TEMPLATE)
    serve_model(client, folder, 2)
    asked: dict[str, Any] = {"tools": TOOLS, "temperature": 1.0, "max_tokens": 300}
    for seed in range(3):
        answer = client.chat([("user", "paint")], tool_choice="paint", parallel_tool_calls=False, seed=seed, **asked)
        assert answer.finish_reason == "tool_calls"
        assert answer.text == ""
        (call,) = answer.tool_calls
        assert call.name == "paint"
        Draft202012Validator(closed(colour=COLOUR, coats=SMALL)).validate(json.loads(call.arguments))
    turn = ChatMessage("assistant", "", tool_calls=answer.tool_calls)
    done = ChatMessage("tool", "painted", tool_call_id=call.id, name="paint")
    after = client.chat([("user", "paint"), turn, done], tool_choice="none", **asked)
    assert after.tool_calls == ()
    assert after.text
    with pytest.raises(InvalidRequest, match="cannot be both"):
        client.chat([("user", "x")], tool_choice="required", json_object=True, **asked)


def stream_tokens(stream: Any) -> Any:
    """Yield the tokens as they arrive, without ending the call when the reader stops."""
    while (tokens := stream._advance()) is not None:
        yield from tokens
