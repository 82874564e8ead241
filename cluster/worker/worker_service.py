"""The worker's control plane: implements WorkerService with its supervisor. It only translates."""

from __future__ import annotations

import platform
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import grpc

from cluster import __version__
from cluster.codec.group_port import encode_rdma_ports
from cluster.codec.stored_models import encode_store
from cluster.codec.worker_info import encode_info
from cluster.core.adapter import MAX_ADAPTER_KEY_CHARS, MAX_ADAPTERS, AdapterRef
from cluster.core.errors import InvalidRequest, MacpipeError
from cluster.core.limits import (
    LOAD_STALL_S,
    MAX_KEPT,
    MAX_PATH_CHARS,
    MAX_ROSTER,
    MAX_STAGE_PEERS,
    OVERLOADED_S,
)
from cluster.core.link_limits import MAX_DATA_HOSTS
from cluster.core.prefix_limits import DISK_READ_S, MAX_DISK_OWNERS
from cluster.core.stored_models import MacStore
from cluster.core.text import is_ip_address, parse_address
from cluster.core.worker import WorkerInfo
from cluster.discovery.interfaces import interface_of
from cluster.doctor.rdma_ports import read_rdma_ports
from cluster.membership.terms import Process
from cluster.platform.macos import MachineFacts, memory_pressure
from cluster.platform.overload import Lag, no_lag
from cluster.platform.power import PowerReading, no_power
from cluster.security.limits import MAX_REVOKED
from cluster.security.trust import COORDINATOR, Trust
from cluster.store.stored_models import list_models, remove_model, store_id
from cluster.transport.rich_errors import abort
from cluster.v1 import worker_pb2 as pb
from cluster.v1.worker_pb2_grpc import WorkerServiceServicer
from cluster.worker.engine_calls import EngineCalls
from cluster.worker.engine_slots import EngineSlots, SlotReport
from cluster.worker.examiner import Examiner
from cluster.worker.group_joins import GroupJoins, require_group_addresses
from cluster.worker.peer_links import PeerLinks, choose_shared
from cluster.worker.pipe_messages import (
    LinkStage,
    OpenPrefixes,
    PrefixesOpened,
    ReadPrefix,
    SetAdapters,
)
from cluster.worker.profile_file import ProfileFile
from cluster.worker.settings import WorkerSettings
from cluster.worker.slice_description import describe_slices, find_problem
from cluster.worker.stage_loader import StageLoader
from cluster.worker.sum_probe import SumProbe
from cluster.worker.term_file import term_file
from cluster.worker.term_keeper import TermKeeper

if TYPE_CHECKING:
    from cluster.security.certificate_renewal import Renewal

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_RELEASE_INTERVAL_S = 0.05
"""Interval of checks whether a coordinator still needs a worker that stops."""


@dataclass
class WorkerServicer(WorkerServiceServicer):
    """Serves the coordinator."""

    id: str
    settings: WorkerSettings
    trust: Trust
    slots: EngineSlots
    loader: StageLoader
    file: ProfileFile
    machine: MachineFacts
    lag: Lag = no_lag
    read_power: Callable[[], PowerReading] = no_power
    instance: str = field(default_factory=lambda: secrets.token_hex(8))
    draining: bool = False
    stopping: bool = False
    removed: anyio.Event = field(default_factory=anyio.Event)
    """Set once this Mac was removed from its cluster."""
    keeper: InitVar[TermKeeper | None] = None
    """Of the term that this worker granted; by default a new one."""

    def __post_init__(self, keeper: TermKeeper | None) -> None:
        """Look up the interface once, not at every heartbeat: the bound address does not change."""
        self.terms = keeper or TermKeeper(term_file(self.settings.home, self.settings.name), self.slots, self.lag)
        self._interface = self.settings.interface or interface_of(self.settings.host)
        self._examiner = Examiner(self.settings.home)
        self._using_store = anyio.Lock()
        self._links = PeerLinks(self.trust, self.file)
        self._joins = GroupJoins(self.lag, read_rdma_ports if self.settings.rdma else tuple)
        self._sums = SumProbe(self.slots, self._joins, self.file)
        self.loader.store_server.in_use = self.slots.fingerprints

    @property
    def is_busy(self) -> bool:
        """Whether requests run on this worker or layers are loaded: this Mac must not go to sleep."""
        return self.slots.loading or any(slot.supervisor.has_work for slot in self.slots)

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        await self._learn_revoked(request, context)
        if request.coordinator:
            self.terms.hear(Process(request.coordinator, request.instance), request.term)
        reports = await self.slots.report()
        info = await self._describe(reports)
        return encode_info(info, data_port=self.slots.hello.port, problem=find_problem(reports), clock=time.time())

    def _first_held(self) -> pb.LoadStageRequest | None:
        """Return the request of the first slice; None if no engine holds one."""
        return next((slot.held for slot in self.slots.held), None)

    async def _describe(self, reports: Sequence[SlotReport]) -> WorkerInfo:
        hello, slices = self.slots.hello, describe_slices(reports)  # after the report: a dead engine holds nothing
        held = self._first_held() or pb.LoadStageRequest()
        report = reports[0].report
        power = self.read_power()
        info = WorkerInfo(
            id=self.id,
            name=self.settings.name,
            version=__version__,
            control_address="",
            data_address="",
            chip=_named_chip(hello.chip, self.settings.throttle),
            backend=hello.backend,
            mlx_version=f"{hello.mlx_version} mlx-lm {hello.mlx_lm_version}",
            memory_total=hello.memory_total,
            memory_limit=hello.memory_limit,
            memory_used=sum(r.report.memory_used for r in reports),
            memory_peak=sum(r.report.memory_peak for r in reports),
            sequences=sum(r.report.sequences for r in reports),
            interface=self._interface,
            gpu_cores=self.machine.gpu_cores,
            macos_version=self.machine.macos_version,
            memory_pressure=await anyio.to_thread.run_sync(memory_pressure) if platform.system() == "Darwin" else "",
            draining=self.draining or self.stopping,
            lag_seconds=lag_s if (lag_s := self.lag()) >= OVERLOADED_S else 0.0,
            power_watts=power.watts,
            energy_joules=power.joules,
            cluster=self.settings.cluster,
            slices=slices,
            data_hosts=report.data_hosts,
            owner=held.coordinator,
            live_owner=self.terms.leader,
            live_owner_process=self.terms.leader_process,
            term=self.terms.number,
            instance=self.instance,
            profile=self.file.kept.profile,
            stopping=self.stopping,
            certificate=self.trust.validity,
            prefix_disk_limit=self.settings.prefix_disk,
            prefix_disk_bytes=report.prefix_disk_bytes,
            prefix_disk_evictions=report.prefix_disk_evictions,
        )
        return info.showing(slices[0]) if slices else info

    async def _learn_revoked(self, request: pb.DescribeRequest, context: Context) -> None:
        """Learn revoked certificates, but only from the cluster's coordinator."""
        revocations = self.trust.revocations
        shown: Any = context.auth_context()
        party = self.trust.party(shown) if revocations else None
        if revocations and party and party.role == COORDINATOR:
            revoked = {int.from_bytes(serial) for serial in request.revoked[:MAX_REVOKED]}
            if not revoked <= revocations.known():
                await anyio.to_thread.run_sync(revocations.learn, revoked)
            if self.trust.serial in revoked:
                self.removed.set()

    async def GrantTerm(self, request: pb.GrantTermRequest, context: Context) -> pb.GrantTermResponse:
        try:
            return await self.terms.answer(request)
        except MacpipeError as e:
            await abort(context, e)

    async def NameInSync(self, request: pb.NameInSyncRequest, context: Context) -> pb.NameInSyncResponse:
        try:
            await self.terms.name_in_sync(request)
        except MacpipeError as e:
            await abort(context, e)
        return pb.NameInSyncResponse()

    async def LoadStage(self, request: pb.LoadStageRequest, context: Context) -> AsyncIterator[pb.LoadStageResponse]:
        await _require_names(context, request.model, request.path, request.fingerprint, request.repo, request.commit)
        await _require_names(context, request.coordinator, request.instance)
        await _require_few_peers(context, request.peers)
        await _require_few_kept(context, request.keep)
        port = 0
        try:
            self.terms.refuse_others(request)
            self.terms.require(request.term)
            self.terms.accept_epoch(request.epoch)
            async with self.slots.load(request) as slot:
                if slot.is_rank:
                    joins = self._joins.join(slot.supervisor, request.epoch, request.rank, request.ranks)
                    async with aclosing(joins) as joining:
                        async for held in joining:
                            ports = encode_rdma_ports(held)
                            yield pb.LoadStageResponse(state="grouping", group_port=held.number, rdma_ports=ports)
                calls = EngineCalls(slot, self.slots.hello, request, self.terms.require)
                async with aclosing(self.loader.stage(request, calls)) as events:
                    async for event in events:
                        yield event
                port = slot.supervisor.hello.port if slot.supervisor.hello else 0
        except MacpipeError as e:
            await abort(context, e)
        self.terms.hear(Process(request.coordinator, request.instance), request.term)
        yield pb.LoadStageResponse(ready=True, data_port=port)

    async def JoinGroup(self, request: pb.JoinGroupRequest, context: Context) -> pb.JoinGroupResponse:
        try:
            self.terms.require(request.term)
            await self._joins.deliver(request.epoch, require_group_addresses(request))
        except MacpipeError as e:
            await abort(context, e)
        return pb.JoinGroupResponse()

    async def MeasureSums(
        self, request: pb.MeasureSumsRequest, context: Context
    ) -> AsyncIterator[pb.MeasureSumsResponse]:
        try:
            if request.ranks:
                self.terms.require(request.term)
            async with aclosing(self._sums.answer(request)) as answers:
                async for answer in answers:
                    yield answer
        except MacpipeError as e:
            await abort(context, e)

    async def SetAdapters(
        self, request: pb.SetAdaptersRequest, context: Context
    ) -> AsyncIterator[pb.SetAdaptersResponse]:
        if len(request.adapters) > MAX_ADAPTERS:
            await abort(context, InvalidRequest(f"a stage has at most {MAX_ADAPTERS} adapters", field="adapters"))
        await _require_names(context, *(a.path for a in request.adapters))
        await _require_few_peers(context, request.peers)
        if any(len(a.name) + len(a.fingerprint) >= MAX_ADAPTER_KEY_CHARS for a in request.adapters):
            await abort(context, InvalidRequest("an adapter's name or fingerprint is too long", field="adapters"))
        try:
            self.terms.refuse_others(request)
            self.terms.require(request.term)
            held = (await self.slots.holder(request.epoch).supervisor.report()).adapters
            async with aclosing(self.loader.adapters(request, held)) as events:
                async for event in events:
                    if isinstance(event, pb.SetAdaptersResponse):
                        yield event
                    else:
                        await self._hold_adapters(request.epoch, event)
        except MacpipeError as e:
            await abort(context, e)
        yield pb.SetAdaptersResponse(ready=True)

    async def _hold_adapters(self, epoch: int, refs: Sequence[AdapterRef]) -> None:
        names, folders = tuple(ref.name for ref in refs), tuple(ref.path for ref in refs)
        fingerprints = tuple(ref.fingerprint for ref in refs)
        supervisor = self.slots.holder(epoch).supervisor
        await supervisor.ask(lambda call: SetAdapters(call, epoch, names, folders, fingerprints), LOAD_STALL_S)

    async def LinkStage(self, request: pb.LinkStageRequest, context: Context) -> pb.LinkStageResponse:
        r, supervisor = request, self.slots.holder(request.epoch).supervisor
        others = await _require_addresses(context, r.pull_from, r.others) if r.pull_from else []
        try:
            self.terms.require(r.term)
            if not r.pull_from:
                await supervisor.ask(lambda call: LinkStage(call, r.epoch, "", ""))
                return pb.LinkStageResponse()
            link = await self._links.pull(
                r.peer.partition(".")[2],
                r.pull_from,
                others,
                lambda address: supervisor.ask(lambda call: LinkStage(call, r.epoch, address, r.peer, r.reader)),
            )
        except MacpipeError as e:
            await abort(context, e)
        if link is None:
            return pb.LinkStageResponse()
        return pb.LinkStageResponse(round_trip_s=link.round_trip_s, bandwidth=link.bandwidth, interface=link.interface)

    async def OpenPrefixes(self, request: pb.OpenPrefixesRequest, context: Context) -> pb.OpenPrefixesResponse:
        await _require_names(context, request.edition)
        if len(request.owners) > MAX_DISK_OWNERS:
            await abort(context, InvalidRequest(f"at most {MAX_DISK_OWNERS} owners may have prefixes", field="owners"))
        owners = "\n".join(request.owners)
        try:
            self.terms.require(request.term)
            opened = await self.slots.holder(request.epoch).supervisor.ask(
                lambda call: OpenPrefixes(call, request.epoch, request.edition, owners, request.anonymous)
            )
        except MacpipeError as e:
            await abort(context, e)
        assert isinstance(opened, PrefixesOpened)
        return pb.OpenPrefixesResponse(beginnings=opened.beginnings)

    async def ReadPrefix(self, request: pb.ReadPrefixRequest, context: Context) -> pb.ReadPrefixResponse:
        await _require_names(context, request.owner, request.adapter)
        r = request
        try:
            self.terms.require(r.term)
            await self.slots.holder(r.epoch).supervisor.ask(
                lambda call: ReadPrefix(call, r.epoch, r.prefix, r.owner, r.adapter, r.beginning, r.length), DISK_READ_S
            )
        except MacpipeError as e:
            await abort(context, e)
        return pb.ReadPrefixResponse()

    async def UnloadStage(self, request: pb.UnloadStageRequest, context: Context) -> pb.UnloadStageResponse:
        await _require_few_kept(context, request.keep)
        try:
            self.terms.refuse_others(request)
            self.terms.require_process(request)
            await self.slots.unload(request)
        except MacpipeError as e:
            await abort(context, e)
        self.terms.release()
        return pb.UnloadStageResponse()

    async def MeasureLink(self, request: pb.MeasureLinkRequest, context: Context) -> pb.MeasureLinkResponse:
        await _require_names(context, request.worker, request.address)
        r, others = request, await _require_addresses(context, request.address, request.others)
        try:
            link = await self._links.measure(r.worker, r.address, others, afresh=r.afresh)
        except MacpipeError as e:
            await abort(context, e)
        return pb.MeasureLinkResponse(
            round_trip_s=link.round_trip_s, bandwidth=link.bandwidth, interface=link.interface, address=link.address
        )

    async def DrainWorker(self, request: pb.DrainWorkerRequest, context: Context) -> pb.DrainWorkerResponse:
        try:
            self.terms.refuse_others(request)
        except MacpipeError as e:
            await abort(context, e)
        self.draining = not request.undo
        return pb.DrainWorkerResponse()

    async def wait_released(self) -> None:
        """Report from now on that this worker stops; return once no coordinator needs it any more."""
        self.stopping = True
        while True:
            if not self.terms.is_needed:
                return
            await anyio.sleep(_RELEASE_INTERVAL_S)

    async def ResetEngine(self, request: pb.ResetEngineRequest, context: Context) -> pb.ResetEngineResponse:
        try:
            self.terms.refuse_others(request)
            self.terms.require_process(request)
        except MacpipeError as e:
            await abort(context, e)
        self.slots.reset(request.epoch, request.why)
        return pb.ResetEngineResponse()

    async def RequestCertificate(
        self, request: pb.RequestCertificateRequest, context: Context
    ) -> pb.RequestCertificateResponse:
        renewal = await self._renewal(context)
        return pb.RequestCertificateResponse(request=await anyio.to_thread.run_sync(renewal.request))

    async def InstallCertificate(
        self, request: pb.InstallCertificateRequest, context: Context
    ) -> pb.InstallCertificateResponse:
        renewal = await self._renewal(context)
        try:
            await anyio.to_thread.run_sync(renewal.install, request.certificate)
        except MacpipeError as e:
            await abort(context, e)
        return pb.InstallCertificateResponse()

    async def _renewal(self, context: Context) -> Renewal:
        if (renewal := self.trust.renewal) is None:
            await abort(context, InvalidRequest("this worker is in no cluster and has no certificate"))
        return renewal

    async def Examine(self, request: pb.ExamineRequest, context: Context) -> pb.ExamineResponse:
        if len(request.members) > MAX_ROSTER:
            await abort(context, InvalidRequest(f"a cluster has at most {MAX_ROSTER} workers", field="members"))
        await _require_names(context, *(text for member in request.members for text in (member.name, member.address)))
        try:
            return await self._examiner.examine(request)
        except MacpipeError as e:
            await abort(context, e)

    async def ListStored(self, request: pb.ListStoredRequest, context: Context) -> pb.ListStoredResponse:
        home = self.settings.home
        async with self._using_store:
            self._close_unused_models()
            models = await anyio.to_thread.run_sync(list_models, home)
        store = MacStore(self.settings.name, str(home / "models"), store_id(home), models)
        return pb.ListStoredResponse(store=encode_store(store))

    async def RemoveStored(self, request: pb.RemoveStoredRequest, context: Context) -> pb.RemoveStoredResponse:
        async with self._using_store:
            self._close_unused_models()
            try:
                await anyio.to_thread.run_sync(remove_model, self.settings.home, request.fingerprint)
            except MacpipeError as e:
                await abort(context, e)
        return pb.RemoveStoredResponse()

    def _close_unused_models(self) -> None:
        """Close the models that are open only for other Macs to read, since an open one counts as in use.

        A stage uses its model, or a quantized copy of it; a load closes all others itself.
        """
        if not self.slots.loading and not self.slots.held:
            self.loader.store_server.release()

    async def LearnRatio(self, request: pb.LearnRatioRequest, context: Context) -> pb.LearnRatioResponse:
        await _require_names(context, request.fingerprint)
        self.file.store_correction(request.fingerprint, request.ratio)
        return pb.LearnRatioResponse()


def _named_chip(chip: str, throttle: float) -> str:
    """Return the chip's name, with the factor by which the worker is slowed down: it is not like others of its chip."""
    return chip if throttle == 1.0 else f"{chip}, {throttle:g} times slower"


async def _require_names(context: Context, *names: str) -> None:
    """Abort the call if a name or path is too long: some are stored, and repeated in every heartbeat."""
    if any(len(name) > MAX_PATH_CHARS for name in names):
        await abort(context, InvalidRequest(f"names and paths have at most {MAX_PATH_CHARS} characters"))


async def _require_addresses(context: Context, address: str, others: Sequence[str]) -> list[str]:
    """Return which further addresses of a data port this Mac shares. Abort the call for too many or invalid ones."""
    if len(others) > MAX_DATA_HOSTS:
        why = f"a data port has at most {MAX_DATA_HOSTS} further addresses, not {len(others)}"
        await abort(context, InvalidRequest(why, field="others"))
    try:
        valid = all(is_ip_address(parse_address(other)[0]) for other in others)
    except MacpipeError:
        valid = False
    if not valid:
        await abort(context, InvalidRequest("a further address is not an IP address and a port", field="others"))
    return choose_shared(address, others)


async def _require_few_peers(context: Context, peers: Collection[pb.StorePeer]) -> None:
    """Abort the call if it names too many Macs to ask for bytes."""
    if len(peers) > MAX_STAGE_PEERS:
        why = f"a stage's bytes may come from at most {MAX_STAGE_PEERS} Macs, not {len(peers)}"
        await abort(context, InvalidRequest(why, field="peers"))


async def _require_few_kept(context: Context, keep: Collection[int]) -> None:
    if len(keep) > MAX_KEPT:
        await abort(context, InvalidRequest(f"a request may keep at most {MAX_KEPT} epochs", field="keep"))
