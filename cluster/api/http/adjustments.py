"""What the server ignores or changes of a request, told once in the headers of its response."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final
from urllib.parse import quote

from starlette.types import Scope

from cluster.api.limits import MAX_IGNORED_CHARS
from cluster.core.errors import InvalidRequest

IGNORED_HEADER: Final = "x-macpipe-ignored"
"""Names of fields that were ignored, separated by commas."""
MAX_TOKENS_HEADER: Final = "x-macpipe-max-tokens"
"""The maximum length of the answer in tokens, if the requested one does not fit the context."""
FALLBACK_HEADER: Final = "x-macpipe-fallback"
"""The name of the model that answers, if the requested one cannot be served now."""
_KEY: Final = "macpipe.adjustments"


class Adjustments:
    """The adjustments of one request. ``strict``: fields that would be ignored are errors instead."""

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.max_tokens: int | None = None
        """The maximum length in tokens to which the answer was shortened; None if it was not."""
        self.fallback = ""
        """The name of the model that answers in place of the requested one; "" if that one does."""
        self._ignored: dict[str, None] = {}

    def ignore(self, fields: Iterable[str]) -> None:
        """Note that ``fields`` are ignored. Raises ``InvalidRequest`` for the first one if the server is strict."""
        for field in fields:
            if self.strict:
                raise InvalidRequest(
                    f"{field} cannot be honoured here; leave it out, or serve without --strict",
                    field=field,
                    code="unsupported_parameter",
                )
            self._ignored[field] = None

    def headers(self) -> dict[str, str]:
        """Return the headers that tell the client."""
        headers = {IGNORED_HEADER: join_fields(self._ignored)} if self._ignored else {}
        if self.max_tokens is not None:
            headers[MAX_TOKENS_HEADER] = str(self.max_tokens)
        if self.fallback:
            headers[FALLBACK_HEADER] = quote(self.fallback, safe="/:@ ")
        return headers


def join_fields(fields: Iterable[str]) -> str:
    """Return as many names as a header may have, separated by commas; ``...`` stands for the rest."""
    joined = ""
    for field in fields:
        longer = f"{joined}, {field}" if joined else field
        if len(longer) > MAX_IGNORED_CHARS:
            return f"{joined}, ..."
        joined = longer
    return joined


def begin_adjustments(scope: Scope, *, strict: bool) -> Adjustments:
    """Return the adjustments of a new request."""
    adjustments = scope[_KEY] = Adjustments(strict=strict)
    return adjustments


def adjustments_of(scope: Scope) -> Adjustments:
    """Return the adjustments of a request."""
    adjustments: Adjustments = scope[_KEY]
    return adjustments
