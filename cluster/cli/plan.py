"""``macpipe plan MODEL...``: shows plans, their predicted speed and their reasons, without loading anything."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import CONTEXT_HELP, Cluster, Coordinator, Json, takes_options
from cluster.cli.plan_options import PlanOptions, order_options, plan_options
from cluster.cli.serve import Peers
from cluster.core.errors import InvalidOption, Unreachable
from cluster.core.limits import SETTLE_S
from cluster.platform.paths import state_home
from cluster.security.cluster_choice import resolve_cluster

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.client import Client, JointPlan, ModelPlan
    from cluster.coordinator.settings import LoadOrder, ModelEntry

T = TypeVar("T")
WAIT_S = 5.0


@takes_options(plan_options)
def plan(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="A Hugging Face id (OWNER/NAME[@REVISION]), a folder, or faq: the bundled model. Several are planned"
            " to be loaded at once, the first one as the default.",
        ),
    ],
    assume: Annotated[
        str | None,
        typer.Option(metavar="MACS", help="Plan for these Macs, not the real ones: m2-ultra-192,m4-pro-48x2,10gbe."),
    ] = None,
    options: Any = None,
    context: Annotated[
        int | None,
        typer.Option("--max-context", "--context", min=1, metavar="N", help=CONTEXT_HELP, show_default="4096, or less"),
    ] = None,
    coordinator: Coordinator = None,
    peer: Peers = None,
    cluster: Cluster = None,
    wait: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Search for workers this long.")] = WAIT_S,
    json: Json = False,
) -> None:
    """Show the plan for MODEL and its predicted speed. Of several models, show which of them fit at once, and where.

    Reads headers and loads nothing. Asks the coordinator if one runs, else plans for the discovered workers.
    With --json, layers are [start, end): [0, 27] means layers 0-26.
    """
    from cluster.cli.plan_tables import show_joint_plan, show_plan
    from cluster.coordinator.settings import LoadOrder

    with errors_in_json(json):
        if assume is not None and (coordinator or peer):
            raise InvalidOption("--assume cannot be combined with --coordinator or --peer", field="assume")
        orders = [
            LoadOrder(model, max_context=context, wait_s=max(wait, SETTLE_S), **order_options(options))
            for model in models
        ]
        named = "" if assume is not None else resolve_cluster(cluster, state_home())
        if len(orders) > 1:
            entries = name_models(orders)
            if assume is not None:
                together = plan_models_assumed(entries, assume)
            else:
                together = coordinators_joint_plan(entries, context, options, coordinator, named) or plan_models_found(
                    entries, named, tuple(peer or ())
                )
            show_joint_plan(together, json)
            return
        if assume is not None:
            made = plan_assumed(orders[0], assume)
        else:
            made = coordinators_plan(models[0], context, options, coordinator, named) or plan_found(
                orders[0], named, tuple(peer or ())
            )
        show_plan(made, json)


def name_models(orders: list[LoadOrder]) -> list[ModelEntry]:
    """Return the models under the names that ``serve`` gives them."""
    from cluster.coordinator.model_catalog import ModelEntry, public_id

    return [ModelEntry(public_id(order.model), order) for order in orders]


def plan_assumed(order: LoadOrder, assume: str) -> ModelPlan:
    """Plan for assumed Macs, from their chips' published figures."""
    from cluster.coordinator.offline_planner import plan_for
    from cluster.coordinator.snapshot import describe_plan

    return describe_plan(plan_for(order, assume, state_home()))


def coordinators_plan(
    model: str, context: int | None, options: PlanOptions, coordinator: str | None, cluster: str
) -> ModelPlan | None:
    """Return a running coordinator's plan. Return None if none was named and none runs at the default address."""
    return ask_coordinator(coordinator, cluster, lambda client: client.plan(model, max_context=context, **options))


def coordinators_joint_plan(
    entries: list[ModelEntry], context: int | None, options: PlanOptions, coordinator: str | None, cluster: str
) -> JointPlan | None:
    """Return a running coordinator's plan of several models, or None as ``coordinators_plan``."""
    from cluster.client import ModelToPlan
    from cluster.client.options import LoadOptions

    load = cast(LoadOptions, {"max_context": context, **options})
    models = [ModelToPlan(entry.order.model, entry.name, entry.pin, entry.priority, load) for entry in entries]
    return ask_coordinator(coordinator, cluster, lambda client: client.plan_models(models))


def ask_coordinator(coordinator: str | None, cluster: str, ask: Callable[[Client], T]) -> T | None:
    """Ask a running coordinator. Return None if none was named and none runs at the default address."""
    from cluster.client import Client

    with Client(coordinator, cluster=cluster) as client:
        try:
            return ask(client)
        except Unreachable:
            if coordinator or os.environ.get("MACPIPE_COORDINATOR"):
                raise
            return None


def plan_models_assumed(entries: list[ModelEntry], assume: str) -> JointPlan:
    """Plan several models for assumed Macs."""
    from cluster.coordinator.offline_planner import plan_models_for

    return plan_models_for(entries, assume, state_home())


def plan_models_found(entries: list[ModelEntry], cluster: str, peers: tuple[str, ...]) -> JointPlan:
    """Plan several models for the workers that this process discovers."""
    import anyio

    from cluster.coordinator.offline_planner import plan_models_over_found

    return anyio.run(plan_models_over_found, entries, cluster, peers, state_home())


def plan_found(order: LoadOrder, cluster: str, peers: tuple[str, ...]) -> ModelPlan:
    """Plan for the workers that this process discovers."""
    import anyio

    from cluster.coordinator.offline_planner import plan_over_found
    from cluster.coordinator.snapshot import describe_plan

    return describe_plan(anyio.run(plan_over_found, order, cluster, peers, state_home()))
