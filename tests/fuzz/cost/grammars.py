"""Cost targets of grammars: the coordinator's check before a request is accepted, and the last stage's work."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping

import anyio

from cluster.core.errors import MacpipeError, StageFailed
from cluster.core.limits import MAX_SCHEMA_BYTES
from cluster.core.request import Grammar, GrammarKind
from cluster.model.grammars import Constraint
from cluster.model.tokenizer import Tokenizer
from cluster.sandbox.child import JobRunner
from cluster.sandbox.job_messages import HEADER, CheckGrammar, Limits, Ready, unpack_reply
from cluster.sandbox.limits import SANDBOX_CPU_S, SANDBOX_MEMORY_BYTES, SANDBOX_PROCESSES, SANDBOX_WALL_FACTOR
from fuzz.cost.recipe import Recipe, filled, size
from fuzz.cost.stand_in import outcome_of, served
from fuzz.cost.target import TAKEN, CostTarget, Entry

FORMATS = ("email", "ipv4", "ipv6", "uri", "date-time", "duration", "uuid", "hostname")
JOB = Limits(SANDBOX_CPU_S, SANDBOX_MEMORY_BYTES, SANDBOX_CPU_S * SANDBOX_WALL_FACTOR)
FOLLOWED = 24
"""Tokens of an answer that the stage's target follows a grammar for."""


def _checked(kind: GrammarKind) -> Entry:
    """The coordinator's look at a grammar, before its request is accepted."""
    model_info = served()

    async def take(source: bytes) -> str:
        try:
            await model_info.check_grammar(Grammar(kind, source.decode("utf-8", "replace")), MAX_SCHEMA_BYTES)
        except MacpipeError as e:
            return outcome_of(e)
        return TAKEN

    return Entry(take, sandbox=True)


def _bound(kind: GrammarKind) -> Entry:
    """Do the last stage's work with an accepted grammar: compile it, then compute a mask for each token."""
    tokenizer = served().tokenizer
    grammars = tokenizer.grammars()
    sandbox = JobRunner(tokenizer)

    async def passed(source: bytes) -> bool:
        return _passes(sandbox, Grammar(kind, source.decode("utf-8", "replace")))

    async def take(source: bytes) -> str:
        grammar = Grammar(kind, source.decode("utf-8", "replace"))
        try:
            constraint = await anyio.to_thread.run_sync(grammars.constraint, grammar, 0)
            await _follow(constraint, tokenizer)
        except MacpipeError as e:
            return outcome_of(e)
        return TAKEN

    return Entry(take, lets_in=passed)


def _passes(sandbox: JobRunner, grammar: Grammar) -> bool:
    """Do the sandbox's job within its limits in a fork, which has the tokenizer: to start a sandbox takes seconds."""
    child = os.fork()
    if not child:
        try:
            reply = sandbox.reply(CheckGrammar(grammar, JOB))
            os._exit(0 if isinstance(unpack_reply(reply[HEADER.size :]), Ready) else 1)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


async def _follow(constraint: Constraint, tokenizer: Tokenizer) -> None:
    """Compute a mask for each of some tokens, one at a time, as a thread does between other work."""
    tokens: list[int] = []
    for _ in range(FOLLOWED):
        await asyncio.sleep(0)
        mask = constraint.allowed_mask(tokens, len(tokens), tokenizer.vocab_size)
        if mask is None:
            raise StageFailed("the grammar does not go on from a token that it allowed")
        left = [int(token) for token in mask.nonzero()[0] if token not in tokenizer.eos]
        if not left:
            return
        tokens.append(left[(7 * len(tokens)) % len(left)])


def _next(number: int) -> str:
    return f'{{"$ref":"#/$defs/d{number + 1}"}}'


def _schemas() -> Mapping[str, Recipe]:
    allof = '{"allOf":['
    made: dict[str, Recipe] = {
        "plain": '{"type":"object"}',
        "multiple": '{"type":"integer","multipleOf":999983}',
        "large multiple": '{"type":"integer","multipleOf":4999999}',
        "small multiple": '{"type":"number","multipleOf":1e-9}',
        "range and multiple": '{"type":"integer","minimum":1,"maximum":100000000000000000,"multipleOf":7919}',
        "multiples": ["cat", allof, ["each", 20, '{"type":"integer","multipleOf":1', "},"], "{}]}"],
        "items": '{"type":"array","minItems":100000,"maxItems":1000000,"items":{"type":"integer","multipleOf":7919}}',
        "length": '{"type":"string","minLength":1000000,"maxLength":2000000}',
        "pattern": '{"type":"string","pattern":"^(.*a.{40}|.*b.{41})$","minLength":3000,"maxLength":60000}',
        "patterns": ["cat", allof, *(f'{{"type":"string","pattern":".*a.{{{n}}}"}},' for n in range(10, 18)), "{}]}"],
        "many patterns": [
            "cat",
            allof,
            *(f'{{"type":"string","pattern":"(.*[a-{chr(98 + n % 20)}].{{{n + 5}}})+"}},' for n in range(40)),
            "{}]}",
        ],
        "properties": [
            "cat",
            '{"type":"object","properties":{',
            ["each", 2000, '"p', '":{"type":"string"},'],
            '"z":{}}}',
        ],
        "required": [
            "cat",
            '{"type":"object","properties":{',
            ["each", 1000, '"p', '":{},'],
            '"z":{}},"required":[',
            ["each", 1000, '"p', '",'],
            '"z"]}',
        ],
        "open properties": [
            "cat",
            '{"type":"object","properties":{',
            ["each", 4500, '"', '":{},'],
            '"z":{}},"additionalProperties":{"type":"string"}}',
        ],
        "enum": ["cat", '{"enum":[', ["each", 6400, '"', '",'], '"z"]}'],
        "alternatives": [
            "cat",
            '{"oneOf":[',
            ["each", 700, '{"type":"object","properties":{"a', '":{"type":"integer"}}},'],
            "{}]}",
        ],
        "combinations": [
            "cat",
            allof,
            ["rep", 14, ["cat", '{"anyOf":[', ["each", 4, '{"properties":{"a', '":{"const":1}}},'], "{}]},"]],
            "{}]}",
        ],
        "references": [
            "cat",
            '{"$defs":{',
            *(f'"d{i}":{{"allOf":[{{"$ref":"#/$defs/d{i + 1}"}},{{"$ref":"#/$defs/d{i + 1}"}}]}},' for i in range(24)),
            '"d24":{"type":"string"}},"$ref":"#/$defs/d0"}',
        ],
        "branching references": [
            "cat",
            '{"$defs":{',
            *(
                f'"d{i}":{{"anyOf":[{{"$ref":"#/$defs/d{i + 1}"}},{{"properties":{{"k":{_next(i)}}}}}]}},'
                for i in range(24)
            ),
            '"d24":{"type":"string"}},"$ref":"#/$defs/d0"}',
        ],
        "depth": ["nest", 400, '{"type":"array","items":', "{}", "}"],
        "pattern properties": [
            "cat",
            '{"type":"object","patternProperties":{',
            *(f'".*a.{{{n}}}":{{"type":"string"}},' for n in range(3, 30)),
            '"z":{}}}',
        ],
        "formats": ["cat", '{"prefixItems":[', *(f'{{"format":"{name}"}},' for name in FORMATS), "{}]}"],
    }
    return made


def _regexes() -> Mapping[str, Recipe]:
    return {
        "plain": "a",
        "nested counts": ["nest", 5, "(", "a", "{1,60})"],
        "long count": "a{60000}",
        "look back": "(a|b)*a(a|b){20}",
        "far look back": "(a|b)*a(a|b){200}",
        "classes": ["rep", 40, r"(\p{L}|\p{N}|\p{S}|\w|\W){1,500}"],
        "words": ["each", 9000, "", "|"],
        "gaps": "(.{0,5000}x){10}",
        "any": ".{0,60000}",
        "letters": ["rep", MAX_SCHEMA_BYTES, "a"],
        "optional letters": ["rep", MAX_SCHEMA_BYTES // 2, "a?"],
        "stars": ["rep", MAX_SCHEMA_BYTES // 2, "a*"],
        "unicode": ["rep", 1000, r"\p{L}"],
        "folded": ["cat", "(?i)", ["rep", 20_000, "\u00e9"]],
        "depth": ["nest", 30_000, "(", "a", ")"],
        "ranges": ["rep", 5000, r"[^\x00-\x7f]"],
    }


def _larks() -> Mapping[str, Recipe]:
    return {
        "plain": 'start: "a"',
        "rules": ["cat", "start: r0\n", *(f"r{i}: r{i + 1} | r{i + 1} r{i + 1}\n" for i in range(40)), 'r40: "a"\n'],
        "many rules": ["cat", 'start: r0\nr: "a"\n', ["each", 4000, "r", ': "a"\n']],
        "ambiguity": 'start: start start start | start start | "a" | ""\n',
        "terminals": ["cat", "start: T1+\n", ["each", 1500, "T", ": /[a-z]*b[a-z]{0,40}/\n"]],
        "and not": "start: A\nA: /(.*a.{12})/ & /(.*b.{13})/ & ~/(.*c.{11})/\n",
        "substring of words": ["cat", 'start: %regex { "substring_words": "', ["rep", 9000, "ab cd "], '" }\n'],
        "substring of letters": ["cat", 'start: %regex { "substring_chars": "', ["rep", 60_000, "a"], '" }\n'],
        "repetition": 'start: x{1,100000}\nx: y{1,100000}\ny: "a"{1,100000}\n',
        "JSON": 'start: %json {"type":"array","minItems":50000,"items":{"type":"integer","multipleOf":99991}}\n',
        "alternatives": ["cat", 'start: "a"', ["rep", 9000, ' | "a"']],
        "sequence": ["cat", "start: ", ["rep", 15_000, '"a" ']],
        "depth": ["cat", "start: ", ["nest", 15_000, "(", '"a"', ")"]],
    }


JSON_ATOMS: tuple[Recipe, ...] = (
    *(
        '{"type":"string"}',
        '{"type":"integer","multipleOf":7}',
        '{"const":1}',
        "{}",
        '"a"',
        '"allOf":[{},{}],',
        '"anyOf":[{},{}],',
    ),
    *(
        '"minLength":9999,',
        '"maxItems":9999,',
        '"pattern":".*a.{9}",',
        '"multipleOf":99991,',
        '"minimum":-99999,',
        '"type":"integer",',
    ),
)
REGEX_ATOMS: tuple[Recipe, ...] = (
    "a",
    "|",
    ".*",
    "{1,99}",
    "{99}",
    "(a|b)",
    "[a-z]",
    r"\w",
    r"\p{L}",
    "(.*a.{9})",
    "?",
    "+",
    "^",
    "$",
)
LARK_ATOMS: tuple[Recipe, ...] = (
    *REGEX_ATOMS,
    '"a"',
    " | ",
    "start ",
    "\n",
    "/[a-z]*b/",
    "T: /a{9}/\n",
    " & ",
    " ~",
    "{1,999}",
)


def _grammar_targets() -> tuple[CostTarget, ...]:
    kinds: tuple[tuple[GrammarKind, str, Callable[[], Mapping[str, Recipe]], tuple[Recipe, ...]], ...] = (
        (GrammarKind.JSON_SCHEMA, "schema", _schemas, JSON_ATOMS),
        (GrammarKind.REGEX, "regex", _regexes, REGEX_ATOMS),
        (GrammarKind.LARK, "lark", _larks, LARK_ATOMS),
    )
    made = []
    for kind, name, seeds, atoms in kinds:
        seeded = lambda s=seeds: {n: r for n, r in ((n, _cut(r)) for n, r in s().items()) if r != ""}  # noqa: E731
        checked, bound = (lambda k=kind: _checked(k)), (lambda k=kind: _bound(k))
        made += [
            CostTarget(f"{name}-check", "64 KiB", MAX_SCHEMA_BYTES, 2 * SANDBOX_PROCESSES, checked, seeded, atoms),
            CostTarget(f"{name}-stage", "64 KiB that the check takes", MAX_SCHEMA_BYTES, 1, bound, seeded, atoms),
        ]
    return tuple(made)


def _cut(recipe: Recipe) -> Recipe:
    return recipe if size(recipe) <= MAX_SCHEMA_BYTES else filled(recipe, MAX_SCHEMA_BYTES)


TARGETS = _grammar_targets()
