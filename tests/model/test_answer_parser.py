"""Parsing of answers: every way of splitting the text gives the same, broken calls are content, nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import make_tokenizer
from cluster.core.errors import InvalidRequest
from cluster.core.request import ChatMessage, ChatOptions, Grammar, Parsing, Tool, ToolCall, ToolChoice
from cluster.model.answer_parser import HEAD_CHARS
from cluster.model.partial_tool_call import PartialToolCall
from cluster.model.tokenizer import Tokenizer, load_tokenizer
from in_process import with_calls_read

WEATHER = Tool(
    "weather",
    "What the sky does",
    json.dumps(
        {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        }
    ),
)
CLOCK = Tool("clock")
TOOLS = (WEATHER, CLOCK)
TEMPLATE = (
    "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.reasoning_content %}(why: {{ m.reasoning_content }}){% endif %}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.city }}"
    "{% set tool_call = c.function %}{{ tool_call.name }}</tool_call>{% endfor %}{% endfor %}"
    "<assistant>{% if enable_thinking %}<think>\n{% endif %}{{ mood }}"
)
ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


def tokenizer_with(folder: Path, template: str, *added: str) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder, template)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    next_id = 1 + max(t["id"] for t in content["added_tokens"])
    for i, text in enumerate(added):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        content["added_tokens"].append({"id": next_id + i, "content": text, **flags})
    path.write_text(json.dumps(content))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("parsing")
    return tokenizer_with(folder, TEMPLATE, "<think>", "</think>", "<tool_call>", "</tool_call>")


def parsed(
    tokenizer: Tokenizer, pieces: Sequence[str], parsing: Parsing, *, whole: bool = True, identity: str = ""
) -> tuple[str, str, list[tuple[str, str]], list[str]]:
    """Reasoning, content, the calls as (name, arguments), and their ids."""
    parser = tokenizer.parser(parsing, identity)
    said = [part for piece in pieces for part in with_calls_read(tokenizer, parser, parser.add(piece), parsing.tools)]
    said += with_calls_read(tokenizer, parser, parser.flush(whole=whole), parsing.tools)
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    ids: dict[int, str] = {}
    for delta in (d for p in said for d in p.calls):
        if delta.name:
            assert delta.index not in names
            assert delta.index == len(names)
            names[delta.index], ids[delta.index], arguments[delta.index] = delta.name, delta.id, ""
        arguments[delta.index] += delta.arguments
    assert parser.called == bool(names)
    calls = [(names[i], arguments[i]) for i in names]
    return "".join(p.reasoning for p in said), "".join(p.text for p in said), calls, list(ids.values())


def test_reasoning_content_and_calls_are_told_apart(tokenizer: Tokenizer) -> None:
    text = f"<think>\nHm, the sky.\n</think>\n\nLet me look.\n\n{ONE}\n{OTHER}"
    reasoning, content, calls, ids = parsed(tokenizer, [text], Parsing(TOOLS))
    assert (reasoning, content) == ("Hm, the sky.", "Let me look.")
    assert calls == [("weather", '{"city": "Oslo", "days": 2}'), ("clock", "{}")]
    assert len(set(ids)) == 2
    assert all(i.startswith("call_") for i in ids)
    again = [parsed(tokenizer, list(text), Parsing(TOOLS), identity=i)[3] for i in ("a", "a", "b", "")]
    assert again[0] == again[1], "a resumed answer has the same calls"
    assert len({i for found in (ids, *again[1:]) for i in found}) == 8


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [ONE, OTHER, "<think>", "</think>", "<tool_call>", "</tool_call>", "a < b", " ", "\n\n", "é", "<", "{}"]
        ),
        max_size=8,
    ),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_how_the_text_is_cut_makes_no_difference(
    tokenizer: Tokenizer, parts: list[str], thinking: bool, whole: bool, data: st.DataObject
) -> None:
    text, parsing = "".join(parts), Parsing(TOOLS, thinking)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    at_once, cut = (parsed(tokenizer, p, parsing, whole=whole)[:3] for p in ([text], pieces))
    letters = parsed(tokenizer, list(text), parsing, whole=whole)[:3]
    assert at_once == cut == letters


@pytest.mark.parametrize(
    "broken",
    [
        '<tool_call>\n{"name": "weather", "arguments": "{"}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "argu\n</tool_call>',
        '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
        "<tool_call>[1, 2]</tool_call>",
        "<tool_call></tool_call>",
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
    ],
)
def test_a_broken_call_is_content_all_of_it(tokenizer: Tokenizer, broken: str) -> None:
    _, content, calls, _ = parsed(tokenizer, list(f"So: {broken} and on"), Parsing(TOOLS))
    assert content == f"So: {broken} and on"
    assert not calls


def test_arguments_are_told_as_they_come(tokenizer: Tokenizer) -> None:
    parser = tokenizer.parser(Parsing(TOOLS))
    told = [parser.add(letter).calls for letter in ONE]
    assert parser.flush(whole=True).calls == ()
    (named, at), *pieces = [(delta, i) for i, calls in enumerate(told) for delta in calls]
    assert (named.name, named.arguments) == ("weather", "")
    assert at < ONE.index("Oslo")
    assert "".join(delta.arguments for delta, _ in pieces) == '{"city": "Oslo", "days": 2}'
    assert len(pieces) > 20


@pytest.mark.parametrize(
    "inside", ['{"city": "}] \\" {", "days": [1, {"a": 2}]}', '{"city": "\\\\"}', '{"a":{},"b":[[]]}', "{}"]
)
def test_arguments_end_where_their_object_does(tokenizer: Tokenizer, inside: str) -> None:
    text = f'<tool_call>{{"name":"weather","arguments": {inside} , "id": "x"}}</tool_call> Done.'
    assert parsed(tokenizer, list(text), Parsing(TOOLS))[1:3] == ("Done.", [("weather", inside)])


def test_a_call_is_one_from_where_its_arguments_begin(tokenizer: Tokenizer) -> None:
    """They have been sent by then, so the caller has to handle a broken or incomplete rest."""
    broken = '<tool_call>\n{"name": "weather", "arguments": {"city": \n</tool_call> So.'
    assert parsed(tokenizer, list(broken), Parsing(TOOLS))[1:3] == ("So.", [("weather", '{"city": \n')])
    cut = ONE[: ONE.index("lo")]
    assert parsed(tokenizer, [cut], Parsing(TOOLS), whole=False)[1:3] == ("", [("weather", '{"city": "Os')])


@pytest.mark.parametrize("end", ["", "\n", '{"na', '"weather', '"arguments'])
def test_a_call_that_was_cut_off_before_is_left_out(tokenizer: Tokenizer, end: str) -> None:
    begun = ONE[: ONE.index(end)] if end else "<tool_call>"
    for pieces in ([f"So: {begun}"], list(f"So: {begun}")):
        assert parsed(tokenizer, pieces, Parsing(TOOLS), whole=False)[1:3] == ("So:", [])


def test_a_call_that_the_model_ended_needs_no_end_mark(tokenizer: Tokenizer) -> None:
    ended = ONE.removesuffix("</tool_call>")
    assert parsed(tokenizer, [ended], Parsing(TOOLS), whole=True)[2] == [("weather", '{"city": "Oslo", "days": 2}')]


def test_without_tools_marks_of_calls_are_text(tokenizer: Tokenizer) -> None:
    assert parsed(tokenizer, [ONE], Parsing())[1:3] == (ONE, [])


def test_an_answer_that_begins_inside_the_reasoning(tokenizer: Tokenizer) -> None:
    options = ChatOptions(enable_thinking=True)
    prompt = tokenizer.chat([ChatMessage("user", "hi")], options)
    assert tokenizer.parsing(prompt, options).thinking
    assert parsed(tokenizer, ["So.\n</think>\nYes"], Parsing(thinking=True))[:2] == ("So.", "Yes")
    off = ChatOptions(enable_thinking=False)
    assert not tokenizer.parsing(tokenizer.chat([ChatMessage("user", "<think>")], off), off).thinking


def test_tools_calls_and_reasoning_reach_the_template(tokenizer: Tokenizer) -> None:
    messages = [
        ChatMessage("user", "sky?"),
        ChatMessage("assistant", "", "hm", (ToolCall("c1", "weather", '{"city": "Oslo"}'),)),
        ChatMessage("tool", "rain", tool_call_id="c1", name="weather"),
    ]
    options = ChatOptions(TOOLS, enable_thinking=False, template='{"mood": "calm"}')
    text = tokenizer.decode(tokenizer.chat(messages, options))
    assert text == (
        "[weather][clock]<user>sky?<assistant>(why: hm)<tool_call>Osloweather</tool_call><tool>rain<assistant>calm"
    )
    none = ChatOptions(TOOLS, ToolChoice.NONE, enable_thinking=False)
    assert "[weather]" not in tokenizer.decode(tokenizer.chat(messages[:1], none))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (ChatOptions(template="[1]"), "chat_template_kwargs"),
        (ChatOptions(template="{"), "chat_template_kwargs"),
        (ChatOptions(template='{"chat_template": "x"}'), "chat_template_kwargs"),
        (ChatOptions(template='{"humour": 1}'), "chat_template_kwargs"),
        (ChatOptions((Tool("a", parameters="[]"),)), "tools"),
    ],
)
def test_what_the_template_does_not_take_is_refused(tokenizer: Tokenizer, options: ChatOptions, field: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        tokenizer.chat([ChatMessage("user", "hi")], options)
    assert refusal.value.field == field


def test_an_effort_that_the_template_does_not_know_is_ignored_and_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ask, high = [ChatMessage("user", "hi")], ChatOptions(reasoning_effort="high")
    assert tokenizer.chat(ask, high) == tokenizer.chat(ask)
    assert tokenizer.ignored_options(high) == ("reasoning_effort",)
    assert tokenizer.ignored_options(ChatOptions()) == ()
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if reasoning_effort and reasoning_effort != 'high' %}{{ raise_exception('only high') }}{% endif %}"
        "{{ reasoning_effort }}"
    )
    fixed = tokenizer_with(tmp_path, template)
    assert fixed.decode(fixed.chat(ask, high)) == "hihigh"
    assert fixed.ignored_options(high) == ()
    low = ChatOptions(reasoning_effort="low")
    assert fixed.decode(fixed.chat(ask, low)) == "hi"
    assert fixed.ignored_options(low) == ("reasoning_effort",)


def test_a_model_without_tools_says_so(tmp_path: Path) -> None:
    plain = tokenizer_with(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(InvalidRequest, match="does not support tools"):
        plain.chat([ChatMessage("user", "hi")], ChatOptions(TOOLS))
    with pytest.raises(InvalidRequest, match="does not support tools; leave them out"):
        plain.required_call_grammar(ChatOptions(TOOLS, ToolChoice.REQUIRED))


def test_a_format_without_a_grammar_says_so(tmp_path: Path) -> None:
    template = "{{ tools }}<tool_call>\n<function={% for m in messages %}{{ m.content }}{% endfor %}"
    coder = tokenizer_with(tmp_path, template, "<tool_call>", "</tool_call>")
    with pytest.raises(InvalidRequest, match="has no grammar for"):
        coder.required_call_grammar(ChatOptions(TOOLS, ToolChoice.REQUIRED))


def accepts(tokenizer: Tokenizer, grammar: Grammar, text: str) -> bool:
    constraint = tokenizer.grammars().constraint(grammar, 0)
    ids = tokenizer.encode(text, add_special_tokens=False)
    mask = constraint.allowed_mask(ids, len(ids), tokenizer.vocab_size)
    return mask is not None and bool(mask[min(tokenizer.eos)])


def test_a_call_that_must_be_is_in_the_models_own_format(tokenizer: Tokenizer) -> None:
    required = tokenizer.required_call_grammar(ChatOptions(TOOLS, ToolChoice.REQUIRED))
    assert required is not None
    tokenizer.check_grammar(required)
    assert accepts(tokenizer, required, ONE)
    assert accepts(tokenizer, required, f"{ONE}\n{OTHER}")
    assert not accepts(tokenizer, required, "Hello")
    one = tokenizer.required_call_grammar(ChatOptions(TOOLS, ToolChoice.NAMED, "clock", parallel_tool_calls=False))
    assert one is not None
    assert accepts(tokenizer, one, OTHER)
    assert not accepts(tokenizer, one, ONE)
    assert not accepts(tokenizer, one, f"{OTHER}{OTHER}")
    assert tokenizer.required_call_grammar(ChatOptions(TOOLS)) is None
    with pytest.raises(InvalidRequest, match="'nobody', which is not among the tools"):
        tokenizer.required_call_grammar(ChatOptions(TOOLS, ToolChoice.NAMED, "nobody"))


def test_required_arguments_are_an_object_where_the_schema_does_not_say_so(tokenizer: Tokenizer) -> None:
    bare = Tool("weather", parameters='{"properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}')
    required = tokenizer.required_call_grammar(ChatOptions((bare,), ToolChoice.REQUIRED))
    assert required is not None
    call = '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>'
    assert accepts(tokenizer, required, call % '{"city": "Oslo"}')
    for empty in ("null", "{}", "0", '""'):
        assert not accepts(tokenizer, required, call % empty)


MISTRAL = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}[TOOL_CALLS]{% endif %}"


def test_the_format_without_an_end_mark(tmp_path: Path) -> None:
    mistral = tokenizer_with(tmp_path, MISTRAL, "[TOOL_CALLS]", "[ARGS]")
    required = mistral.required_call_grammar(ChatOptions(TOOLS, ToolChoice.REQUIRED))
    assert required is not None
    text = '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}'
    assert accepts(mistral, required, text)
    assert parsed(mistral, list(text), Parsing(TOOLS))[2] == [("weather", '{"city": "Oslo"}')]
    assert parsed(mistral, list(text), Parsing(TOOLS), whole=False)[2] == [("weather", '{"city": "Oslo"}')]
    assert parsed(mistral, list(text[:-3]), Parsing(TOOLS), whole=False)[1:3] == ("", [])


def test_the_head_of_a_call_is_looked_for_in_a_bounded_text(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a call whose head never comes costs the square of its length: it is looked for with each token."""
    searched: list[int] = []
    start = PartialToolCall.start

    def watched(text: str, form: str, names: Collection[str]) -> tuple[PartialToolCall, int] | None:
        searched.append(len(text))
        return start(text, form, names)

    monkeypatch.setattr(PartialToolCall, "start", watched)
    parser = tokenizer.parser(Parsing(TOOLS))
    for piece in ("<tool_call>", *["no head " * 8] * 200):
        parser.add(piece)
    assert 30 < len(searched) < 40
    assert max(searched) == HEAD_CHARS
