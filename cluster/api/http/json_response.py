"""Encodes JSON responses, and creates the ids of their objects."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterable
from itertools import chain
from typing import Any, Final

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from cluster.core.limits import KIB, STREAM_WRITE_TIMEOUT_S

LONG_CHARS: Final = 16 * KIB
"""Characters of a text that is encoded by itself. A response has up to 64 shorter ones in each of few fields."""
WRITE_CHARS: Final = 256 * KIB
"""Characters of a long response that are encoded and written in one step."""


class Encoded:
    """A value inside of data for ``compact`` that is JSON text already, in ``pieces`` that follow each other."""

    __slots__ = ("pieces",)

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces


def compact_pieces(data: Any) -> list[str]:
    """Return ``data`` as JSON without spaces, in pieces that follow each other. ``Encoded`` values are not copied."""
    found: list[Encoded] = []
    mark = secrets.token_hex(16)  # no text of a client or a model can contain it

    def insert(value: object) -> str:
        if not isinstance(value, Encoded):
            raise TypeError(f"{type(value).__name__} has no JSON encoding")
        found.append(value)
        return mark

    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=insert)
    if not found:
        return [text]
    first, *rest = text.split(f'"{mark}"')
    return [first, *chain.from_iterable((*one.pieces, after) for one, after in zip(found, rest, strict=True))]


def compact(data: Any) -> str:
    """Return ``data`` as JSON without spaces. ``Encoded`` values are inserted as they are."""
    return "".join(compact_pieces(data))


def encoded_list(values: Iterable[str]) -> Encoded:
    """Return the list of ``values``, which are JSON texts."""
    between = chain.from_iterable((",", value) for value in values)
    next(between, None)
    return Encoded("[", *between, "]")


async def encode_each(values: Iterable[Any]) -> list[str]:
    """Return each of ``values`` as JSON. The event loop runs after each."""
    texts = []
    for value in values:
        texts.append(compact(value))
        await asyncio.sleep(0)
    return texts


async def encode_text(text: str) -> str | Encoded:
    """Return ``text`` for use in a response; a long one as JSON, encoded while the event loop goes on."""
    if len(text) < LONG_CHARS:
        return text
    pieces = []
    for start in range(0, len(text), WRITE_CHARS):
        pieces.append(json.dumps(text[start : start + WRITE_CHARS], ensure_ascii=False)[1:-1])
        await asyncio.sleep(0)
    return Encoded('"', *pieces, '"')


class Json(JSONResponse):
    """A JSON response that is not streamed."""

    def render(self, content: Any) -> bytes:
        """Return the body: compact JSON and a line break."""
        return f"{compact(content)}\n".encode()


class LongJson(Response):
    """A JSON response of any length, written in parts of ``WRITE_CHARS`` between which the event loop runs."""

    media_type = "application/json"

    def __init__(self, content: Any) -> None:
        super().__init__()
        del self.headers["content-length"]  # a long body is sent in chunks, and never held as a whole
        self._pieces = [*compact_pieces(content), "\n"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        part: list[str] = []
        size = 0
        for piece in self._pieces:
            for start in range(0, len(piece), WRITE_CHARS):
                part.append(piece[start : start + WRITE_CHARS])
                size += len(part[-1])
                if size >= WRITE_CHARS:
                    await self._write("".join(part), send)
                    part, size = [], 0
        await self._write("".join(part), send)
        await send({"type": "http.response.body", "body": b""})

    async def _write(self, text: str, send: Send) -> None:
        async with asyncio.timeout(STREAM_WRITE_TIMEOUT_S):
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await asyncio.sleep(0)


def new_id(prefix: str) -> str:
    """Return a random id with ``prefix``, such as ``chatcmpl-0f3a...``."""
    return f"{prefix}{secrets.token_hex(12)}"
