"""API keys: who may use a cluster's HTTP API, at which scope, and how much of it.

A key's text is ``mpk_ID_SECRET``. It is shown once, and only its SHA-256 is kept. A secret has 256 random bits, so a
plain hash is as good as a slow one: it cannot be guessed. The module holds limits; it does not count requests.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from cluster.core.errors import Busy, DuplicateName, InvalidOption, MemberNotFound
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.limits import MAX_KEYS
from cluster.security.name_check import check_name
from cluster.security.state_file import StateFile, bytes_of

TEXT: Final = re.compile(r"mpk_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
"""The form of a key. Any other text is refused without hashing it."""
_NO_DIGEST: Final = bytes(32)
"""Compared with if no key has the id, so that the answer takes the same time."""


class KeyScope(StrEnum):
    """What a key gives access to. ADMIN includes INFERENCE."""

    INFERENCE = "inference"
    ADMIN = "admin"

    def covers(self, needed: KeyScope) -> bool:
        """Return whether this scope includes ``needed``."""
        return self in (needed, KeyScope.ADMIN)


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Limits of a key; None means unlimited. Tokens are those of prompts and answers together."""

    requests_a_minute: int | None = None
    tokens_a_minute: int | None = None
    at_once: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests_a_minute", "tokens_a_minute", "at_once"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise InvalidOption(f"{name.replace('_', ' ')}: {value} is not a limit; give at least 1", field=name)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret. Times are seconds since the epoch; ``revoked`` is None while the key is valid."""

    id: str
    name: str
    scope: KeyScope
    limits: KeyLimits
    made: float
    digest: bytes = field(repr=False)
    revoked: float | None = None


class KeyStore:
    """The keys in ``folder``. Other processes may edit them; each call sees their changes."""

    def __init__(self, folder: ClusterFolder, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._file = StateFile(folder, folder.keys, _pack, _unpack)

    def all_keys(self) -> tuple[ApiKey, ...]:
        """Return all keys in order of creation, revoked ones included. Raises ``ClusterDamaged``."""
        return self._file.rows()

    def find_by_id(self, key_id: str) -> ApiKey | None:
        """Return the valid key with that id; None if there is none."""
        return next((key for key in self.all_keys() if key.id == key_id and key.revoked is None), None)

    def find(self, text: str) -> ApiKey | None:
        """Return the valid key with this text; None if there is none. A wrong secret takes the same time."""
        parts = TEXT.fullmatch(text)
        if parts is None:
            return None
        key = self.find_by_id(parts[1])
        right = hmac.compare_digest(_digest(text), _NO_DIGEST if key is None else key.digest)
        return key if right else None

    def create(
        self, name: str, scope: KeyScope = KeyScope.INFERENCE, limits: KeyLimits | None = None
    ) -> tuple[ApiKey, str]:
        """Create a key and return it with its text, which is not kept. Raises ``DuplicateName``, ``Busy`` if full."""
        check_name(name, "a key's")
        key_id = secrets.token_hex(6)
        text = f"mpk_{key_id}_{secrets.token_urlsafe(32)}"
        key = ApiKey(key_id, name, scope, limits or KeyLimits(), self._clock(), _digest(text))
        with self._file.edit() as edit:
            good = [known for known in edit.rows if known.revoked is None]
            if any(known.name == name for known in good):
                raise DuplicateName(f"there is a key named {name}; revoke it first, or choose another name")
            if len(good) >= MAX_KEYS:
                raise Busy(f"the cluster has {MAX_KEYS} keys; revoke some (`macpipe key list`)")
            room = MAX_KEYS - 1 - len(good)
            gone = sorted((k for k in edit.rows if k.revoked is not None), key=lambda k: k.revoked or 0.0)
            forgotten = gone[: max(0, len(gone) - room)]
            edit.rows = (*(k for k in edit.rows if k not in forgotten), key)
        return key, text

    def revoke(self, which: str) -> ApiKey:
        """Revoke the valid key with this name or id, and return it. Raises ``MemberNotFound``."""
        with self._file.edit() as edit:
            at = next((i for i, k in enumerate(edit.rows) if k.revoked is None and which in (k.id, k.name)), None)
            if at is None:
                raise MemberNotFound(f"no key of this cluster is named {which[:64]}; `macpipe key list` shows them")
            gone = replace(edit.rows[at], revoked=self._clock())
            edit.rows = (*edit.rows[:at], gone, *edit.rows[at + 1 :])
        return gone


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _pack(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "scope": key.scope.value,
        "limits": [key.limits.requests_a_minute, key.limits.tokens_a_minute, key.limits.at_once],
        "made": key.made,
        "digest": key.digest.hex(),
        "revoked": key.revoked,
    }


def _unpack(
    id: str,  # noqa: A002
    name: str,
    scope: str,
    limits: list[int | None],
    made: float,
    digest: str | bytes,
    revoked: float | None,
) -> ApiKey:
    secret = bytes_of(digest)
    if len(secret) != len(_NO_DIGEST) or secret == _NO_DIGEST:
        raise ValueError("not a hash")
    ended = None if revoked is None else float(revoked)
    return ApiKey(str(id), str(name), KeyScope(scope), KeyLimits(*limits), float(made), secret, ended)
