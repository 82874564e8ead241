"""Grammars: from what an answer must be to the tokens that may come next, through llguidance.

It knows token ids and a tokenizer; it refuses to know logits, sequences and frames. llguidance's own limits bound a
mask, the same in a check and on the last stage. They do not bound compiling: check a grammar in a process that can be
killed (``cluster.sandbox``), and what it needs there it will need on a stage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance import TokenizerWrapper as Spelled
from llguidance.hf import from_tokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cluster.core.errors import InvalidGrammar, StageFailed
from cluster.core.limits import MASK_LEXER_FUEL, MASK_PARSER_ITEMS
from cluster.core.request import Grammar, GrammarKind
from cluster.model.panics import panics_raised_as
from cluster.model.schema_support import unkept

if TYPE_CHECKING:  # a type of the stubs alone
    from llguidance._lib import JsonCompileOptions

__all__ = ["Constraint", "Grammars"]

MASK_LIMITS: Final = LLParserLimits(step_lexer_fuel=MASK_LEXER_FUEL, step_max_items=MASK_PARSER_ITEMS)
"""What one mask may cost. Everybody's tokens on a stage wait for it."""
_EXCERPT: Final = re.compile(r"\d+ \||\^+$")
"""A line of the source with its number, and what points into it."""
_TOO_LOW: Final = re.compile(r"-0*[1-9][0-9]{18}")
"""Near the lowest number of 64 bits, as a constant, llguidance 1.9 ends the process."""
_QUOTED: Final = re.compile(r'(?<=invalid regex )"[^\n]*"(?= \()|"[^"\n]{33,}"')
JSON_STYLE: Final[JsonCompileOptions] = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\t]{1,20}"}
"""Any usual layout, but no endless run of blanks: models that are bound to JSON like to get lost in one."""


class Grammars:
    """The compiler for one tokenizer, for any thread. ``eos`` are the ids that end an answer."""

    def __init__(self, wrapper: TokenizerWrapper, eos: frozenset[int]) -> None:
        """Takes about 1 s for a large vocabulary. Raises InvalidGrammar for a tokenizer that cannot be used."""
        try:
            with panics_raised_as(ValueError("llguidance failed")):
                read = from_tokenizer(wrapper._tokenizer, eos_token=sorted(eos) or None)
                spelling = _Spelling(wrapper._tokenizer.backend_tokenizer, read)
                self._tokenizer = LLTokenizer(Spelled(spelling), eos_token=sorted(eos) or None)
        except Exception as error:  # llguidance raises whatever an unknown kind of tokenizer makes it raise
            raise InvalidGrammar(f"this model's tokenizer cannot be bound to a grammar: {error}") from error
        self.eos = tuple(sorted(eos))

    def check(self, grammar: Grammar) -> None:
        """Do what a stage does for the first token of an answer: compile ``grammar`` and compute a mask.

        Unbounded in time and memory. Raises InvalidGrammar with the reason.
        """
        constraint = self.constraint(replace(grammar, free_until=()), 0)
        try:
            constraint.allowed_mask((), 0, self._tokenizer.vocab_size)
        except InvalidGrammar as error:
            raise _refusal(grammar, error.sentence) from error

    def constraint(self, grammar: Grammar, start: int) -> Constraint:
        """Compile ``grammar`` and bind a sequence whose answer begins at token ``start``. Raises InvalidGrammar."""
        return Constraint(self.compile(grammar), self.eos, start, grammar)

    def compile(self, grammar: Grammar) -> LLMatcher:
        """Compile ``grammar``. Unbounded in time and memory. Raises InvalidGrammar with the reason."""
        with panics_raised_as(_refusal(grammar, "it makes the compiler fail")):
            matcher = LLMatcher(self._tokenizer, _source(grammar), log_level=0, limits=MASK_LIMITS)
            if matcher.is_error():
                raise _refusal(grammar, matcher.get_error())
            return matcher


class _Spelling:
    """A tokenizer as llguidance asks for it, whose text is never a mark: ``<|user|>`` in a grammar is spelled out.

    By itself llguidance takes such text for the model's own token of that name, which it then refuses as text. A mark
    that is meant stands in Lark without quotes.
    """

    def __init__(self, backend: Tokenizer, read: LLTokenizer) -> None:
        self._backend = copy(backend)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        known = range(read.vocab_size)
        self.eos_token_id, self.bos_token_id = read.eos_token, None
        self.special_token_ids = [i for i in known if read.is_special_token(i)]
        self.tokens = [read.decode_bytes([i]) for i in known]

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("text, not bytes")
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids


class Constraint:
    """One sequence's place in its grammar, found from its tokens alone: whatever they become, it follows.

    The tokens from ``start`` on are the answer. The grammar begins after the first occurrence of ``free_until`` there;
    before it, everything but the end of the answer is allowed.
    """

    def __init__(self, matcher: LLMatcher, eos: tuple[int, ...], start: int, grammar: Grammar) -> None:
        self._matcher, self._eos, self._start, self._free_until = matcher, eos, start, grammar.free_until
        self._by_id = grammar.kind is GrammarKind.LARK and "<[" in grammar.source
        self.forget()

    def forget(self) -> None:
        """The tokens before are no longer what they were (a trim, a restored prefix): follow them anew."""
        self._matcher.reset()
        self._begun: int | None = None if self._free_until else self._start
        self._end = self._start

    def allowed_mask(self, tokens: Sequence[int], position: int, vocabulary: int) -> NDArray[np.bool_] | None:
        """Which of ``vocabulary`` ids may stand at ``position``, after ``tokens[:position]``: bool [vocabulary].

        None where those tokens are none that the grammar allows: a guess that is about to be taken back. Raises
        InvalidGrammar where a mask is too much work, and where nothing may stand there.
        """
        with panics_raised_as(InvalidGrammar("the grammar makes its compiler fail")):
            return self._mask(vocabulary) if self._follow(tokens, position) else None

    def _mask(self, vocabulary: int) -> NDArray[np.bool_]:
        mask = np.ones(vocabulary, dtype=np.bool_)
        if self._begun is not None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            known = np.unpackbits(bits, bitorder="little", count=min(vocabulary, 8 * len(bits)))
            mask[: len(known)], mask[len(known) :] = known, False
        mask[[i for i in self._eos if i < vocabulary]] = self._begun is not None and self._matcher.is_accepting()
        if self._matcher.is_error():
            raise InvalidGrammar(
                f"the grammar takes too much work for one token: {_first_line(self._matcher.get_error())}"
            )
        if not mask.any():
            raise InvalidGrammar(
                "the grammar came to a place where no token may stand; one that ends answers cannot be a part of one"
            )
        return mask

    def is_complete_after(self, tokens: Sequence[int], token: int) -> bool:
        """Whether nothing but the end can follow ``token``, picked after ``tokens``; which is then certain to be it.

        Raises StageFailed for a token that the grammar does not allow, InvalidGrammar where the compiler fails.
        """
        with panics_raised_as(InvalidGrammar("the grammar makes its compiler fail")):
            return self._completed(tokens, token)

    def _completed(self, tokens: Sequence[int], token: int) -> bool:
        if self._begun is None or token in self._eos or self._end != len(tokens):
            return False
        # Where a grammar names tokens by their ids, llguidance does not find back from one; a copy costs twice as much.
        matcher = self._matcher.deep_copy() if self._by_id else self._matcher
        if not matcher.consume_token(token):
            raise StageFailed(f"the grammar does not allow token {token}, which was picked under it")
        done: bool = matcher.is_stopped()
        if not self._by_id:
            matcher.rollback(1)
        return done

    def _follow(self, tokens: Sequence[int], position: int) -> bool:
        """Advance over what came since. False where the grammar does not allow it; then it stays where that begins."""
        if self._begun is None:
            self._begun = self._find_start(tokens, position)
            self._end = position if self._begun is None else self._begun
        if self._begun is None:
            return True
        new = list(tokens[self._end : position])
        self._end += self._matcher.try_consume_tokens(new)
        return self._end >= position

    def _find_start(self, tokens: Sequence[int], position: int) -> int | None:
        """Where the grammar begins, if the part before it has ended."""
        mark = list(self._free_until)
        first = max(self._start, self._end - len(mark) + 1)
        places = range(first, position - len(mark) + 1)
        return next((i + len(mark) for i in places if list(tokens[i : i + len(mark)]) == mark), None)


def _source(grammar: Grammar) -> str:
    """The grammar as llguidance reads it. Raises InvalidGrammar."""
    if grammar.kind is not GrammarKind.REGEX and _TOO_LOW.search(grammar.source):
        raise _refusal(grammar, "it has a whole number of more than 18 digits below zero")
    match grammar.kind:
        case GrammarKind.REGEX:
            return str(LLMatcher.grammar_from_regex(grammar.source))
        case GrammarKind.LARK:
            return str(LLMatcher.grammar_from_lark(grammar.source))
    schema: Any = '{"type": "object"}' if grammar.kind is GrammarKind.JSON_OBJECT else grammar.source
    try:
        if why := unkept(json.loads(schema)):
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
    """The compiler's words without the excerpts that it shows: errors carry names and places, no text of a client's."""
    said = _QUOTED.sub('"..."', why)
    lines = (line.strip() for line in said.splitlines())
    return "; ".join(line for line in lines if line and not _EXCERPT.match(line) and line not in source).replace(
        ":;", ":"
    )


def _first_line(text: str) -> str:
    return next(iter(text.splitlines()), "")[:300]
