"""``macpipe load MODEL``: loads a model on a running coordinator."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Coordinator, Json
from cluster.cli.serve import (
    HowGood,
    HowOftenRight,
    HowRoute,
    KvBits,
    Lanes,
    Layers,
    MaxContext,
    MaxStepMs,
    Model,
    PrefillChunk,
    TakeBack,
    Workers,
    check_kv_bits,
)
from cluster.core.limits import MAX_STEP_MS
from cluster.core.plan import Objective, Route

if TYPE_CHECKING:
    from cluster.client import ClusterState, Loading


def load(
    model: Model,
    workers: Workers = None,
    layers: Layers = None,
    route: HowRoute = Route.DIRECT,
    max_context: MaxContext = None,
    lanes: Lanes = None,
    max_step_ms: MaxStepMs = MAX_STEP_MS,
    prefill_chunk: PrefillChunk = None,
    kv_bits: KvBits = 0,
    objective: HowGood = Objective.LATENCY,
    acceptance: HowOftenRight = 0.0,
    take_back: TakeBack = False,
    coordinator: Coordinator = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Load MODEL on a running coordinator.

    It replaces the served model.
    """
    from cluster.client import Client
    from cluster.core.text import parse_layers

    with errors_in_json(json), Client(coordinator, cluster=cluster) as client:
        if layers:
            parse_layers(layers)
        loading = client.load(
            model,
            workers=workers,
            layers=layers or "",
            route=route,
            max_context=max_context,
            lanes=lanes,
            max_step_ms=max_step_ms,
            prefill_chunk=prefill_chunk,
            kv_bits=check_kv_bits(kv_bits),
            objective=objective,
            acceptance=acceptance,
            take_back=take_back,
        )
        state = follow(loading)
        if json:
            from cluster.cli.json_output import print_json

            print_json(state)
        else:
            held = ", ".join(f"{stage.worker} {stage.layers}" for stage in state.stages)
            sys.stdout.write(f"serving {state.model} on {len(state.stages)} workers: {held}\n")
            for spare in state.spares:
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
