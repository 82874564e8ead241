"""Describe the models of a coordinator, each with its replicas, as ``macpipe status`` and ``ps`` show them."""

from __future__ import annotations

import asyncio
import time

from cluster.coordinator.deployment import Deployment
from cluster.coordinator.deployment_table import DeploymentTable
from cluster.coordinator.model_catalog import ModelEntry
from cluster.coordinator.replica import Replica
from cluster.coordinator.snapshot import describe_adapters, describe_stages
from cluster.core.cluster_state import DeploymentState, ReplicaState, RequestState, ServingState
from cluster.core.plan import Speculation


async def describe_deployments(table: DeploymentTable) -> tuple[DeploymentState, ...]:
    """Describe all models, loaded or not, the default one first; nothing if there is a single model with one replica.

    A loop that does not answer in time is described without its requests.
    """
    if table.is_single and all(len(deployment.replicas) == 1 for deployment in table.values()):
        return ()
    described = (_describe(table, entry, table.get(entry.name)) for entry in table.catalog)
    return tuple(await asyncio.gather(*described))


async def _describe(table: DeploymentTable, entry: ModelEntry, deployment: Deployment | None) -> DeploymentState:
    name = table.catalog.public_name(entry)
    if deployment is None:
        return DeploymentState(name, entry.order.model, ServingState.IDLE, entry.aliases, pinned=entry.pin)
    served = [replica for replica in deployment.replicas if replica.service]
    replicas = tuple(await asyncio.gather(*map(_describe_replica, served)))
    shape = deployment.model_info.shape if deployment.model_info else None
    service = deployment.service
    return DeploymentState(
        name=table.public_name(deployment),
        model=shape.model.name if shape else entry.order.model,
        state=deployment.state,
        aliases=entry.aliases,
        problem=next((replica.problem for replica in replicas if replica.problem), ""),
        activity=deployment.watch.sentence if deployment.is_loading else "",
        max_context=shape.max_context if shape else 0,
        pinned=entry.pin,
        idle_seconds=time.monotonic() - deployment.used_at if shape and not deployment.has_requests else 0.0,
        replicas=replicas,
        adapters=describe_adapters(service.model_info.adapters.served) if service else (),
        speculation=service.speculation if service else Speculation.OFF,
        draft_worker=next((one.draft_worker for one in deployment.services if one.draft_worker), ""),
    )


async def _describe_replica(replica: Replica) -> ReplicaState:
    loop = await replica.view()
    service = replica.service
    repair = service.recovery.describe() if service and service.recovery else None
    epoch = service.epoch if service else None
    requests = loop.requests if loop else ()
    return ReplicaState(
        state=replica.state,
        problem=repair.cause if repair else "",
        epoch=epoch.plan.epoch if epoch else 0,
        stages=describe_stages(service.adapters.adjust(epoch.plan), epoch.stages, loop) if service and epoch else (),
        requests=requests,
        lane_sizes=loop.lane_sizes if loop else (),
        queued=sum(request.state is RequestState.QUEUED for request in requests),
        prefixes=loop.prefixes if loop else 0,
    )
