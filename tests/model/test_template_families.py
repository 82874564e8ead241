"""Conversations of coding agents in the chat templates of common model families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.core.request import ChatMessage, ChatOptions, Parsing, Tool, ToolCall, ToolChoice
from cluster.model.answer_parser import Parsed
from cluster.model.grammars import Constraint
from in_process import with_calls_read
from model.template_families import FAMILIES, Family, in_order, make

SHELL = Tool(
    "shell",
    "Run a command",
    json.dumps(
        {
            "type": "object",
            "properties": {"command": {"type": "string", "maxLength": 20}},
            "required": ["command"],
            "additionalProperties": False,
        }
    ),
)
READ = Tool("read", "Read a file", json.dumps({"type": "object", "properties": {"path": {"type": "string"}}}))
OFFER = ChatOptions(tools=(SHELL, READ), tool_choice=ToolChoice.AUTO)


def call(identity: str, tool: str, **arguments: object) -> ToolCall:
    return ToolCall(identity, tool, json.dumps(arguments))


AGENT = (
    ChatMessage("system", "S-ONE"),
    ChatMessage("system", "S-TWO"),
    ChatMessage("user", "U-ONE"),
    ChatMessage("user", "U-TWO"),
    ChatMessage(
        "assistant",
        "",
        tool_calls=(call("call_1", "shell", command="C-ONE"), call("call_2", "read", path="C-TWO", limit=3, raw=True)),
    ),
    ChatMessage("tool", "R-ONE", tool_call_id="call_1", name="shell"),
    ChatMessage("tool", "R-TWO", tool_call_id="call_2", name="read"),
    ChatMessage("system", "S-LATER"),
    ChatMessage("assistant", "A-ONE"),
    ChatMessage("assistant", "A-TWO"),
    ChatMessage("user", "U-THREE"),
)
"""Two developer messages, two user messages, parallel calls, a reminder after their results, an answer in parts."""
PLAIN = tuple(m for m in AGENT if not m.tool_calls and m.role != "tool")


CALLING = tuple(family for family in FAMILIES if family.answer)


def admitted(constraint: Constraint, ids: list[int], vocabulary: int) -> int:
    """Return how many of ``ids`` the grammar admits, from the first on."""
    for at, token in enumerate(ids):
        mask = constraint.allowed_mask(ids[:at], at, vocabulary)
        if mask is not None and not mask[token]:
            return at
    return len(ids)


@pytest.mark.parametrize("family", CALLING, ids=lambda family: family.name)
def test_an_agents_conversation_is_rendered_whole_and_in_order(family: Family, tmp_path: Path) -> None:
    tokenizer = make(family, tmp_path)
    text = tokenizer.decode(tokenizer.chat(AGENT, OFFER))
    assert in_order(text, "S-ONE", "S-TWO", "U-ONE", "U-TWO", "C-ONE", "R-ONE", "R-TWO", "S-LATER", "A-ONE", "A-TWO")
    assert in_order(text, "C-ONE", "C-TWO", "R-TWO", "A-TWO", "U-THREE")
    assert "Run a command" in text or family.name == "gpt-oss"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_conversation_without_tools_is_rendered_whole_and_in_order(family: Family, tmp_path: Path) -> None:
    tokenizer = make(family, tmp_path)
    text = tokenizer.decode(tokenizer.chat(PLAIN))
    assert in_order(text, *(message.content for message in PLAIN))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_longer_conversation_starts_with_the_shorter_one(family: Family, tmp_path: Path) -> None:
    """Otherwise no turn could start from the caches of the turn before."""
    tokenizer = make(family, tmp_path)
    shorter = tokenizer.decode(tokenizer.chat(PLAIN[:-1]))
    longer = tokenizer.decode(tokenizer.chat(PLAIN))
    assert longer.startswith(shorter[: shorter.rindex("A-TWO")])


@pytest.mark.parametrize("family", CALLING, ids=lambda family: family.name)
def test_a_call_in_the_models_format_is_found(family: Family, tmp_path: Path) -> None:
    tokenizer = make(family, tmp_path)
    ids = tokenizer.chat(AGENT[:3], OFFER)
    parser = tokenizer.parser(tokenizer.parsing(ids, OFFER))
    parts: list[Parsed] = []
    for character in family.answer:
        parts += with_calls_read(tokenizer, parser, parser.add(character), OFFER.tools)
    parts += with_calls_read(tokenizer, parser, parser.flush(whole=True), OFFER.tools)
    calls = [delta for part in parts for delta in part.calls]
    assert [delta.name for delta in calls if delta.name] == ["shell"]
    assert json.loads("".join(delta.arguments for delta in calls)) == {"command": "ls"}
    assert "".join(part.text for part in parts) == ""
    assert "".join(part.reasoning for part in parts) in ("", "hm")


@pytest.mark.parametrize("family", [f for f in CALLING if f.required], ids=lambda family: family.name)
def test_a_required_call_admits_the_models_format_alone(family: Family, tmp_path: Path) -> None:
    tokenizer = make(family, tmp_path)
    options = ChatOptions(tools=(SHELL, READ), tool_choice=ToolChoice.NAMED, tool_name="shell")
    grammar = tokenizer.required_call_grammar(options)
    assert grammar is not None
    compiled = tokenizer.grammars()
    answer = family.answer
    for marker in ("</think>", "<|start|>assistant"):
        answer = answer.rpartition(marker)[2]
    ids = list(tokenizer.encode(answer.strip(), add_special_tokens=False))
    assert admitted(compiled.constraint(grammar, 0), ids, tokenizer.vocab_size) == len(ids)
    other = list(tokenizer.encode("no", add_special_tokens=False))
    assert admitted(compiled.constraint(grammar, 0), other, tokenizer.vocab_size) == 0


def test_harmony_content_follows_its_channel(tmp_path: Path) -> None:
    family = next(f for f in FAMILIES if f.name == "gpt-oss")
    parser = make(family, tmp_path).parser(Parsing(tools=(SHELL,)))
    answer = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi there."
    parts = [parser.add(character) for character in answer]
    parts.append(parser.flush(whole=True))
    assert "".join(part.reasoning for part in parts) == "hm"
    assert "".join(part.text for part in parts) == "Hi there."
