"""JSON as this surface writes it: compact, and with a line's end for people who use curl."""

from __future__ import annotations

import json
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
