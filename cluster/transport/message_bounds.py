"""Count and charge gRPC requests while they are still bytes, before protobuf builds objects of them.

16 MiB of empty submessages are eight million objects. gRPC itself limits only bytes, so a message's fields are counted
in the wire format, even those of members: a worker without a cluster answers every program of its machine. The module
knows the requests' descriptors, not their meaning.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from grpc import aio

from cluster.core.errors import InvalidRequest, MacpipeError, TooLarge
from cluster.core.limits import MAX_FIELDS, MAX_PROMPT_IDS
from cluster.transport.byte_budget import ByteBudget
from cluster.transport.parsing_thread import PARSING
from cluster.transport.rich_errors import abort

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "aio.ServicerContext[Any, Any]"
_VARINT: Final = 0
_BYTES: Final = 2
_SIZES: Final = {1: 8, 3: 0, 4: 0, 5: 4}
"""Bytes of a value by its wire type. A group's ends have none, and its fields are counted like others."""
_CONTINUED: Final = bytes(range(128, 256))
"""Bytes of a varint that are not its last."""
_NONE: Final[Mapping[str, int]] = MappingProxyType({})


def count_fields(data: bytes, message: Descriptor, most: int = MAX_FIELDS) -> None:
    """Check that ``data`` as a ``message`` has at most ``most`` fields, those of submessages included.

    Packed numbers are limited to ``MAX_PROMPT_IDS``. Raises ``TooLarge``. Malformed data ends the count: protobuf stops
    there too, and has built only what was counted.
    """
    if len(data) <= most:  # a field has two bytes at least
        return
    count = 0
    numbers = 0
    outer = [(0, len(data), _message_type(message))]
    while outer:
        at, end, kind = outer.pop()
        while at < end:
            count += 1
            if count > most:
                raise TooLarge(f"the request has more than {most} fields, those of its parts included")
            tag, at = _varint(data, at)
            if tag & 7 != _BYTES:
                at = _skip(data, at, tag & 7)
                continue
            size, at = _varint(data, at)
            if at + size > end:
                break
            if size and (part := kind.parts.get(tag >> 3)):
                outer.append((at + size, end, kind))
                end, kind = at + size, part
                continue
            if tag >> 3 in kind.packed:
                numbers += len(data[at : at + size].translate(None, _CONTINUED))
            at += size
    if numbers > MAX_PROMPT_IDS:
        raise TooLarge(f"the request has more than {MAX_PROMPT_IDS} numbers in its lists; send fewer token ids")


def _skip(data: bytes, at: int, wire: int) -> int:
    """Return the end of the value at ``at``, whose wire type has no length; past the end for an unknown type."""
    if wire == _VARINT:
        return _varint(data, at)[1]
    return at + _SIZES.get(wire, len(data))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at ``at`` and the offset after it; an offset past the end of ``data`` if it is cut off."""
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80 or shift > 63:
            return value, at
        shift += 7
    return 0, len(data) + 1


@dataclass(frozen=True, slots=True, eq=False)
class _MessageType:
    """The field numbers of a message type: ``parts`` hold submessages, ``packed`` hold lists of varints."""

    parts: dict[int, _MessageType]
    packed: frozenset[int]


@functools.cache
def _message_type(message: Descriptor) -> _MessageType:
    """Return the type of a message that is not recursive; no public message is."""
    parts = {f.number: _message_type(f.message_type) for f in message.fields if f.message_type}
    varints = (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_INT32)
    packed = frozenset(f.number for f in message.fields if f.is_repeated and f.cpp_type in varints)
    return _MessageType(parts, packed)


class MessageBounds(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its typing stub alone
    """Intercepts ``services``: charges a request to ``bodies`` until it ends, bounds its fields, then parses it.

    ``client`` returns the caller's name for ``Charge``. ``most_fields`` allows some messages, by full name, more fields
    than MAX_FIELDS. All but small messages are counted and parsed on the parsing thread.
    """

    def __init__(
        self,
        services: tuple[ServiceDescriptor, ...],
        bodies: ByteBudget,
        client: Callable[[Context], str],
        most_fields: Mapping[str, int] = _NONE,
    ) -> None:
        self._requests = {f"/{s.full_name}/{m.name}": m.input_type for s in services for m in s.methods}
        self._bodies, self._client, self._most_fields = bodies, client, most_fields

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(details)
        message = self._requests.get(details.method)
        if handler is None or message is None or handler.request_streaming:
            return handler
        parse = functools.partial(self._parse_bounded, message, handler.request_deserializer)
        if handler.response_streaming:
            streaming = self._bound_stream(handler.unary_stream, parse)
            return grpc.unary_stream_rpc_method_handler(streaming, None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(
            self._bound_single(handler.unary_unary, parse), None, handler.response_serializer
        )

    async def _parse_bounded(self, message: Descriptor, deserialize: Callable[[bytes], Any] | None, data: bytes) -> Any:
        most = self._most_fields.get(message.full_name, MAX_FIELDS)
        return await PARSING.run(len(data), _parse, message, deserialize, most, data)

    def _bound_stream(self, behaviour: Any, parse: Callable[[bytes], Awaitable[Any]]) -> Any:
        async def bounded(data: bytes, context: Context) -> AsyncIterator[Any]:
            with self._bodies.open(self._client(context)) as charge:
                try:
                    charge.add(len(data))
                    request = await parse(data)
                except MacpipeError as e:
                    await abort(context, e)
                del data
                async with aclosing(behaviour(request, context)) as replies:
                    async for reply in replies:
                        yield reply

        return bounded

    def _bound_single(self, behaviour: Any, parse: Callable[[bytes], Awaitable[Any]]) -> Any:
        async def bounded(data: bytes, context: Context) -> Any:
            with self._bodies.open(self._client(context)) as charge:
                try:
                    charge.add(len(data))
                    request = await parse(data)
                except MacpipeError as e:
                    await abort(context, e)
                del data
                return await behaviour(request, context)

        return bounded


def _parse(message: Descriptor, deserialize: Callable[[bytes], Any] | None, most: int, data: bytes) -> Any:
    """Return the request. Raises ``TooLarge``, and ``InvalidRequest`` if it is malformed."""
    assert deserialize, "generated servicers always have one"
    count_fields(data, message, most)
    try:
        return deserialize(data)
    except DecodeError:
        raise InvalidRequest(f"the request is not a valid protobuf encoding of {message.name}") from None
