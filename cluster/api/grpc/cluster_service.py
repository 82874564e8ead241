"""The gRPC ClusterService: cluster status, and loading, planning, unloading and draining."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

from cluster.api.grpc.training_stream import train
from cluster.codec.cluster_state import encode_adapter, encode_cluster_state
from cluster.codec.examination import encode_examination
from cluster.codec.plan import (
    decode_groups,
    decode_objective,
    decode_route,
    decode_speculation,
    encode_joint_plan,
    encode_plan,
    encode_progress,
)
from cluster.codec.stored_models import encode_removal, encode_store
from cluster.coordinator.certificate_issuer import CertificateIssuer
from cluster.coordinator.cluster_stores import ClusterStores
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.examinations import Examinations
from cluster.coordinator.joint_planner import require_model_count
from cluster.coordinator.model_catalog import MAX_REPLICAS, public_id, require_model_name
from cluster.coordinator.on_demand import OnDemand
from cluster.coordinator.present_plans import PresentPlans
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.coordinator.snapshot import describe_adapters, describe_plan
from cluster.core.adapter import MAX_ADAPTERS
from cluster.core.errors import Forbidden, InvalidOption, InvalidRequest, MacpipeError
from cluster.core.limits import DEFAULT_MAX_CONTEXT, MAX_PREFILL_CHUNK
from cluster.core.plan import LoadProgress, Plan, Speculation
from cluster.core.quantization import require_weight_bits
from cluster.core.text import parse_layers
from cluster.core.worker import WorkerInfo
from cluster.security.passed_caller import caller_certificate, is_coordinator, passed_certificate
from cluster.security.trust import Trust
from cluster.transport.rich_errors import abort
from cluster.v1 import cluster_pb2 as pb
from cluster.v1.cluster_pb2_grpc import ClusterServiceServicer

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ClusterServicer(ClusterServiceServicer):
    """Serves ClusterService for one coordinator. ``first`` is the order of the model that it was started with.

    ``on_demand`` makes room for the models that people load; None if nothing does. ``issuer`` renews certificates of
    members; None without a cluster.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        trust: Trust,
        first: LoadOrder,
        examinations: Examinations,
        stores: ClusterStores,
        on_demand: OnDemand | None = None,
        issuer: CertificateIssuer | None = None,
    ) -> None:
        self._coordinator, self._issuer = coordinator, issuer
        self._on_demand = on_demand
        self._plans = PresentPlans(coordinator, on_demand)
        self._trust = trust
        self._first = first
        self._examinations = examinations
        self._stores = stores

    async def GetCluster(self, request: pb.GetClusterRequest, context: Context) -> pb.GetClusterResponse:
        return encode_cluster_state(await self._coordinator.snapshot())

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> AsyncIterator[pb.LoadModelResponse]:
        try:
            name, order = self._choose(request)
            async for p in self._progress(name, order):
                yield pb.LoadModelResponse(progress=encode_progress(p))
            state = encode_cluster_state(await self._coordinator.snapshot())
            yield pb.LoadModelResponse(ready=state)
        except MacpipeError as e:
            await abort(context, e)

    def _choose(self, request: pb.LoadModelRequest) -> tuple[str, LoadOrder]:
        """Return the name in the catalog, and the order, of what is to be loaded. Raises ``MacpipeError``."""
        if not request.model and not request.name:
            raise _no_model()
        order = _load_order(request, self._first)
        plain = _load_order(pb.LoadModelRequest(model=request.model), self._first)
        return self._coordinator.catalog.choose_load(request.name, order, plain)

    async def _progress(self, name: str, order: LoadOrder) -> AsyncIterator[LoadProgress]:
        """Run a load and yield its progress. Closing the iterator cancels the load."""
        reporter = _ProgressQueue()
        load = asyncio.create_task((self._on_demand or self._coordinator).load(order, reporter, name=name))
        load.add_done_callback(lambda _: reporter.queue.put_nowait(None))
        try:
            while (p := await reporter.queue.get()) is not None:
                yield p
            await load
        finally:
            load.cancel()

    async def Plan(self, request: pb.PlanRequest, context: Context) -> pb.PlanResponse:
        try:
            if not request.model:
                raise _no_model()
            plan = await self._plans.plan(_load_order(request, self._first))
            return encode_plan(describe_plan(plan, self._coordinator.links))
        except MacpipeError as e:
            await abort(context, e)
            raise

    async def PlanModels(self, request: pb.PlanModelsRequest, context: Context) -> pb.PlanModelsResponse:
        try:
            entries = _model_entries(request.models, self._first)
            return encode_joint_plan(await self._plans.plan_models(entries))
        except MacpipeError as e:
            await abort(context, e)
            raise

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:
        try:
            names = await self._coordinator.unload(request.name, every=request.all)
        except MacpipeError as e:
            await abort(context, e)
        return pb.UnloadModelResponse(names=names)

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        try:
            await self._coordinator.drain(request.worker, undo=request.undo)
        except MacpipeError as e:
            await abort(context, e)
        return pb.DrainResponse(cluster=encode_cluster_state(await self._coordinator.snapshot()))

    async def HandOver(self, request: pb.HandOverRequest, context: Context) -> pb.HandOverResponse:
        try:
            return pb.HandOverResponse(standby=await self._coordinator.hand_over(request.standby))
        except MacpipeError as e:
            await abort(context, e)
            raise

    async def Train(
        self, request_iterator: AsyncIterator[pb.TrainRequest], context: Context
    ) -> AsyncIterator[pb.TrainResponse]:
        try:
            async with aclosing(train(self._coordinator, request_iterator)) as messages:
                async for message in messages:
                    yield message
        except MacpipeError as e:
            await abort(context, e)

    async def AddAdapter(self, request: pb.AddAdapterRequest, context: Context) -> pb.AddAdapterResponse:
        try:
            adapter = await self._coordinator.add_adapter(request.adapter.name, request.adapter.folder, request.model)
        except MacpipeError as e:
            await abort(context, e)
        (state,) = describe_adapters([adapter])
        return pb.AddAdapterResponse(adapter=encode_adapter(state))

    async def RemoveAdapter(self, request: pb.RemoveAdapterRequest, context: Context) -> pb.RemoveAdapterResponse:
        try:
            ended = await self._coordinator.remove_adapter(request.name, request.model)
        except MacpipeError as e:
            await abort(context, e)
        return pb.RemoveAdapterResponse(ended_requests=ended)

    async def ExamineCluster(self, request: pb.ExamineClusterRequest, context: Context) -> pb.ExamineClusterResponse:
        try:
            examined = await self._examinations.run()
        except MacpipeError as e:
            await abort(context, e)
        return pb.ExamineClusterResponse(macs=map(encode_examination, examined))

    async def ListStores(self, request: pb.ListStoresRequest, context: Context) -> pb.ListStoresResponse:
        try:
            stores = await self._stores.list_stores()
        except MacpipeError as e:
            await abort(context, e)
        return pb.ListStoresResponse(stores=map(encode_store, stores))

    async def RemoveFromStores(
        self, request: pb.RemoveFromStoresRequest, context: Context
    ) -> pb.RemoveFromStoresResponse:
        try:
            removals = await self._stores.remove(request.models)
        except MacpipeError as e:
            await abort(context, e)
        return pb.RemoveFromStoresResponse(removals=map(encode_removal, removals))

    async def RenewCertificate(
        self, request: pb.RenewCertificateRequest, context: Context
    ) -> pb.RenewCertificateResponse:
        party = self._trust.party(caller_certificate(self._trust, context))
        try:
            if party is None or self._issuer is None:
                raise InvalidRequest(
                    "this coordinator does not issue certificates; ask the coordinator that leads the cluster"
                )
            if is_coordinator(party) and passed_certificate(context):
                raise Forbidden("a coordinator renews its own certificate itself, not through another one")
            certificate = await self._issuer.renew(party.role, party.id, request.request)
            return pb.RenewCertificateResponse(certificate=certificate)
        except MacpipeError as e:
            await abort(context, e)


class _ProgressQueue:
    """A reporter that queues progress for a client. The queue is bounded by the progress steps of one load."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[LoadProgress | None] = asyncio.Queue()

    def waiting(self, found: Sequence[WorkerInfo], wanted: int | None) -> None: ...

    def planned(self, plan: Plan) -> None: ...

    def progress(self, progress: LoadProgress) -> None:
        self.queue.put_nowait(progress)


def _no_model() -> InvalidRequest:
    return InvalidRequest("the model is missing; name a Hugging Face id or a folder", field="model")


def _load_order(r: pb.LoadModelRequest | pb.PlanRequest, first: LoadOrder) -> LoadOrder:
    """Decode an order. What depends on the use of the cluster and not on the model is by default as in ``first``."""
    return LoadOrder(
        model=r.model,
        worker_count=r.workers or None,
        layers=parse_layers(r.layers) if r.layers else None,
        route=decode_route(r.route),
        max_context=r.max_context or None,
        default_context=first.max_context or DEFAULT_MAX_CONTEXT,
        lanes=r.lanes or None,
        max_step_ms=_max_step_ms(r.max_step_ms if isinstance(r, pb.LoadModelRequest) else 0.0) or first.max_step_ms,
        prefill_chunk=_prefill_chunk(r.prefill_chunk),
        kv_bits=_kv_bits(r.kv_bits),
        quantize=require_weight_bits(r.quantize),
        objective=decode_objective(r.objective),
        acceptance=r.acceptance,
        take_back=isinstance(r, pb.LoadModelRequest) and r.take_back,
        speculation=decode_speculation(r.speculation) if isinstance(r, pb.LoadModelRequest) else Speculation.OFF,
        draft=r.draft if isinstance(r, pb.LoadModelRequest) else "",
        adapters=_adapters(r.adapters),
        exact=not (isinstance(r, pb.LoadModelRequest) and r.inexact),
        groups=decode_groups(r.groups, "group"),
        insecure_links=decode_groups(r.insecure_links, "insecure-links"),
    )


def _model_entries(models: Sequence[pb.ModelToPlan], first: LoadOrder) -> list[ModelEntry]:
    """Decode models that are planned together. Raise InvalidOption for names that cannot be, and as ``_load_order``."""
    require_model_count(len(models))
    orders = [_load_order(model.order, first) for model in models]
    return [
        ModelEntry(
            require_model_name(m.name or public_id(order.model)),
            order,
            pin=m.pinned,
            priority=m.priority,
            replicas=_replicas(m),
        )
        for m, order in zip(models, orders, strict=True)
    ]


def _replicas(model: pb.ModelToPlan) -> int | None:
    """Decode how many replicas a model is to have; None is as many as there are idle Macs for. Raise InvalidOption."""
    if not model.HasField("replicas"):
        return 1
    if model.replicas > MAX_REPLICAS:
        raise InvalidOption(f"replicas is {model.replicas}; it must be at most {MAX_REPLICAS}", field="replicas")
    return model.replicas or None


def _adapters(given: Sequence[pb.AdapterFolder]) -> tuple[tuple[str, str], ...]:
    if len(given) > MAX_ADAPTERS:
        raise InvalidRequest(f"{len(given)} adapters were given; at most {MAX_ADAPTERS} are loaded", field="adapters")
    return tuple((a.name, a.folder) for a in given)


def _max_step_ms(value: float) -> float:
    if not math.isfinite(value) or value < 0:
        raise InvalidRequest(f"max_step_ms is {value:g}; it must be above 0", field="max_step_ms")
    return value


def _prefill_chunk(value: int) -> int | None:
    if value > MAX_PREFILL_CHUNK:
        raise InvalidRequest(
            f"prefill_chunk is {value}; it must be from 1 to {MAX_PREFILL_CHUNK}", field="prefill_chunk"
        )
    return value or None


def _kv_bits(value: int) -> int:
    if value not in (0, 4, 8):
        raise InvalidRequest(f"kv_bits is {value}; it must be 8 or 4", field="kv_bits")
    return value
