"""Encodes cache edits as short msgpack lists: a code, then the edit's fields in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.core.adapter import MAX_ADAPTER_KEY_CHARS
from cluster.core.errors import BadFrame
from cluster.core.frames import Drop, Edit, Join, Leave, Mark, Persist, Restore, Save, Trim, Unmark
from cluster.core.limits import MAX_LOGIT_BIAS, MAX_MARKER_TOKENS
from cluster.core.request import Grammar, GrammarKind, SamplingParams
from cluster.wire.header_fields import Fields

_JOIN = 0
_PERSIST = 8
_PLAIN: dict[int, tuple[Callable[..., Edit], int]] = {
    1: (Leave, 1), 2: (Trim, 2), 3: (Save, 2), 4: (Restore, 3), 5: (Drop, 1), 6: (Mark, 2), 7: (Unmark, 2)
}  # fmt: skip
"""Edits with only integer fields: code -> type and number of fields."""

_GRAMMARS = frozenset(kind.value for kind in GrammarKind)
_CODES = {kind: code for code, (kind, _) in _PLAIN.items()}


def pack_edit(edit: Edit) -> list[Any]:
    """Return ``edit`` as a list for msgpack."""
    if isinstance(edit, Join):
        sampling = _pack_sampling(edit.sampling)
        flags = (edit.look_ahead, edit.noise, edit.adapter, edit.embeds)
        return [_JOIN, edit.sequence, edit.prompt_length, sampling, *flags]
    if isinstance(edit, Persist):
        return [_PERSIST, edit.prefix, edit.owner, edit.adapter]
    return [_CODES[type(edit)], *(getattr(edit, name) for name in edit.__slots__)]


def unpack_edit(value: Any) -> Edit:
    """Return the edit in ``value``. Raises ``BadFrame`` if it is invalid."""
    if type(value) is not list or not value or type(value[0]) is not int:
        raise BadFrame("a frame's edit is not a list that starts with an integer code")
    if value[0] == _JOIN:
        f = Fields(value, "join", 8)
        sampling, adapter = _unpack_sampling(value[3]), _unpack_adapter(f, 6)
        return Join(f.count(1), f.count(2), sampling, f.flag(4), f.count(5), adapter, f.flag(7))
    if value[0] == _PERSIST:
        f = Fields(value, "persist", 4)
        return Persist(f.count(1), f.text(2), _unpack_adapter(f, 3))
    if value[0] not in _PLAIN:
        raise BadFrame(f"a frame's edit has the unknown code {value[0]}")
    kind, count = _PLAIN[value[0]]
    f = Fields(value, "edit", 1 + count)
    return kind(*(f.count(i) for i in range(1, 1 + count)))


def _unpack_adapter(f: Fields, i: int) -> str:
    key = f.text(i)
    if len(key) > MAX_ADAPTER_KEY_CHARS:
        raise BadFrame(f"a frame names an adapter with {len(key)} characters; the limit is {MAX_ADAPTER_KEY_CHARS}")
    return key


def _pack_sampling(p: SamplingParams) -> list[Any]:
    return [
        p.temperature,
        p.top_p,
        p.top_k,
        p.min_p,
        p.repetition_penalty,
        p.presence_penalty,
        p.frequency_penalty,
        p.logit_bias,
        p.seed,
        p.logprobs,
        p.top_logprobs,
        None if (g := p.grammar) is None else (g.kind.value, g.source, g.free_until),
    ]


def _unpack_sampling(value: Any) -> SamplingParams:
    f = Fields(value, "sampling", 12)
    bias = [Fields(row, "bias", 2) for row in f.rows(7, MAX_LOGIT_BIAS)]
    return SamplingParams(
        temperature=f.number(0),
        top_p=f.number(1),
        top_k=f.count(2),
        min_p=f.number(3),
        repetition_penalty=f.number(4),
        presence_penalty=f.number(5),
        frequency_penalty=f.number(6),
        logit_bias=tuple((row.count(0), row.number(1)) for row in bias),
        seed=f.seed(8),
        logprobs=f.flag(9),
        top_logprobs=f.count(10),
        grammar=_unpack_grammar(f.optional_list(11)),
    )


def _unpack_grammar(value: list[Any] | None) -> Grammar | None:
    if value is None:
        return None
    f = Fields(value, "grammar", 3)
    if f.text(0) not in _GRAMMARS:
        raise BadFrame(f"a grammar of unknown kind {f.text(0)[:32]!r}")
    return Grammar(GrammarKind(f.text(0)), f.text(1), f.counts(2, MAX_MARKER_TOKENS))
