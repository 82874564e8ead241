"""Plan models beside those that are loaded now, and say which of these would leave. Loads and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.coordinator.coordinator import Coordinator
from cluster.coordinator.deployment import Deployment
from cluster.coordinator.model_catalog import public_id
from cluster.coordinator.on_demand import OnDemand
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.errors import DoesNotFit, MacpipeError
from cluster.core.joint_plan import JointPlan
from cluster.core.plan import Plan
from cluster.core.text import names_in_words


class PresentPlans:
    """Plans for the cluster as it is. ``on_demand`` knows which models would leave for another one; None: none does."""

    def __init__(self, coordinator: Coordinator, on_demand: OnDemand | None) -> None:
        self._coordinator, self._on_demand = coordinator, on_demand

    async def plan(self, order: LoadOrder) -> Plan:
        """Return the plan of a model beside what is loaded; where it does not fit, once idle models have left.

        A model that is loaded is planned as if it was not. Raises as ``Coordinator.plan`` and ``OnDemand.find_room``.
        """
        if self._on_demand is None:
            return await self._coordinator.plan(order)
        own = [one for one in self._loaded() if one.order and one.order.model == order.model]
        holders = [replica.holder for one in own for replica in one.replicas]
        try:
            return await self._coordinator.plan(order, leaving=holders)
        except DoesNotFit:
            if not self._loaded():
                raise
        name = own[0].name if own else public_id(order.model)
        leaving = await self._find_leaving(self._on_demand, ModelEntry(name, order))
        victims = [replica.holder for one in self._loaded() if one.name in leaving for replica in one.replicas]
        plan = await self._coordinator.plan(order, leaving=[*holders, *leaving, *victims])
        return replace(plan, reasons=(f"it fits once {_are_unloaded(leaving)}, as a load of it does", *plan.reasons))

    async def plan_models(self, entries: Sequence[ModelEntry]) -> JointPlan:
        """Return the plans of several models as if nothing was loaded, and say what fits beside what is.

        Raises as ``ClusterPlanner.plan_models``.
        """
        made = await self._coordinator.joint_planner.plan_models(entries)
        if self._on_demand is None or not self._loaded():
            return made
        now = [sentence for entry in entries if (sentence := await self._describe(self._on_demand, entry))]
        return replace(made, reasons=(*made.reasons, *now))

    def _loaded(self) -> list[Deployment]:
        return [one for one in self._coordinator.deployments.values() if one.model_info]

    async def _describe(self, on_demand: OnDemand, entry: ModelEntry) -> str:
        """Say whether a model is loaded, or fits now; "" if that cannot be told."""
        loaded = {one.name: one for one in self._loaded()}
        if own := loaded.get(entry.name):
            return f"{entry.name} is loaded now, on {names_in_words(own.first.workers)}"
        try:
            leaving = await self._find_leaving(on_demand, entry)
        except DoesNotFit as e:
            return f"beside what is loaded now: {e.sentence}"
        except MacpipeError:
            return ""
        if leaving:
            return f"{entry.name} fits now once {_are_unloaded(leaving)}, as a load of it does"
        return f"{entry.name} fits now beside {names_in_words(list(loaded))}"

    async def _find_leaving(self, on_demand: OnDemand, entry: ModelEntry) -> tuple[str, ...]:
        """Return the models, and copies of models, that would leave for a load. Raises as ``OnDemand.find_room``."""
        try:
            return (await on_demand.find_room(entry, patient=False)).victims
        finally:
            self._coordinator.deployments.forget_unloaded()


def _are_unloaded(names: Sequence[str]) -> str:
    return f"{names_in_words(names)} {'is' if len(names) == 1 else 'are'} unloaded"
