"""How a daemon ends: on a signal, or with the first error that one of its tasks raised."""

from __future__ import annotations

import signal

import anyio

from cluster.errors import MacpipeError


async def stop_on_signal(scope: anyio.CancelScope) -> None:
    """Cancel ``scope`` on SIGINT or SIGTERM."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


def first_error(group: BaseExceptionGroup[MacpipeError]) -> MacpipeError:
    """The first of the errors that a task group collected."""
    error = group.exceptions[0]
    return first_error(error) if isinstance(error, BaseExceptionGroup) else error
