"""What the two roles of a coordinator's process share: it leads, or it stands by, one after the other."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import anyio
from starlette.types import ASGIApp

from cluster.api.grpc.leader_service import LeaderServicer
from cluster.api.http.port_settings import HttpPort
from cluster.api.metrics import ProcessMetrics
from cluster.api.passing.leader_channel import LeaderChannel
from cluster.api.passing.passed_http import passing_application
from cluster.api.ports import HttpFront, addresses_for_others, url_for_others
from cluster.coordinator.certificate_issuer import CertificateIssuer
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.epoch_numbers import EpochNumbers
from cluster.coordinator.identity import state_folder
from cluster.coordinator.in_sync_names import InSyncNames
from cluster.coordinator.journal import Fsync, Journal
from cluster.coordinator.journal_writer import JournalWriter
from cluster.coordinator.lost_workers import KnownWorker
from cluster.coordinator.model_catalog import DEFAULT
from cluster.coordinator.replica_mark import ReplicaMark
from cluster.coordinator.replicated_service import SERVICE_FILE, ReplicatedService
from cluster.coordinator.replicator import Replicator
from cluster.coordinator.roster import Roster
from cluster.coordinator.settings import ServeSettings
from cluster.coordinator.state_files import StateFiles
from cluster.core.errors import MacpipeError, NotLeader, NotServing
from cluster.core.leadership import CoordinatorName, Replicate, StandbyState
from cluster.core.limits import DEFAULT_COORDINATOR_PORT, LOOP_STOP_S
from cluster.core.replication_limits import PREPARED_S, STOP_PREPARED_S
from cluster.discovery.interfaces import interfaces
from cluster.discovery.sighting import Source
from cluster.discovery.static import merge_sources, static_source
from cluster.platform.overload import Lag, TimerLag
from cluster.platform.paths import short_host_name
from cluster.security.authority import read_authority
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.credentials import open_trust
from cluster.security.removal import was_removed
from cluster.security.roles import Role
from cluster.security.trust import COORDINATOR, Trust
from cluster.standby.authority_holder import AuthorityClient
from cluster.standby.heir import choose_heir
from cluster.standby.leadership_upkeep import LeadershipUpkeep
from cluster.standby.leads_client import ask_over
from cluster.standby.other_coordinators import OtherCoordinators
from cluster.standby.standby import Succession

__all__ = ["CoordinatorProcess", "Leading"]

log = logging.getLogger(__name__)

_GO_ON: Final = "send the request again, or resume the answer there"
"""What a client does whose coordinator does not lead any more: over HTTP the first, over gRPC either."""


@dataclass(frozen=True, slots=True)
class ClusterNames:
    """The names in this Mac's certificate as a coordinator: its own, and the cluster's with its id."""

    own: str
    cluster: str
    cluster_id: str

    @staticmethod
    def read(settings: ServeSettings, trust: Trust) -> ClusterNames | None:
        """Return the names with which ``trust`` was opened; None without a cluster."""
        ring = ClusterFolder(settings.home, settings.cluster).keyring(Role.COORDINATOR) if trust.me else None
        if ring is None:
            return None
        return ClusterNames(ring.party.name, read_authority(ring.authority).cluster, ring.party.cluster_id)


@dataclass(frozen=True, slots=True)
class CoordinatorProcess:
    """One process. ``source`` has the workers' announcements, and ``trust`` is the one with which it asks others.

    ``front`` answers at its HTTP port. ``names`` is None without a cluster. ``lag`` is that of this machine, and
    ``metrics`` are those of the process itself.
    """

    settings: ServeSettings
    source: Source
    trust: Trust
    http: HttpPort
    front: HttpFront
    names: ClusterNames | None
    others: OtherCoordinators
    lag: Lag
    metrics: ProcessMetrics

    @staticmethod
    def create(
        settings: ServeSettings, source: Source, trust: Trust, http: HttpPort, front: HttpFront
    ) -> CoordinatorProcess:
        """Return the process of these settings, which knows the coordinators that it knew before.

        Others know it by its name as a member; without a cluster by the host's, and the port if it is unusual.
        """
        names, port = ClusterNames.read(settings, trust), settings.port
        alone = short_host_name() if port == DEFAULT_COORDINATOR_PORT else f"{short_host_name()}:{port}"
        name = names.own if names else alone
        file = state_folder(settings.home, settings.cluster) / "coordinators"
        others = OtherCoordinators(CoordinatorName(name, secrets.token_hex(8)), ask_over(trust), file)
        lag, metrics = TimerLag().start(), ProcessMetrics(time.time())
        return CoordinatorProcess(settings, source, trust, http, front, names, others, lag, metrics)

    def authority_addresses(self) -> tuple[str, ...]:
        """Return where the authority's holder may answer gRPC: where it was heard, else where the leader is."""
        leader = self.others.leader.addresses[:1] if self.others.leader else ()
        return AuthorityClient(self.trust, self.others).addresses() or leader

    def listen_on(self, addresses: tuple[str, ...]) -> None:
        """Note where this process listens now, as other Macs reach it."""
        local = interfaces()
        urls = tuple(url_for_others(url, local) for url in (self.front.url,) if url)
        self.others.me = replace(self.others.me, addresses=addresses_for_others(addresses, local), http=urls)

    def create_roster(self, coordinator_id: str, service: ReplicatedService | None = None) -> Roster:
        """Return a roster of the workers that are announced, and of those that ``service`` names, for a new process.

        Raises the errors of ``open_trust``.
        """
        settings, source = self.settings, self.source
        if service:
            source = merge_sources(static_source(service.workers), source)
        trust = open_trust(settings.home, settings.cluster, COORDINATOR)
        return Roster(source, settings.cluster, coordinator_id, trust)

    def pass_on_http(self, own: Mapping[str, ASGIApp] | None = None) -> LeaderChannel:
        """Have whoever leads answer at this HTTP port, but for the paths in ``own``. Return the channel to it."""
        leader = LeaderChannel(self.trust, lambda: self.others.leader, lambda: self.others.problem)
        self.front.answer_by(passing_application(leader, self.http.sites, own=own))
        return leader

    # Leading

    def issuer(self, trust: Trust) -> CertificateIssuer | None:
        """Return what issues certificates while this process leads; None without a cluster."""
        if trust.renewal is None or trust.members is None:
            return None
        return CertificateIssuer(trust.renewal.folder, trust.members, AuthorityClient(trust, self.others).renew)

    @property
    def _journal_file(self) -> Path:
        return state_folder(self.settings.home, self.settings.cluster) / "journal"

    def settings_of(self, taken: Succession | None) -> ServeSettings:
        """Return the settings to serve with: those of the process, with the service of the leader before it."""
        if taken is None:
            return self.settings
        service = taken.service
        return replace(
            self.settings,
            order=service.models[0].order,
            models=service.models,
            journal=service.journal,
            replicate=service.replicate,
            max_schema_bytes=service.max_schema_bytes,
            load_wait_s=service.load_wait_s,
            strict=service.strict,
        )

    def begin(self, coordinator_id: str, epochs: EpochNumbers, taken: Succession | None) -> Roster:
        """Return the roster to lead with. What the leader before left behind is used, if it may be."""
        if taken is None:
            return self.create_roster(coordinator_id)
        epochs.learn(taken.newest_epoch)
        taken.roster.inherited_epoch = epochs.last
        taken.roster.miss(taken.service.known)
        if not taken.may_resume:
            self._journal_file.unlink(missing_ok=True)
        return taken.roster

    def replicate(
        self, settings: ServeSettings, coordinator: Coordinator, roster: Roster, taken: Succession | None
    ) -> Leading:
        """Return what this process does as a leader beside serving. ``coordinator`` gets its journal.

        A process that was not elected cannot be sure that its copy of the journal is in sync, if there were others.
        """
        mode, mark = settings.replicate, ReplicaMark(settings.home, settings.cluster)
        mark.own()
        trusts_itself = taken or mode is not Replicate.SYNC or not self.others.addresses
        names = InSyncNames(
            roster.terms.process,
            [mark.id],
            lambda: roster.terms.number,
            roster.ring_workers,
            None if trusts_itself else lambda: roster.terms.in_sync,
            roster.spare_workers,
        )
        replicator = Replicator(mode, mark.id, names if mode else None, self.lag)
        if settings.journal or mode:
            coordinator.journal = JournalWriter(
                Journal(self._journal_file, settings.journal or Fsync.NEVER),
                replication=replicator if mode else None,
                gated=mode is Replicate.SYNC,
                lacks_earlier=taken is not None and not (mode and taken.may_resume),
            )
            if mode:
                replicator.attach(coordinator.journal)
                roster.on_taken = names.join
        roster.hears_coordinator = self.others.hears
        first = settings.models[0].name if settings.models else DEFAULT
        coming = [*(taken.service.loaded if taken else (first,))]
        files = StateFiles(settings.home, settings.cluster)
        upkeep = LeadershipUpkeep(
            self.others,
            roster,
            replicator,
            files,
            lambda: _describe_service(settings, coordinator, roster, coming),
            state_folder(settings.home, settings.cluster) / SERVICE_FILE,
        )
        coordinator.leadership = lambda: upkeep.state
        leading = Leading(self, coordinator, roster, replicator, upkeep, coming)
        coordinator.hand_over = leading.hand_over
        return leading


@dataclass(frozen=True, slots=True)
class Leading:
    """A process while it leads."""

    process: CoordinatorProcess
    coordinator: Coordinator
    roster: Roster
    replicator: Replicator
    upkeep: LeadershipUpkeep
    coming: list[str]
    """The names of the models that are loaded at first. Until that is done, a successor is to load them, too."""
    chosen: list[StandbyState] = field(default_factory=list)
    """The standby that was asked to take over, if one was."""
    loads: AsyncExitStack = field(default_factory=AsyncExitStack)
    """Ends the loads that run, which requests may wait for."""
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once nothing is recorded any more, before live requests end here."""

    async def hand_over(self, name: str) -> str:
        """Begin to hand over to the standby that ``name`` means, to one in sync for "". Return its name.

        It is first given time to read what it needs to lead: answers pause for that otherwise. Raises as
        ``choose_heir``.
        """
        await self._wait_prepared(self._choose_heir(name), PREPARED_S)
        heir = self._choose_heir(name)  # it may have left meanwhile
        self.chosen[:] = [heir]
        self.upkeep.end()
        return heir.name

    def _choose_heir(self, name: str) -> StandbyState:
        me, standbys = self.process.others.me, self.replicator.standbys()
        return choose_heir(name, me, standbys, any_copy=not self.replicator.mode)

    async def _wait_prepared(self, heir: StandbyState, most_s: float) -> None:
        if self.replicator.is_prepared(heir):
            return
        log.info("handover: waiting until the standby has read the model standby=%s most_s=%.0f", heir.name, most_s)
        if not await self.replicator.wait_prepared(heir, most_s):
            log.warning("handover: going on before the standby has read the model standby=%s", heir.name)

    def _best_heir(self, standbys: Sequence[StandbyState]) -> StandbyState:
        chosen = {one.name for one in self.chosen}
        return max(standbys, key=lambda one: (one.in_sync, one.name in chosen, self.replicator.is_prepared(one)))

    def servicer(self, http: ASGIApp) -> LeaderServicer:
        """Return the service for other coordinators, which pass HTTP requests to this application."""
        settings = self.process.settings
        return LeaderServicer(
            self.process.others,
            settings.home,
            settings.cluster,
            self.replicator,
            http,
            self.leaving,
            self.upkeep.publish,
            self.upkeep.confirm,
        )

    async def stop(self, problem: NotLeader | None = None) -> None:
        """Stop serving. If another coordinator leads, or a standby is there, leave it what it needs to go on.

        ``problem`` is why this process must not lead, if that ended it.
        """
        others = self.process.others
        if not others.is_superseded and not self.chosen and (following := self.replicator.standbys()):
            await self._wait_prepared(self._best_heir(following), STOP_PREPARED_S)
        standbys = self.replicator.standbys()
        superseded = others.is_superseded
        heir = self._best_heir(standbys) if standbys and not superseded else None
        self._log_step_down(heir, problem)
        self.upkeep.end()  # a standby that begins to follow now would have it claim to lead again
        others.stand_by()
        if self.chosen:  # else the whole process stops, or learns in a moment who leads
            self.process.pass_on_http()
        if not superseded and not heir:
            await self._close(NotServing("the coordinator is stopping"))
            return
        error = _handed_over(heir) if heir else _superseded(others.leader)
        await self._hold_loops()
        await self.replicator.stop(error, heir.name if heir else "")
        self.leaving.set()
        self.coordinator.deployments.lead_change.end(error)  # before loads fail since their workers have gone on
        await self.roster.terms.give_back()
        await self._close(error)

    async def _close(self, error: MacpipeError) -> None:
        """End the loads, then all requests with ``error``: a load could open the coordinator again."""
        self.coordinator.deployments.lead_change.end(error)
        await self.loads.aclose()
        await self.coordinator.close(error)

    def _log_step_down(self, heir: StandbyState | None, problem: NotLeader | None) -> None:
        """Log why this process leads no more, and who does as far as it is known; nothing if it just ends."""
        others, term = self.process.others, self.roster.terms.number
        why = problem.sentence if problem else ""
        if others.is_superseded and others.leader:
            values = (why or "higher term", term, others.leader.name, others.term)
            log.warning("leader: stepped down reason=%s term=%d leader=%s term_of_leader=%d", *values)
        elif heir or self.chosen or problem:
            ended = "removed" if was_removed(self.process.trust) else "stopped"
            why = why or ("handover" if self.chosen else ended)
            log.warning("leader: stepped down reason=%s term=%d leader=%s", why, term, heir.name if heir else "unknown")

    async def _hold_loops(self) -> None:
        """Have no token come any more, and all records of those that came be written."""
        deployments = self.coordinator.deployments.values()
        loops = [service.loop for deployment in deployments for service in deployment.services]
        for loop in loops:
            loop.hold()
        with anyio.move_on_after(LOOP_STOP_S), suppress(NotServing):
            for loop in loops:
                await asyncio.wrap_future(loop.view())  # behind all that was to be done before


def _describe_service(
    settings: ServeSettings, coordinator: Coordinator, roster: Roster, coming: Sequence[str]
) -> ReplicatedService:
    """Return what is served now, as another coordinator would go on with it. ``coming`` is loaded soon."""
    served = {model.name: model.order for model in coordinator.deployments.served() if model.order}
    loading = [deployment.name for deployment in coordinator.deployments.values() if deployment.is_loading]
    entries, guests = (
        tuple(replace(one, order=served.get(one.name, one.order)) for one in some)
        for some in (coordinator.catalog.entries, coordinator.catalog.guests)
    )
    return ReplicatedService(
        entries,
        tuple(dict.fromkeys((*coming, *served, *loading))),
        tuple(sorted(roster.addresses())),
        settings.journal,
        settings.replicate,
        settings.max_schema_bytes,
        settings.load_wait_s,
        settings.strict,
        _known_workers(coordinator, roster),
        guests,
    )


def _known_workers(coordinator: Coordinator, roster: Roster) -> tuple[KnownWorker, ...]:
    """Return who answers at the roster's addresses, or did until it was lost, sorted by address."""
    found = [*(entry.info for entry in roster.members), *coordinator.known_workers()]
    known = {one.control_address: KnownWorker(one.id, one.name, one.control_address) for one in found if one.id}
    return tuple(known[address] for address in sorted(roster.addresses()) if address in known)


def _superseded(leader: CoordinatorName | None) -> NotLeader:
    """Return the error of requests to a coordinator that was replaced."""
    addresses = leader.addresses if leader else ()
    name = leader.name if leader else "another coordinator"
    return NotLeader(f"{name} leads now; {_GO_ON}", retry_after_s=0.1, leader=",".join(addresses))


def _handed_over(heir: StandbyState) -> NotLeader:
    """Return the error of requests to a coordinator that stops, since a standby takes its place."""
    why = f"this coordinator stops, and {heir.name} takes its place; {_GO_ON}"
    return NotLeader(why, retry_after_s=1.0, leader=",".join(heir.addresses))
