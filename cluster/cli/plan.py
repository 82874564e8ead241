"""``macpipe plan MODEL``: shows a plan, its predicted speed and its reasons, without loading anything."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.model_options import Model
from cluster.cli.options import CONTEXT_HELP, Cluster, Coordinator, Json, takes_options
from cluster.cli.plan_options import PlanOptions, order_options, plan_options
from cluster.cli.serve import Peers
from cluster.core.errors import InvalidOption, Unreachable
from cluster.core.limits import SETTLE_S
from cluster.core.text import count_in_words
from cluster.platform.paths import state_home
from cluster.security.cluster_choice import resolve_cluster

if TYPE_CHECKING:
    from cluster.client import ModelPlan
    from cluster.coordinator.settings import LoadOrder

WAIT_S = 5.0


@takes_options(plan_options)
def plan(
    model: Model,
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
    """Show the plan for MODEL and its predicted speed.

    Reads MODEL's headers and loads nothing. Asks the coordinator if one runs, else plans for the discovered workers.
    With --json, layers are [start, end): [0, 27] means layers 0-26.
    """
    from cluster.coordinator.settings import LoadOrder

    with errors_in_json(json):
        order = LoadOrder(model, max_context=context, wait_s=max(wait, SETTLE_S), **order_options(options))
        if assume is not None and (coordinator or peer):
            raise InvalidOption("--assume cannot be combined with --coordinator or --peer", field="assume")
        if assume is not None:
            made = plan_assumed(order, assume)
        else:
            named = resolve_cluster(cluster, state_home())
            made = coordinators_plan(model, context, options, coordinator, named) or plan_found(
                order, named, tuple(peer or ())
            )
        show(made, json)


def plan_assumed(order: LoadOrder, assume: str) -> ModelPlan:
    """Plan for assumed Macs, from their chips' published figures."""
    from cluster.coordinator.offline_planner import plan_for
    from cluster.coordinator.snapshot import describe_plan

    return describe_plan(plan_for(order, assume, state_home()))


def coordinators_plan(
    model: str, context: int | None, options: PlanOptions, coordinator: str | None, cluster: str
) -> ModelPlan | None:
    """Return a running coordinator's plan. Return None if none was named and none runs at the default address."""
    from cluster.client import Client

    with Client(coordinator, cluster=cluster) as client:
        try:
            return client.plan(model, max_context=context, **options)
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


def show(made: ModelPlan, json: bool) -> None:
    """Print one JSON object on stdout, or a table and the plan's reasons."""
    if json:
        from cluster.cli.json_output import print_json

        print_json(made)
        return
    from cluster.cli.load_progress import describe_forecast, stage_table
    from cluster.cli.screen import console, print_lines

    screen = console(sys.stdout)
    print_lines(
        screen,
        f"{made.model}: {count_in_words(made.layers, 'layer')} in {count_in_words(len(made.stages), 'stage')}, planned"
        f" for {made.objective}; room for {made.max_sequences} x {made.max_context} tokens of context",
    )
    screen.print()
    screen.print(stage_table((s.worker, s.layers, s.weight_bytes, s.cache_bytes, s.predicted_ms) for s in made.stages))
    screen.print()
    print_lines(screen, *describe_forecast(made.forecast, made.spares, made.reasons))
