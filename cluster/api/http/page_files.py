"""Serves the page: an HTML document, a style sheet and modules of JavaScript, as they are in the package.

They hold no facts of the cluster, so anyone may read them. The page asks for facts on routes that need a key. It loads
nothing from other hosts, and its policy forbids it to.
"""

from __future__ import annotations

import hashlib
import html
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from cluster.api.http.errors import routing_error

FOLDER: Final = Path(__file__).parent / "page"
_INDEX: Final = "index.html"
_ADDRESS: Final = b"http://localhost:8080"
"""Where the document names the address of this API, for browsers without JavaScript."""
_KINDS: Final = MappingProxyType(
    {
        ".css": "text/css; charset=utf-8",
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
    }
)
"""The files that are served, by ending; others, such as licences, are not."""
_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""No inline script or style, no other host, no frame, and no text that a script turns into HTML."""
_HEADERS: Final = MappingProxyType(
    {
        "content-security-policy": _POLICY,
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }
)


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


class PageFiles:
    """The files of the page, read once."""

    def __init__(self, folder: Path = FOLDER) -> None:
        found = (path for path in sorted(folder.iterdir()) if path.suffix in _KINDS)
        self._files = {path.name: _read(path) for path in found}

    async def get(self, request: Request) -> Response:
        """Return a file by its name. Raises a ``MacpipeError`` with the status 404."""
        return self.file(request, request.path_params["name"])

    def index(self, request: Request) -> Response:
        """Return the document, with the address under which it was asked for."""
        called = html.escape(f"{request.url.scheme}://{request.url.netloc}")
        content = self._files[_INDEX].content.replace(_ADDRESS, called.encode())
        return self._respond(request, _make_file(content, _KINDS[".html"]))

    def file(self, request: Request, name: str) -> Response:
        """Return a file, or 304 if the browser has it. Raises a ``MacpipeError`` with the status 404."""
        file = self._files.get(name)
        if file is None:
            raise routing_error(404, f"the page has no file {name[:64]}")
        return self._respond(request, file)

    @staticmethod
    def _respond(request: Request, file: _File) -> Response:
        headers = {**_HEADERS, "etag": file.etag}
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.media_type)


def wants_page(request: Request) -> bool:
    """Return whether the request is a browser's, and not that of a program that probes the address."""
    return "text/html" in request.headers.get("accept", "")


def _read(path: Path) -> _File:
    return _make_file(path.read_bytes(), _KINDS[path.suffix])


def _make_file(content: bytes, media_type: str) -> _File:
    return _File(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
