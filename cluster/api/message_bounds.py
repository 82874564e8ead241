"""Public gRPC requests, counted and charged while they are still bytes, before protobuf builds objects of them.

16 MiB of empty submessages are eight million objects. gRPC's own bound is on bytes, so a message's fields are counted
on the wire format. It knows the requests' descriptors. It refuses to know what a request means.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from grpc import aio

from cluster.api.bounds import MAX_FIELDS, MAX_PROMPT_IDS
from cluster.api.byte_budget import ByteBudget
from cluster.core.errors import InvalidRequest, MacpipeError, TooLarge
from cluster.transport.rich_errors import abort

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "aio.ServicerContext[Any, Any]"
_VARINT: Final = 0
_BYTES: Final = 2
_SIZES: Final = {1: 8, 3: 0, 4: 0, 5: 4}
"""Bytes of a value by its type on the wire; a group's ends have none, and its fields are counted like others."""
_MORE: Final = bytes(range(128, 256))
"""Bytes of a varint that another one follows."""


def count_fields(data: bytes, message: Descriptor) -> None:
    """Bound the fields that ``data`` has as a ``message``, in all submessages together, and its packed numbers.

    Raises ``TooLarge``. What is malformed ends the count: protobuf refuses it there, after building what was counted.
    """
    if len(data) <= MAX_FIELDS:  # a field has two bytes at least
        return
    count, numbers, outer = 0, 0, [(0, len(data), _kind_of(message))]
    while outer:
        at, end, kind = outer.pop()
        while at < end:
            count += 1
            if count > MAX_FIELDS:
                raise TooLarge(f"the request has more than {MAX_FIELDS} fields, those of its parts included")
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
                numbers += len(data[at : at + size].translate(None, _MORE))
            at += size
    if numbers > MAX_PROMPT_IDS:
        raise TooLarge(f"the request has more than {MAX_PROMPT_IDS} numbers in a list")


def _skip(data: bytes, at: int, wire: int) -> int:
    """Where the value at ``at`` ends, of a type without a length; past the end of ``data`` for an unknown type."""
    if wire == _VARINT:
        return _varint(data, at)[1]
    return at + _SIZES.get(wire, len(data))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at ``at``, and where the next field begins; past the end of ``data`` where it is cut off."""
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
class _Kind:
    """A message's fields by number: those that hold messages, and those that hold lists of varints."""

    parts: dict[int, _Kind]
    packed: frozenset[int]


@functools.cache
def _kind_of(message: Descriptor) -> _Kind:
    """Of a message that does not hold itself, as none of the public ones does."""
    parts = {f.number: _kind_of(f.message_type) for f in message.fields if f.message_type}
    varints = (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_INT32)
    return _Kind(parts, frozenset(f.number for f in message.fields if f.is_repeated and f.cpp_type in varints))


class MessageBounds(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its typing stub alone
    """Stands before ``services``: a request is charged to ``bodies`` until it ends, counted, and only then parsed.

    ``client`` names who calls, as ``Charge`` takes it.
    """

    def __init__(
        self, services: tuple[ServiceDescriptor, ...], bodies: ByteBudget, client: Callable[[Context], str]
    ) -> None:
        self._requests = {f"/{s.full_name}/{m.name}": m.input_type for s in services for m in s.methods}
        self._bodies, self._client = bodies, client

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        handler, message = await continuation(details), self._requests.get(details.method)
        if handler is None or message is None or handler.request_streaming:
            return handler
        parse = functools.partial(_parse, message, handler.request_deserializer)
        if handler.response_streaming:
            streaming = self._streaming(handler.unary_stream, parse)
            return grpc.unary_stream_rpc_method_handler(streaming, None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(
            self._single(handler.unary_unary, parse), None, handler.response_serializer
        )

    def _streaming(self, behaviour: Any, parse: Callable[[bytes], Any]) -> Any:
        async def bounded(data: bytes, context: Context) -> AsyncIterator[Any]:
            with self._bodies.open(self._client(context)) as charge:
                try:
                    charge.add(len(data))
                    request = parse(data)
                except MacpipeError as e:
                    await abort(context, e)
                del data
                async for reply in behaviour(request, context):
                    yield reply

        return bounded

    def _single(self, behaviour: Any, parse: Callable[[bytes], Any]) -> Any:
        async def bounded(data: bytes, context: Context) -> Any:
            with self._bodies.open(self._client(context)) as charge:
                try:
                    charge.add(len(data))
                    request = parse(data)
                except MacpipeError as e:
                    await abort(context, e)
                del data
                return await behaviour(request, context)

        return bounded


def _parse(message: Descriptor, deserialize: Callable[[bytes], Any] | None, data: bytes) -> Any:
    """The request. Raises ``TooLarge``, and ``InvalidRequest`` where it is none."""
    assert deserialize, "generated servicers always have one"
    count_fields(data, message)
    try:
        return deserialize(data)
    except DecodeError:
        raise InvalidRequest(f"the request is not a {message.name} as protobuf writes it") from None
