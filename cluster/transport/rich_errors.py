"""Converts macpipe's errors to gRPC's rich errors and back.

It knows google.rpc.Status and the wording of gRPC's own failures. It refuses to know who calls whom: callers pass the
address and the peer's name. The size of an error is bounded, because gRPC replaces an error with large metadata by one
of its own.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from cluster.core.errors import (
    Busy,
    ConnectionLost,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    MacpipeError,
    MemberRemoved,
    OtherParty,
    PortClosed,
    Unauthenticated,
    Unreachable,
    VersionMismatch,
)
from cluster.security.trust import REMOVED_METADATA

DOMAIN: Final = "macpipe"
COORDINATOR: Final = "coordinator"
STATUS_METADATA_KEY: Final = "grpc-status-details-bin"
ELLIPSIS: Final = "…"
MAX_SENTENCE_BYTES: Final = 1024
"""The sentence is sent twice, once percent-encoded (up to three times as long), and gRPC limits metadata to 8 KiB."""
MAX_DETAIL_BYTES: Final = 1024
"""Maximum size of the keys and values of all details together. Further details are left out."""


def to_status(error: MacpipeError) -> Status:
    """Return ``error`` as a google.rpc.Status, for ``grpc_status.rpc_status.to_status``.

    It contains an ErrorInfo (domain ``macpipe``), a RetryInfo if ``retry_after_s`` is set, and a BadRequest if
    ``field`` is set. Sentence and details are cut to ``MAX_SENTENCE_BYTES`` and ``MAX_DETAIL_BYTES``.
    """
    sentence = cut(error.sentence, MAX_SENTENCE_BYTES)
    status = Status(code=_code(error).value[0], message=sentence)
    status.details.add().Pack(ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_bound_details(error.details)))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    if error.field:
        violation = BadRequest.FieldViolation(field=cut(error.field, MAX_DETAIL_BYTES), description=error.reason)
        status.details.add().Pack(BadRequest(field_violations=[violation]))
    return status


def from_status(status: Status) -> MacpipeError | None:
    """Return the error that was given to ``to_status``, or None if the status has no ErrorInfo of macpipe.

    A reason that this version does not know becomes a MacpipeError with the detail ``reason``.
    """
    info, retry, fields = ErrorInfo(), RetryInfo(), BadRequest()
    for detail in status.details:
        for known in (info, retry, fields):
            detail.Unpack(known)
    if info.domain != DOMAIN:
        return None
    kind = MacpipeError.kind(info.reason)
    error = (kind or MacpipeError)(
        status.message,
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
        field=fields.field_violations[0].field if fields.field_violations else "",
    )
    error.details = dict(info.metadata) | ({} if kind else {"reason": info.reason})
    return error


def from_rpc_error(error: grpc.RpcError, address: str, *, peer: str = COORDINATOR) -> MacpipeError:
    """Return the macpipe error for a failed call.

    ``address`` and ``peer`` (such as ``worker mac-a``) name the other side in the sentence. The peer's own error comes
    back with its class. A failure of the connection or of gRPC becomes the nearest class. Accepts the errors of both
    ``grpc`` and ``grpc.aio``.
    """
    return _read_carried(error) or _describe_rpc_error(error, address, peer)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: MacpipeError) -> NoReturn:
    """Abort a grpc.aio handler's call with ``error`` as its rich status."""
    status = to_status(error)
    packed: Any = ((STATUS_METADATA_KEY, status.SerializeToString()),)
    await context.abort(_code(error), status.message, packed)


def cut(text: str, limit: int) -> str:
    """Return ``text``, cut to ``limit`` bytes of UTF-8 with an ellipsis if longer. Lone surrogates become ``?``."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - len(ELLIPSIS.encode())].decode("utf-8", "ignore") + ELLIPSIS


def _code(error: MacpipeError) -> grpc.StatusCode:
    return grpc.StatusCode[error.grpc_status]


def _bound_details(details: dict[str, str]) -> dict[str, str]:
    kept: dict[str, str] = {}
    left = MAX_DETAIL_BYTES
    for given, value in details.items():
        key = cut(given, MAX_DETAIL_BYTES)
        left -= len(key.encode())
        if left < len(ELLIPSIS.encode()):
            break
        kept[key] = cut(str(value), left)
        left -= len(kept[key].encode())
    return kept


def _read_carried(error: grpc.RpcError) -> MacpipeError | None:
    metadata: Any = error.trailing_metadata() or ()
    for key, value in metadata:
        if key == STATUS_METADATA_KEY and isinstance(value, bytes):
            return _parse_status(value)
    return None


def _parse_status(data: bytes) -> MacpipeError | None:
    try:
        return from_status(Status.FromString(data))
    except DecodeError:  # a proxy answered instead of the peer
        return None


def _describe_rpc_error(error: grpc.RpcError, address: str, peer: str) -> MacpipeError:
    code = error.code()
    details = cut(error.details() or "", MAX_SENTENCE_BYTES)
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return _unreachable(details, address, peer)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"the call to the {peer} at {address} timed out")
        case grpc.StatusCode.UNAUTHENTICATED:
            kind = MemberRemoved if _was_removed(error) else Unauthenticated
            return kind(f"the {peer} at {address} refused this Mac: {details}")
        case grpc.StatusCode.PERMISSION_DENIED:
            return Forbidden(details or f"the {peer} at {address} does not allow this")
        case grpc.StatusCode.CANCELLED:
            return ConnectionLost(f"the {peer} at {address} ended the call, as one does that stops")
        case grpc.StatusCode.UNIMPLEMENTED:
            return VersionMismatch(
                f"the server at {address} does not implement this call; check that it is a {peer} of the same version"
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in details:
            return InvalidRequest(f"a message to or from the {peer} is too large ({details})")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Busy(f"the {peer} at {address} is busy: {details}")
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequest(details or f"the {peer} at {address} refused the request")
        case _:
            return MacpipeError(f"the {peer} at {address} failed: {details or code.name}", code=code.name)


def _was_removed(error: grpc.RpcError) -> bool:
    trailing: Any = error.trailing_metadata() or ()
    return any(key == REMOVED_METADATA for key, _ in trailing)


_NOT_HTTP2: Final = ("Trying to connect an http1.x server", "Failed parsing HTTP/2")
"""gRPC's words for a server that answers with something else. No host name can contain them: they have spaces."""
_REFUSED: Final = re.compile(re.escape(os.strerror(errno.ECONNREFUSED)) + r"[ ()\d\]]*\Z")
"""The end of gRPC's chain of causes if nothing listens at an address. gRPC has no status code for this case. Only the
end is matched, where no name that others chose can appear."""

OUTSIDE: Final = "outside"
"""The detail of an ``Unreachable`` whose server is no member of this cluster: its value says in which way."""
_HANDSHAKE_CAUSES: Final = (
    (
        ("WRONG_VERSION_NUMBER",),
        "it does not speak TLS, so it is in no cluster; let it join with `macpipe join TOKEN`",
        "no_tls",
    ),
    (
        ("certificate has expired", "certificate is not yet valid"),
        "its certificate is not valid now by this Mac's clock; compare the clocks of both Macs",
        "",
    ),
    (
        ("BAD_SIGNATURE", "CERTIFICATE_VERIFY_FAILED", "certificate signature failure", "unable to get local issuer"),
        "its certificate is of another cluster; let it join this one with `macpipe join TOKEN`",
        "other_cluster",
    ),
    (
        ("Socket closed", "Connection reset", "handshake"),
        "it closed the connection at once: it is stopping, it is in another cluster or in none, or it no longer"
        " accepts this Mac's certificate",
        "",
    ),
)
"""The cause of a failed TLS handshake by gRPC's words for it, and in which way the server is outside the cluster."""


def _unreachable(details: str, address: str, peer: str) -> Unreachable:
    if "Hostname Verification" in details:
        return OtherParty(f"the server at {address} belongs to this cluster, but is not the expected {peer}")
    why, outside = _handshake_cause(details)
    if why:
        sentence = f"cannot connect to the {peer} at {address}: {why}"
        return Unreachable(sentence, outside=outside) if outside else Unreachable(sentence)
    if any(words in details for words in _NOT_HTTP2):
        return Unreachable(f"the server at {address} does not speak gRPC; use the {peer}'s gRPC port")
    if "failed to connect" not in details.lower() and "resol" not in details.lower():
        return ConnectionLost(f"the connection to the {peer} at {address} broke ({details or 'no reason given'})")
    if peer != COORDINATOR:
        kind = PortClosed if _REFUSED.search(details) else Unreachable
        return kind(f"the {peer} does not answer at {address} ({_cause(details)})")
    return Unreachable(
        f"no coordinator answers at {address} ({_cause(details)}); start one with `macpipe serve MODEL`,"
        " or name another with --coordinator HOST:PORT or MACPIPE_COORDINATOR"
    )


def is_ping_timeout(details: str) -> bool:
    """Return whether gRPC closed a connection because a ping got no answer. It has no code of its own for this.

    The connection is open but silent then. That of a process that exits is closed.
    """
    return "ping timeout" in details


def _handshake_cause(details: str) -> tuple[str, str]:
    """Return why a TLS handshake failed, and in which way the server is outside the cluster; empty if none failed."""
    if "failed to connect" not in details:
        return "", ""
    causes = ((why, outside) for words, why, outside in _HANDSHAKE_CAUSES if any(word in details for word in words))
    return next(causes, ("", ""))


def _cause(details: str) -> str:
    """Return the last and most specific part of gRPC's chain of causes, such as ``Connection refused``."""
    cause = details.rsplit(": ", 1)[-1].strip(" []")
    closing = cause.count(")") - cause.count("(")
    return (cause[:-closing] if closing > 0 else cause) or "no reason given"
