"""``macpipe load MODEL``: loads a model on a running coordinator."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.model_options import STEP_HELP, Draft, Exact, Model, Speculate, TakeBack
from cluster.cli.options import CONTEXT_HELP, Cluster, Coordinator, Json, Switch, takes_options
from cluster.cli.plan_options import plan_options
from cluster.cli.status import idle_spares
from cluster.core.cluster_state import holders_in_words
from cluster.core.plan import Speculation
from cluster.core.text import count_in_words

if TYPE_CHECKING:
    from cluster.client import ClusterState, Loading


@takes_options(plan_options)
def load(
    model: Model,
    options: Any = None,
    name: Annotated[
        str, typer.Option(metavar="NAME", help="Serve it under this name, beside other models.", show_default="its own")
    ] = "",
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

    MODEL may be a name of a configured model: it is loaded with its options, unless others are given. A single model
    without a name is replaced. --max-context and --max-step-ms of serve stay in force.
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
            name=name,
            **options,
        )
        state = follow(loading)
        if json:
            from cluster.cli.json_output import print_json

            print_json(state)
        else:
            for line in describe_loaded(state, name or model):
                sys.stdout.write(f"{line}\n")


def describe_loaded(state: ClusterState, name: str) -> Iterator[str]:
    """Yield lines about the model that was loaded under ``name``, and then about spare workers."""
    loaded = next((one for one in state.deployments if name in (one.name, one.model, *one.aliases)), None)
    shown, stages = (loaded.name, loaded.stages) if loaded else (state.model, state.stages)
    yield f"serving {shown} on {count_in_words(len(stages), 'worker')}: {holders_in_words(stages)}"
    if state.draft_worker:
        yield f"draft model on {state.draft_worker}"
    for spare in idle_spares(state):
        yield f"spare: {spare.worker} ({spare.why})"


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
