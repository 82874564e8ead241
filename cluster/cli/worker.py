"""``macpipe worker``: the daemon on each Mac."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.home import short_host_name, state_home
from cluster.cli.lifeline import end_with_stdin
from cluster.cli.sizes import parse_size


def worker(
    name: Annotated[str | None, typer.Option(help="This worker's name.", show_default="the host's name")] = None,
    host: Annotated[str, typer.Option(help="Listen on this address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Listen on this port; 0 takes a free one.")] = 0,
    cluster: Annotated[str, typer.Option(help="Be seen by coordinators of this cluster.")] = "default",
    memory_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Use no more memory than this, like 24GiB.")
    ] = None,
    home: Annotated[
        Path | None, typer.Option(help="Keep this worker's id in this folder; else MACPIPE_HOME, else the usual place.")
    ] = None,
    exit_with_stdin: Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)] = False,
) -> None:
    """Lend this Mac to a cluster.

    Holds the layers that a coordinator gives it, and runs them. Stays in the foreground; Ctrl-C ends it.
    """
    from cluster.worker.daemon import run
    from cluster.worker.settings import WorkerSettings

    settings = WorkerSettings(
        name=short_host_name() if name is None else name,
        home=state_home(home),
        cluster=cluster,
        host=host,
        port=port,
        memory_limit=parse_size(memory_limit, "--memory-limit") if memory_limit else None,
    )
    if exit_with_stdin:
        end_with_stdin()
    raise typer.Exit(run(settings))
