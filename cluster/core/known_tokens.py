"""Tokens that the reader of a resumed answer already has: their number, and a digest that tells them from others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from cluster.core.errors import AnswerDiffers

DIGEST_BYTES: Final = 32
"""Length of a digest of tokens."""


class TokenDigest:
    """The SHA-256 of token ids, each as an unsigned little-endian 32-bit integer, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, token: int) -> None:
        """Add the next token."""
        self._hash.update(token.to_bytes(4, "little"))

    def digest(self) -> bytes:
        """Return the digest of the tokens so far."""
        return self._hash.digest()


@dataclass(frozen=True, slots=True)
class KnownTokens:
    """The first tokens of one sample: how many, and their ``TokenDigest``; b"" if they are not compared."""

    count: int
    digest: bytes = b""


KnownAnswer: TypeAlias = Sequence[KnownTokens]
"""The known tokens of each sample, or one entry for all samples."""


class KnownTokensCheck:
    """Compares the tokens of one sample with those that its reader has, and tells which need not be sent."""

    def __init__(self, known: KnownTokens) -> None:
        self._known = known
        self._left = known.count
        self._found = TokenDigest() if known.digest else None

    def is_known(self, token: int) -> bool:
        """Return whether the reader has the next token, which is ``token``. Raise AnswerDiffers if it has others."""
        if not self._left:
            return False
        self._left -= 1
        if self._found:
            self._found.add(token)
            if not self._left and self._found.digest() != self._known.digest:
                raise AnswerDiffers(
                    f"the first {self._known.count} tokens of the answer are not those that the client has; send the "
                    "request again"
                )
        return True

    def close(self) -> None:
        """Raise AnswerDiffers if the answer has ended before the tokens that its reader has."""
        if self._found and self._left:
            raise AnswerDiffers(
                f"the answer has {self._known.count - self._left} tokens, and the client has {self._known.count}; send "
                "the request again"
            )
