"""Bounds public gRPC requests on their wire format, before protobuf builds objects from them.

gRPC bounds the bytes of a message only, and 16 MiB of empty submessages become eight million objects. So this module
counts fields. It knows the descriptors of the requests, but not what a request means.
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
"""Bytes of a value by wire type. The tags that start and end a group have no value; a group's fields count as usual."""
_CONTINUED: Final = bytes(range(128, 256))
"""Bytes of a varint that are not its last."""


def count_fields(data: bytes, message: Descriptor) -> None:
    """Check the number of fields and packed numbers in ``data``, an encoded ``message`` with all its submessages.

    Raises ``TooLarge``. Malformed data ends the count: protobuf stops there too, and built only what was counted.
    """
    if len(data) <= MAX_FIELDS:  # a field has at least two bytes
        return
    count = 0
    numbers = 0
    outer = [(0, len(data), _message_type(message))]
    while outer:
        at, end, kind = outer.pop()
        while at < end:
            count += 1
            if count > MAX_FIELDS:
                raise TooLarge(
                    f"the request has more than {MAX_FIELDS} fields, submessages included; send fewer messages or tools"
                )
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

    ``client`` returns the caller's name, to which its bytes are charged.
    """

    def __init__(
        self, services: tuple[ServiceDescriptor, ...], bodies: ByteBudget, client: Callable[[Context], str]
    ) -> None:
        self._requests = {f"/{s.full_name}/{m.name}": m.input_type for s in services for m in s.methods}
        self._bodies = bodies
        self._client = client

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(details)
        message = self._requests.get(details.method)
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
    """Parse a request. Raises ``TooLarge``, and ``InvalidRequest`` if it is malformed."""
    assert deserialize, "generated servicers always have one"
    count_fields(data, message)
    try:
        return deserialize(data)
    except DecodeError:
        raise InvalidRequest(f"the request is not a valid protobuf encoding of {message.name}") from None
