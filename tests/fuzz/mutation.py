"""Mutate an input: byte by byte, or by its parts, with lengths and checksums corrected.

Without correct checksums, no mutated input would reach the decoder behind them. Pure, except for the given
randomness.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

import msgpack

Mutate = Callable[[bytes, Random, Sequence[bytes]], bytes]
"""A spoiled copy of an input; the other seeds may lend pieces of theirs."""

LONGEST: Final = 64 * 1024
"""Inputs do not grow beyond this: bounds are set lower for them, or told by a length that lies."""
NUMBERS: Final = (
    *(0, 1, -1, 2, 7, 255, 256, 4095, 4096, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63),
    *(2**64 - 1, -(2**31), -(2**63), 10**6, 10**9),
)
FLOATS: Final = (0.0, -0.0, 0.5, -1.5, 1e308, -1e308, 5e-324, float("inf"), float("-inf"), float("nan"))
TEXTS: Final = (
    *(
        "",
        "\0",
        " ",
        "a",
        "é",
        "😀",
        "\x1b[2J",
        "\u202e",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "a/b",
        "~",
        "%s%n",
        "{}",
    ),
    *(
        "-1",
        "1e999",
        "0" * 40,
        "9" * 5000,
        "\u00b2",
        "\u0661",
        "x" * 300,
        "null",
        "true",
        "__class__",
        "[::1]:7000",
        "http://[",
    ),
)
PIECES: Final = (*(t.encode() for t in TEXTS), b"\xff", bytes(8), b"\xff" * 8, b"\x80", b"\xc0\x80", b"\n", b"\r\n")


def spoil_bytes(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    """One to eight edits anywhere: flipped bits, cuts, copies, lies about lengths, pieces of other seeds."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(made) + 1)
        end = min(len(made), at + rng.choice((1, 2, 4, 8, 64)))
        match rng.randrange(7):
            case 0 if made:
                made[at % len(made)] ^= 1 << rng.randrange(8)
            case 1:
                del made[at:end]
            case 2:
                made[at:at] = made[at:end] * rng.choice((1, 2, 50))
            case 3:
                made[at:end] = rng.choice(PIECES)
            case 4:
                size = rng.choice((1, 2, 4, 8))
                made[at : at + size] = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(
                    size, rng.choice(("big", "little"))
                )
            case 5 if others:
                other = rng.choice(others)
                begin = rng.randrange(len(other) + 1)
                made[at:end] = other[begin : begin + rng.choice((4, 64, 1024))]
            case _:
                made[at:at] = rng.randbytes(rng.choice((1, 4, 16)))
    return bytes(made[:LONGEST])


def spoil_tree(tree: Any, rng: Random, others: Sequence[Any] = ()) -> Any:
    """Make one to four edits of a tree of lists, dicts and plain values, in place where possible."""
    places = list(_places(tree))
    if not places:
        return _value(rng, others)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holder, key = rng.choice(places)
        if key not in holder if isinstance(holder, dict) else key >= len(holder):
            continue  # an edit before this one took it away
        match rng.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, list):
                holder[key:key] = [holder[key]] * rng.choice((1, 2, 20))
            case 2:
                holder[key] = _nested(holder[key], rng)
            case 3 if isinstance(holder, dict):
                holder[rng.choice(TEXTS)] = holder[key]
            case 4:
                lent, name = rng.choice(places)
                holder[key] = (
                    _copied(lent[name]) if name in lent or (isinstance(lent, list) and name < len(lent)) else None
                )
            case _:
                holder[key] = _value(rng, others)
    return tree


def _places(tree: Any) -> Any:
    """Every place of the tree that holds something: its list or dict, and index or key."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys = range(len(node)) if isinstance(node, list) else list(node) if isinstance(node, dict) else ()
        for key in keys:
            yield node, key
            waiting.append(node[key])


def _value(rng: Random, others: Sequence[Any]) -> Any:
    match rng.randrange(8):
        case 0 | 1:
            return rng.choice(TEXTS)
        case 2 | 3:
            return rng.choice(NUMBERS)
        case 4:
            return rng.choice(FLOATS)
        case 5:
            return [rng.choice(NUMBERS)] * rng.choice((1, 3, 300))
        case 6 if others:
            return _copied(rng.choice(others))
        case _:
            return rng.choice((None, True, False, b"", b"\xff\0", [], {}))


def _nested(value: Any, rng: Random) -> Any:
    for _ in range(rng.choice((1, 1, 2, 2, 60, 600))):
        value = [value]
    return value


def _copied(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_copied(one) for one in tree][:300]
    if isinstance(tree, dict):
        return {key: _copied(one) for key, one in tree.items()}
    return tree


def _as_it_is(data: bytes) -> bytes:
    return data


def by_tree(
    load: Callable[[bytes], Any], dump: Callable[[Any], bytes], seal: Callable[[bytes], bytes] = _as_it_is
) -> Mutate:
    """Spoil what the bytes stand for; where they stand for nothing, and else half of the time, the bytes themselves."""

    def spoil(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
        if rng.random() < 0.5:
            return seal(spoil_bytes(data, rng, others))
        try:
            return dump(spoil_tree(load(data), rng))[:LONGEST]
        except (
            ValueError,
            TypeError,
            IndexError,
            OverflowError,
            RecursionError,
            struct.error,
            msgpack.UnpackException,
        ):
            return spoil_bytes(data, rng, others)

    return spoil


def _json_dump(tree: Any) -> bytes:
    return json.dumps(tree, default=lambda value: value.decode("latin-1"), skipkeys=True).encode(
        "utf-8", "surrogatepass"
    )


def _msgpack_load(data: bytes) -> Any:
    return msgpack.unpackb(data, strict_map_key=False)


def _msgpack_dump(tree: Any) -> bytes:
    return bytes(msgpack.packb(tree))


spoil_json = by_tree(json.loads, _json_dump)
spoil_msgpack = by_tree(_msgpack_load, _msgpack_dump)


def _records_load(data: bytes) -> list[Any]:
    unpacker = msgpack.Unpacker(strict_map_key=False)
    unpacker.feed(data)
    return list(unpacker)


spoil_records = by_tree(_records_load, lambda tree: b"".join(map(_msgpack_dump, tree)))
"""Msgpack items, one behind the other."""
spoil_lines = by_tree(
    lambda data: [json.loads(line) for line in data.splitlines()],
    lambda tree: b"\n".join(map(_json_dump, tree)) + b"\n",
)
"""JSON, a line each."""


def sealed_frame(header: bytes, body: bytes) -> bytes:
    """A frame's header and tensors with a length and a checksum that are right."""
    return struct.pack("<II", len(header), zlib.crc32(body, zlib.crc32(header))) + header + body


def _frame_load(data: bytes) -> Any:
    length = int.from_bytes(data[:4], "little")
    if not length or 8 + length > len(data):
        raise ValueError("a body, or no frame at all")
    return [_msgpack_load(data[8 : 8 + length]), data[8 + length :]]


def _frame_dump(tree: Any) -> bytes:
    return sealed_frame(_msgpack_dump(tree[0]), tree[1] if isinstance(tree[1], bytes) else b"")


def _resealed(data: bytes) -> bytes:
    """The checksum put right, mostly; the length stays what it was made."""
    return data[:4] + struct.pack("<I", zlib.crc32(data[8:])) + data[8:] if len(data) % 4 else data


spoil_frame = by_tree(_frame_load, _frame_dump, _resealed)


def spoil_parts(spoil: Mutate) -> Mutate:
    """Mutate, drop, repeat or reorder some messages of an input of several messages (see ``joined``)."""

    def spoiled(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
        parts = apart(data)
        lent = [part for other in others for part in apart(other)]
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(parts) + 1)
            match rng.randrange(5):
                case 0:
                    del parts[at : at + 1]
                case 1:
                    parts[at:at] = parts[at : at + 1] * rng.choice((1, 1, 70))
                case 2:
                    rng.shuffle(parts)
                case _:
                    parts[at : at + 1] = [spoil(part, rng, lent) for part in parts[at : at + 1] or lent[:1]]
        return joined(parts)[:LONGEST]

    return spoiled


def joined(parts: Sequence[bytes]) -> bytes:
    """Return several messages as one input, each after its length."""
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def apart(data: bytes) -> list[bytes]:
    """The messages of an input; a length that lies takes what is there."""
    parts, at = [], 0
    while at + 4 <= len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        parts.append(data[at + 4 : end])
        at = end
    return parts


Field = tuple[int, int, Any]


def spoil_proto(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    """Mutate a protobuf message by field: another value or type, repeated, dropped, or nested."""
    fields = _fields(data)
    if not fields or rng.random() < 0.15:
        return spoil_bytes(data, rng, others)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(fields))
        number, kind, value = fields[at]
        match rng.randrange(6):
            case 0 if len(fields) > 1:
                del fields[at]
            case 1:
                fields[at:at] = [fields[at]] * rng.choice((1, 2, 40))
            case 2:
                fields[at] = (number, 0, rng.choice(NUMBERS) % 2**64)
            case 3:
                fields[at] = (number, 2, rng.choice(PIECES))
            case 4:
                fields[at] = (rng.choice((number, number + 1, rng.randrange(1, 30))), kind, value)
            case _ if kind == 2:
                fields[at] = (number, kind, spoil_proto(value, rng, others) if value else rng.choice(PIECES))
            case _:
                fields[at] = (
                    number,
                    kind,
                    rng.randrange(2**64) if kind == 0 else rng.randbytes({1: 8, 5: 4}.get(kind, 3)),
                )
    return _written(fields)[:LONGEST]


def _fields(data: bytes) -> list[Field]:
    """Return a message's fields; an empty list if it is invalid."""
    found: list[Field] = []
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            found.append((number, kind, value))
            continue
        size = {1: 8, 5: 4}.get(kind, -1)
        if kind == 2:
            size, at = _varint(data, at)
        if size < 0 or not number or at + size > len(data):
            return []
        found.append((number, kind, data[at : at + size]))
        at += size
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            break
    return value % 2**64, at


def _written(fields: Sequence[Field]) -> bytes:
    made = bytearray()
    for number, kind, value in fields:
        made += _as_varint(number << 3 | kind)
        if kind == 0:
            made += _as_varint(value)
        else:
            made += (_as_varint(len(value)) if kind == 2 else b"") + value
    return bytes(made)


def _as_varint(value: int) -> bytes:
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes((*made, value))
