"""``macpipe load MODEL``: loads a model on a running coordinator."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import CONTEXT_HELP, Cluster, Coordinator, Json, Switch, takes_options
from cluster.cli.plan_options import plan_options
from cluster.cli.serve import STEP_HELP, Draft, Exact, Model, Speculate, TakeBack
from cluster.core.plan import Speculation
from cluster.core.text import count_in_words

if TYPE_CHECKING:
    from cluster.client import ClusterState, Loading


@takes_options(plan_options)
def load(
    model: Model,
    options: Any = None,
    max_context: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help=CONTEXT_HELP, show_default="that of serve, or less"),
    ] = None,
    max_step_ms: Annotated[
        float | None, typer.Option(min=1, metavar="MS", help=STEP_HELP, show_default="that of serve")
    ] = None,
    speculate: Speculate = Speculation.OFF,
    draft: Draft = "",
    exact: Exact = Switch.ON,
    take_back: TakeBack = False,
    coordinator: Coordinator = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Load MODEL on a running coordinator.

    It replaces the served model. --max-context and --max-step-ms of serve stay in force.
    """
    from cluster.client import Client

    with errors_in_json(json), Client(coordinator, cluster=cluster) as client:
        loading = client.load(
            model,
            max_context=max_context,
            max_step_ms=max_step_ms,
            speculate=speculate,
            draft=draft,
            exact=exact is Switch.ON,
            take_back=take_back,
            **options,
        )
        state = follow(loading)
        if json:
            from cluster.cli.json_output import print_json

            print_json(state)
        else:
            held = ", ".join(f"{stage.worker} {stage.layers}" for stage in state.stages)
            sys.stdout.write(f"serving {state.model} on {count_in_words(len(state.stages), 'worker')}: {held}\n")
            if state.draft_worker:
                sys.stdout.write(f"draft model on {state.draft_worker}\n")
            for spare in state.spares:
                if spare.worker == state.draft_worker:
                    continue
                sys.stdout.write(f"spare: {spare.worker} ({spare.why})\n")


def follow(loading: Loading) -> ClusterState:
    """Show a load's progress on stderr until it is done. Return the cluster's state."""
    from cluster.cli.load_progress import LoadBars
    from cluster.client.deadlines import require_serving
    from cluster.core.plan import LoadProgress

    bars = LoadBars(sys.stderr)
    last: LoadProgress | ClusterState | None = None
    try:
        for last in loading:
            if isinstance(last, LoadProgress):
                bars.show(last)
    finally:
        bars.close()
    return require_serving(last)
