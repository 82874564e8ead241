"""Grammars compile while the compute thread goes on, and a failure affects only its own sequence."""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from llguidance import LLMatcher

from checkpoints import make
from cluster.core.errors import BadFrame, InvalidGrammar, StageFailed
from cluster.core.frames import Compute, Join, Leave, Step
from cluster.core.limits import COMPILED_BYTES, COMPILED_LIVE_BYTES, MIB
from cluster.core.request import Grammar, GrammarKind, SamplingParams
from cluster.model import grammar_compiler
from cluster.model.grammar_compiler import COMPILED_KEPT, MASK_GROWTH_BYTES, Compilation, GrammarCompiler
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
    """Until it is set, ``SLOW`` is not compiled."""
    opened, compile_ = threading.Event(), Grammars.compile

    def slowly(self: Grammars, grammar: Grammar) -> LLMatcher:
        if grammar == SLOW:
            opened.wait()
        return compile_(self, grammar)

    monkeypatch.setattr(Grammars, "compile", slowly)
    yield opened
    opened.set()


@pytest.fixture
def compiler(grammars: Grammars) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(lambda: grammars)
    yield made
    made.close()


def compiled(compiler: GrammarCompiler, grammar: Grammar) -> Compilation:
    """The compilation of ``grammar``, once it has ended."""
    compilation = compiler.begin(grammar)
    assert compilation is not None
    assert compilation.wait(10)
    return compilation


def letters(count: int) -> Grammar:
    return Grammar(GrammarKind.REGEX, f"a{{{count}}}b")


def until(true: Callable[[], bool]) -> None:
    """Wait for what another thread does; the test's own limit ends it."""
    while not true():
        threading.Event().wait(0.005)


def test_a_slow_one_delays_no_other(compiler: GrammarCompiler, gate: threading.Event) -> None:
    slow = compiler.begin(SLOW)
    assert slow is not None
    assert compiled(compiler, WORD).constraint(WORD, 0).allowed_mask((), 0, 258) is not None
    with pytest.raises(InvalidGrammar, match="the regex has not been compiled yet"):
        slow.constraint(SLOW, 0)
    gate.set()
    assert slow.wait(10)
    assert slow.constraint(SLOW, 0).allowed_mask((), 0, 258) is not None


def test_one_that_cannot_be_compiled_says_why(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidGrammar, match="the regex cannot be compiled"):
        compiled(compiler, BROKEN).constraint(BROKEN, 0)


def test_a_panic_of_the_compiler_fails_its_own_grammar(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """As pyo3's, which is no Exception."""

    def panic(self: Grammars, grammar: Grammar) -> LLMatcher:
        raise Panic

    with monkeypatch.context() as patch:
        patch.setattr(Grammars, "compile", panic)
        for i in range(3):
            with pytest.raises(InvalidGrammar, match="the grammar compiler failed: Panic"):
                compiled(compiler, letters(i)).constraint(letters(i), 0)
    assert compiled(compiler, WORD).constraint(WORD, 0).allowed_mask((), 0, 258) is not None


def test_a_tokenizer_that_cannot_be_used_fails_each_of_them() -> None:
    def fail() -> Grammars:
        raise InvalidGrammar("this model's tokenizer cannot be bound to a grammar")

    compiler = GrammarCompiler(fail)
    for _ in range(2):
        with pytest.raises(InvalidGrammar, match="tokenizer cannot be bound"):
            compiled(compiler, WORD).constraint(WORD, 0)
    compiler.close()


def test_few_may_wait_and_those_that_nobody_wants_any_more_do_not(
    compiler: GrammarCompiler, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_compiler, "THREADS", 1)
    monkeypatch.setattr(grammar_compiler, "MAX_STAGE_COMPILES", 2)
    slow = compiler.begin(SLOW)
    assert slow is not None
    until(lambda: not compiler._waiting)
    left = compiler.begin(letters(1))
    assert compiler.begin(WORD) is None
    del left
    assert (word := compiler.begin(WORD)) is not None
    assert len(compiler._waiting) == 1
    gate.set()
    assert word.wait(10)
    assert set(compiler._known) == {word.key, slow.key}


def test_what_is_kept_is_bounded_in_bytes(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(compiler, WORD)
    until(lambda: len(compiler._kept) == 1)
    monkeypatch.setattr(Compilation, "nbytes", COMPILED_BYTES // 4)
    for i in range(12):
        compiled(compiler, letters(i))
    until(lambda: [*compiler._kept] == [(letters(i).kind, letters(i).source) for i in range(8, 12)])
    assert len(compiler._known) == 4
    compiled(compiler, letters(8))
    compiled(compiler, letters(12))
    until(lambda: [*compiler._kept] == [(letters(i).kind, letters(i).source) for i in (10, 11, 8, 12)])


def test_one_that_is_larger_than_the_budget_lives_as_long_as_its_rows(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compilation, "nbytes", COMPILED_BYTES + 1)
    first = compiled(compiler, WORD)
    until(lambda: not compiler._kept)
    assert compiler.begin(WORD) is first
    del first
    until(lambda: not compiler._known)


def test_none_is_compiled_while_those_of_live_rows_take_too_much(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compilation, "nbytes", COMPILED_LIVE_BYTES + 1)
    first = compiled(compiler, WORD)
    until(lambda: not compiler._working)
    second = compiler.begin(letters(1))
    assert second is not None
    assert len(compiler._waiting) == 1
    assert compiler._working == 0
    del first
    assert compiled(compiler, letters(1)) is second


def test_one_that_was_used_for_long_makes_room_for_others(compiler: GrammarCompiler) -> None:
    old = compiled(compiler, WORD)
    old.masks = COMPILED_BYTES // MASK_GROWTH_BYTES
    compiled(compiler, letters(1))
    until(lambda: [*compiler._kept] == [(letters(1).kind, letters(1).source)])
    assert compiler.begin(WORD) is old


def test_many_small_ones_are_bounded_in_number(compiler: GrammarCompiler) -> None:
    for i in range(COMPILED_KEPT + 9):
        compiled(compiler, letters(i))
    until(lambda: len(compiler._known) == COMPILED_KEPT)
    assert len(compiler._kept) == COMPILED_KEPT


def test_idle_ones_are_dropped_without_any_request(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "COMPILED_IDLE_S", 0.05)
    compiled(compiler, WORD)
    compiled(compiler, letters(1))
    until(lambda: not compiler._known)
    assert not compiler._kept


DEAR = (
    Grammar(GrammarKind.JSON_SCHEMA, '{"type":"integer","multipleOf":49999}'),
    Grammar(GrammarKind.JSON_SCHEMA, f'{{"enum":{json.dumps([f"value {i}" for i in range(4000)])}}}'),
    Grammar(GrammarKind.LARK, "start: " + '"a" ' * 9999),
)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's own account of its heap")
@pytest.mark.parametrize("grammar", DEAR, ids=["integers", "enum", "sequence"])
def test_a_grammar_weighs_what_it_takes_of_the_heap_or_more(compiler: GrammarCompiler, grammar: Grammar) -> None:
    compiled(compiler, WORD)
    before = heap_bytes()
    compilation = compiled(compiler, grammar)
    grown = heap_bytes() - before
    assert grown > MIB
    assert grown / 2 < compilation.nbytes < 20 * grown + MIB


def heap_bytes() -> int:
    """What the C library has given out, of all threads."""

    class Mallinfo(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]

    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    info = mallinfo()
    return int(info.e) + int(info.h)  # hblkhd and uordblks


def lane(folder: Path, *grammars: Grammar | None) -> Ring:
    """A ring with the prompts of one sequence for each grammar, from 1 on, whose next frame decodes."""
    ring = Ring(read_shape(folder, "llama", 512), folder, 2)
    for sequence, grammar in enumerate(grammars, 1):
        ring.send(Join(sequence, len(PROMPT), SamplingParams(grammar=grammar, logprobs=True)))
        ring.prefill(sequence, PROMPT[:-1])
    return ring


def step(*rows: tuple[int, int]) -> Step:
    return Step(Compute.DECODE, tuple(s for s, _ in rows), tuple((token,) for _, token in rows))


def test_a_row_whose_grammar_is_not_compiled_sits_out_and_its_lane_goes_on(folder: Path, gate: threading.Event) -> None:
    ring = lane(folder, SLOW, None, WORD)
    compilation = ring.stages[-1]._table.get(1).sampler._compilation
    assert compilation is not None
    reply = ring.send_alone(step=step((1, PROMPT[-1]), (2, PROMPT[-1])))
    assert [sample.sequence for sample in reply.samples] == [2]
    assert reply.failures == ()
    assert ring.decode(2, reply.samples[0].token).sequence == 2
    assert ring.send_alone().samples == ()
    gate.set()
    assert compilation.wait(10)
    reply = ring.send(step=step((3, PROMPT[-1])))
    assert [sample.sequence for sample in reply.samples] == [3, 1]
    alone = lane(folder, SLOW).go_on(1, PROMPT[-1], 4)
    assert [reply.samples[1], *ring.go_on(1, reply.samples[1].token, 3)] == alone


def test_a_row_whose_grammar_fails_late_fails_alone(
    folder: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = lane(folder, SLOW, SLOW, None)
    reply = ring.send_alone(step=step((1, PROMPT[-1]), (2, PROMPT[-1]), (3, PROMPT[-1])))
    monkeypatch.setattr(Compilation, "constraint", refuse_first())
    gate.set()
    for sequence in (1, 2):
        compilation = ring.stages[-1]._table.get(sequence).sampler._compilation
        assert compilation is not None
        assert compilation.wait(10)
    late = ring.send_alone(step=step((3, reply.samples[0].token)))
    assert [(failure.sequence, failure.reason) for failure in late.failures] == [(1, InvalidGrammar.reason)]
    assert [sample.sequence for sample in late.samples] == [3, 2]
    ring.send(Leave(1))
    assert ring.go_on(2, late.samples[1].token, 2)


def refuse_first() -> Callable[[Compilation, Grammar, int], Constraint]:
    """A ``Compilation.constraint`` that fails once."""
    made, calls = Compilation.constraint, []

    def constraint(self: Compilation, grammar: Grammar, start: int) -> Constraint:
        calls.append(grammar)
        if len(calls) == 1:
            raise InvalidGrammar("no")
        return made(self, grammar, start)

    return constraint


def test_who_leaves_while_its_grammar_is_compiled_leaves_nothing(folder: Path, gate: threading.Event) -> None:
    ring = lane(folder, SLOW)
    assert ring.send_alone(step=step((1, PROMPT[-1]))).samples == ()
    with pytest.raises(BadFrame, match="its last one waits for its grammar"):
        ring.send_alone(step=step((1, PROMPT[-1])))
    ring.send_alone(Leave(1))
    gate.set()
    assert ring.send_alone().samples == ()
    assert not ring.stages[-1]._table.deferred(9)


def test_a_grammar_that_fails_at_a_token_fails_its_own_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Constraint, tokens: object, token: int, *, forced: bool) -> None:
        raise StageFailed("the grammar does not allow it")

    monkeypatch.setattr(Constraint, "look_ahead", fail)
    ring = Ring(read_shape(folder, "llama", 512), folder, 2)
    ring.send(Join(1, len(PROMPT), SamplingParams(grammar=WORD)), Join(2, len(PROMPT), SamplingParams()))
    for sequence in (1, 2):
        ring.prefill(sequence, PROMPT[:-1])
    reply = ring.send(step=Step(Compute.DECODE, (1, 2), ((PROMPT[-1],),) * 2))
    assert [sample.sequence for sample in reply.samples] == [2]
    assert [failure.sequence for failure in reply.failures] == [1]
