"""One file of a prefix on disk: a checksum, a header, and the raw bytes of arrays or tokens.

It knows bytes alone. Nothing in a file is believed before its checksum is right and it says that it is the file that
was asked for: a damaged file, or one from another place, is a miss.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgpack

from cluster.core.errors import PrefixMissing
from cluster.core.prefix_limits import MAX_PIECE_BYTES, MAX_PIECE_HEADER_BYTES
from cluster.platform.private_files import create_private_file, open_regular_file, write_all

_MAGIC: Final = b"mpprefx1"
_HASHED_FROM: Final = len(_MAGIC) + hashlib.sha256().digest_size
_LENGTH_BYTES: Final = 4
TEMPORARY: Final = ".new-"
"""What the name of a file begins with until it is complete."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The content of a file: ``header`` has plain values, ``data`` the bytes."""

    header: dict[str, Any]
    data: memoryview


def pack_piece(path: Path, header: dict[str, Any], parts: Iterable[bytes | memoryview]) -> list[bytes | memoryview]:
    """Return the content of the file ``path``, in parts: what ``write_piece`` takes."""
    packed = bytes(msgpack.packb({**header, "name": _name_of(path)}))
    body = [len(packed).to_bytes(_LENGTH_BYTES, "little"), packed, *parts]
    hashed = hashlib.sha256()
    for part in body:
        hashed.update(part)
    return [_MAGIC, hashed.digest(), *body]


def write_piece(path: Path, content: Iterable[bytes | memoryview]) -> None:
    """Write a file as a whole, or leave nothing. Raises OSError."""
    fresh = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    file = create_private_file(fresh)
    try:
        for part in content:
            write_all(file, part)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)


def read_piece(path: Path) -> Piece:
    """Read and check a file. Raises PrefixMissing if it is missing, damaged, or the copy of another file."""
    try:
        with open_regular_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if not _HASHED_FROM + _LENGTH_BYTES <= size <= MAX_PIECE_BYTES + MAX_PIECE_HEADER_BYTES:
                raise PrefixMissing(f"{path.name} has an impossible size of {size} bytes")
            content = memoryview(file.read(size + 1))
    except OSError as e:
        raise PrefixMissing(f"{path.name} cannot be read: {e.strerror}") from e
    if bytes(content[: len(_MAGIC)]) != _MAGIC or len(content) != size:
        raise PrefixMissing(f"{path.name} is not a prefix's file")
    if hashlib.sha256(content[_HASHED_FROM:]).digest() != content[len(_MAGIC) : _HASHED_FROM]:
        raise PrefixMissing(f"{path.name} is damaged")
    return _unpack(path, content[_HASHED_FROM:])


def _unpack(path: Path, body: memoryview) -> Piece:
    length = int.from_bytes(body[:_LENGTH_BYTES], "little")
    end = _LENGTH_BYTES + length
    try:
        if length > MAX_PIECE_HEADER_BYTES or end > len(body):
            raise ValueError("too long")
        header = msgpack.unpackb(body[_LENGTH_BYTES:end])
    except (ValueError, msgpack.UnpackException, RecursionError) as e:
        raise PrefixMissing(f"{path.name} has an invalid header") from e
    if not isinstance(header, dict) or header.get("name") != _name_of(path):
        raise PrefixMissing(f"{path.name} is the copy of another file")
    return Piece(header, body[end:])


def _name_of(path: Path) -> list[str]:
    """Return the part of a path that says what its file is: owner, model, beginning and cache."""
    return list(path.parts[-4:])
