"""Encodes JSON responses, and creates the ids of their objects."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterable
from itertools import chain
from typing import Any

from starlette.responses import JSONResponse


class Encoded:
    """A value inside of data for ``compact`` that is JSON text already."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def compact(data: Any) -> str:
    """Return ``data`` as JSON without spaces. ``Encoded`` values are inserted as they are."""
    found: list[str] = []
    mark = secrets.token_hex(16)  # no text of a client or a model can contain it

    def insert(value: object) -> str:
        if not isinstance(value, Encoded):
            raise TypeError(f"{type(value).__name__} has no JSON encoding")
        found.append(value.text)
        return mark

    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=insert)
    if not found:
        return text
    return "".join(chain(*zip(text.split(f'"{mark}"'), [*found, ""], strict=True)))


def encoded_list(values: Iterable[str]) -> Encoded:
    """Return the list of ``values``, which are JSON texts."""
    return Encoded(f"[{','.join(values)}]")


async def encode_list(values: Iterable[Any]) -> Encoded:
    """Return the list of ``values`` as JSON.

    The event loop runs after each value, because an answer's log-probabilities are hundreds of thousands of objects.
    """
    texts = []
    for value in values:
        texts.append(compact(value))
        await asyncio.sleep(0)
    return encoded_list(texts)


class Json(JSONResponse):
    """A JSON response that is not streamed."""

    def render(self, content: Any) -> bytes:
        """Return the body: compact JSON and a line break."""
        return f"{compact(content)}\n".encode()


def new_id(prefix: str) -> str:
    """Return a random id with ``prefix``, such as ``chatcmpl-0f3a...``."""
    return f"{prefix}{secrets.token_hex(12)}"
