"""Errors over gRPC: each of ours arrives as itself, and each of gRPC's own gets a sentence and a class."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from cluster.core import errors
from cluster.security.tokens import WrongSecret
from cluster.transport import rich_errors as status


def tree(kind: type[errors.MacpipeError]) -> list[type[errors.MacpipeError]]:
    return [kind, *(one for child in kind.__subclasses__() for one in tree(child))]


CLASSES = [kind for kind in tree(errors.MacpipeError) if kind.__module__ == errors.__name__]
short = st.text(max_size=40).filter(lambda text: text.isprintable())


class Failure(grpc.RpcError):
    """The error of a call, without the call."""

    def __init__(self, code: grpc.StatusCode, details: str = "", metadata: tuple[Any, ...] = ()) -> None:
        self._said = (code, details, metadata)

    def code(self) -> grpc.StatusCode:
        return self._said[0]

    def details(self) -> str:
        return self._said[1]

    def trailing_metadata(self) -> tuple[Any, ...]:
        return self._said[2]


def sent(error: errors.MacpipeError) -> Failure:
    told = rpc_status.to_status(status.to_status(error))
    return Failure(told.code, told.details, told.trailing_metadata)


@given(
    kind=st.sampled_from(CLASSES),
    sentence=short,
    retry=st.none() | st.floats(0, 1e6).map(lambda s: round(s, 6)),
    field=short,
    details=st.dictionaries(short, short, max_size=5),
)
def test_an_error_comes_back_as_it_was(kind: Any, sentence: str, retry: Any, field: str, details: Any) -> None:
    error = kind(sentence, retry_after_s=retry, field=field)
    error.details = details
    back = status.from_rpc_error(sent(error), "mac:1")
    assert type(back) is kind
    assert (back.sentence, back.field, back.details) == (sentence, field, details)
    assert back.retry_after_s == (None if retry is None else pytest.approx(retry, abs=1e-8))


@given(text=st.text(alphabet=st.characters(), max_size=3000), limit=st.integers(3, 2000))
def test_cutting_keeps_the_limit_and_whole_characters(text: str, limit: int) -> None:
    cut = status.cut(text, limit)
    assert len(cut.encode()) <= limit
    assert cut == text or cut.endswith("…") or any("\ud800" <= c <= "\udfff" for c in text)


@given(
    sentence=st.text(max_size=9000),
    details=st.dictionaries(st.text(max_size=900), st.text(max_size=9000), max_size=30),
)
def test_what_is_sent_fits_grpcs_bound_on_metadata(sentence: str, details: Any) -> None:
    error = errors.WorkerLost(sentence, field="x" * 5000)
    error.details = details
    told = status.to_status(error)
    percent_encoded, base64 = 3 * len(told.message.encode()), 4 * len(told.SerializeToString()) // 3
    assert percent_encoded + base64 < 8 * 1024


def test_a_long_error_crosses_a_real_call() -> None:
    error = errors.DoesNotFit("é" * 90_000, missing="x" * 90_000)

    async def refuse(request: bytes, context: Any) -> bytes:
        await status.abort(context, error)

    async def call() -> errors.MacpipeError:
        server = grpc.aio.server()
        handlers = {"Call": grpc.unary_unary_rpc_method_handler(refuse)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                await channel.unary_unary("/test.Test/Call")(b"", timeout=5)
        except grpc.aio.AioRpcError as failed:
            return status.from_rpc_error(failed, "mac:1")
        finally:
            await server.stop(0)
        raise AssertionError

    back = asyncio.run(call())
    assert type(back) is errors.DoesNotFit
    assert back.sentence.startswith("éé")
    assert back.details["missing"].startswith("xx")


def test_a_newer_reason_keeps_its_sentence_and_its_name() -> None:
    told = Status(code=9, message="the moon is in the way")
    told.details.add().Pack(ErrorInfo(reason="MOON", domain=status.DOMAIN, metadata={"phase": "full"}))
    failure = Failure(
        grpc.StatusCode.FAILED_PRECONDITION, told.message, ((status.STATUS_METADATA_KEY, told.SerializeToString()),)
    )
    back = status.from_rpc_error(failure, "mac:1")
    assert type(back) is errors.MacpipeError
    assert back.sentence == "the moon is in the way"
    assert back.details == {"phase": "full", "reason": "MOON"}


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"", Status(code=5, message="elsewhere").SerializeToString()])
def test_somebody_elses_details_are_not_ours(data: bytes) -> None:
    failure = Failure(grpc.StatusCode.CANCELLED, "gone", ((status.STATUS_METADATA_KEY, data),))
    assert type(status.from_rpc_error(failure, "mac:1")) is errors.ConnectionLost


@pytest.mark.parametrize(
    ("code", "said", "kind", "words"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses; last error: UNKNOWN: ipv4:1.2.3.4:1: Failed to connect to"
         " remote host: Connection refused", errors.Unreachable, ["mac:1", "refused", "macpipe serve", "--coordin"]),
        ("UNAVAILABLE", "Socket closed", errors.ConnectionLost, ["mac:1", "broke", "Socket closed"]),
        ("UNAVAILABLE", "last error: UNAVAILABLE: Failed parsing HTTP/2 (Expected SETTINGS)", errors.Unreachable,
         ["mac:1", "gRPC"]),
        ("UNAVAILABLE", "errors resolving mac-http1:1: [field:hostname lookup error:address lookup failed for"
         " mac-http1:1: Domain name not found]", errors.Unreachable, ["no coordinator answers", "name not found"]),
        ("DEADLINE_EXCEEDED", "", errors.DeadlineExceeded, ["mac:1", "timed out"]),
        ("CANCELLED", "", errors.ConnectionLost, ["mac:1", "ended the call"]),
        ("UNIMPLEMENTED", "", errors.VersionMismatch, ["mac:1", "version"]),
        ("RESOURCE_EXHAUSTED", "Sent message larger than max (5 vs. 4)", errors.InvalidRequest, ["larger"]),
        ("RESOURCE_EXHAUSTED", "", errors.Busy, ["busy"]),
        ("INVALID_ARGUMENT", "no", errors.InvalidRequest, ["no"]),
        ("UNKNOWN", "Unexpected <class 'KeyError'>", errors.MacpipeError, ["mac:1", "KeyError"]),
    ],
)  # fmt: skip
def test_grpcs_own_failures_have_a_class_and_a_sentence(code: str, said: str, kind: Any, words: list[str]) -> None:
    error = status.from_rpc_error(Failure(grpc.StatusCode[code], said), "mac:1")
    assert type(error) is kind
    assert all(word in error.sentence for word in words), error.sentence


def test_a_worker_that_does_not_answer_is_not_called_a_coordinator() -> None:
    failure = Failure(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses: Connection refused")
    sentence = status.from_rpc_error(failure, "mac:1", peer="worker mac-a").sentence
    assert "worker mac-a" in sentence
    assert "serve" not in sentence


def test_each_reason_has_one_class() -> None:
    reasons = [kind.reason for kind in (*CLASSES, WrongSecret)]
    assert sorted(reasons) == sorted(errors.Reason)
    assert all(errors.MacpipeError.kind(kind.reason) is kind for kind in CLASSES)
