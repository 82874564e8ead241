"""What both clients hold of a call: how long it may take, and what its failure means. It makes no call itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import grpc

from cluster.client.cluster_state import ClusterState
from cluster.client.options import Options, number
from cluster.core.errors import DeadlineExceeded, InvalidRequest, MacpipeError
from cluster.core.limits import CONTROL_TIMEOUT_S, LOAD_STALL_S
from cluster.core.plan import LoadProgress
from cluster.transport.rich_errors import from_rpc_error

STALL_TIMEOUT_S: Final = LOAD_STALL_S + CONTROL_TIMEOUT_S
"""A load that says nothing for this long: the coordinator's own bound and the time to tell of it."""


@contextmanager
def failures_told(address: str, is_closed: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Raise the MacpipeError that a failed call to ``address`` means, in place of grpc's exception.

    grpc raises a bare error for a call on a closed channel; ``is_closed`` says whether that is why.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, address) from error
    except (ValueError, grpc.aio.UsageError) as error:
        if is_closed():
            raise closed_error() from error
        raise


def closed_error() -> MacpipeError:
    """The error of a call on a client that was closed."""
    return MacpipeError("this client is closed; make a new one")


def answer_timeout_s(options: Options, default: float | None) -> float | None:
    """Seconds that an answer may take: the option, else the client's own, else None. Raises InvalidRequest."""
    given = options.get("timeout_s")
    return default if given is None else check_timeout_s(given)


def check_timeout_s(given: float | None) -> float | None:
    """``given`` if it is None or above 0; raises InvalidRequest."""
    if given is not None and number("timeout_s", given) <= 0:
        raise InvalidRequest(f"timeout_s must be above 0, not {given}", field="timeout_s")
    return given


def require_serving(last: LoadProgress | ClusterState | None) -> ClusterState:
    """The last event of a load, if it is what a load must end with; raises MacpipeError."""
    if not isinstance(last, ClusterState):
        raise MacpipeError("the coordinator ended the load without saying that it serves")
    return last


def stall_error(stall_s: float) -> DeadlineExceeded:
    """The error of a load that said nothing for ``stall_s`` seconds."""
    return DeadlineExceeded(f"the load has not moved for {stall_s:.0f} s")
