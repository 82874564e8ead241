"""``macpipe top``: shows the cluster at work, live: its Macs, their load, and the requests."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Coordinator, Json

if TYPE_CHECKING:
    from cluster.cli.top_view import TopView


def top(coordinator: Coordinator = None, cluster: Cluster = None, json: Json = False) -> None:
    """Show the Macs, their load and all requests, live.

    Arrow keys scroll through the requests, and q ends. If the output is not a terminal, one snapshot is printed, after
    the second over which tokens per second are counted.
    """
    from cluster.cli.top_view import TopView

    view = TopView()
    if sys.stdout.isatty() and not json:
        from cluster.cli.watch import watch_cluster

        watch_cluster(coordinator, cluster, view)
        return
    with errors_in_json(json):
        _take_snapshot(coordinator, cluster, view)
        if json:
            from cluster.cli.json_output import print_json

            print_json({"tokens_per_second": view.rates.now, "cluster": view.state})
        else:
            from cluster.cli.screen import console

            screen = console(sys.stdout)
            screen.print(view.draw(screen.width, 0, ""))


def _take_snapshot(coordinator: str | None, cluster: str | None, view: TopView) -> None:
    """Add two states to the view, between which tokens are counted."""
    from cluster.cli.live_figures import RATE_S
    from cluster.client import Client

    with Client(coordinator, cluster=cluster) as client:
        view.add(client.cluster())
        time.sleep(RATE_S)
        view.add(client.cluster())
