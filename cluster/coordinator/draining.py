"""Move everything that a worker holds to other workers, so that it can be stopped."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.coordinator.deployment import Deployment
from cluster.coordinator.worker_client import WorkerClient
from cluster.core.errors import MacpipeError, NoPlan, NotServing, NoWorkers


async def drain_worker(worker: str, control: WorkerClient, deployments: Iterable[Deployment]) -> None:
    """Drain a worker. Raises as ``ModelService.move_away`` if it still holds layers, and takes it back into use."""
    await control.drain(undo=False)
    try:
        for deployment in deployments:
            await _leave(worker, deployment)
    except MacpipeError:
        await control.drain(undo=True)
        raise


async def undo_drain(worker: str, control: WorkerClient, deployments: Iterable[Deployment]) -> None:
    """Take a drained worker back into use."""
    await control.drain(undo=True)
    for deployment in deployments:
        for service in deployment.services:
            service.cancel_move_away(worker)


async def _leave(worker: str, deployment: Deployment) -> None:
    """Move a deployment's layers away. A replica that has no other workers ends, if another one goes on."""
    for replica in deployment.replicas:
        if replica.service is None:
            continue
        try:
            await replica.service.move_away(worker)
        except (NoPlan, NoWorkers):
            if not deployment.can_lose(replica.holder):
                raise
            await deployment.remove_copy(replica)


async def refuse_handover(standby: str) -> str:
    """Raise ``NotServing``: this coordinator has no standbys."""
    raise NotServing("no standby follows this coordinator; start one on another Mac with `macpipe serve --standby`")
