"""``macpipe unload``: unloads a running coordinator's model."""

from __future__ import annotations

import sys

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Coordinator, Json


def unload(coordinator: Coordinator = None, cluster: Cluster = None, json: Json = False) -> None:
    """Unload the model of a running coordinator.

    Ends running answers and frees the workers' memory.
    """
    from cluster.client import Client

    with errors_in_json(json), Client(coordinator, cluster=cluster) as client:
        model = client.cluster().model
        client.unload()
        if json:
            from cluster.cli.json_output import print_json

            print_json({"unloaded": model or None})
            return
        sys.stdout.write(f"unloaded {model}\n" if model else "nothing was loaded\n")
