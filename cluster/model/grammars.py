"""Computes masks of the tokens that a grammar allows next, and compiles grammars, with llguidance.

It knows token ids and a tokenizer, nothing of logits, sequences and frames. llguidance's limits bound the cost of a
mask, equally in a check and on the last stage. They do not bound compilation: check a grammar first in a process that
can be killed (``cluster.sandbox``). A stage then needs the same resources as that check.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance import TokenizerWrapper as Spelled
from llguidance.hf import from_tokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cluster.core.errors import InvalidGrammar, StageFailed
from cluster.core.limits import (
    JSON_PARSER_ITEMS,
    JSON_ROW_ITEMS,
    MASK_LEXER_FUEL,
    MASK_PARSER_ITEMS,
    MASK_ROW_ITEMS,
    MAX_FORCED_TOKENS,
    WALK_CPU_S,
    WALK_TOKENS,
)
from cluster.core.request import Grammar, GrammarKind
from cluster.model.panics import panics_raised_as
from cluster.model.schema_support import find_unenforced

if TYPE_CHECKING:  # a type of the stubs alone
    from llguidance._lib import JsonCompileOptions

__all__ = ["Constraint", "Grammars", "LookAhead"]

MASK_LIMITS: Final = LLParserLimits(
    step_lexer_fuel=MASK_LEXER_FUEL, step_max_items=MASK_PARSER_ITEMS, max_items_in_row=MASK_ROW_ITEMS
)
"""What one mask may cost. Everybody's tokens on a stage wait for it."""
JSON_MASK_LIMITS: Final = LLParserLimits(
    step_lexer_fuel=MASK_LEXER_FUEL, step_max_items=JSON_PARSER_ITEMS, max_items_in_row=JSON_ROW_ITEMS
)
"""The same where the grammar comes from a JSON schema, whose items cost less."""
JSON_KINDS: Final = frozenset({GrammarKind.JSON_SCHEMA, GrammarKind.JSON_OBJECT})
_EXCERPT: Final = re.compile(r"\d+ \||\^+$")
"""Matches a numbered source line, and the line of carets below it."""
_TOO_LOW: Final = re.compile(r"-0*[1-9][0-9]{18}")
"""Matches constants near the lowest 64-bit integer: llguidance 1.9 aborts the process on them."""
_QUOTED: Final = re.compile(r'(?<=invalid regex )"[^\n]*"(?= \()|"[^"\n]{33,}"')
JSON_STYLE: Final[JsonCompileOptions] = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\t]{1,20}"}
"""Allows any usual layout but bounds runs of blanks: models restricted to JSON tend to emit endless ones."""


class Grammars:
    """Compiles grammars for one tokenizer; thread-safe. ``eos`` are the ids that end an answer."""

    def __init__(self, wrapper: TokenizerWrapper, eos: frozenset[int]) -> None:
        """Prepare the tokenizer: about 1 s for a large vocabulary. Raises InvalidGrammar if it is not supported."""
        try:
            with panics_raised_as(ValueError("llguidance failed")):
                read = from_tokenizer(wrapper._tokenizer, eos_token=sorted(eos) or None)
                spelling = _Spelling(wrapper._tokenizer.backend_tokenizer, read)
                self._tokenizer = LLTokenizer(Spelled(spelling), eos_token=sorted(eos) or None)
        except Exception as error:  # llguidance may raise anything for an unknown kind of tokenizer
            raise InvalidGrammar(f"this model's tokenizer does not support grammars: {error}") from error
        self.eos = tuple(sorted(eos))

    def check(self, grammar: Grammar) -> None:
        """Do what a stage does for the first tokens of an answer: compile ``grammar``, then follow it twice.

        Unbounded in time and memory. Raises InvalidGrammar with the reason. A grammar that passes may still fail at a
        later token of an answer.
        """
        constraint = self.constraint(replace(grammar, free_until=()), 0)
        give_up = time.thread_time() + WALK_CPU_S
        for choose in (_take_lowest, _take_scattered):
            constraint.forget()
            try:
                self._walk(constraint, choose, give_up)
            except InvalidGrammar as error:
                raise _refusal(grammar, error.sentence) from error

    def _walk(self, constraint: Constraint, choose: Callable[[NDArray[np.int_], int], int], give_up: float) -> None:
        """Follow ``constraint`` over ``WALK_TOKENS`` tokens before this thread's CPU time reaches ``give_up``.

        Raises InvalidGrammar where the first token is impossible, and where any token or all of them are too much work.
        """
        tokens: list[int] = []
        while len(tokens) < WALK_TOKENS:
            try:
                mask = constraint.allowed_mask(tokens, len(tokens), self._tokenizer.vocab_size)
                if mask is None:
                    return
                mask[[i for i in self.eos if i < len(mask)]] = False
                left = mask.nonzero()[0]
                if not len(left):
                    return
            except InvalidGrammar:
                if constraint.failed or not tokens:
                    raise
                return  # a dead end that a model need not come to
            if time.thread_time() > give_up:
                raise InvalidGrammar(f"its tokens take too much work: {WALK_CPU_S} s for the first {len(tokens) + 1}")
            tokens.append(choose(left, len(tokens)))

    def constraint(self, grammar: Grammar, start: int) -> Constraint:
        """Compile ``grammar`` for a sequence whose answer starts at token ``start``. Raises InvalidGrammar."""
        return Constraint(self.compile(grammar), self.eos, start, grammar)

    def compile(self, grammar: Grammar) -> LLMatcher:
        """Compile ``grammar``. Unbounded in time and memory. Raises InvalidGrammar with the reason."""
        with panics_raised_as(_refusal(grammar, "it makes the compiler fail")):
            limits = JSON_MASK_LIMITS if grammar.kind in JSON_KINDS else MASK_LIMITS
            matcher = LLMatcher(self._tokenizer, _source(grammar), log_level=0, limits=limits)
            if matcher.is_error():
                raise _refusal(grammar, matcher.get_error())
            return matcher


class _Spelling:
    """A tokenizer for llguidance that never turns text into special tokens: ``<|user|>`` in a grammar is plain text.

    Without it, llguidance encodes such text as the special token of that name and then rejects this token as text. A
    Lark grammar names a special token without quotes.
    """

    def __init__(self, backend: Tokenizer, read: LLTokenizer) -> None:
        self._backend = copy(backend)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        known = range(read.vocab_size)
        self.eos_token_id = read.eos_token
        self.bos_token_id = None
        self.special_token_ids = [i for i in known if read.is_special_token(i)]
        self.tokens = [read.decode_bytes([i]) for i in known]

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("text, not bytes")
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids


@dataclass(frozen=True, slots=True)
class LookAhead:
    """What a grammar says of the time after a token: only the end can follow, or only these tokens, in order."""

    complete: bool = False
    forced: tuple[int, ...] = ()


class Constraint:
    """Tracks one sequence's position in its grammar. The position depends on the sequence's tokens alone.

    The tokens from ``start`` on are the answer. The grammar starts after the first occurrence of ``free_until`` there;
    before it, all tokens are allowed except those that end the answer.
    """

    def __init__(self, matcher: LLMatcher, eos: tuple[int, ...], start: int, grammar: Grammar) -> None:
        self._matcher = matcher
        self._eos = eos
        self._start = start
        self._free_until = grammar.free_until
        self._by_id = grammar.kind is GrammarKind.LARK and "<[" in grammar.source
        self.forget()

    def forget(self) -> None:
        """Reset the position, after earlier tokens have changed (a trim, a restored prefix)."""
        self._matcher.reset()
        self._grammar_start: int | None = None if self._free_until else self._start
        self._end = self._start
        self._forget_forced()

    def _forget_forced(self) -> None:
        self._forced: tuple[int, ...] = ()
        self._forced_start = 0

    def rewind(self, length: int) -> None:
        """Go back to the first ``length`` tokens, after those behind them have been dropped."""
        self._forget_forced()
        if self._grammar_start is None:
            self._end = max(self._start, min(self._end, length))
            return
        back = self._end - length
        if back <= 0 and not self.failed:
            return
        # llguidance cannot roll back a token that a grammar names by id
        if self._by_id or self.failed or length < self._grammar_start or not self._matcher.rollback(back):
            self.forget()
            return
        self._end = length

    def allowed_mask(self, tokens: Sequence[int], position: int, vocabulary: int) -> NDArray[np.bool_] | None:
        """Return which of ``vocabulary`` ids may follow ``tokens[:position]``: bool [vocabulary].

        Return None if the grammar does not allow ``tokens[:position]``. Raises InvalidGrammar if the mask costs too
        much or allows no token.
        """
        with panics_raised_as(InvalidGrammar("the grammar compiler fails on this grammar; change it")):
            return self._mask(vocabulary) if self._follow(tokens, position) else None

    @property
    def failed(self) -> bool:
        """Whether a token was too much work: then it follows nothing more."""
        return bool(self._matcher.is_error())

    def _require_working(self, matcher: LLMatcher) -> None:
        """Raise InvalidGrammar where ``matcher`` has given up."""
        if matcher.is_error():
            raise InvalidGrammar(f"the grammar takes too much work for one token: {_first_line(matcher.get_error())}")

    def _mask(self, vocabulary: int) -> NDArray[np.bool_]:
        mask = np.ones(vocabulary, dtype=np.bool_)
        if self._grammar_start is not None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            known = np.unpackbits(bits, bitorder="little", count=min(vocabulary, 8 * len(bits)))
            mask[: len(known)], mask[len(known) :] = known, False
        mask[[i for i in self._eos if i < vocabulary]] = (
            self._grammar_start is not None and self._matcher.is_accepting()
        )
        self._require_working(self._matcher)
        if not mask.any():
            raise InvalidGrammar(
                "the grammar allows no token at this position; it cannot contain tokens that end an answer"
            )
        return mask

    def look_ahead(self, position: int, token: int, *, forced: bool = False) -> LookAhead:
        """Return what must follow ``token``, sampled at ``position``; ``forced`` tokens only if asked for.

        Nothing is known unless the last mask was the one for ``position``.

        Raises StageFailed for a token that the grammar does not allow, InvalidGrammar where the compiler fails or the
        token is too much work.
        """
        with panics_raised_as(InvalidGrammar("the grammar compiler fails on this grammar; change it")):
            return self._look_ahead(position, token, forced)

    def _look_ahead(self, position: int, token: int, forced: bool) -> LookAhead:
        if self._grammar_start is None or token in self._eos or self._end != position:
            return LookAhead()
        # llguidance cannot roll back a token that a grammar names by id. A copy works but costs twice as much.
        matcher = self._matcher.deep_copy() if self._by_id else self._matcher
        if not matcher.try_consume_tokens([token]):
            self._require_working(matcher)
            raise StageFailed(f"the grammar does not allow token {token}, which was sampled under it")
        done: bool = matcher.is_stopped()
        following = self._find_forced(matcher, position, token) if forced and not done else ()
        if not self._by_id:
            matcher.rollback(1)
        return LookAhead(done, following)

    def _find_forced(self, matcher: LLMatcher, position: int, token: int) -> tuple[int, ...]:
        """Return the only tokens that can follow ``token`` at ``position``, which ``matcher`` has consumed.

        What is known is not computed again: it takes as long as a mask, over all bytes that the grammar forces.
        """
        known = position - self._forced_start
        if 0 <= known < len(self._forced) - 1 and self._forced[known] == token:
            return self._forced[known + 1 :]
        self._forced = tuple(matcher.compute_ff_tokens()[:MAX_FORCED_TOKENS])
        self._forced_start = position + 1
        return self._forced

    def _follow(self, tokens: Sequence[int], position: int) -> bool:
        """Advance over the new tokens. Return False, and stop at the first bad token, if the grammar forbids one."""
        if self._grammar_start is None:
            self._grammar_start = self._find_start(tokens, position)
            self._end = position if self._grammar_start is None else self._grammar_start
        if self._grammar_start is None:
            return True
        new = list(tokens[self._end : position])
        self._end += self._matcher.try_consume_tokens(new)
        self._require_working(self._matcher)
        return self._end >= position

    def _find_start(self, tokens: Sequence[int], position: int) -> int | None:
        """Return the position at which the grammar starts; None if ``free_until`` has not occurred."""
        mark = list(self._free_until)
        first = max(self._start, self._end - len(mark) + 1)
        places = range(first, position - len(mark) + 1)
        return next((i + len(mark) for i in places if list(tokens[i : i + len(mark)]) == mark), None)


def _take_lowest(left: NDArray[np.int_], step: int) -> int:
    """A step of the walk that repeats itself: what is ambiguous becomes worse with each repetition."""
    return int(left[0])


def _take_scattered(left: NDArray[np.int_], step: int) -> int:
    """A step of the walk that goes elsewhere each time."""
    return int(left[(7 * step + 3) % len(left)])


def _source(grammar: Grammar) -> str:
    """Return the grammar in llguidance's format. Raises InvalidGrammar."""
    if grammar.kind is not GrammarKind.REGEX and _TOO_LOW.search(grammar.source):
        raise _refusal(grammar, "it has a negative integer of more than 18 digits")
    match grammar.kind:
        case GrammarKind.REGEX:
            return str(LLMatcher.grammar_from_regex(grammar.source))
        case GrammarKind.LARK:
            return str(LLMatcher.grammar_from_lark(grammar.source))
    schema: Any = '{"type": "object"}' if grammar.kind is GrammarKind.JSON_OBJECT else grammar.source
    try:
        if why := find_unenforced(json.loads(schema)):
            raise _refusal(grammar, why)
        return str(LLMatcher.grammar_from_json_schema(schema, defaults=JSON_STYLE))
    except RecursionError as error:
        raise _refusal(grammar, "it is nested too deeply") from error
    except ValueError as error:
        raise _refusal(grammar, str(error)) from error


def _refusal(grammar: Grammar, why: str) -> InvalidGrammar:
    reason = _without_source(why, grammar.source)[:1000] or "llguidance gave no reason"
    return InvalidGrammar(f"the {grammar.kind.value} cannot be compiled: {reason}", field=grammar.kind.value)


def _without_source(why: str, source: str) -> str:
    """Return the compiler's message without excerpts of the source: errors must not contain a client's text."""
    redacted = _QUOTED.sub('"..."', why)
    lines = (line.strip() for line in redacted.splitlines())
    return "; ".join(line for line in lines if line and not _EXCERPT.match(line) and line not in source).replace(
        ":;", ":"
    )


def _first_line(text: str) -> str:
    return next(iter(text.splitlines()), "")[:300]
