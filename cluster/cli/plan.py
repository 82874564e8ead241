"""``macpipe plan MODEL...``: shows plans, their predicted speed and their reasons, without loading anything."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.models_toml import name_models, parse_models, require_models
from cluster.cli.options import CONTEXT_HELP, Cluster, Coordinator, Json, takes_options
from cluster.cli.plan_options import order_options, plan_options
from cluster.cli.serve import Peers
from cluster.core.errors import InvalidOption, Unreachable
from cluster.core.limits import SETTLE_S
from cluster.platform.paths import state_home
from cluster.security.cluster_choice import resolve_cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.client import Client, JointPlan, ModelPlan
    from cluster.client.options import LoadOptions
    from cluster.coordinator.settings import LoadOrder, ModelEntry

T = TypeVar("T")
WAIT_S = 5.0


@takes_options(plan_options)
def plan(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            callback=require_models,
            help="A Hugging Face id (OWNER/NAME[@REVISION]), a folder, or faq: the bundled model. Several are planned"
            " to be loaded at once, the first one as the default.",
        ),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(
            "--models", metavar="FILE", is_eager=True, help="Plan the models of this TOML file, as `serve --models`."
        ),
    ] = None,
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
        if assume is None:
            cluster = resolve_cluster(cluster, state_home())
        defaults = {"max_context": context, "wait_s": max(wait, SETTLE_S), **order_options(options)}
        if models or len(model or ()) > 1:
            entries = read_models(models, defaults) if models else name_models(model or (), defaults, ())
            made = plan_together(entries, assume, coordinator, cluster or "", tuple(peer or ()))
            show_joint_plan(made, json)
            return
        order = LoadOrder(model=(model or [""])[0], **defaults)
        if assume is not None:
            plan = plan_assumed(order, assume)
        else:
            plan = coordinators_plan(order, coordinator, cluster or "") or plan_found(
                order, cluster or "", tuple(peer or ())
            )
        show_plan(plan, json)


def read_models(path: Path, defaults: dict[str, Any]) -> tuple[ModelEntry, ...]:
    """Return the models of a file. Raise InvalidOption with the file and the line."""
    from cluster.coordinator.models_file import ModelsFile

    return ModelsFile(path, partial(parse_models, path, defaults, ())).read()


def plan_together(
    entries: Sequence[ModelEntry], assume: str | None, coordinator: str | None, cluster: str, peers: tuple[str, ...]
) -> JointPlan:
    """Plan several models for assumed Macs, else with the coordinator if one runs, else for the discovered workers."""
    import anyio

    from cluster.coordinator.offline_planner import plan_models_for, plan_models_over_found

    if assume is not None:
        return plan_models_for(entries, assume, state_home())
    return coordinators_joint_plan(entries, coordinator, cluster) or anyio.run(
        plan_models_over_found, entries, cluster, peers, state_home()
    )


def plan_assumed(order: LoadOrder, assume: str) -> ModelPlan:
    """Plan for assumed Macs, from their chips' published figures."""
    from cluster.coordinator.offline_planner import plan_for
    from cluster.coordinator.snapshot import describe_plan

    return describe_plan(plan_for(order, assume, state_home()))


def coordinators_plan(order: LoadOrder, coordinator: str | None, cluster: str) -> ModelPlan | None:
    """Return a running coordinator's plan. Return None if none was named and none runs at the default address."""
    return ask_coordinator(coordinator, cluster, lambda client: client.plan(order.model, **load_options(order)))


def coordinators_joint_plan(entries: Sequence[ModelEntry], coordinator: str | None, cluster: str) -> JointPlan | None:
    """Return a running coordinator's plan of several models, or None as ``coordinators_plan``."""
    from cluster.client import ModelToPlan

    models = [ModelToPlan(e.order.model, e.name, e.pin, e.priority, e.replicas, load_options(e.order)) for e in entries]
    return ask_coordinator(coordinator, cluster, lambda client: client.plan_models(models))


def load_options(order: LoadOrder) -> LoadOptions:
    """Return what an order asks of a plan as the client's options."""
    return {
        "workers": order.worker_count,
        "layers": ",".join(map(str, order.layers or ())),
        "route": order.route,
        "max_context": order.max_context,
        "lanes": order.lanes,
        "kv_bits": order.kv_bits,
        "quantize": order.quantize,
        "prefill_chunk": order.prefill_chunk,
        "objective": order.objective,
        "acceptance": order.acceptance,
        "adapters": dict(order.adapters),
        "groups": order.groups,
        "insecure_links": order.insecure_links,
    }


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


def plan_found(order: LoadOrder, cluster: str, peers: tuple[str, ...]) -> ModelPlan:
    """Plan for the workers that this process discovers."""
    import anyio

    from cluster.coordinator.offline_planner import plan_over_found
    from cluster.coordinator.snapshot import describe_plan

    return describe_plan(anyio.run(plan_over_found, order, cluster, peers, state_home()))
