"""A request as plain data and back: what of it the journal keeps. All of it but the deadline, which is a clock's."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

from cluster.chat import Parsing, Tool
from cluster.grammar import Grammar, GrammarKind
from cluster.types import Request, SamplingParams


def as_data(r: Request) -> tuple[Any, ...]:
    """Tuples, numbers and strings alone, as far as the request itself holds no more than that."""
    parsing = astuple(r.parsing) if r.parsing else None
    asked = (r.id, r.prompt, astuple(r.sampling), r.max_tokens, r.stop, r.ignore_eos, r.client, r.priority)
    return (*asked, r.samples, parsing)


def from_data(data: Any) -> Request:
    """The request that ``as_data`` was given, as msgpack gives it back. Raises ``TypeError`` or ``ValueError``."""
    request_id, prompt, sampling, max_tokens, stop, ignore_eos, client, priority, samples, parsing = data
    return Request(
        id=request_id,
        prompt=tuple(prompt),
        sampling=_sampling(sampling),
        max_tokens=max_tokens,
        stop=tuple(stop),
        ignore_eos=ignore_eos,
        client=client,
        priority=priority,
        samples=samples,
        parsing=_parsing(*parsing) if parsing else None,
    )


def _sampling(data: list[Any]) -> SamplingParams:
    *values, grammar = data
    plain: Any = [tuple(map(tuple, v)) if isinstance(v, list) else v for v in values]
    plain.append(_grammar(*grammar) if grammar else None)
    return SamplingParams(*plain)


def _grammar(kind: str, source: str, free_until: list[int]) -> Grammar:
    return Grammar(GrammarKind(kind), source, tuple(free_until))


def _parsing(tools: list[list[str]], thinking: bool) -> Parsing:
    return Parsing(tuple(Tool(*tool) for tool in tools), thinking)
