"""The worker daemon: one task group with identity, engine, control port and announcement, until a signal."""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio

from cluster import __version__
from cluster.core.errors import MacpipeError
from cluster.core.limits import DRAIN_S
from cluster.platform.private_files import protect_home
from cluster.platform.process import first_error
from cluster.worker.settings import WorkerSettings, prefix_folder, worker_folder

if TYPE_CHECKING:
    import grpc

    from cluster.worker.worker_service import WorkerServicer

log = logging.getLogger(__name__)


def run(settings: WorkerSettings) -> int:
    """Run a worker until SIGINT or SIGTERM and return the exit code. Raises ``MacpipeError`` if it cannot start."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        anyio.run(_run, settings)
    except* MacpipeError as group:
        raise first_error(group) from None
    return 0


async def _run(settings: WorkerSettings) -> None:
    """Bind the control port, start the engine, then serve and announce. Errors of a step are raised at once."""
    from cluster.discovery.interfaces import LOOPBACK, best_address, interfaces
    from cluster.platform.macos import machine_facts
    from cluster.platform.overload import TimerLag
    from cluster.platform.power import PowerMeter
    from cluster.platform.sleep import stay_awake
    from cluster.security.credentials import open_trust
    from cluster.security.removal import require_member
    from cluster.security.trust import WORKER
    from cluster.transport.grpc_setup import bind, control_server
    from cluster.worker.engine_launcher import EngineLauncher, engine_command
    from cluster.worker.engine_lock import EngineLock
    from cluster.worker.engine_slots import EngineSlots
    from cluster.worker.identity import hold_identity
    from cluster.worker.prefix_files import prepare_folder
    from cluster.worker.profile_provider import ensure_profile
    from cluster.worker.stage_loader import StageLoader
    from cluster.worker.term_file import term_file
    from cluster.worker.term_keeper import TermKeeper
    from cluster.worker.worker_service import WorkerServicer

    protect_home(settings.home)
    folder = worker_folder(settings.home, settings.name)
    with hold_identity(settings.home, settings.name) as worker_id, EngineLock.open(folder) as engine_lock:
        trust = open_trust(settings.home, settings.cluster, WORKER, name=settings.name)
        if not settings.host:
            host = best_address(interfaces()) if trust.me else LOOPBACK
            settings = replace(settings, host=host, every_address=bool(trust.me))
        require_member(trust, settings.cluster, WORKER)
        await anyio.to_thread.run_sync(
            prepare_folder, prefix_folder(settings.home, settings.name), settings.prefix_disk
        )
        server = control_server(trust)
        port = bind(server, trust, settings.host, settings.port)
        machine = machine_facts()
        limit = settings.memory_limit or machine.wired_limit or None
        lag = TimerLag().start()
        launcher = EngineLauncher(engine_command(settings, limit), (engine_lock.file,))
        slots = EngineSlots(launcher, lag)
        file = term_file(settings.home, settings.name)
        terms = TermKeeper(file, slots, lag, engine_lock.acquire)  # now, since its lease runs from here
        supervisor = slots.first.supervisor
        async with anyio.create_task_group() as tasks:
            servicers: list[WorkerServicer] = []
            tasks.start_soon(_stop_on_signal, tasks.cancel_scope, servicers)
            tasks.start_soon(slots.run)
            await supervisor.wait_started()
            profile = await ensure_profile(settings, supervisor)
            if settings.standby:
                tasks.start_soon(launcher.keep)  # only now: its imports would distort the measurement
            loader = StageLoader(settings.home, trust)
            with closing(PowerMeter()) as power:
                servicer = WorkerServicer(
                    worker_id, settings, trust, slots, loader, profile, machine, lag, power.read, keeper=terms
                )
                servicers.append(servicer)
                tasks.start_soon(stay_awake, lambda: servicer.is_busy)
                await _serve(settings, servicer, server, port)


async def _stop_on_signal(scope: anyio.CancelScope, servicers: list[WorkerServicer]) -> None:
    """Drain with a time limit at the first signal; stop at once at the second, or at one before the worker serves."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with anyio.create_task_group() as tasks:
            async for _ in signals:
                if not servicers or servicers[0].stopping:
                    scope.cancel()
                else:
                    tasks.start_soon(_drain_and_stop, scope, servicers[0])


async def _drain_and_stop(scope: anyio.CancelScope, servicer: WorkerServicer) -> None:
    """Wait until the coordinator has moved this worker's layers away, at most ``DRAIN_S``."""
    with anyio.move_on_after(DRAIN_S):
        await servicer.wait_released()
    scope.cancel()


async def _serve(settings: WorkerSettings, servicer: WorkerServicer, server: grpc.aio.Server, port: int) -> None:
    """Serve the control port and announce it until cancelled. Raises MemberRemoved if removed from the cluster."""
    from cluster.discovery.announce import announce
    from cluster.security.removal import removed_error
    from cluster.security.trust import WORKER
    from cluster.v1.store_pb2_grpc import add_StoreServiceServicer_to_server
    from cluster.v1.worker_pb2_grpc import add_WorkerServiceServicer_to_server

    add_WorkerServiceServicer_to_server(servicer, server)
    add_StoreServiceServicer_to_server(servicer.loader.store_server, server)
    await server.start()
    announcement = announce(
        id=servicer.id,
        name=settings.name,
        version=__version__,
        cluster=settings.cluster,
        host=settings.host,
        port=port,
    )
    try:
        async with announcement:
            _print_ready(settings, port, servicer)
            await servicer.removed.wait()
            raise removed_error(settings.cluster, WORKER)
    finally:
        with anyio.CancelScope(shield=True):
            await server.stop(grace=None)


def _print_ready(settings: WorkerSettings, port: int, servicer: WorkerServicer) -> None:
    hello = servicer.slots.hello
    alone = "" if servicer.trust.me else "; on this machine only: `macpipe join` lets others in"
    limit, profile = hello.memory_limit / 2**30, servicer.file.kept.profile
    speed = f", {profile.bandwidth / 1e9:.3g} GB/s in decode" if profile.known else ""
    sys.stderr.write(
        f"worker {settings.name} of cluster {settings.cluster} on {settings.host}:{port}: "
        f"{hello.chip}, mlx {hello.mlx_version} ({hello.backend}), up to {limit:.1f} GiB{speed}{alone}\n"
    )
    sys.stderr.flush()
