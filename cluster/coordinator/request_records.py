"""Encode and decode the journal's records: bytes with length and checksum, and requests as plain data.

Every field of a request is kept except three: the deadline, since it is a time of the monotonic clock, which a restart
invalidates; the split points and the prediction, since they only save work.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import astuple, fields
from typing import Any, BinaryIO, Final

import msgpack

from cluster.core.journal_limits import JOURNAL_BYTES
from cluster.core.request import Grammar, GrammarKind, Parsing, Request, SamplingParams, Tool

HEADER: Final = b"macpipe journal 2\n"
"""The first bytes of a journal. The previous format had no header: it was a sequence of msgpack objects."""
_PREFIX: Final = struct.Struct(">II")
"""Precedes each record: the length of its msgpack body in bytes, and the CRC-32 of the body."""
_DEFAULTS = SamplingParams()
_NEWER: Final[tuple[Any, ...]] = (None, True, "", False)
"""The values of ``prompt_logprobs``, ``speculate``, ``adapter`` and ``resumable`` in records that have none."""


class DamagedJournal(ValueError):
    """A record is cut off or corrupt. The records after it cannot be read."""


def pack_record(*values: Any) -> bytes:
    """Return a record's bytes. Raises ``TypeError`` if a value is not plain data."""
    body = bytes(msgpack.packb(values))
    return _PREFIX.pack(len(body), zlib.crc32(body)) + body


def unpack_record(record: bytes) -> list[Any]:
    """Return the values of one record. Raises ``DamagedJournal``."""
    length, checksum = _PREFIX.unpack_from(record)
    body = record[_PREFIX.size :]
    if len(body) != length or zlib.crc32(body) != checksum:
        raise DamagedJournal("a record's length or checksum does not match")
    return _values(body)


def read_records(file: BinaryIO) -> Iterator[list[Any]]:
    """Yield the records of a journal in this format or the previous one.

    Raises ``DamagedJournal`` at the first damaged record.
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
            raise DamagedJournal(f"the records cannot be read: {type(e).__name__}") from e


def _values(body: bytes) -> list[Any]:
    try:
        values = msgpack.unpackb(body, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as e:
        raise DamagedJournal("a record is not msgpack") from e
    if not isinstance(values, list):
        raise DamagedJournal("a record is not a list")
    return values


def as_data(r: Request) -> tuple[Any, ...]:
    """Return the request as tuples, numbers and strings, provided that its fields hold nothing else."""
    parsing = astuple(r.parsing) if r.parsing else None
    return (
        r.id,
        r.prompt,
        astuple(r.sampling),
        r.max_tokens,
        r.stop,
        r.ignore_eos,
        r.client,
        r.priority,
        r.samples,
        parsing,
        r.prompt_logprobs,
        r.speculate,
        r.adapter,
        r.resumable,
    )


def from_data(data: Any) -> Request:
    """Return the request from the output of ``as_data`` after a round trip through msgpack.

    An older record lacks up to four of the last fields. Raises ``TypeError`` or ``ValueError``.
    """
    request_id, prompt, sampling, max_tokens, stop, ignore_eos, client, priority, samples, parsing, *newer = data
    prompt_logprobs, speculate, adapter, resumable = tuple(newer) + _NEWER[len(newer) :]
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
        prompt_logprobs=prompt_logprobs,
        speculate=speculate,
        adapter=adapter,
        resumable=resumable,
    )
    if not _has_valid_types(request):
        raise TypeError("a field of the request has the wrong type")
    return request


def token_ids(tokens: Iterable[Any]) -> list[int]:
    """Return the token ids as a list. Raises ``TypeError`` unless each is an int from 0 to 2**32 - 1."""
    ids = list(tokens)
    if not all(type(token) is int and 0 <= token < 2**32 for token in ids):
        raise TypeError("invalid token id")
    return ids


def _has_valid_types(r: Request) -> bool:
    """Return whether each field has the right type. Grammar and parsing were already checked when they were built."""
    token_ids(r.prompt)
    texts = (r.id, r.client, r.adapter, *r.stop)
    counts = (r.max_tokens, r.priority, r.samples)
    p = r.sampling
    return (
        all(type(text) is str for text in texts)
        and all(type(count) is int for count in counts)
        and type(r.ignore_eos) is bool
        and type(r.speculate) is bool
        and type(r.resumable) is bool
        and (r.prompt_logprobs is None or type(r.prompt_logprobs) is int)
        and all(_has_type_of(getattr(p, f.name), getattr(_DEFAULTS, f.name)) for f in fields(p) if f.name != "grammar")
        and all(len(pair) == 2 and type(pair[0]) is int and type(pair[1]) in (int, float) for pair in p.logit_bias)
    )


def _has_type_of(value: object, default: object) -> bool:
    return type(value) is type(default) or (type(value) is int and type(default) is float)


def _read_sampling(data: list[Any]) -> SamplingParams:
    *values, grammar = data
    plain: Any = [tuple(map(tuple, v)) if isinstance(v, list) else v for v in values]
    plain.append(_read_grammar(*grammar) if grammar else None)
    return SamplingParams(*plain)


def _read_grammar(kind: str, source: str, free_until: list[int]) -> Grammar:
    if type(source) is not str:
        raise TypeError("the source of a grammar is not a string")
    return Grammar(GrammarKind(kind), source, tuple(token_ids(free_until)))


def _read_parsing(tools: list[list[str]], thinking: bool) -> Parsing:
    if type(thinking) is not bool or not all(type(text) is str for tool in tools for text in tool):
        raise TypeError("the tools or the thinking flag of a chat have the wrong type")
    return Parsing(tuple(Tool(*tool) for tool in tools), thinking)
