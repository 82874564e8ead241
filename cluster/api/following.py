"""Stand by: follow the coordinator that leads, pass what clients want on to it, and return once elected."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import TracebackType

import anyio

from cluster.api.coordinator_process import CoordinatorProcess
from cluster.api.grpc.authority_service import add_authority_service
from cluster.api.grpc.inference_service import client_name
from cluster.api.grpc.leader_service import LeaderServicer
from cluster.api.http.standby_routes import standby_routes
from cluster.api.passing.passed_calls import PassedCalls
from cluster.api.ports import bind_public
from cluster.coordinator.identity import read_coordinator_id
from cluster.coordinator.model_reader import ModelReader
from cluster.coordinator.replicated_service import ReplicatedService
from cluster.coordinator.reporter import Reporter
from cluster.coordinator.roster import Roster
from cluster.core.errors import MemberRemoved
from cluster.core.limits import DEFAULT_COORDINATOR_PORT
from cluster.core.text import format_address
from cluster.discovery.coordinator_announcement import look_for_coordinator
from cluster.discovery.interfaces import LOOPBACK
from cluster.security.cluster_choice import remembered_coordinator
from cluster.security.credentials import open_trust
from cluster.security.removal import removed_error
from cluster.security.trust import COORDINATOR, Trust
from cluster.standby.follow_stream import FollowStream
from cluster.standby.model_fit import ModelFit
from cluster.standby.replica_folder import ReplicaFolder
from cluster.standby.standby import Standby, Succession
from cluster.store.store import Store
from cluster.transport.byte_budget import ByteBudget
from cluster.transport.grpc_setup import public_server
from cluster.v1.leader_pb2_grpc import add_LeaderServiceServicer_to_server

__all__ = ["follow"]

log = logging.getLogger(__name__)


async def follow(process: CoordinatorProcess, report: Reporter, patience_s: float) -> Succession:
    """Follow whoever leads. Return once this process has been elected; its gRPC port is closed then.

    Do not stand for election in the first ``patience_s`` seconds. Raises ``MemberRemoved`` once this Mac was removed
    from the cluster.
    """
    settings = process.settings
    trust = open_trust(settings.home, settings.cluster, COORDINATOR)
    async with AsyncExitStack() as stack:
        replica = stack.enter_context(ReplicaFolder(settings.home, settings.cluster))
        reader = ModelReader(Store(settings.home))
        stack.push_async_exit(partial(_close_unless_elected, reader))

        def create_roster(service: ReplicatedService) -> Roster:
            return process.create_roster(read_coordinator_id(settings.home, settings.cluster), service)

        standby = Standby(
            process.others,
            replica,
            lambda address: FollowStream(address, trust, process.others.me, replica),
            create_roster,
            ModelFit(reader),
            await stack.enter_async_context(_find_coordinators(process)),
            process.lag,
        )
        await stack.enter_async_context(_standby_port(process, trust, standby))
        report.problem(f"standing by for cluster {settings.cluster} on {process.others.me.addresses[0]}")
        try:
            return await standby.run(patience_s)
        except MemberRemoved as e:
            raise removed_error(settings.cluster, COORDINATOR, e.sentence) from None


async def _close_unless_elected(
    reader: ModelReader, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
) -> None:
    """Close the reader if ``follow`` ends by an error, which a cancellation is, too."""
    if error:
        with anyio.CancelScope(shield=True):
            await reader.close()


@asynccontextmanager
async def _find_coordinators(process: CoordinatorProcess) -> AsyncIterator[Callable[[], list[str]]]:
    """Yield what returns where coordinators may be: as named, as remembered, and as they are announced now."""
    settings = process.settings
    known = [*settings.coordinators, remembered_coordinator(settings.home, settings.cluster) or ""]
    if process.names is None:
        known.append(format_address(LOOPBACK, DEFAULT_COORDINATOR_PORT))
        yield lambda: [address for address in known if address]
        return
    async with look_for_coordinator(process.names.cluster_id) as source:
        yield lambda: [*filter(None, known), *(sighting.address for sighting in source.current())]


@asynccontextmanager
async def _standby_port(process: CoordinatorProcess, trust: Trust, standby: Standby) -> AsyncIterator[None]:
    """Answer other coordinators, and pass the calls and requests of clients on to the one that leads.

    What is asked about this process itself is answered here.
    """
    settings = process.settings
    own = standby_routes(lambda: standby.state, process.metrics, process.http.keys, process.http.sites)
    leader, server = process.pass_on_http(own), public_server(trust)
    add_LeaderServiceServicer_to_server(LeaderServicer(process.others, settings.home, settings.cluster), server)
    add_authority_service(server, settings, trust)
    server.add_generic_rpc_handlers((PassedCalls(leader, ByteBudget(), partial(client_name, trust)),))
    addresses = bind_public(server, settings, trust)
    await server.start()
    process.listen_on(addresses)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await server.stop(grace=None)
