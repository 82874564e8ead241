"""Where later prompts part from a conversation, in the chat templates of common model families."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import pytest

from cluster.core.limits import MAX_BORDERS
from cluster.core.request import ChatMessage, ChatOptions
from model.test_template_families import FAMILIES, OFFER, Family, call, make

SYSTEM = ChatMessage("system", "You are a coding agent. " * 5)
FIRST = (SYSTEM, ChatMessage("user", "Please fix it. " * 4))
CALL = ChatMessage(
    "assistant", "", reasoning="Let me look at the files first.", tool_calls=(call("call_1", "shell", command="ls"),)
)
AGENTS = (*FIRST, CALL, ChatMessage("tool", "a.py\nb.py\n" * 8, tool_call_id="call_1", name="shell"))
PLAIN = (*FIRST, ChatMessage("assistant", "What is it?", reasoning="Hm."), ChatMessage("user", "The test. " * 20))
OTHER = (SYSTEM, ChatMessage("user", "What is this?"))
NEXT = (ChatMessage("assistant", "Done.", reasoning="I should say so."), ChatMessage("user", "Thanks; the next one."))


def shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_next_prompts_part_near_a_split_point(family: Family, tmp_path: Path) -> None:
    """Another conversation, a tool's result, and the next question, after which reasoning may be dropped."""
    tokenizer = make(family, tmp_path)
    options, second = (OFFER, AGENTS) if family.answer else (ChatOptions(), PLAIN)
    asked = (FIRST, second, (*second, *NEXT))
    prompts = [tokenizer.chat(messages, options) for messages in asked]
    marks: set[int] = set()
    for messages, prompt, later in zip(asked, prompts, prompts[1:], strict=False):
        found = tokenizer.find_split_points(messages, options, tokenizer.render(messages, options)).likely
        assert list(found) == sorted(set(found))
        assert all(0 < length < len(prompt) for length in found)
        marks |= {*found, len(prompt) - 1}
        both = shared(prompt, later)
        assert max(length for length in marks if length <= both) >= 0.95 * both
    new = tokenizer.chat(OTHER, options)
    assert shared(new, prompts[0]) in marks


def test_a_conversation_that_only_asks_has_a_split_point_too(tmp_path: Path) -> None:
    tokenizer = make(FAMILIES[0], tmp_path)
    prompt = tokenizer.render((ChatMessage("user", "0 or 1?"),))
    found = tokenizer.find_split_points((ChatMessage("user", "0 or 1?"),), ChatOptions(), prompt).likely
    assert tokenizer.decode(prompt.ids[: found[0]]).endswith("user\n")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_the_prompt_shares_with_its_own_answer_needs_no_chunk_of_its_own(family: Family, tmp_path: Path) -> None:
    tokenizer = make(family, tmp_path)
    prompt = tokenizer.render(FIRST)
    found = tokenizer.find_split_points(FIRST, ChatOptions(), prompt).likely
    answered = tokenizer.chat((*FIRST, ChatMessage("assistant", "Done."), ChatMessage("user", "Thanks.")))
    both = shared(prompt.ids, answered)
    assert max((*found, len(prompt.ids) - 1)) >= both - 1
    if both >= len(prompt.ids) - 1:
        assert "fix it." in tokenizer.decode(prompt.ids[found[-1] :])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_borders_are_where_messages_tools_and_sections_begin(family: Family, tmp_path: Path) -> None:
    tokenizer = make(family, tmp_path)
    options = OFFER if family.answer else ChatOptions()
    sections = "You are an agent.\n\n# Style\nBe brief.\n<env>\nIt is Monday.\n</env>\n```text\nclean\n```"
    asked = (ChatMessage("system", sections), ChatMessage("user", "Fix it."), ChatMessage("assistant", "Which one?"))
    prompt = tokenizer.render((*asked, ChatMessage("user", "The first.")), options)
    split = tokenizer.find_split_points((*asked, ChatMessage("user", "The first.")), options, prompt)
    assert not {*split.borders} & {*split.likely}
    rests = [prompt.text.removeprefix(tokenizer.decode(prompt.ids[:at])) for at in {*split.borders, *split.likely}]
    wanted = ["# Style", "<env>", "```text", "Fix it.", "Which one?", "The first."]
    for part in wanted + (['"read"'] if '"read"' in prompt.text else []):
        assert any(part in rest[: len(part) + 2] for rest in rests), part


def test_there_are_not_too_many_borders(tmp_path: Path) -> None:
    tokenizer = make(FAMILIES[0], tmp_path)
    messages = (ChatMessage("system", "# A\n" * 1000), ChatMessage("user", "Well?"))
    prompt = tokenizer.render(messages)
    found = tokenizer.find_split_points(messages, ChatOptions(), prompt).borders
    assert MAX_BORDERS // 2 < len(found) <= MAX_BORDERS
    assert found == tuple(sorted(found))
