"""Find workers for an order and plan over them, with the links between them as they are measured now. Loads nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

import anyio

from cluster.coordinator.group_meeting import is_accepted
from cluster.coordinator.joint_planner import ModelToPlace, plan_models, require_models
from cluster.coordinator.link_measurement import measure_links
from cluster.coordinator.model_reader import ModelReader
from cluster.coordinator.neighbours import Neighbours, plan_beside
from cluster.coordinator.planner import Links, explain_exposure, list_groups, make_plan, offer_workers
from cluster.coordinator.reporter import LoadReporter
from cluster.coordinator.roster_view import RosterView
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.coordinator.sum_measurement import find_sums, measure_sums
from cluster.coordinator.worker_gathering import gather_workers
from cluster.core.all_reduce import AllReduce
from cluster.core.errors import DoesNotFit, MacpipeError
from cluster.core.joint_plan import JointPlan
from cluster.core.load_limits import COMING_READ_S, MAX_COMING
from cluster.core.plan import ModelShape, Plan
from cluster.core.worker import WorkerInfo
from cluster.placement.candidates import Sums

ROOM_WAIT_S: Final = 5.0
"""Workers are waited for this long, only to see whether a model that cannot be served would fit."""


class ClusterPlanner:
    """Plans over the workers of one roster. ``report`` hears of the workers that a plan waits for."""

    def __init__(self, roster: RosterView, reader: ModelReader, report: LoadReporter) -> None:
        self._roster, self._reader, self._report = roster, reader, report
        self.links: Links = {}
        """The links between workers as they were measured last, by the names (from, to)."""
        self._shapes: dict[LoadOrder, ModelShape] = {}
        """The shapes of models that are yet to be loaded."""

    async def plan(
        self, order: LoadOrder, *, wait: bool = False, given_name: str = "", leaving: Collection[str] = ()
    ) -> Plan:
        """Return the plan for an order with the workers present now. Change nothing.

        With ``wait``, wait for workers as a load does. An error calls the model by ``given_name``. The slices of the
        holders in ``leaving`` do not count. Raises ``MacpipeError``.
        """
        order.check()
        roster = self._roster.without(leaving) if leaving else self._roster
        shape = replace(await self._reader.read_shape(order), given_name=given_name)
        if wait:
            found = await gather_workers(roster, order, shape, self._report)
        else:
            found = await roster.present(order.wanted_workers)
        return await self.make_plan(0, shape, found, order)

    async def require_room(self, order: LoadOrder, given_name: str) -> None:
        """Raise ``DoesNotFit`` if a model whose tokenizer cannot be used is also too large for the workers.

        That comes first: nobody mends a model that then does not fit.
        """
        try:
            soon = replace(order, wait_s=min(order.wait_s, ROOM_WAIT_S))
            await self.plan(soon, wait=True, given_name=given_name)
        except DoesNotFit:
            raise
        except MacpipeError:  # it cannot be planned now, which says nothing about its size
            return

    async def plan_models(self, entries: Sequence[ModelEntry], *, wait: bool = False) -> JointPlan:
        """Return the plans of several models over the workers present now. Change nothing.

        With ``wait``, wait for as many workers as one of the models asks for. Raises ``MacpipeError``.
        """
        require_models([entry.name for entry in entries])
        for entry in entries:
            entry.order.check()
        models = [ModelToPlace.of(entry, await self._reader.read_shape(entry.order)) for entry in entries]
        wanted = max(entry.order.wanted_workers or 0 for entry in entries) or None
        if wait:
            wait_s = max(entry.order.wait_s for entry in entries)
            found = await self._roster.gather(wanted, wait_s, self._report, lambda _: True)
        else:
            found = await self._roster.present(wanted)
        links = await self._measure_links(found)
        return await anyio.to_thread.run_sync(
            plan_models,
            models,
            lambda shape, order: offer_workers(shape, found, order, links),
            lambda plan: explain_exposure(plan, found),
            links,
        )

    async def make_plan(self, number: int, shape: ModelShape, found: Sequence[WorkerInfo], order: LoadOrder) -> Plan:
        """Return a plan over some of these workers. Measure their links if all speeds are known, or to choose one.

        Raises the errors of ``make_plan``.
        """
        links = await self._measure_links(found)
        sums = await self._find_sums(shape, found, order, links, measure=False)
        return await anyio.to_thread.run_sync(make_plan, number, shape, found, order, links, sums)

    async def make_plan_beside(
        self,
        number: int,
        shape: ModelShape,
        found: Sequence[WorkerInfo],
        order: LoadOrder,
        everyone: Sequence[WorkerInfo],
        neighbours: Neighbours,
    ) -> tuple[Plan, LoadOrder]:
        """Return a plan as ``plan_beside`` does: beside loaded models, and with room for those that are yet to come.

        It is about to be loaded, so the sums of groups that it may have are measured unless they are known.
        """
        shapes = await self._read_coming(neighbours)
        links = await self._measure_links(everyone if neighbours.coming else found)
        sums = await self._find_sums(shape, found, order, links, measure=True)
        return await anyio.to_thread.run_sync(
            plan_beside, number, shape, found, order, links, everyone, neighbours, shapes, sums
        )

    async def _read_coming(self, neighbours: Neighbours) -> dict[str, ModelShape]:
        """Return the shapes of the first ``MAX_COMING`` models to come, as far as they can be read in time."""
        coming = sorted(neighbours.coming, key=lambda entry: (not entry.pin, -entry.priority))[:MAX_COMING]
        orders = {entry.order for entry in neighbours.waiting}
        self._shapes = {order: shape for order, shape in self._shapes.items() if order in orders}
        with anyio.move_on_after(COMING_READ_S):
            for entry in coming:
                if entry.order not in self._shapes:
                    with suppress(MacpipeError, OSError):  # it will be told when it is loaded
                        self._shapes[entry.order] = await self._reader.read_shape(entry.order)
        return {entry.name: self._shapes[entry.order] for entry in coming if entry.order in self._shapes}

    async def _find_sums(
        self, shape: ModelShape, found: Sequence[WorkerInfo], order: LoadOrder, links: Links, *, measure: bool
    ) -> Sums:
        """Return how fast the groups that a plan may have add up, as far as it is known, or is measured now.

        Nothing can be predicted of workers whose speed is unknown, so theirs are not measured. Raises the errors of
        ``offer_workers``, and those of a term that is not granted.
        """
        forced, possible = list_groups(order, offer_workers(shape, found, order, links), shape)
        by_name = {worker.name: worker for worker in found}
        sums: dict[frozenset[str], AllReduce | None] = {}
        for names in forced or possible:
            members = [by_name[name] for name in names if name in by_name]
            if len(members) < len(names) or not all(member.profile.known for member in members):
                continue
            controls = [self._roster.control(member.control_address) for member in members]
            known = await find_sums(members, controls)
            if measure and (known is None or known.is_disturbed):
                await self._roster.take_term(controls)
                known = await measure_sums(members, controls, insecure=is_accepted(names, order.insecure_links))
            if known or measure:
                sums[frozenset(names)] = known
        return sums

    async def _measure_links(self, found: Sequence[WorkerInfo]) -> Links:
        links: Links = {}
        choice = all(w.profile.known for w in found) or any(w.data_hosts for w in found)
        if len(found) > 1 and choice:
            links = await measure_links(found, [self._roster.control(w.control_address) for w in found])
            known = {member.info.name for member in self._roster.members}
            self.links = {pair: link for pair, link in {**self.links, **links}.items() if known.issuperset(pair)}
        return links
