"""Checks the Host and Origin headers: which host names this API answers to, and which web pages may call it.

A web page can send requests to machines that only its visitor can reach. An unknown Host reveals DNS rebinding: the
page's own name resolves to this machine. Origin tells which site the page is from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from cluster.core.errors import Forbidden, InvalidOption
from cluster.core.limits import PREFLIGHT_S
from cluster.core.text import is_loopback

_ORIGIN: Final = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")
_METHODS: Final = ("GET", "HEAD", "POST")
"""The methods of all routes that a page may call."""
_RATES: Final = (
    f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
)
_SHOWN: Final = ("x-request-id", "retry-after", *_RATES)
"""Response headers that a page may read."""


@dataclass(frozen=True, slots=True)
class OriginPolicy:
    """The allowed hosts and origins, in lower case.

    ``hosts`` are names beside those of loopback. ``origins`` are such as ``https://chat.example:8443``.
    """

    hosts: frozenset[str] = field(default_factory=frozenset)
    origins: frozenset[str] = field(default_factory=frozenset)

    def check(self, headers: Headers) -> None:
        """Check a request's Host and Origin. Raises ``Forbidden``."""
        host = _host_of(f"//{headers.get('host', '')}")
        if not host:
            raise Forbidden("the request has no valid Host header; send the address that is called, such as localhost")
        if not (is_loopback(host) or host in self.hosts):
            name = host[:64]
            raise Forbidden(
                f"the host name {name} is not allowed; use an address such as localhost, or serve with "
                f"--http-allow-host {name}"
            )
        origin = headers.get("origin")
        if origin is not None and not is_same_origin(origin, headers["host"]) and not self.allows(origin):
            raise Forbidden(
                f"web pages of {origin[:128]} may not use this API; serve with --http-allow-origin to allow an origin"
            )

    def allows(self, origin: str | None) -> bool:
        """Return whether pages of ``origin`` are allowed by --http-allow-origin."""
        return origin is not None and origin.lower() in self.origins

    def with_cors(self, app: ASGIApp) -> ASGIApp:
        """Return ``app`` behind starlette's CORS middleware, which answers preflights; ``app`` itself without origins.

        No response allows cookies or other credentials: callers send their key themselves.
        """
        if not self.origins:
            return app
        return CORSMiddleware(
            app,
            allow_origins=self.origins,
            allow_methods=_METHODS,
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=_SHOWN,
            max_age=round(PREFLIGHT_S),
        )


class CheckedOrigins(OriginPolicy):
    """For requests whose headers were checked where they arrived."""

    def check(self, headers: Headers) -> None:
        """Allow every Host and Origin."""


def is_same_origin(origin: str, host: str) -> bool:
    """Return whether a page of ``origin`` was served under the Host header ``host``."""
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def check_host(given: str) -> str:
    """Return a normalized entry for ``OriginPolicy.hosts``. Raises ``InvalidOption``."""
    host = _host_of(f"//{given}")
    if not host or host != given.lower().strip("[]").rstrip("."):
        raise InvalidOption(
            f"--http-allow-host is {given[:64]}; give a name or an address without a port, such as mac-1.example",
            field="http_allow_host",
        )
    return host


def check_origin(given: str) -> str:
    """Return a normalized entry for ``OriginPolicy.origins``.

    Raises ``InvalidOption``. ``*`` is rejected: any web page could call the API.
    """
    if not _ORIGIN.fullmatch(given.lower()):
        raise InvalidOption(
            f"--http-allow-origin is {given[:64]}; give an origin, such as https://chat.example:8443; wildcards are "
            "not supported, since any web page could then call this API",
            field="http_allow_origin",
        )
    return given.lower()


def _host_of(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower().rstrip(".")
    except ValueError:
        return ""
