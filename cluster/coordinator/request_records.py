"""The journal's records: their bytes with length and checksum, and a request as plain data and back.

All of a request is kept but the deadline, which is a clock's.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import astuple, fields
from typing import Any, BinaryIO, Final

import msgpack

from cluster.core.limits import JOURNAL_BYTES
from cluster.core.request import Grammar, GrammarKind, Parsing, Request, SamplingParams, Tool

HEADER: Final = b"macpipe journal 2\n"
"""How a journal begins. The format before this one had no header: msgpack objects one behind the other."""
_PREFIX: Final = struct.Struct(">II")
"""Before each record: the length of its msgpack, and the CRC-32 of that."""
_PLAIN = SamplingParams()


class DamagedJournal(ValueError):
    """A record was cut off, or is not what was written; what follows it cannot be read."""


def pack_record(*values: Any) -> bytes:
    """A record's bytes. Raises ``TypeError`` where a value is more than data."""
    body = bytes(msgpack.packb(values))
    return _PREFIX.pack(len(body), zlib.crc32(body)) + body


def unpack_record(record: bytes) -> list[Any]:
    """The values of one record. Raises ``DamagedJournal``."""
    length, checksum = _PREFIX.unpack_from(record)
    body = record[_PREFIX.size :]
    if len(body) != length or zlib.crc32(body) != checksum:
        raise DamagedJournal("a record's length or checksum does not match")
    return _values(body)


def read_records(file: BinaryIO) -> Iterator[list[Any]]:
    """The records of a journal of this format or the one before it.

    Raises ``DamagedJournal`` after the last good one.
    """
    header = file.read(len(HEADER))
    if header == HEADER:
        while prefix := file.read(_PREFIX.size):
            if len(prefix) < _PREFIX.size or _PREFIX.unpack(prefix)[0] > 2 * JOURNAL_BYTES:
                raise DamagedJournal("a record's length is damaged")
            yield unpack_record(prefix + file.read(_PREFIX.unpack(prefix)[0]))
    elif header:
        file.seek(0)
        try:
            yield from msgpack.Unpacker(file, max_buffer_size=2 * JOURNAL_BYTES)
        except (ValueError, msgpack.UnpackException) as e:
            raise DamagedJournal(f"its records cannot be read: {type(e).__name__}") from e


def _values(body: bytes) -> list[Any]:
    try:
        values = msgpack.unpackb(body, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as e:
        raise DamagedJournal("a record is no msgpack") from e
    if not isinstance(values, list):
        raise DamagedJournal("a record is no list")
    return values


def as_data(r: Request) -> tuple[Any, ...]:
    """Tuples, numbers and strings alone, as far as the request itself holds no more than that."""
    parsing = astuple(r.parsing) if r.parsing else None
    asked = (r.id, r.prompt, astuple(r.sampling), r.max_tokens, r.stop, r.ignore_eos, r.client, r.priority)
    return (*asked, r.samples, parsing)


def from_data(data: Any) -> Request:
    """The request that ``as_data`` was given, as msgpack gives it back. Raises ``TypeError`` or ``ValueError``."""
    request_id, prompt, sampling, max_tokens, stop, ignore_eos, client, priority, samples, parsing = data
    request = Request(
        id=request_id,
        prompt=tuple(prompt),
        sampling=_read_sampling(sampling),
        max_tokens=max_tokens,
        stop=tuple(stop),
        ignore_eos=ignore_eos,
        client=client,
        priority=priority,
        samples=samples,
        parsing=_read_parsing(*parsing) if parsing else None,
    )
    if not _sound(request):
        raise TypeError("a field of a request has another type than it was written with")
    return request


def token_ids(tokens: Iterable[Any]) -> list[int]:
    """Token ids. Raises ``TypeError`` for what is none."""
    ids = list(tokens)
    if not all(type(token) is int and 0 <= token < 2**32 for token in ids):
        raise TypeError("a token id is none")
    return ids


def _sound(r: Request) -> bool:
    """Whether each field has its type; grammars and parsing were checked as they were made."""
    token_ids(r.prompt)
    texts, counts, p = (r.id, r.client, *r.stop), (r.max_tokens, r.priority, r.samples), r.sampling
    return (
        all(type(text) is str for text in texts)
        and all(type(count) is int for count in counts)
        and type(r.ignore_eos) is bool
        and all(_alike(getattr(p, f.name), getattr(_PLAIN, f.name)) for f in fields(p) if f.name != "grammar")
        and all(len(pair) == 2 and type(pair[0]) is int and type(pair[1]) in (int, float) for pair in p.logit_bias)
    )


def _alike(value: object, plain: object) -> bool:
    return type(value) is type(plain) or (type(value) is int and type(plain) is float)


def _read_sampling(data: list[Any]) -> SamplingParams:
    *values, grammar = data
    plain: Any = [tuple(map(tuple, v)) if isinstance(v, list) else v for v in values]
    plain.append(_grammar(*grammar) if grammar else None)
    return SamplingParams(*plain)


def _grammar(kind: str, source: str, free_until: list[int]) -> Grammar:
    if type(source) is not str:
        raise TypeError("a grammar is no text")
    return Grammar(GrammarKind(kind), source, tuple(token_ids(free_until)))


def _read_parsing(tools: list[list[str]], thinking: bool) -> Parsing:
    if type(thinking) is not bool or not all(type(text) is str for tool in tools for text in tool):
        raise TypeError("what a chat may call has another type than it was written with")
    return Parsing(tuple(Tool(*tool) for tool in tools), thinking)
