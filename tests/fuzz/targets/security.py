"""Fuzz targets of membership: join tokens, certificates and their requests, API keys, and a cluster's files."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from cluster.core.errors import MacpipeError
from cluster.security.authority import Authority, read_authority, read_request_key
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import make_request
from cluster.security.members import Members
from cluster.security.roles import Role, read_party
from cluster.security.tokens import JoinToken, TokenStore
from fuzz.mutation import spoil_bytes, spoil_msgpack
from fuzz.targets.kept import scratch
from fuzz.targets.target import Prepared, Target

ID = "ab" * 8


def _folder() -> ClusterFolder:
    return ClusterFolder(scratch("home"), "fuzz")


def join_tokens() -> Prepared:
    folder = _folder()
    issued = TokenStore(folder).issue(bytes(range(32)), Role.WORKER)

    def run(data: bytes) -> None:
        token = JoinToken.parse(data.decode("utf-8", "replace"))
        assert JoinToken.parse(token.text) == token

    return Prepared(run, (issued.text.encode(),))


def certificates() -> Prepared:
    """Read certificates of parties and of authorities, and requests for them, as they arrive over the network."""
    authority = Authority.make(_folder(), time.time())
    _, request = make_request()
    signed = authority.sign(request, Role.WORKER, ID, "mac-1", time.time())

    def run(data: bytes) -> None:
        for read in (read_party, read_request_key):
            try:
                read(data)
            except MacpipeError:
                continue
        read_authority(data)

    return Prepared(run, (authority.certificate, signed, request), allowed=(MacpipeError, ValueError))


def _state(path: Path, rows: Callable[[], object]) -> Prepared:
    seed = path.read_bytes()

    def run(data: bytes) -> None:
        path.write_bytes(data)
        rows()

    return Prepared(run, (seed,), spoil_msgpack)


def members() -> Prepared:
    folder = _folder()
    authority = Authority.make(folder, time.time())
    _, request = make_request()
    kept = Members(folder)
    kept.admit(read_party(authority.sign(request, Role.WORKER, ID, "mac-1", time.time())), time.time() + 1e6)

    def rows() -> None:
        fresh = Members(folder)
        fresh.revoked()
        fresh.current()

    return _state(folder.members, rows)


def tokens() -> Prepared:
    folder = _folder()
    issued = TokenStore(folder).issue(bytes(range(32)), Role.WORKER)

    def rows() -> None:
        fresh = TokenStore(folder)
        for token in fresh.all_tokens():
            token.state(time.time())
        fresh.accept(issued.id, issued.secret, bytes(32))

    return _state(folder.tokens, rows)


def api_keys() -> Prepared:
    from cluster.security.keys import KeyStore

    folder = _folder()
    _, text = KeyStore(folder).create("mine")

    def rows() -> None:
        KeyStore(folder).find(text)

    return _state(folder.keys, rows)


def key_texts() -> Prepared:
    from cluster.security.keys import KeyStore

    kept = KeyStore(_folder())
    _, text = kept.create("mine")

    def run(data: bytes) -> None:
        given = data.decode("latin-1")
        assert (kept.find(given) is not None) == (given == text)

    return Prepared(run, (text.encode(),), spoil_bytes)


TARGETS = (
    Target("join-token", 150, join_tokens),
    Target("certificate", 40, certificates),
    Target("members", 40, members),
    Target("tokens", 40, tokens),
    *((Target("keys", 40, api_keys), Target("key", 60, key_texts)) if find_spec("cluster.security.keys") else ()),
)
