"""``macpipe unload``: unloads a running coordinator's model."""

from __future__ import annotations

import sys

from cluster.cli.options import Cluster, Coordinator


def unload(coordinator: Coordinator = None, cluster: Cluster = None) -> None:
    """Unload the model of a running coordinator.

    Ends running answers and frees the workers' memory.
    """
    from cluster.client import Client

    with Client(coordinator, cluster=cluster) as client:
        model = client.cluster().model
        client.unload()
        sys.stdout.write(f"unloaded {model}\n" if model else "nothing was loaded\n")
