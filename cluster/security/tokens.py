"""Join tokens: the text that a person carries from the coordinator's Mac to another, and its record on the coordinator.

A token pins the authority (SHA-256 of its public key), so that a Mac knows to whom it may send the secret. The secret
has 128 bits, is stored only as its SHA-256, serves one key and expires. The text holds only what its holder needs.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from cluster.core.errors import Busy, InvalidOption, InvalidRequest, MemberNotFound, Reason, TokenRefused
from cluster.security.authority import cluster_id_of
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import date_in_words
from cluster.security.limits import MAX_TOKEN_CHARS, MAX_TOKEN_S, MAX_TOKENS, MIN_TOKEN_S, TOKEN_S
from cluster.security.roles import Role
from cluster.security.state_file import StateFile, bytes_of

PREFIX: Final = "mpj1."
JOINERS: Final = (Role.WORKER, Role.CLIENT, Role.ADMIN, Role.COORDINATOR)
"""Roles that a token can grant. The index of a role is its number in the token's text."""
_ALPHABET: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
"""Base58: no character is mistaken for another, and a double click selects the whole word."""
_SECRET, _PIN, _ID, _CHECK = 16, 32, 4, 4
_BYTES: Final = 1 + _SECRET + _PIN + _ID + _CHECK
_DIGITS: Final = 78
"""Base58 digits for ``_BYTES`` bytes."""
_FORGOTTEN_S: Final = 86_400.0


class TokenState(StrEnum):
    """The state of a token."""

    OPEN = "open"
    USED = "used"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class JoinToken:
    """The content of a token. ``fingerprint`` is the authority's; ``id`` (8 hex digits) names the token in lists."""

    id: str
    role: Role
    fingerprint: bytes
    secret: bytes = field(repr=False)

    @property
    def cluster_id(self) -> str:
        return cluster_id_of(self.fingerprint)

    @property
    def text(self) -> str:
        body = bytes([JOINERS.index(self.role)]) + self.secret + self.fingerprint + bytes.fromhex(self.id)
        number = int.from_bytes(body + _checksum(body))
        return PREFIX + "".join(_ALPHABET[number // 58**place % 58] for place in reversed(range(_DIGITS)))

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Read a token's text. Raises ``InvalidOption`` if it is invalid or incomplete; no error contains the text."""
        word = text.strip()
        if not word.startswith(PREFIX) or len(word) > MAX_TOKEN_CHARS:
            raise InvalidOption(f"this is not a join token: a token begins with {PREFIX}", field="token")
        if len(word) != len(PREFIX) + _DIGITS:
            raise InvalidOption("a part of the join token is missing; copy all of it", field="token")
        try:
            body = _number(word.removeprefix(PREFIX)).to_bytes(_BYTES)
            if _checksum(body[:-_CHECK]) != body[-_CHECK:]:
                raise ValueError
            role = JOINERS[body[0]]
        except (ValueError, OverflowError, IndexError):
            raise InvalidOption("a character of the join token is wrong; copy it again", field="token") from None
        pin = 1 + _SECRET
        return cls(body[pin + _PIN : -_CHECK].hex(), role, body[pin : pin + _PIN], body[1:pin])


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """The record of a token: ``digest`` of its secret, and once it was used, by whom and for which public key.

    Times are seconds since the epoch. ``certificate`` (PEM) is the one that was issued for it.
    """

    id: str
    role: Role
    digest: bytes = field(repr=False)
    issued: float
    expires: float
    revoked: float | None = None
    used: float | None = None
    user: str = ""
    key: bytes = b""
    certificate: bytes = field(default=b"", repr=False)

    def state(self, now: float) -> TokenState:
        if self.revoked is not None:
            return TokenState.REVOKED
        if self.used is not None:
            return TokenState.USED
        return TokenState.EXPIRED if now >= self.expires else TokenState.OPEN


class TokenStore:
    """The tokens of ``folder``. Other processes may edit them."""

    def __init__(self, folder: ClusterFolder, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._file = StateFile(folder, folder.tokens, _pack, _unpack)

    def all_tokens(self) -> tuple[IssuedToken, ...]:
        """Return all tokens in order of creation."""
        return self._file.rows()

    def issue(self, fingerprint: bytes, role: Role, ttl_s: float = TOKEN_S) -> JoinToken:
        """Create a token that admits one Mac as ``role``. Only the result has its secret. Raises ``InvalidOption``."""
        if role not in JOINERS:
            raise InvalidOption(
                f"no token admits a {role}; a token is for a worker, a client, an admin or a coordinator", field="role"
            )
        if not MIN_TOKEN_S <= ttl_s <= MAX_TOKEN_S:
            raise InvalidOption(f"a join token cannot last {ttl_s:.0f} s; choose from 1 minute to 7 days", field="ttl")
        made = JoinToken(secrets.token_hex(_ID), role, fingerprint, secrets.token_bytes(_SECRET))
        now = self._clock()
        with self._file.edit() as edit:
            kept = tuple(token for token in edit.rows if token.expires + _FORGOTTEN_S > now)
            if len(kept) >= MAX_TOKENS:
                raise Busy(f"there are {MAX_TOKENS} join tokens already; wait until some are a day old")
            edit.rows = (*kept, IssuedToken(made.id, role, _digest(made.secret), now, now + ttl_s))
        return made

    def revoke(self, id: str) -> IssuedToken:  # noqa: A002
        """Revoke a token, used or not. A Mac that joined with it stays a member. Raises ``MemberNotFound``."""
        with self._file.edit() as edit:
            for at, token in enumerate(edit.rows):
                if token.id == id:
                    ended = replace(token, revoked=token.revoked or self._clock())
                    edit.rows = (*edit.rows[:at], ended, *edit.rows[at + 1 :])
                    return ended
        raise MemberNotFound(f"there is no join token {id[:32]}; `macpipe token list` shows them")

    def accept(self, id: str, secret: bytes, key: bytes) -> IssuedToken:  # noqa: A002
        """Return the token that ``key`` (SHA-256 of a public key) may use or has used. Raises ``TokenRefused``.

        An unknown id and a wrong secret get the same answer in the same time.
        """
        found = next((token for token in self.all_tokens() if token.id == id), None)
        right = hmac.compare_digest(found.digest if found else bytes(32), _digest(secret))
        if found is None or not right:
            raise WrongSecret("the cluster does not know this join token; ask for a new one: `macpipe token create`")
        new = "ask for a new one: `macpipe token create` on the coordinator's Mac"
        state = found.state(self._clock())
        if state is TokenState.REVOKED:
            raise TokenRefused(f"this join token was revoked; {new}")
        if state is TokenState.EXPIRED:
            raise TokenRefused(f"this join token expired {date_in_words(found.expires)}; {new}")
        if state is TokenState.USED and not hmac.compare_digest(found.key, key):
            raise TokenRefused(f"this join token was used by {found.user}; a token admits one Mac: {new}")
        return found

    def export_open(self) -> list[dict[str, Any]]:
        """Return the rows of the tokens that may still be used, as plain values."""
        now = self._clock()
        return [_pack(token) for token in self.all_tokens() if token.state(now) is TokenState.OPEN]

    def import_tokens(self, rows: list[Any], *, locked: bool = False) -> None:
        """Add the tokens of ``export_open``. Raises ``InvalidRequest``."""
        try:
            tokens = [_unpack(**row) for row in rows[:MAX_TOKENS]]
        except (ValueError, TypeError) as e:
            raise InvalidRequest("the join tokens that were sent cannot be read") from e
        with self._file.edit(locked=locked) as edit:
            known = {token.id for token in edit.rows}
            edit.rows = (*edit.rows, *(token for token in tokens if token.id not in known))[-MAX_TOKENS:]

    def spend(self, token: IssuedToken, key: bytes, user: str, certificate: bytes) -> None:
        """Mark ``token`` as used. The caller must have held the folder's lock since it accepted the token."""
        with self._file.edit(locked=True) as edit:
            at = next(at for at, kept in enumerate(edit.rows) if kept.id == token.id)
            used = replace(token, used=self._clock(), user=user, key=key, certificate=certificate)
            edit.rows = (*edit.rows[:at], used, *edit.rows[at + 1 :])


class WrongSecret(TokenRefused):
    """No token has this id and this secret: a guess, or a token that was forgotten."""

    reason = Reason.TOKEN_UNKNOWN


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECK]


def _number(digits: str) -> int:
    number = 0
    for digit in digits:
        number = number * 58 + _ALPHABET.index(digit)
    return number


def _pack(token: IssuedToken) -> dict[str, Any]:
    return {
        "id": token.id,
        "role": token.role.value,
        "digest": token.digest.hex(),
        "issued": token.issued,
        "expires": token.expires,
        "revoked": token.revoked,
        "used": token.used,
        "user": token.user,
        "key": token.key.hex(),
        "certificate": token.certificate.decode("ascii"),
    }


def _unpack(
    id: str,  # noqa: A002
    role: str,
    digest: str | bytes,
    issued: float,
    expires: float,
    revoked: float | None,
    used: float | None,
    user: str,
    key: str | bytes,
    certificate: str | bytes,
) -> IssuedToken:
    secret = bytes_of(digest)
    if len(secret) != 32:
        raise ValueError("a digest has 32 bytes")
    if not all(time is None or type(time) is float for time in (revoked, used)):
        raise ValueError("a time is a number")
    if (type(id), type(user)) != (str, str):
        raise ValueError("a field of a token has another type than it was written with")
    pem = certificate if isinstance(certificate, bytes) else certificate.encode("ascii")
    return IssuedToken(id, Role(role), secret, float(issued), float(expires), revoked, used, user, bytes_of(key), pem)
