"""Sampling and stop fields that several JSON bodies share. ``cluster.api.sampling_validation`` checks the values."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from cluster.api.http.body import Form, first_entries
from cluster.api.requests import SamplingOptions
from cluster.core.errors import InvalidRequest
from cluster.core.limits import (
    LEAST_REPETITION_PENALTY,
    MAX_LOGIT_BIAS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MOST_REPETITION_PENALTY,
)

Count: TypeAlias = Annotated[int, Field(ge=0, le=2**31 - 1)]
Positive: TypeAlias = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seed: TypeAlias = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
StopString: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings: TypeAlias = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]
Biases: TypeAlias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_LOGIT_BIAS),
    first_entries(MAX_LOGIT_BIAS),
]


class SamplingForm(Form):
    """The fields that chat and completions share. ``top_k`` 0 or -1 turns it off."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST_REPETITION_PENALTY, le=MOST_REPETITION_PENALTY)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases | None = None
    seed: Seed | None = None
    stop: StopString | StopStrings | None = None
    ignore_eos: bool = False
    speculate: bool | None = None

    def sampling_options(self, *, logprobs: bool, top_logprobs: int) -> SamplingOptions:
        """Return the sampling options. The default temperature is 1, as at OpenAI. Raises ``InvalidRequest``."""
        return SamplingOptions(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=_biases(self.logit_bias or {}),
            seed=None if self.seed is None else self.seed % 2**64,
            logprobs=logprobs,
            top_logprobs=top_logprobs,
        )


def stop_list(stop: str | list[str] | None) -> list[str]:
    """Return the stop strings as a list."""
    return [stop] if isinstance(stop, str) else stop or []


def _biases(given: dict[str, float]) -> dict[int, float]:
    biases = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10 and int(token) < 2**32):
            raise InvalidRequest(f"logit_bias has the key {token[:32]!r}; it must be a token id", field="logit_bias")
        biases[int(token)] = bias
    return biases
