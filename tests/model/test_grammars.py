"""Grammars on the last stage: each row follows its own, with any other options and edits of its sequence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from checkpoints import SPECIAL_IDS, make
from cluster.core.errors import InvalidGrammar
from cluster.core.frames import Compute, Join, Leave, Restore, Sample, Save, Step, Trim
from cluster.core.limits import MAX_FORCED_TOKENS
from cluster.core.request import Grammar, GrammarKind, SamplingParams
from cluster.model.model_shape import read_shape
from cluster.model.tokenizer import Tokenizer, load_tokenizer
from effort import chosen
from model.ring import PROMPT, Ring, tokens

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
JSON = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
REGEX = Grammar(GrammarKind.REGEX, r"[a-f]{3}-[0-9]{4}")
LARK = Grammar(GrammarKind.LARK, 'start: item ("," item){2}\nitem: "<" NAME ">"\nNAME: /[a-z]{1,4}/')
SHAPE = {
    REGEX: re.compile(r"[a-f]{3}-[0-9]{4}"),
    LARK: re.compile(r"<[a-z]{1,4}>,<[a-z]{1,4}>,<[a-z]{1,4}>"),
}
HOT = SamplingParams(temperature=1.0, seed=3, grammar=JSON)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("grammars") / "llama")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture
def ring(folder: Path) -> Ring:
    return Ring(read_shape(folder, "llama", 512), folder, 2)


def document(ring: Ring, sampling: SamplingParams, most: int = 200) -> list[Sample]:
    """One answer up to its end of sequence or its grammar's end."""
    ring.send(Join(1, len(PROMPT), sampling))
    ring.prefill(1, PROMPT[:-1])
    samples = [ring.decode(1, PROMPT[-1])]
    while not samples[-1].final and samples[-1].token not in END and len(samples) < most:
        samples.append(ring.decode(1, samples[-1].token))
    ring.send(Leave(1))
    return samples


END = frozenset({259, 262})
"""Of these checkpoints: the tokenizer's own and the config's."""


def text_of(tokenizer: Tokenizer, samples: list[Sample]) -> str:
    return tokenizer.decode([t for t in tokens(samples) if t not in tokenizer.eos])


def valid(text: str, grammar: Grammar) -> bool:
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        return bool(Draft202012Validator(json.loads(grammar.source)).is_valid(json.loads(text)))
    return SHAPE[grammar].fullmatch(text) is not None


def test_the_end_is_where_the_tokenizer_says(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos == END


@pytest.mark.parametrize("grammar", [JSON, REGEX, LARK], ids=lambda g: g.kind.value)
@pytest.mark.parametrize("temperature", chosen([0.0, 1.0, 2.0], 1.0))
def test_an_answer_is_what_its_grammar_says(
    ring: Ring, tokenizer: Tokenizer, grammar: Grammar, temperature: float
) -> None:
    for seed in range(3):
        samples = document(ring, SamplingParams(temperature=temperature, seed=seed, grammar=grammar))
        assert samples[-1].final, text_of(tokenizer, samples)
        assert not any(s.final for s in samples[:-1])
        assert valid(text_of(tokenizer, samples), grammar)


def test_nothing_that_a_request_asks_for_brings_back_what_is_ruled_out(ring: Ring, tokenizer: Tokenizer) -> None:
    def token(letter: str) -> int:
        return tokenizer.encode(letter, add_special_tokens=False)[0]

    wild = SamplingParams(
        temperature=1.5,
        seed=5,
        top_k=40,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.5,
        presence_penalty=1.0,
        frequency_penalty=0.5,
        logit_bias=((token("!"), 100.0), (259, 100.0), (token("{"), -100.0)),
        logprobs=True,
        top_logprobs=20,
        grammar=JSON,
    )
    samples = document(ring, wild)
    assert valid(text_of(tokenizer, samples), JSON)
    assert all(s.logprob is not None and s.logprob <= 0 for s in samples)
    assert all(t.logprob > -float("inf") for s in samples for t in s.top)
    assert samples[0].top[0].token == samples[0].token
    assert len(samples[0].top) < 20, "only few tokens can begin an object"


@pytest.mark.parametrize("kind", ["json", "regex", "lark"])
def test_forced_tokens_are_those_that_come(ring: Ring, tokenizer: Tokenizer, kind: str) -> None:
    """A sample that looks ahead names the tokens which its grammar leaves no choice about: they are sampled next."""
    grammar = {"json": JSON, "regex": Grammar(GrammarKind.REGEX, "(yes|no), of course"), "lark": LARK}[kind]
    sampling = SamplingParams(temperature=1.0, seed=3, grammar=grammar)
    plain = document(ring, sampling)
    assert not any(sample.forced for sample in plain)
    ring.send(Join(1, len(PROMPT), sampling, look_ahead=True))
    ring.prefill(1, PROMPT[:-1])
    samples = [ring.decode(1, PROMPT[-1])]
    while not samples[-1].final and samples[-1].token not in END:
        samples.append(ring.decode(1, samples[-1].token))
    said = tokens(samples)
    assert said == tokens(plain)
    for i, sample in enumerate(samples):
        assert tuple(said[i + 1 : i + 1 + len(sample.forced)]) == sample.forced
    assert any(len(sample.forced) > 1 for sample in samples)


def test_forced_tokens_are_bounded_and_found_once_for_so_many(tokenizer: Tokenizer) -> None:
    grammar = Grammar(GrammarKind.REGEX, "(a|b)" + "c" * 100)
    constraint = tokenizer.grammars().constraint(grammar, 0)
    said = tokenizer.encode("a" + "c" * 100, add_special_tokens=False)
    found = [constraint.look_ahead(0, said[0], forced=True).forced]
    assert len(found[0]) == MAX_FORCED_TOKENS
    for i in range(1, 2 * MAX_FORCED_TOKENS):
        assert constraint.allowed_mask(said[:i], i, tokenizer.vocab_size) is not None
        found.append(constraint.look_ahead(i, said[i], forced=True).forced)
        assert found[-1] == tuple(said[i + 1 : i + 1 + len(found[-1])])
        assert 1 <= len(found[-1]) <= MAX_FORCED_TOKENS
    assert sum(len(one) == MAX_FORCED_TOKENS for one in found) == 2


def test_after_a_wrong_guess_other_tokens_are_forced(tokenizer: Tokenizer) -> None:
    constraint = tokenizer.grammars().constraint(Grammar(GrammarKind.REGEX, "xyz|abc"), 0)
    x, y, z, a, b, c = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "xyzabc")
    assert constraint.look_ahead(0, x, forced=True).forced == (y, z)
    constraint.allowed_mask([x], 1, tokenizer.vocab_size)
    constraint.rewind(0)
    assert constraint.look_ahead(0, a, forced=True).forced == (b, c)
    assert constraint.look_ahead(0, a).forced == ()


def test_rows_of_a_batch_follow_each_its_own(ring: Ring, tokenizer: Tokenizer) -> None:
    asked = [SamplingParams(temperature=1.0, seed=i, grammar=g) for i, g in enumerate((JSON, None, REGEX, LARK, JSON))]
    alone = [tokens(document(ring, s, 24)) for s in asked]
    for i, sampling in enumerate(asked):
        ring.send(Join(i, len(PROMPT), sampling))
        ring.prefill(i, PROMPT[:-1])
    said: list[list[int]] = [[] for _ in asked]
    live = dict.fromkeys(range(len(asked)), PROMPT[-1])
    for _ in range(24):
        step = Step(Compute.DECODE, tuple(live), tuple((token,) for token in live.values()))
        for sample in ring.send(step=step).samples:
            said[sample.sequence].append(sample.token)
            live[sample.sequence] = sample.token
            if sample.final or sample.token in tokenizer.eos:
                del live[sample.sequence]
                ring.send(Leave(sample.sequence))
        if not live:
            break
    assert said == alone


def test_a_sequence_that_joins_again_with_its_answer_so_far_goes_on_the_same(ring: Ring) -> None:
    whole = tokens(document(ring, HOT))
    for cut in (1, len(whole) // 2, len(whole) - 1):
        again = (*PROMPT, *whole[:cut])
        ring.send(Join(1, len(PROMPT), HOT))
        ring.prefill(1, again[:-1])
        rest = [ring.decode(1, again[-1])]
        while not rest[-1].final:
            rest.append(ring.decode(1, rest[-1].token))
        ring.send(Leave(1))
        assert whole[:cut] + tokens(rest) == whole


def test_prefixes_and_trims_leave_the_grammar_where_the_tokens_are(ring: Ring) -> None:
    whole = tokens(document(ring, HOT))
    ring.send(Join(2, len(PROMPT), HOT))
    ring.prefill(2, (*PROMPT, *whole[:4]))
    ring.send(Save(2, 9), Leave(2))
    ring.send(Join(1, len(PROMPT), HOT), Restore(1, 9, len(PROMPT) + 2))
    samples = [ring.decode(1, whole[2])]
    samples.append(ring.decode(1, samples[-1].token))
    ring.send(Trim(1, len(PROMPT) + 3))
    samples.append(ring.decode(1, whole[3]))
    assert tokens(samples) == [whole[3], whole[4], whole[4]]


def test_guesses_that_the_grammar_forbids_are_answered_up_to_where_they_go_wrong(ring: Ring) -> None:
    whole = tokens(document(ring, HOT))
    ring.send(Join(1, len(PROMPT), HOT))
    ring.prefill(1, PROMPT[:-1])
    row = (PROMPT[-1], whole[0], 259, 5)
    reply = ring.send(step=Step(Compute.DECODE, (1,), (row,), guesses=3, start=len(PROMPT) - 1))
    assert tokens(reply.samples) == whole[:2]
    ring.send(Trim(1, len(PROMPT) + 1))
    assert tokens(ring.go_on(1, whole[1], 3)) == whole[2:5]


def test_the_part_before_the_grammar_is_free_but_does_not_end(ring: Ring, tokenizer: Tokenizer) -> None:
    mark = tokenizer.encode("th", add_special_tokens=False)
    free = Grammar(GrammarKind.REGEX, REGEX.source, mark)
    asked = SamplingParams(temperature=1.0, seed=1, logit_bias=((259, 100.0), (mark[0], 2.0)), grammar=free)
    text = text_of(tokenizer, document(ring, asked, 400))
    before, _, after = text.partition("th")
    assert before
    assert valid(after, REGEX)


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        (Grammar(GrammarKind.REGEX, "a("), "unclosed group"),
        (Grammar(GrammarKind.LARK, "start: nobody"), "unknown name"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "wat"}'), "wat"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"type": '), "json_schema"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"not": {"type": "object"}}'), "not"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"$ref": "https://example.org/x"}'), "json_schema"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(tokenizer: Tokenizer, grammar: Grammar, why: str) -> None:
    with pytest.raises(InvalidGrammar, match=re.escape(why)) as refusal:
        tokenizer.check_grammar(grammar)
    assert refusal.value.field == grammar.kind.value


MARK = "<|end|>"


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(GrammarKind.LARK, f'start: "a{MARK}b"'),
        Grammar(GrammarKind.LARK, f'start: "{MARK}"'),
        Grammar(GrammarKind.REGEX, r"a<\|end\|>b"),
        Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"const": MARK})),
    ],
)
def test_text_that_spells_a_mark_of_the_model_is_text(ring: Ring, tokenizer: Tokenizer, grammar: Grammar) -> None:
    """It was mistaken for the mark itself, which has no text, and the answer ended with an error."""
    picked = [s.token for s in document(ring, SamplingParams(grammar=grammar)) if s.token not in END]
    assert not set(picked) & set(SPECIAL_IDS.values())
    assert tokenizer.decode(picked).strip('"').strip("ab") == MARK


def test_a_grammar_of_token_ids(ring: Ring) -> None:
    picked = document(ring, SamplingParams(grammar=Grammar(GrammarKind.LARK, "start: <[70]> <[72-80]> <[5]>")))
    assert [s.token in allowed for s, allowed in zip(picked, ({70}, range(72, 81), {5}), strict=True)] == [True] * 3


def test_a_grammar_with_nothing_to_say_is_told_as_one(ring: Ring) -> None:
    """A token that ends answers cannot be a part of one."""
    wrong = SamplingParams(grammar=Grammar(GrammarKind.LARK, f"start: {MARK}"))
    for i, sampling in enumerate((wrong, SamplingParams())):
        ring.send(Join(i, len(PROMPT), sampling))
        ring.prefill(i, PROMPT[:-1])
    reply = ring.send(step=Step(Compute.DECODE, (0, 1), ((PROMPT[-1],), (PROMPT[-1],))))
    assert [s.sequence for s in reply.samples] == [1]
    assert [(f.sequence, f.reason) for f in reply.failures] == [(0, "INVALID_GRAMMAR")]
    ring.send(Leave(0), Leave(1), Join(0, len(PROMPT), wrong))
    ring.prefill(0, PROMPT[:-1])
    alone = ring.send(step=Step(Compute.DECODE, (0,), ((PROMPT[-1],),)))
    assert [(f.sequence, f.reason) for f in alone.failures] == [(0, "INVALID_GRAMMAR")]


def test_a_grammar_that_fails_on_the_stage_ends_its_own_row_alone(ring: Ring) -> None:
    bad = SamplingParams(grammar=Grammar(GrammarKind.REGEX, "a("))
    for i, sampling in enumerate((bad, SamplingParams())):
        ring.send(Join(i, len(PROMPT), sampling))
        ring.prefill(i, PROMPT[:-1])
    reply = ring.send(step=Step(Compute.DECODE, (0, 1), ((PROMPT[-1],), (PROMPT[-1],))))
    assert [s.sequence for s in reply.samples] == [1]
    assert [(f.sequence, f.reason) for f in reply.failures] == [(0, "INVALID_GRAMMAR")]


OPEN = {"type": "object", "additionalProperties": {"type": "boolean"}}


@pytest.mark.parametrize(
    "schema", [{**OPEN, "minProperties": 2}, {"type": "array", "items": {**OPEN, "minProperties": 3}}]
)
def test_a_count_of_keys_that_may_repeat_is_refused(tokenizer: Tokenizer, schema: dict[str, object]) -> None:
    with pytest.raises(InvalidGrammar, match="minProperties"):
        tokenizer.grammars().check(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)))


@pytest.mark.parametrize(
    "schema",
    [
        {**OPEN, "minProperties": 1, "maxProperties": 2},
        {**OPEN, "required": ["a", "b"], "minProperties": 2},
        {"type": "object", "properties": {"minProperties": {"type": "integer"}}},
        {"const": {"minProperties": 9}},
    ],
)
def test_a_count_of_keys_that_is_kept_is_taken(tokenizer: Tokenizer, schema: dict[str, object]) -> None:
    tokenizer.grammars().check(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)))


def test_a_schema_without_a_bottom_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidGrammar):
        tokenizer.grammars().check(Grammar(GrammarKind.JSON_SCHEMA, '{"not":' * 9000 + "{}" + "}" * 9000))


RULES = "start: r0\n" + "".join(f"r{i}: r{i + 1} | r{i + 1} r{i + 1}\n" for i in range(40)) + 'r40: "a"\n'
ALTERNATIVES = "start: " + " | ".join(f'"{i}"' for i in range(7000))
SPLITS = "start: s\ns: " + " | ".join(f"s s{' t' * (i % 5)}" for i in range(60)) + ' | "a"\nt: "a" | ""\n'


@pytest.mark.parametrize("source", [RULES, ALTERNATIVES, SPLITS], ids=["rules", "alternatives", "splits"])
def test_a_grammar_whose_later_tokens_are_too_much_work_is_refused(tokenizer: Tokenizer, source: str) -> None:
    with pytest.raises(InvalidGrammar, match="too much work") as refused:
        tokenizer.check_grammar(Grammar(GrammarKind.LARK, source))
    assert refused.value.field == "lark"


def test_a_token_that_is_too_much_work_is_the_grammars_fault(tokenizer: Tokenizer) -> None:
    """Not the stage's, whose failure would begin a recovery."""
    grammars = tokenizer.grammars()
    digit = tokenizer.encode("6", add_special_tokens=False)[0]
    for act in (lambda c: c.look_ahead(0, digit), lambda c: c.allowed_mask([digit], 1, tokenizer.vocab_size)):
        constraint = grammars.constraint(Grammar(GrammarKind.LARK, ALTERNATIVES), 0)
        assert constraint.allowed_mask([], 0, tokenizer.vocab_size)[digit]
        with pytest.raises(InvalidGrammar, match="too much work for one token"):
            act(constraint)
        assert constraint.failed


def test_a_schema_of_2000_optional_properties_is_taken_and_followed(tokenizer: Tokenizer) -> None:
    properties = {f"p{i}": {"type": "integer"} for i in range(2000)}
    wide = Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"type": "object", "properties": properties}))
    tokenizer.check_grammar(wide)
    constraint = tokenizer.grammars().constraint(wide, 0)
    answer = tokenizer.encode('{"p7": 1, "p1999": 23}', add_special_tokens=False)
    for position, token in enumerate(answer):
        assert constraint.allowed_mask(answer[:position], position, tokenizer.vocab_size)[token]
        constraint.look_ahead(position, token)
    assert constraint.allowed_mask(answer, len(answer), tokenizer.vocab_size)[list(tokenizer.eos)].any()


def test_a_dead_end_that_a_model_need_not_come_to_is_no_reason_to_refuse(tokenizer: Tokenizer) -> None:
    tokenizer.check_grammar(Grammar(GrammarKind.LARK, 'start: "a" | "b" <[259]>\n'))
