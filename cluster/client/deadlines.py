"""Deadlines and errors of calls, shared by both clients. It makes no call itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import grpc

from cluster.client.options import Options, check_number
from cluster.core.cluster_state import ClusterState
from cluster.core.errors import DeadlineExceeded, InvalidRequest, MacpipeError
from cluster.core.limits import CONTROL_TIMEOUT_S, LOAD_STALL_S
from cluster.core.plan import LoadProgress
from cluster.transport.rich_errors import from_rpc_error

STALL_TIMEOUT_S: Final = LOAD_STALL_S + CONTROL_TIMEOUT_S
"""Longest silence of a load: the coordinator's own timeout, plus the time to report it."""


@contextmanager
def translate_errors(address: str) -> Iterator[None]:
    """Translate gRPC errors of a call to ``address`` into MacpipeError."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, address) from error


def answer_timeout_s(options: Options, default: float | None) -> float | None:
    """Return an answer's timeout in seconds: the option, else the client's, else None. Raise InvalidRequest."""
    given = options.get("timeout_s")
    return default if given is None else check_timeout_s(given)


def check_timeout_s(given: float | None) -> float | None:
    """Return ``given`` if it is None or above 0. Raise InvalidRequest otherwise."""
    if given is not None and check_number("timeout_s", given) <= 0:
        raise InvalidRequest(f"timeout_s must be above 0, not {given}", field="timeout_s")
    return given


def require_serving(last: LoadProgress | ClusterState | None) -> ClusterState:
    """Return the last event of a load if it is a ClusterState. Raise MacpipeError otherwise."""
    if not isinstance(last, ClusterState):
        raise MacpipeError("the load ended without a final state; see `macpipe status`")
    return last


def stall_error(stall_s: float) -> DeadlineExceeded:
    """Return the error of a load without an event for ``stall_s`` seconds."""
    return DeadlineExceeded(f"the load made no progress for {stall_s:.0f} s")
