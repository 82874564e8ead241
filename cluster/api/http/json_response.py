"""Encodes JSON responses, and creates the ids of their objects."""

from __future__ import annotations

import json
import secrets
from typing import Any

from starlette.responses import JSONResponse


def compact(data: Any) -> str:
    """Return ``data`` as JSON without spaces."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


class Json(JSONResponse):
    """A JSON response that is not streamed."""

    def render(self, content: Any) -> bytes:
        """Return the body: compact JSON and a line break."""
        return f"{compact(content)}\n".encode()


def new_id(prefix: str) -> str:
    """Return a random id with ``prefix``, such as ``chatcmpl-0f3a...``."""
    return f"{prefix}{secrets.token_hex(12)}"
