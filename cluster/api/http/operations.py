"""POST /api/plan, /api/plans, /api/load and /api/unload: what an admin does on the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request

from cluster.api.background_load import BackgroundLoad
from cluster.api.http.body import Form, ShortText, read
from cluster.api.http.json_response import Json
from cluster.api.http.sse import while_connected
from cluster.api.page_limits import MAX_LAYERS_CHARS
from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.model_catalog import MAX_REPLICAS, public_id, require_model_name
from cluster.coordinator.present_plans import PresentPlans
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.coordinator.snapshot import describe_plan
from cluster.core.json_types import to_json_types
from cluster.core.limits import MAX_PLANNED_MODELS
from cluster.core.plan import Objective, Route
from cluster.core.text import parse_layers

Count = Annotated[int, Field(ge=1, lt=2**31)]


class PlanForm(Form):
    """A model and how to place it; the fields are those of ``LoadOrder``, and None is the default."""

    model: Annotated[ShortText, Field(min_length=1)]
    workers: Count | None = None
    layers: Annotated[str, Field(max_length=MAX_LAYERS_CHARS)] | None = None
    max_context: Count | None = None
    quantize: Literal[0, 1, 2, 3, 4, 5, 6, 8] = 0
    kv_bits: Literal[0, 4, 8] = 0
    objective: Literal["latency", "throughput"] = "latency"
    route: Literal["direct", "relay"] = "direct"
    acceptance: Annotated[float, Field(ge=0, le=1)] = 0.0

    def order(self, first: LoadOrder) -> LoadOrder:
        """Return the order. What depends on the use of the cluster and not on the model is as in ``first``.

        Raises ``InvalidOption`` for layers that cannot be.
        """
        return LoadOrder(
            model=self.model,
            worker_count=self.workers,
            layers=parse_layers(self.layers) if self.layers else None,
            route=Route(self.route),
            max_context=self.max_context,
            default_context=first.max_context or first.default_context,
            max_step_ms=first.max_step_ms,
            quantize=self.quantize,
            kv_bits=self.kv_bits,
            objective=Objective(self.objective),
            acceptance=self.acceptance,
        )


class NamedPlanForm(PlanForm):
    """A model that is planned with others."""

    name: ShortText = ""
    pinned: bool = False
    priority: Annotated[int, Field(ge=0, lt=2**31)] = 0
    replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] | Literal["auto"] = 1

    def entry(self, first: LoadOrder) -> ModelEntry:
        """Return the model under its name, by default its id or the last part of its folder. Raises as ``order``."""
        order = self.order(first)
        name = require_model_name(self.name or public_id(order.model))
        replicas = None if self.replicas == "auto" else self.replicas
        return ModelEntry(name, order, pin=self.pinned, priority=self.priority, replicas=replicas)


class JointPlanForm(Form):
    """Models that are planned to be loaded at once; the fields of each are those of ``ModelEntry`` and ``PlanForm``."""

    models: Annotated[list[NamedPlanForm], Field(min_length=1, max_length=MAX_PLANNED_MODELS, fail_fast=True)]


class UnloadForm(Form):
    """A model's name; the only one that is loaded without it."""

    name: ShortText = ""


@dataclass(frozen=True, slots=True)
class Operations:
    """The routes' handlers. ``first`` is the order of the model that the coordinator was started with."""

    coordinator: Coordinator
    plans: PresentPlans
    loads: BackgroundLoad
    first: LoadOrder

    async def plan(self, request: Request) -> Json:
        """Return which worker would hold which layers, and the predicted speed. Load nothing."""
        form = await read(request, PlanForm)
        order = form.order(self.first)
        plan = await while_connected(request, lambda: self.plans.plan(order))
        return Json(to_json_types(describe_plan(plan)))

    async def plan_models(self, request: Request) -> Json:
        """Return which of several models fit at once, and which worker would hold what. Load nothing."""
        form = await read(request, JointPlanForm)
        entries = [model.entry(self.first) for model in form.models]
        plan = await while_connected(request, lambda: self.plans.plan_models(entries))
        return Json(to_json_types(plan))

    async def load(self, request: Request) -> Json:
        """Begin to load a model. The load goes on without the page, which shows its progress."""
        form = await read(request, PlanForm)
        order = form.order(self.first)
        plain = PlanForm(model=form.model).order(self.first)
        name, order = self.coordinator.catalog.choose_load("", order, plain)
        self.loads.start(order, name)
        return Json({"state": "loading"}, 202)

    async def unload(self, request: Request) -> Json:
        """End live requests and free the workers' memory."""
        form = await read(request, UnloadForm)
        await self.coordinator.unload(form.name)
        return Json({"state": "idle"})
