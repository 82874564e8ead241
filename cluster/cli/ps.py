"""``macpipe ps``: shows live requests, their lanes, and the stages' memory use."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Coordinator, Json

if TYPE_CHECKING:
    from rich.table import Table

    from cluster.client import ClusterState, StageState

RIGHT: Final = frozenset({"prompt", "cached", "answer", "guessed", "window", "lane", "age"})
STAGE_RIGHT: Final = frozenset({"caches reserved", "prefixes", "room", "idle"})


def ps(coordinator: Coordinator = None, cluster: Cluster = None, json: Json = False) -> None:
    """Show live requests and how busy the stages are."""
    from cluster.client import Client

    with errors_in_json(json), Client(coordinator, cluster=cluster) as client:
        state = client.cluster()
        if json:
            from cluster.cli.json_output import print_json

            print_json(requests_as_json(state))
        else:
            show_requests(state)


def requests_as_json(state: ClusterState) -> dict[str, Any]:
    """Return the object that ``--json`` prints: of all models, each request and each stage with its model's name.

    ``models`` has what belongs to each model, or to each replica where there are several. ``guesses`` are those of the
    default model.
    """
    from cluster.core.json_types import to_json_types

    rings = [(name or state.model, ring) for name, ring in state.rings]
    return {
        "requests": [to_json_types(one) | {"model": name} for name, ring in rings for one in ring.requests],
        "lanes": [size for _, ring in rings for size in ring.lane_sizes],
        "queued": sum(ring.queued for _, ring in rings),
        "prefixes": sum(ring.prefixes for _, ring in rings),
        "guesses": state.guesses,
        "stages": [to_json_types(stage) | {"model": name} for name, ring in rings for stage in ring.stages],
        "models": [
            {
                "name": name,
                "state": ring.state,
                "lanes": ring.lane_sizes,
                "queued": ring.queued,
                "prefixes": ring.prefixes,
            }
            for name, ring in rings
        ],
    }


def show_requests(state: ClusterState) -> None:
    """Print the live requests and the stages on stdout."""
    from cluster.cli.screen import console, print_lines, printable

    screen = console(sys.stdout)
    if state.activity:
        print_lines(screen, state.activity)
    if not state.all_requests:
        screen.print("no live requests")
    else:
        screen.print(_table(state))
    if state.training:
        return
    for name, ring in state.rings:
        if ring.stages:
            lanes = f"answers per lane: {', '.join(map(str, ring.lane_sizes))}; " if any(ring.lane_sizes) else ""
            prefixes = f"{ring.prefixes} cached prefix{'es' * (ring.prefixes != 1)}"
            screen.print(printable(f"\n{f'{name}: ' if name else ''}{lanes}{ring.queued} queued; {prefixes}"))
            screen.print(_stages(ring.stages))


def _stages(stages: tuple[StageState, ...]) -> Table:
    from cluster.cli.screen import format_bytes, printable, table

    shown = table("stage", "worker", "caches reserved", "prefixes", "room", "idle", right=STAGE_RIGHT)
    for stage in stages:
        shown.add_row(
            stage.place,
            printable(stage.worker),
            format_bytes(stage.reserved_bytes),
            format_bytes(stage.prefix_bytes),
            format_bytes(stage.cache_bytes),
            "-" if stage.bubble_share is None else f"{stage.bubble_share:.0%}",
        )
    return shown


def _table(state: ClusterState) -> Table:
    from cluster.cli.screen import format_duration, printable, table

    requests = [(name, one) for name, ring in state.rings for one in ring.requests]
    guesses = any(one.guessed_tokens or one.window > 1 for _, one in requests)
    columns = ("guessed", "window") if guesses else ()
    models = ("model",) if state.deployments else ()
    shown = table("request", *models, "state", "prompt", "cached", "answer", *columns, "lane", "age", right=RIGHT)
    for name, one in requests:
        prefilled = one.prompt_tokens == one.prefilled_tokens or one.completion_tokens > 0
        shown.add_row(
            printable(one.request_id),
            *((printable(name),) if models else ()),
            one.state,
            str(one.prompt_tokens) if prefilled else f"{one.prefilled_tokens} of {one.prompt_tokens}",
            str(one.cached_tokens),
            str(one.completion_tokens),
            *((str(one.guessed_tokens), str(one.window)) if guesses else ()),
            "-" if one.lane is None else str(one.lane),
            format_duration(one.age_seconds),
        )
    return shown
