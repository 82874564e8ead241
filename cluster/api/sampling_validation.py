"""Validates sampling and stop options, and fills in defaults. Every error names its field."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import replace

from cluster.api.requests import SamplingOptions
from cluster.core.errors import InvalidRequest
from cluster.core.limits import (
    MAX_LOGIT_BIAS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
)
from cluster.core.request import SAMPLING_RANGES, Grammar, SamplingParams

_DEFAULTS = SamplingParams()
_POSITIVE = {"top_p"}
"""Options that must be above zero, since zero would leave no token to sample."""


def sampling_params(o: SamplingOptions, vocabulary: int, grammar: Grammar | None = None) -> SamplingParams:
    """Return the options with defaults filled in and a random seed if none was given. Raises ``InvalidRequest``."""
    if o.top_logprobs > MAX_TOP_LOGPROBS:
        raise InvalidRequest(
            f"top_logprobs is {o.top_logprobs}; it must be at most {MAX_TOP_LOGPROBS}", field="top_logprobs"
        )
    return replace(
        SamplingParams(),
        **{name: _number(o, name) for name in SAMPLING_RANGES},
        grammar=grammar,
        top_k=min(o.top_k, vocabulary),
        logit_bias=_logit_bias(o, vocabulary),
        seed=secrets.randbits(63) if o.seed is None else o.seed,
        logprobs=o.logprobs or o.top_logprobs > 0,
        top_logprobs=o.top_logprobs,
    )


def _number(o: SamplingOptions, name: str) -> float:
    given: float | None = getattr(o, name)
    if given is None:
        return float(getattr(_DEFAULTS, name))
    value = float(given)
    least, most = SAMPLING_RANGES[name]
    if not math.isfinite(value) or not least <= value <= most or (name in _POSITIVE and value == 0):
        bracket = "(" if name in _POSITIVE else "["
        raise InvalidRequest(f"{name} is {value:g}; it must be in {bracket}{least:g}, {most:g}]", field=name)
    return value


def _logit_bias(o: SamplingOptions, vocabulary: int) -> tuple[tuple[int, float], ...]:
    biases = o.logit_bias or {}
    if len(biases) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias has {len(biases)} entries; send at most {MAX_LOGIT_BIAS}", field="logit_bias")
    for token, bias in biases.items():
        if token >= vocabulary:
            raise InvalidRequest(
                f"logit_bias has the token id {token}; the model has {vocabulary} tokens", field="logit_bias"
            )
        if not -100 <= bias <= 100:
            raise InvalidRequest(
                f"logit_bias of token {token} is {bias:g}; it must be in [-100, 100]", field="logit_bias"
            )
    return tuple(sorted(biases.items()))


def stop_strings(stop: Sequence[str]) -> tuple[str, ...]:
    """Return the stop strings without duplicates. Raises ``InvalidRequest`` for too many, an empty or a long one."""
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"{len(stop)} stop strings were given; send at most {MAX_STOP_STRINGS}", field="stop")
    if not all(0 < len(s) <= MAX_STOP_CHARS for s in stop):
        raise InvalidRequest(f"a stop string must have 1 to {MAX_STOP_CHARS} characters", field="stop")
    return tuple(dict.fromkeys(stop))
