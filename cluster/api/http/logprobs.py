"""Encodes log-probabilities in OpenAI's two formats: the token list of chat, and the columns of completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Final

from cluster.api.http.json_response import encode_list
from cluster.api.request_service import RunningRequest
from cluster.core.request import TokenEvent

_REPLACEMENT: Final = "\ufffd"
_LEAST: Final = -9999.0
"""OpenAI's value for an impossible token, since JSON has no infinity."""


def chat_logprobs(tokens: Sequence[TokenEvent], running: RunningRequest) -> dict[str, Any]:
    """Return ``{"content": [...], "refusal": null}``."""
    return {"content": [entry(t, running) for t in tokens], "refusal": None}


async def collected_chat_logprobs(tokens: Sequence[TokenEvent], running: RunningRequest) -> dict[str, Any]:
    """Return the same for a whole answer, encoded while the event loop goes on."""
    return {"content": await encode_list(entry(t, running) for t in tokens), "refusal": None}


def entry(token: TokenEvent, running: RunningRequest) -> dict[str, Any]:
    """Encode one token with its alternatives. ``bytes`` is null if the token is only part of a character."""
    text = running.checkpoint.tokenizer.token_text
    top = [_logprob_entry(text(t.token), t.logprob) for t in token.top]
    return {**_logprob_entry(text(token.token), token.logprob or 0.0), "top_logprobs": top}


def _logprob_entry(text: str, logprob: float) -> dict[str, Any]:
    whole = None if _REPLACEMENT in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, _LEAST), "bytes": whole}


def _alternatives(token: TokenEvent, text: Callable[[int], str]) -> dict[str, float]:
    """Return the log-probability of each alternative by its text, including the sampled token."""
    found = {text(o.token): max(o.logprob, _LEAST) for o in token.top}
    return found | {text(token.token): max(token.logprob or 0.0, _LEAST)}


def columns(tokens: Sequence[TokenEvent], running: RunningRequest, offset: int) -> dict[str, Any]:
    """Return the ``logprobs`` of completions; ``offset`` is the character at which the first token's text begins."""
    text = running.checkpoint.tokenizer.token_text
    return {
        "tokens": [text(t.token) for t in tokens],
        "token_logprobs": [max(t.logprob or 0.0, _LEAST) for t in tokens],
        "top_logprobs": [_alternatives(t, text) for t in tokens],
        "text_offset": _offsets(tokens, offset),
    }


async def collected_columns(tokens: Sequence[TokenEvent], running: RunningRequest) -> dict[str, Any]:
    """Return the same for a whole answer, encoded while the event loop goes on."""
    text = running.checkpoint.tokenizer.token_text
    return {
        "tokens": await encode_list(text(t.token) for t in tokens),
        "token_logprobs": [max(t.logprob or 0.0, _LEAST) for t in tokens],
        "top_logprobs": await encode_list(_alternatives(t, text) for t in tokens),
        "text_offset": _offsets(tokens, 0),
    }


def _offsets(tokens: Sequence[TokenEvent], offset: int) -> list[int]:
    """Return the character at which each token's text begins."""
    return list(accumulate((len(t.text) for t in tokens[:-1]), initial=offset)) if tokens else []
