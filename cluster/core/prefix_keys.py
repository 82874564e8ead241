"""Names for prefixes on disk: the edition of a model, the owner of a prefix, and the first tokens of a sequence.

Coordinator and workers compute the same names. A name tells nothing about tokens or owners.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Final

PREFIX_FORMAT: Final = 1
"""Version of the files and of these names; files of another one are never read."""
NODE_ID_BYTES: Final = 16
_HASH_CHARS: Final = 32
_LENGTH_BYTES: Final = 4
_MEMBER: Final = re.compile(r"(coordinator|worker|admin|client)\.[0-9a-f]{16}")


class OwnerKind(StrEnum):
    """How an owner proved who it is: by an API key, by a certificate of the cluster, or not at all."""

    KEY = "key"
    MEMBER = "member"
    OPEN = "open"


def edition_key(fingerprint: str, digests: Mapping[str, str], kv_bits: int, weight_bits: int = 0) -> str:
    """Return the name of a model's edition, by the digests of its stored tensors and the bits to which it is loaded."""
    hashed = hashlib.sha256(f"{PREFIX_FORMAT}\0{fingerprint}\0{kv_bits}\0".encode())
    if weight_bits:
        hashed.update(f"weights {weight_bits}\0".encode())
    for name, digest in sorted(digests.items()):
        hashed.update(f"{name}\0{digest}\0".encode())
    return hashed.hexdigest()[:_HASH_CHARS]


def owner_key(client: str) -> str:
    """Return the name of the owner that the scheduler knows as ``client``: its kind and a hash."""
    if client.startswith("key:"):
        kind = OwnerKind.KEY
    else:
        kind = OwnerKind.MEMBER if _MEMBER.fullmatch(client) else OwnerKind.OPEN
    return f"{kind}-{hashlib.sha256(client.encode()).hexdigest()[:_HASH_CHARS]}"


def node_ids(
    edition: str, owner: str, adapter: str, tokens: Sequence[int], lengths: Iterable[int]
) -> list[tuple[int, bytes]]:
    """Return the name of the first ``length`` tokens for each of ``lengths``, in ascending order of length.

    ``edition`` and ``owner`` are the names of both, ``adapter`` that of the adapter, "" for none.
    """
    hashed = hashlib.sha256(f"{edition}\0{owner}\0{adapter}\0".encode())
    found, at = [], 0
    for length in sorted(set(lengths)):
        hashed.update(pack_tokens(tokens[at:length]))
        at = length
        found.append((length, hashed.digest()[:NODE_ID_BYTES]))
    return found


def node_ends(tokens: int, marks: Iterable[int], every: int) -> list[int]:
    """Return where the pieces of a prefix of ``tokens`` tokens end on disk: every so many tokens, and at its marks.

    Marks in the first half of the first piece save too little.
    """
    marked = {at for at in marks if every // 2 <= at <= tokens}
    return sorted({*range(every, tokens + 1, every), *marked})


def pack_beginnings(beginnings: Iterable[tuple[int, bytes]]) -> bytes:
    """Return lengths and names of beginnings as bytes: each name, then its length as 32 bits."""
    return b"".join(name + length.to_bytes(_LENGTH_BYTES, "little") for length, name in beginnings)


def unpack_beginnings(data: bytes) -> list[tuple[int, bytes]]:
    """Return what ``pack_beginnings`` packed. Raises ValueError if the size is wrong."""
    size = NODE_ID_BYTES + _LENGTH_BYTES
    if len(data) % size:
        raise ValueError(f"{len(data)} bytes are not a number of beginnings")
    rows = (data[at : at + size] for at in range(0, len(data), size))
    return [(int.from_bytes(row[NODE_ID_BYTES:], "little"), row[:NODE_ID_BYTES]) for row in rows]


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Return token ids as 32-bit integers, in the byte order of all supported machines (little-endian)."""
    return array("i", tokens).tobytes()


def unpack_tokens(data: bytes | memoryview) -> tuple[int, ...]:
    """Return the token ids that ``pack_tokens`` packed. Raises ValueError if the size is not a multiple of four."""
    unpacked = array("i")
    unpacked.frombytes(bytes(data))
    return tuple(unpacked)
