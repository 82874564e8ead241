"""How a daemon's own processes begin, and how it ends: on a signal, or with the first error of one of its tasks."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import anyio

from cluster.errors import MacpipeError
from cluster.home import absolute_path


def own_code_alone(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Python imports nothing from the folder where a person has started the daemon.

    That folder may be a model's, and have modules of its own. This program is found where it is, from any folder.
    """
    places = [str(Path(__file__).parent.parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    found = [absolute_path(Path(place)) for place in places if place]
    return {**environment, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(map(str, found))}


def accept_signals() -> None:
    """Undo what a parent left behind that would keep this process from ending, or from seeing its children end.

    Nothing is blocked any more, and SIGINT, SIGTERM and SIGCHLD are ignored no more. SIGHUP stays as it is: `nohup`
    ignores it on purpose.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)


async def stop_on_signal(scope: anyio.CancelScope) -> None:
    """Cancel ``scope`` on SIGINT or SIGTERM."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


def first_error(group: BaseExceptionGroup[MacpipeError]) -> MacpipeError:
    """The first of the errors that a task group collected."""
    error = group.exceptions[0]
    return first_error(error) if isinstance(error, BaseExceptionGroup) else error
