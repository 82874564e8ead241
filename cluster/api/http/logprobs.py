"""Encodes log-probabilities in OpenAI's two formats: the token list of chat, and the columns of completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any, Final

from cluster.api.http.json_response import compact, encode_each, encoded_list
from cluster.api.request_service import RunningRequest
from cluster.core.request import PromptLogprobs, TokenEvent, TopLogprob

_REPLACEMENT: Final = "\ufffd"
_LEAST: Final = -9999.0
"""OpenAI's value for an impossible token, since JSON has no infinity."""
_COLUMNS: Final = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def chat_logprobs(tokens: Sequence[TokenEvent], running: RunningRequest) -> dict[str, Any]:
    """Return ``{"content": [...], "refusal": null}``."""
    return {"content": [entry(t, running) for t in tokens], "refusal": None}


def entry(token: TokenEvent, running: RunningRequest) -> dict[str, Any]:
    """Encode one token with its alternatives. ``bytes`` is null if the token is only part of a character."""
    text = running.model_info.tokenizer.token_text
    top = [_logprob_entry(text(t.token), t.logprob) for t in token.top]
    return {**_logprob_entry(text(token.token), token.logprob or 0.0), "top_logprobs": top}


def _logprob_entry(text: str, logprob: float) -> dict[str, Any]:
    whole = None if _REPLACEMENT in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, _LEAST), "bytes": whole}


def _alternatives(
    top: Sequence[TopLogprob], token: int, logprob: float, text: Callable[[int], str]
) -> dict[str, float]:
    """Return the log-probability of each alternative by its text, including the token itself."""
    found = {text(o.token): max(o.logprob, _LEAST) for o in top}
    return found | {text(token): max(logprob, _LEAST)}


def columns(tokens: Sequence[TokenEvent], running: RunningRequest, offset: int) -> dict[str, Any]:
    """Return the ``logprobs`` of completions; ``offset`` is the character at which the first token's text begins."""
    text = running.model_info.tokenizer.token_text
    return {
        "tokens": [text(t.token) for t in tokens],
        "token_logprobs": [max(t.logprob or 0.0, _LEAST) for t in tokens],
        "top_logprobs": [_alternatives(t.top, t.token, t.logprob or 0.0, text) for t in tokens],
        "text_offset": _offsets(tokens, offset),
    }


def chat_row(running: RunningRequest, token: TokenEvent) -> tuple[str, ...]:
    """Return the JSON of one token of a chat's answer that is collected."""
    return (compact(entry(token, running)),)


def columns_row(running: RunningRequest, token: TokenEvent) -> tuple[str, ...]:
    """Return the JSON of one token in the columns of completions, without its offset."""
    text = running.model_info.tokenizer.token_text
    logprob = max(token.logprob or 0.0, _LEAST)
    return compact(text(token.token)), compact(logprob), compact(_alternatives(token.top, token.token, logprob, text))


async def collected_columns(
    rows: Sequence[tuple[str, ...]], offsets: Sequence[int], prompt: EchoedPrompt | None = None
) -> dict[str, Any]:
    """Return the ``logprobs`` of a whole completion after its echoed prompt, from its ``columns_row``s."""
    before = prompt.columns if prompt else dict[str, list[Any]]()
    found: dict[str, Any] = {}
    for i, name in enumerate(_COLUMNS[:3]):
        prompted = await encode_each(before.get(name, ()))
        found[name] = encoded_list(chain(prompted, (row[i] for row in rows)))
    start = len(prompt.text) if prompt else 0
    return {**found, "text_offset": [*before.get("text_offset", ()), *(start + offset for offset in offsets)]}


def _offsets(tokens: Sequence[TokenEvent], offset: int) -> list[int]:
    """Return the character at which each token's text begins."""
    return list(accumulate((len(t.text) for t in tokens[:-1]), initial=offset)) if tokens else []


class EchoedPrompt:
    """Encodes a prompt with its log-probabilities in the columns of completions, piece by piece.

    ``text`` and ``columns`` are those of the prompt so far. OpenAI's columns begin with the first
    token, which has no log-probability.
    """

    def __init__(self, running: RunningRequest) -> None:
        self._prompt = running.request.prompt
        self._tokenizer = running.model_info.tokenizer
        self._decoder = self._tokenizer.decoder()
        self._count = self._length = 0
        self._pieces: list[str] = []
        self.columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def begin(self) -> tuple[str, dict[str, list[Any]]]:
        """Add the first token. Return its text and columns."""
        return self._add([None], [None])

    def add(self, piece: PromptLogprobs) -> tuple[str, dict[str, list[Any]]]:
        """Add the next tokens. Return their text and columns."""
        own = self._prompt[piece.start : piece.start + len(piece.logprobs)]
        ids = tuple({*own, *piece.top_tokens})
        texts = dict(zip(ids, self._tokenizer.token_texts(ids), strict=True))
        tops = [
            _alternatives(piece.top(i), token, logprob, texts.__getitem__)
            for i, (token, logprob) in enumerate(zip(own, piece.logprobs, strict=True))
        ]
        return self._add([max(logprob, _LEAST) for logprob in piece.logprobs], tops)

    def _add(self, logprobs: list[Any], tops: list[Any]) -> tuple[str, dict[str, list[Any]]]:
        tokens = self._prompt[self._count : self._count + len(logprobs)]
        offsets, pieces = [], []
        for token in tokens:
            offsets.append(self._length)
            pieces.append(self._decoder.add(token))
            self._length += len(pieces[-1])
        self._count += len(tokens)
        if self._count == len(self._prompt):
            pieces.append(self._decoder.flush())
            self._length += len(pieces[-1])
        self._pieces += pieces
        values: tuple[list[Any], ...] = (self._tokenizer.token_texts(tokens), logprobs, tops, offsets)
        added = dict(zip(_COLUMNS, values, strict=True))
        for name in _COLUMNS:
            self.columns[name] += added[name]
        return "".join(pieces), added
