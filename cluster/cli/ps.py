"""``macpipe ps``: shows live requests, their lanes, and the stages' memory use."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Coordinator, Json

if TYPE_CHECKING:
    from rich.table import Table

    from cluster.client import ClusterState, LiveRequest

RIGHT: Final = frozenset({"prompt", "cached", "answer", "guessed", "window", "lane", "age"})
STAGE_RIGHT: Final = frozenset({"caches reserved", "prefixes", "room", "idle"})


def ps(coordinator: Coordinator = None, cluster: Cluster = None, json: Json = False) -> None:
    """Show live requests and how busy the stages are."""
    from cluster.client import Client

    with errors_in_json(json), Client(coordinator, cluster=cluster) as client:
        state = client.cluster()
        if json:
            from cluster.cli.json_output import print_json

            lanes = {"lanes": state.lane_sizes, "queued": state.queued, "prefixes": state.prefixes}
            print_json({"requests": state.requests, **lanes, "guesses": state.guesses, "stages": state.stages})
        else:
            show_requests(state)


def show_requests(state: ClusterState) -> None:
    """Print the live requests and the stages on stdout."""
    from cluster.cli.screen import console, print_lines

    screen = console(sys.stdout)
    if state.activity:
        print_lines(screen, state.activity)
    if not state.requests:
        screen.print("no live requests")
    else:
        screen.print(_table(state.requests))
    if state.stages and not state.training:
        lanes = f"answers per lane: {', '.join(map(str, state.lane_sizes))}; " if any(state.lane_sizes) else ""
        prefixes = f"{state.prefixes} cached prefix{'es' * (state.prefixes != 1)}"
        screen.print(f"\n{lanes}{state.queued} queued; {prefixes}")
        screen.print(_stages(state))


def _stages(state: ClusterState) -> Table:
    from cluster.cli.screen import format_bytes, printable, table

    shown = table("stage", "worker", "caches reserved", "prefixes", "room", "idle", right=STAGE_RIGHT)
    for stage in state.stages:
        shown.add_row(
            str(stage.index),
            printable(stage.worker),
            format_bytes(stage.reserved_bytes),
            format_bytes(stage.prefix_bytes),
            format_bytes(stage.cache_bytes),
            "-" if stage.bubble_share is None else f"{stage.bubble_share:.0%}",
        )
    return shown


def _table(requests: tuple[LiveRequest, ...]) -> Table:
    from cluster.cli.screen import format_duration, printable, table

    guesses = any(one.guessed_tokens or one.window > 1 for one in requests)
    columns = ("guessed", "window") if guesses else ()
    shown = table("request", "state", "prompt", "cached", "answer", *columns, "lane", "age", right=RIGHT)
    for one in requests:
        prefilled = one.prompt_tokens == one.prefilled_tokens or one.completion_tokens > 0
        shown.add_row(
            printable(one.request_id),
            one.state,
            str(one.prompt_tokens) if prefilled else f"{one.prefilled_tokens} of {one.prompt_tokens}",
            str(one.cached_tokens),
            str(one.completion_tokens),
            *((str(one.guessed_tokens), str(one.window)) if guesses else ()),
            "-" if one.lane is None else str(one.lane),
            format_duration(one.age_seconds),
        )
    return shown
