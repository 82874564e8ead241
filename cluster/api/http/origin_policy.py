"""By which names this API may be called, and whose web pages may call it.

A page that somebody visits can send requests to machines that only its visitor can reach. The Host header says by which
name a page believes to call us (a name of its own that leads here is a trick), Origin says whose page it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from cluster.core.errors import Forbidden, InvalidOption
from cluster.core.limits import MAX_CORS_HEADER_CHARS, PREFLIGHT_S
from cluster.core.text import is_loopback

_METHOD: Final = re.compile(r"[A-Z]{1,16}")
_ORIGIN: Final = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")
_HEADERS: Final = re.compile(r"[A-Za-z0-9_-]+(, ?[A-Za-z0-9_-]+)*")
_RATES: Final = (
    f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
)
_SHOWN: Final = ", ".join(("x-request-id", "retry-after", *_RATES))
"""Headers that a page may read."""


@dataclass(frozen=True, slots=True)
class OriginPolicy:
    """``hosts`` are names beside loopback's own, in small letters; ``origins`` such as ``https://chat.example:8443``."""

    hosts: frozenset[str] = field(default_factory=frozenset)
    origins: frozenset[str] = field(default_factory=frozenset)

    def check(self, headers: Headers) -> None:
        """Raises ``Forbidden``."""
        host = _host_of(f"//{headers.get('host', '')}")
        if not host or not (is_loopback(host) or host in self.hosts):
            name = host[:64] or "a host without a name"
            raise Forbidden(
                f"this is not {name}; call it by its address, such as localhost, or serve with --http-allow-host {name}"
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_same_origin(origin, headers["host"]) and not self.allows(origin):
            raise Forbidden(
                f"web pages of {origin[:128]} may not use this API; --http-allow-origin lets some in by name"
            )

    def allows(self, origin: str | None) -> bool:
        """Whether pages of ``origin`` were let in by name."""
        return origin is not None and origin.lower() in self.origins

    def cross(self, origin: str | None) -> dict[str, str]:
        """Headers with which a browser shows an answer to a page of ``origin``; nothing for those not let in."""
        if not self.origins:
            return {}
        if origin is None or not self.allows(origin):
            return {"vary": "origin"}
        return {"vary": "origin", "access-control-allow-origin": origin, "access-control-expose-headers": _SHOWN}

    def preflight(self, method: str, headers: Headers) -> dict[str, str] | None:
        """The answer's headers where a browser asks whether a page may ask; None where this is no such question."""
        wanted = headers.get("access-control-request-method")
        if method != "OPTIONS" or wanted is None or not self.allows(headers.get("origin")):
            return None
        asked = headers.get("access-control-request-headers", "")
        if not _METHOD.fullmatch(wanted) or len(asked) > MAX_CORS_HEADER_CHARS:
            raise Forbidden("that is no method that a page can ask for")
        answer = {"access-control-allow-methods": wanted, "access-control-max-age": f"{PREFLIGHT_S:.0f}"}
        if _HEADERS.fullmatch(asked):
            answer["access-control-allow-headers"] = asked
        if headers.get("access-control-request-private-network") == "true":
            answer["access-control-allow-private-network"] = "true"
        return answer

    @staticmethod
    def _is_same_origin(origin: str, host: str) -> bool:
        try:
            return urlsplit(origin).netloc.lower() == host.lower()
        except ValueError:
            return False


def check_host(given: str) -> str:
    """A name for ``Sites.hosts``. Raises ``InvalidOption``."""
    host = _host_of(f"//{given}")
    if not host or host != given.lower().strip("[]").rstrip("."):
        raise InvalidOption(
            f"--http-allow-host is {given[:64]}; it takes a name or an address without a port, such as mac-1.example",
            field="http_allow_host",
        )
    return host


def check_origin(given: str) -> str:
    """A name for ``Sites.origins``. Raises ``InvalidOption``: any is none, since pages would use it unasked."""
    if not _ORIGIN.fullmatch(given.lower()):
        raise InvalidOption(
            f"--http-allow-origin is {given[:64]}; it takes an origin, such as https://chat.example:8443; there is no "
            "wildcard, since any page that somebody visits could then use this API",
            field="http_allow_origin",
        )
    return given.lower()


def _host_of(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower().rstrip(".")
    except ValueError:
        return ""
