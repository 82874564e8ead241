"""Grammars compile while the compute thread goes on, and a failure affects only its own sequence."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from llguidance import LLMatcher

from checkpoints import make
from cluster.core.errors import InvalidGrammar, StageFailed
from cluster.core.frames import Compute, Join, Step
from cluster.core.request import Grammar, GrammarKind, SamplingParams
from cluster.model import grammar_compiler
from cluster.model.grammar_compiler import COMPILED_KEPT, GrammarCompiler
from cluster.model.grammars import Constraint, Grammars
from cluster.model.model_shape import read_shape
from cluster.model.tokenizer import load_tokenizer
from model.ring import PROMPT, Ring

SLOW = Grammar(GrammarKind.REGEX, "slow")
WORD = Grammar(GrammarKind.REGEX, "[a-z]+")
BROKEN = Grammar(GrammarKind.REGEX, "(")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("compiler") / "llama")


@pytest.fixture(scope="module")
def grammars(folder: Path) -> Grammars:
    return load_tokenizer(folder).grammars()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, ``SLOW`` is not compiled; waiting for it is short."""
    opened, compile_ = threading.Event(), Grammars.compile

    def slowly(self: Grammars, grammar: Grammar) -> LLMatcher:
        if grammar == SLOW:
            opened.wait()
        return compile_(self, grammar)

    monkeypatch.setattr(Grammars, "compile", slowly)
    monkeypatch.setattr(grammar_compiler, "GRAMMAR_WAIT_S", 0.05)
    yield opened
    opened.set()


@pytest.fixture
def compiler(grammars: Grammars) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(lambda: grammars)
    yield made
    made.close()


def test_one_that_is_late_fails_and_is_there_for_who_comes_later(
    compiler: GrammarCompiler, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.begin(SLOW)
    with pytest.raises(InvalidGrammar, match="the regex was not compiled within"):
        compiler.constraint(SLOW, 0)
    monkeypatch.setattr(grammar_compiler, "GRAMMAR_WAIT_S", 10.0)
    assert compiler.constraint(WORD, 0).allowed_mask((), 0, 258) is not None
    gate.set()
    assert compiler.constraint(SLOW, 0).allowed_mask((), 0, 258) is not None


def test_one_that_cannot_be_compiled_says_why(compiler: GrammarCompiler) -> None:
    compiler.begin(BROKEN)
    with pytest.raises(InvalidGrammar, match="the regex cannot be compiled"):
        compiler.constraint(BROKEN, 0)


def test_a_tokenizer_that_cannot_be_used_fails_each_of_them() -> None:
    def fail() -> Grammars:
        raise InvalidGrammar("this model's tokenizer cannot be bound to a grammar")

    compiler = GrammarCompiler(fail)
    for _ in range(2):
        with pytest.raises(InvalidGrammar, match="tokenizer cannot be bound"):
            compiler.constraint(WORD, 0)
    compiler.close()


def test_few_are_kept_and_few_may_wait(
    compiler: GrammarCompiler, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_STAGE_COMPILES", 1)
    compiler.begin(SLOW)
    with pytest.raises(InvalidGrammar, match="1 other grammars are waiting"):
        compiler.constraint(WORD, 0)
    gate.set()
    monkeypatch.setattr(grammar_compiler, "GRAMMAR_WAIT_S", 10.0)
    compiler.constraint(SLOW, 0)
    for i in range(3 * COMPILED_KEPT):
        compiler.constraint(Grammar(GrammarKind.REGEX, f"a{{{i}}}b"), 0)
    assert len(compiler._compiled) <= COMPILED_KEPT + 1


def test_a_late_grammar_fails_its_own_row_of_a_lane(folder: Path, gate: threading.Event) -> None:
    ring = Ring(read_shape(folder, "llama", 512), folder, 2)
    ring.send(Join(1, len(PROMPT), SamplingParams(grammar=SLOW)), Join(2, len(PROMPT), SamplingParams()))
    for sequence in (1, 2):
        ring.prefill(sequence, PROMPT[:-1])
    reply = ring.send(step=Step(Compute.DECODE, (1, 2), ((PROMPT[-1],),) * 2))
    assert [sample.sequence for sample in reply.samples] == [2]
    assert [(failure.sequence, failure.reason) for failure in reply.failures] == [(1, InvalidGrammar.reason)]
    assert ring.decode(2, reply.samples[0].token).sequence == 2


def test_a_grammar_that_fails_at_a_token_fails_its_own_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Constraint, tokens: object, token: int) -> bool:
        raise StageFailed("the grammar does not allow it")

    monkeypatch.setattr(Constraint, "is_complete_after", fail)
    ring = Ring(read_shape(folder, "llama", 512), folder, 2)
    ring.send(Join(1, len(PROMPT), SamplingParams(grammar=WORD)), Join(2, len(PROMPT), SamplingParams()))
    for sequence in (1, 2):
        ring.prefill(sequence, PROMPT[:-1])
    reply = ring.send(step=Step(Compute.DECODE, (1, 2), ((PROMPT[-1],),) * 2))
    assert [sample.sequence for sample in reply.samples] == [2]
    assert [failure.sequence for failure in reply.failures] == [1]
