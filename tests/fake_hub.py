"""A fake hub on this machine over real HTTP, as huggingface_hub expects it, with faults of a bad network.

It serves folders as models, under one commit each, and counts every byte of a body that it sends. It serves weights
through a redirect, as the real one does. Its faults may be changed while it runs.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>[^?]+)")
INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/?]+)(/revision/(?P<revision>[^?]+))?")


@dataclass
class FakeHub:
    """``folders`` maps ``owner/name`` to a folder. Sizes are bytes, times seconds."""

    folders: dict[str, Path]
    commit: str = "c0ffee" + "0" * 34
    token: str = ""
    """Where set, only its bearer may have anything; the others are told that the model is gated."""
    expired: str = ""
    """Where set, whoever shows this token is told that it is none."""
    pace_s: float = 0.0
    """Wait before each piece of 4 KiB of what is longer than a header."""
    cut_after: int = 0
    """Break each connection after that many bytes of a weight file; 0: never."""
    spoiled: dict[str, int] = field(default_factory=dict)
    """File -> how many answers about it still get a wrong byte at their end."""
    down: bool = False
    """Answer 503 to everything."""
    address: str = ""
    served: dict[str, int] = field(default_factory=dict)
    """Bytes of bodies sent, by file."""
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    """Every range that was asked for, of every file: [start, end)."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weight files that were sent."""
        return sum(count for file, count in self.served.items() if file.endswith(".safetensors"))

    def asked_twice(self) -> int:
        """Bytes of weight files, headers left out, that were asked for more than once."""
        seen: dict[str, set[int]] = {}
        twice = 0
        for file, start, end in self.ranges:
            if file.endswith(".safetensors") and start > 8:
                asked = set(range(start, end))
                twice += len(asked & seen.setdefault(file, set()))
                seen[file] |= asked
        return twice

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        hub = self

        class Handler(Answer):
            pass

        Handler.hub = hub
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        self.address = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join(5)


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path)
        try:
            self._answer(path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self, path: str) -> None:
        if self.hub.down:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE)
        elif path.startswith("/cdn/"):
            self._file(Path(path.removeprefix("/cdn")))
        elif match := INFO.fullmatch(path.partition("?")[0]):
            self._info(match["repo"], match["revision"] or "main")
        elif match := FILE.fullmatch(path.partition("?")[0]):
            self._resolve(match["repo"], match["revision"], match["file"])
        else:
            self._say(HTTPStatus.NOT_FOUND)

    def _refused(self, repo: str, revision: str) -> bool:
        """Answer as the real hub does to unauthorized requests, or to those for a missing file."""
        if repo not in self.hub.folders:
            self._say(HTTPStatus.UNAUTHORIZED, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", self.hub.commit):
            self._say(HTTPStatus.NOT_FOUND, {"X-Error-Code": "RevisionNotFound"})
        elif self.hub.expired and self.headers.get("Authorization") == f"Bearer {self.hub.expired}":
            self._say(HTTPStatus.UNAUTHORIZED, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            status = HTTPStatus.FORBIDDEN if self.headers.get("Authorization") else HTTPStatus.UNAUTHORIZED
            self._say(status, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."})
        else:
            return False
        return True

    def _info(self, repo: str, revision: str) -> None:
        if self._refused(repo, revision):
            return
        folder = self.hub.folders[repo]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        siblings = [described(path, path.relative_to(folder).as_posix()) for path in files]
        facts = {
            "id": repo,
            "modelId": repo,
            "sha": self.hub.commit,
            "siblings": siblings,
            "tags": [],
            "private": False,
        }
        self._say(HTTPStatus.OK, {"Content-Type": "application/json"}, json.dumps(facts).encode())

    def _resolve(self, repo: str, revision: str, file: str) -> None:
        if self._refused(repo, revision):
            return
        path = self.hub.folders[repo] / file
        if not path.is_file():
            self._say(HTTPStatus.NOT_FOUND, {"X-Error-Code": "EntryNotFound"})
        elif path.suffix == ".safetensors":
            self._say(HTTPStatus.FOUND, {"Location": f"{self.hub.address}/cdn{path}", "X-Repo-Commit": self.hub.commit})
        else:
            self._file(path)

    def _file(self, path: Path) -> None:
        size, asked = path.stat().st_size, self.headers.get("Range")
        start, end = 0, size
        headers = {"Accept-Ranges": "bytes", "ETag": '"x"', "X-Repo-Commit": self.hub.commit}
        if asked and (match := re.fullmatch(r"bytes=(\d+)-(\d+)", asked)):
            start, end = int(match[1]), min(size, int(match[2]) + 1)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        with path.open("rb") as opened:
            opened.seek(start)
            body = bytearray(opened.read(end - start))
        with self.hub.lock:
            self.hub.ranges.append((path.name, start, end))
            if start > 8 and self.hub.spoiled.get(path.name, 0) > 0:
                self.hub.spoiled[path.name] -= 1
                body[-1] ^= 1
        self._say(HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK, headers, bytes(body), path.name)

    def _say(
        self, status: HTTPStatus, headers: dict[str, str] | None = None, body: bytes = b"", name: str = ""
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self._send(body, name)

    def _send(self, body: bytes, name: str) -> None:
        cut = self.hub.cut_after if name.endswith(".safetensors") else 0
        for at in range(0, len(body), 4096):
            if cut and at >= cut:
                self.close_connection = True
                self.connection.close()
                return
            if self.hub.pace_s and len(body) > 4096:
                time.sleep(self.hub.pace_s)
            piece = body[at : at + 4096]
            self.wfile.write(piece)
            with self.hub.lock:
                if not name:
                    continue
                self.hub.served[name] = self.hub.served.get(name, 0) + len(piece)


def described(path: Path, name: str) -> dict[str, Any]:
    """Return a file's entry as in the hub's API."""
    content = path.read_bytes()
    facts = {"rfilename": name, "size": len(content)}
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    if path.suffix == ".safetensors":
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return {**facts, "blobId": "0" * 40, "lfs": lfs}
    return {**facts, "blobId": blob}
