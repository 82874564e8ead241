"""``macpipe unload``: have a running coordinator let its model go."""

from __future__ import annotations

import sys

from cluster.cli.options import Cluster, Coordinator


def unload(coordinator: Coordinator = None, cluster: Cluster = None) -> None:
    """Have a running coordinator unload.

    Ends the answers that are under way and frees the workers' memory.
    """
    from cluster.client import Client

    with Client(coordinator, cluster=cluster) as client:
        model = client.cluster().model
        client.unload()
        sys.stdout.write(f"unloaded {model}\n" if model else "nothing was loaded\n")
