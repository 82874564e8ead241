"""How a daemon's own processes begin, and how it ends: on a signal, or with the first error of one of its tasks."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import anyio

from cluster.errors import MacpipeError


def own_code_alone(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Python imports nothing from the folder where a person has started the daemon.

    That folder may be a model's, and have modules of its own. This program is found where it is.
    """
    places = [str(Path(__file__).parent.parent), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, places))}


async def stop_on_signal(scope: anyio.CancelScope) -> None:
    """Cancel ``scope`` on SIGINT or SIGTERM."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


def first_error(group: BaseExceptionGroup[MacpipeError]) -> MacpipeError:
    """The first of the errors that a task group collected."""
    error = group.exceptions[0]
    return first_error(error) if isinstance(error, BaseExceptionGroup) else error
