"""JSON as the HTTP API writes it, and the ids of its objects."""

from __future__ import annotations

import json
import secrets
from typing import Any

from starlette.responses import JSONResponse


def compact(data: Any) -> str:
    """JSON without spaces."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


class Json(JSONResponse):
    """A whole response."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return f"{compact(content)}\n".encode()


def new_id(prefix: str) -> str:
    """Such as ``chatcmpl-0f3a...``."""
    return f"{prefix}{secrets.token_hex(12)}"
