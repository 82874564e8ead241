"""`macpipe serve`: one task group that runs discovery, the coordinator and the public ports until a signal."""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import anyio
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]  # made by a star import
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from cluster.api.background_load import BackgroundLoad, LoadTracker
from cluster.api.cluster_feed import ClusterFeed
from cluster.api.coordinator_process import CoordinatorProcess, Leading
from cluster.api.following import follow
from cluster.api.grpc.authority_service import AUTHORITY, add_authority_service
from cluster.api.grpc.cluster_service import ClusterServicer
from cluster.api.grpc.inference_service import InferenceServicer, client_name
from cluster.api.http.app import application
from cluster.api.http.middleware import RequestMiddleware
from cluster.api.http.port_settings import hosts_certified_elsewhere, http_port
from cluster.api.join_admission import admit_while_holder
from cluster.api.key_usage import KeyUsage
from cluster.api.metrics import Metrics
from cluster.api.models_watch import ModelsWatch
from cluster.api.ports import HttpFront, bind_public, serve_http
from cluster.api.prefix_owners import prefix_owners
from cluster.api.request_service import RequestService
from cluster.coordinator.certificate_issuer import CertificateIssuer
from cluster.coordinator.certificate_rotation import CertificateRotation
from cluster.coordinator.cluster_stores import ClusterStores
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.epoch_numbers import EpochNumbers
from cluster.coordinator.examinations import Examinations
from cluster.coordinator.identity import hold_identity, state_folder
from cluster.coordinator.model_catalog import DEFAULT, ModelCatalog, ModelEntry
from cluster.coordinator.models_file import ModelsFile
from cluster.coordinator.on_demand import OnDemand
from cluster.coordinator.reporter import Reporter
from cluster.coordinator.roster import Roster
from cluster.coordinator.settings import ServeSettings
from cluster.core.cluster_state import ServingState
from cluster.core.errors import LoadEnded, MacpipeError, NotLeader
from cluster.core.limits import GONE_S, HEARTBEAT_S, RETURN_S, SHUTDOWN_GRACE_S
from cluster.core.term_limits import LEASE_S
from cluster.core.text import is_loopback, parse_address
from cluster.discovery.browse import browse
from cluster.discovery.cluster_name import announce_cluster_name
from cluster.discovery.coordinator_announcement import announce_coordinator
from cluster.discovery.interfaces import LOOPBACK
from cluster.discovery.static import merge_sources, static_source
from cluster.platform.private_files import protect_home
from cluster.platform.process import first_error, stop_on_signal
from cluster.platform.sleep import stay_awake
from cluster.security.cluster_choice import remember_coordinator
from cluster.security.credentials import open_trust
from cluster.security.members import require_roster
from cluster.security.removal import await_removal, require_member
from cluster.security.trust import COORDINATOR, Trust
from cluster.standby.leadership_upkeep import LeadershipUpkeep
from cluster.standby.own_certificates import OwnCertificates
from cluster.standby.standby import Succession
from cluster.store.store import Store
from cluster.transport.grpc_setup import public_server
from cluster.transport.grpc_streams import GrpcDialer
from cluster.transport.message_bounds import MessageBounds
from cluster.v1 import cluster_pb2, inference_pb2
from cluster.v1.cluster_pb2_grpc import add_ClusterServiceServicer_to_server
from cluster.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from cluster.v1.leader_pb2_grpc import add_LeaderServiceServicer_to_server

log = logging.getLogger(__name__)

DESCRIPTORS = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"],
)
SERVICES = tuple(service.full_name for service in DESCRIPTORS)


@dataclass(frozen=True, slots=True)
class Services:
    """What the public port serves."""

    requests: RequestService
    cluster: ClusterServicer
    http: RequestMiddleware
    checks: health.HealthServicer = field(default_factory=health.HealthServicer)


def run(settings: ServeSettings, report: Reporter, file: ModelsFile | None = None) -> int:
    """Serve until SIGINT or SIGTERM, then return the exit code. Raises ``MacpipeError`` if serving cannot start.

    ``file`` is where the models of ``settings`` come from; its changes are taken up.
    """
    try:
        anyio.run(_run, settings, report, file)
    except* MacpipeError as group:
        raise first_error(group) from None
    return 0


async def _run(settings: ServeSettings, report: Reporter, file: ModelsFile | None) -> None:
    """Lead, or stand by until this process is elected; and again, whenever another coordinator leads."""
    if settings.home:
        protect_home(settings.home)
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(anyio.create_task_group())
        tasks.start_soon(stop_on_signal, tasks.cancel_scope)
        source = static_source(settings.peers)
        if not settings.peers_only:
            source = merge_sources(source, await stack.enter_async_context(browse(settings.cluster)))
        trust = open_trust(settings.home, settings.cluster, COORDINATOR)
        require_member(trust, settings.cluster, COORDINATOR)
        tasks.start_soon(await_removal, trust, settings.cluster, COORDINATOR)
        certificates = OwnCertificates(trust, hosts_certified_elsewhere(settings))
        await certificates.renew_by_any(settings.coordinators)
        http, front = http_port(settings), HttpFront()
        await stack.enter_async_context(serve_http(settings, http, front, report))
        process = CoordinatorProcess.create(settings, source, trust, http, front)
        tasks.start_soon(certificates.run, process.authority_addresses)
        if trust.me:
            await tasks.start(admit_while_holder, settings, trust, report)
        follows, patience_s = settings.standby or await process.others.find_leader(process.others.addresses), 0.0
        while True:
            taken = await follow(process, report, patience_s) if follows else None
            try:
                await _lead(process, report, None if taken else file, taken)
            except* NotLeader as group:
                report.problem(first_error(group).sentence)
            follows, patience_s = True, GONE_S + LEASE_S  # whoever takes its place goes first


async def _lead(
    process: CoordinatorProcess, report: Reporter, file: ModelsFile | None, taken: Succession | None
) -> None:
    """Serve until another coordinator leads by a higher term. ``taken`` is what an elected standby goes on with."""
    settings = process.settings_of(taken)
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(anyio.create_task_group())
        own_id = stack.enter_context(hold_identity(settings.home, settings.cluster))
        epochs = _epochs(settings)
        roster = process.begin(own_id, epochs, taken)
        trust = roster.trust
        require_roster(trust.members, settings.cluster)
        tracker = LoadTracker(report)
        coordinator = _coordinator(process, settings, roster, tracker, epochs, taken)
        leading = process.replicate(settings, coordinator, roster, taken)
        keys = process.http.keys
        coordinator.prefix_owners = partial(prefix_owners, keys, trust)
        key_usage = KeyUsage(keys) if keys else None
        on_demand = OnDemand(coordinator, settings.load_wait_s)
        coordinator.make_way = on_demand.make_way
        if taken and taken.had_loaded_default:
            coordinator.deployments.lead_change.begin_return()
        metrics = Metrics(process.metrics)
        service = RequestService(coordinator, metrics, key_usage, on_demand=on_demand, strict=settings.strict)
        tasks.start_soon(service.end_revoked)
        loads, feed = BackgroundLoad(coordinator, tracker, on_demand), ClusterFeed()
        app = application(service, process.http.sites, loads, feed, settings.order)
        process.front.answer_by(app)
        stack.callback(feed.close)
        issuer = process.issuer(trust)
        services = Services(service, _cluster_servicer(coordinator, roster, settings, on_demand, issuer), app)
        await leading.upkeep.publish()
        addresses = await stack.enter_async_context(_public_port(leading, trust, services))
        process.listen_on(addresses)
        log.info("leader: listening term=%d address=%s", roster.terms.number, addresses[0])
        leading.loads.push_async_callback(loads.close)
        leading.loads.push_async_callback(on_demand.close)
        tasks.start_soon(_update_health, coordinator, services.checks, on_demand)
        tasks.start_soon(on_demand.run)
        tasks.start_soon(stay_awake, lambda: coordinator.is_busy)
        if issuer:
            tasks.start_soon(CertificateRotation(roster, coordinator.members, issuer).run)
        tasks.start_soon(leading.replicator.run)
        tasks.start_soon(_stay_leader, leading.upkeep, tasks.cancel_scope)
        await _load_first(coordinator, settings, report, process, taken)
        coordinator.deployments.lead_change.end_return()
        log.info("leader: serving term=%d model=%s", roster.terms.number, settings.order.model)
        models = ModelsWatch(coordinator, file, report, on_demand)
        await models.load_pinned()
        leading.coming.clear()
        tasks.start_soon(models.run)
        gc.freeze()  # a full collection would look at a million objects of the libraries: 0.1 s for every thread
        plan, _ = await coordinator.plan_and_view()
        if trust.me:  # not before, so that one that cannot serve does not take the place of one that does
            remember_coordinator(settings.home, settings.cluster, addresses[0])
        if plan:
            catalog = coordinator.catalog
            names = [catalog.public_name(entry) for entry in catalog] if len(catalog.entries) > 1 else []
            report.serving(addresses, plan, process.front.url, names)
        await anyio.sleep_forever()


def _coordinator(
    process: CoordinatorProcess,
    settings: ServeSettings,
    roster: Roster,
    tracker: LoadTracker,
    epochs: EpochNumbers,
    taken: Succession | None,
) -> Coordinator:
    """Return the coordinator of the models that the settings name. Nothing is loaded yet."""
    coordinator = Coordinator(
        settings.cluster,
        roster,
        GrpcDialer(roster.trust, process.lag, lambda: roster.terms.number),
        tracker,
        Store(settings.home),
        settings.max_schema_bytes,
        epochs,
        process.lag,
        taken.reader if taken else None,
    )
    coordinator.adopt_catalog(_catalog(settings))
    if taken:
        coordinator.deployments.expect_guests(taken.service.loaded_guests)
    return coordinator


def _cluster_servicer(
    coordinator: Coordinator,
    roster: Roster,
    settings: ServeSettings,
    on_demand: OnDemand,
    issuer: CertificateIssuer | None,
) -> ClusterServicer:
    examinations = Examinations(roster, coordinator.members)
    stores = ClusterStores(roster, coordinator.members, settings.home)
    return ClusterServicer(coordinator, roster.trust, settings.order, examinations, stores, on_demand, issuer)


async def _stay_leader(upkeep: LeadershipUpkeep, scope: anyio.CancelScope) -> None:
    """Cancel ``scope`` once another coordinator leads by a higher term."""
    await upkeep.run()
    scope.cancel()


async def _load_first(
    coordinator: Coordinator,
    settings: ServeSettings,
    report: Reporter,
    process: CoordinatorProcess,
    taken: Succession | None,
) -> None:
    """Load the default model; in place of another leader, what is left of it, as often as it takes: soon at first.

    Raises ``MacpipeError`` unless another coordinator leads by a higher term: then the caller is about to be cancelled.
    """
    pause_s = HEARTBEAT_S
    while taken is None or taken.had_loaded_default:
        try:
            await coordinator.load(settings.order, again=taken is not None)
            return
        except LoadEnded as e:
            report.problem(e.sentence)
            return
        except MacpipeError as e:
            await process.others.find_leader(process.others.addresses)
            if process.others.is_superseded:  # one that leads by a lower term gives way to this process
                await anyio.sleep_forever()
            if taken is None:
                raise
            report.problem(f"cannot go on with {settings.order.model} yet: {e.sentence}")
        await anyio.sleep(pause_s)
        pause_s = min(2 * pause_s, RETURN_S)


def _catalog(settings: ServeSettings) -> ModelCatalog:
    """Return the models that the settings name. Raises ``InvalidOption``."""
    return ModelCatalog(settings.models or (ModelEntry(DEFAULT, settings.order),))


def _epochs(settings: ServeSettings) -> EpochNumbers:
    """Return the epoch numbers, stored beside this coordinator's id if it has a home folder."""
    home = settings.home
    return EpochNumbers(state_folder(home, settings.cluster) / "epoch" if home else None)


@asynccontextmanager
async def _public_port(leading: Leading, trust: Trust, services: Services) -> AsyncIterator[tuple[str, ...]]:
    """Serve gRPC and yield the addresses, the one for this Mac first.

    The port answers status and health while the model still loads.

    On exit the coordinator stops first, so that live requests end with its error and not with a broken connection.
    """
    settings, requests = leading.process.settings, services.requests
    bounds = MessageBounds((*DESCRIPTORS, AUTHORITY), requests.bodies, partial(client_name, trust))
    server = public_server(trust, bounds)
    add_InferenceServiceServicer_to_server(InferenceServicer(requests, trust), server)
    add_ClusterServiceServicer_to_server(services.cluster, server)
    add_LeaderServiceServicer_to_server(leading.servicer(services.http.behind_standby()), server)
    add_authority_service(server, settings, trust)
    add_HealthServicer_to_server(services.checks, server)
    reflection.enable_server_reflection((*SERVICES, HEALTH, reflection.SERVICE_NAME), server)
    addresses = bind_public(server, settings, trust)
    await server.start()
    problem: NotLeader | None = None
    try:
        async with _announced(leading.process, *parse_address(addresses[-1])):
            yield addresses
    except NotLeader as e:
        problem = e
        raise
    finally:
        with anyio.CancelScope(shield=True):
            await leading.stop(problem)
            await server.stop(grace=SHUTDOWN_GRACE_S)


@asynccontextmanager
async def _announced(process: CoordinatorProcess, host: str, port: int) -> AsyncIterator[None]:
    """Announce the port to the clients of this cluster, if there is one, and the cluster's own host name."""
    names = process.names
    if names is None:
        yield
        return
    async with (
        announce_coordinator(cluster_id=names.cluster_id, host=host, port=port),
        announce_cluster_name(names.cluster, _host_of_name(process.settings, host), port),
    ):
        yield


def _host_of_name(settings: ServeSettings, host: str) -> str:
    """Return the host to which the cluster's name leads: that of HTTP if it is on the network, else gRPC's ``host``."""
    http = settings.http.address[0] if settings.http.address else LOOPBACK
    return host if is_loopback(http) else http


async def _update_health(coordinator: Coordinator, checks: health.HealthServicer, on_demand: OnDemand) -> None:
    """Keep grpc.health.v1 up to date: SERVING only once a token has passed through every stage of the default model.

    A model that left later, and that a request would load, counts as served.
    """
    while True:
        state = coordinator.default_state
        serving = state is ServingState.SERVING or (state is ServingState.IDLE and on_demand.would_load(None))
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *SERVICES):
            await checks.set(service, status)
        await coordinator.changed.wait()
        coordinator.changed.clear()
