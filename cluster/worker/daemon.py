"""The worker daemon: one task group that owns identity, engine, control port and announcement, until a signal."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

import anyio

from cluster import __version__
from cluster.errors import MacpipeError
from cluster.worker.settings import WorkerSettings

if TYPE_CHECKING:
    from cluster.worker.supervisor import Supervisor

log = logging.getLogger(__name__)


def run(settings: WorkerSettings) -> int:
    """Run a worker until SIGINT or SIGTERM; the exit code. Raises ``MacpipeError`` where it cannot start."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        anyio.run(_run, settings)
    except* MacpipeError as group:
        raise _first(group) from None
    return 0


def _first(group: BaseExceptionGroup[MacpipeError]) -> MacpipeError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def _run(settings: WorkerSettings) -> None:
    from cluster.worker.identity import identity
    from cluster.worker.supervisor import Supervisor

    with identity(settings.home, settings.name) as worker_id:
        supervisor = Supervisor(settings.host, settings.memory_limit)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(supervisor.run)
            tasks.start_soon(_stop_on_signal, tasks.cancel_scope)
            await supervisor.wait_started()
            await _answer(settings, worker_id, supervisor)


async def _stop_on_signal(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for number in signals:
            log.info("%s: stopping", signal.Signals(number).name)
            scope.cancel()


async def _answer(settings: WorkerSettings, worker_id: str, supervisor: Supervisor) -> None:
    """Open the control port, announce it, and wait to be cancelled."""
    import grpc

    from cluster.discovery.announce import announce
    from cluster.transport.options import CONTROL_OPTIONS, bind
    from cluster.v1.worker_pb2_grpc import add_WorkerServiceServicer_to_server
    from cluster.worker.control import Control

    server = grpc.aio.server(options=CONTROL_OPTIONS)
    add_WorkerServiceServicer_to_server(Control(worker_id, settings, supervisor), server)
    port = bind(server, settings.host, settings.port)
    await server.start()
    try:
        async with announce(
            id=worker_id,
            name=settings.name,
            version=__version__,
            cluster=settings.cluster,
            host=settings.host,
            port=port,
        ):
            _say_ready(settings, port, supervisor)
            await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            await server.stop(grace=None)


def _say_ready(settings: WorkerSettings, port: int, supervisor: Supervisor) -> None:
    hello = supervisor.hello
    assert hello
    limit = hello.memory_limit / 2**30
    sys.stderr.write(
        f"worker {settings.name} of cluster {settings.cluster} on {settings.host}:{port}: "
        f"{hello.chip}, mlx {hello.mlx_version} ({hello.backend}), up to {limit:.1f} GiB\n"
    )
    sys.stderr.flush()
