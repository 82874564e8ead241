"""``macpipe worker``: runs the worker daemon on a Mac."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.config_file import ConfigFile
from cluster.cli.log_stream import LogFile, open_log
from cluster.cli.options import Cluster, Home, Level
from cluster.core.errors import InvalidOption
from cluster.core.text import parse_size
from cluster.platform.logs import LogLevel
from cluster.platform.paths import state_home
from cluster.platform.process import accept_signals, allow_open_files, end_with_stdin
from cluster.security.cluster_choice import choose_worker_name, resolve_cluster
from cluster.worker.settings import Profiling, WorkerSettings

LOOPBACK = "127.0.0.1"
PrefixDisk = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Keep caches of prompts and answers on this Mac's disk too, up to this size, like 50GiB. Every Mac of a "
        "model needs it. Without it, those on disk are deleted.",
        show_default="in memory only",
    ),
]
WorkerName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="This worker's name.", show_default="that of init or join, else the host's"),
]
Standby = Annotated[bool, typer.Option(help="Keep a second engine ready (100 MB) to replace a dead one at once.")]
Rdma = Annotated[
    bool, typer.Option(help="Let groups of Macs use RDMA over Thunderbolt 5 where it is enabled; else TCP.")
]


def worker(
    name: WorkerName = None,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Listen on this address.",
            show_default=f"{LOOPBACK}, or this Mac's best address in a cluster",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="Listen on this port; 0 picks a free one.")
    ] = 0,
    data_port: Annotated[
        int,
        typer.Option(min=0, max=65535, metavar="PORT", help="Receive activations on this port; 0 picks a free one."),
    ] = 0,
    cluster: Cluster = None,
    memory_limit: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory limit, like 24GiB.")] = None,
    prefix_disk: PrefixDisk = None,
    interface: Annotated[
        str | None, typer.Option(metavar="NAME", help="Listen on this network interface, like en0, instead of --host.")
    ] = None,
    profile: Annotated[
        Profiling,
        typer.Option(help="Use the speed measured at the first start, measure it again, or leave it unknown."),
    ] = Profiling.KEPT,
    standby: Standby = True,
    rdma: Rdma = True,
    throttle: Annotated[float, typer.Option(min=1, hidden=True)] = 1.0,
    home: Home = None,
    log_level: Level = LogLevel.INFO,
    log_file: LogFile = None,
    config: ConfigFile = None,
    exit_with_stdin: Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)] = False,
) -> None:
    """Run a worker on this Mac.

    Loads and runs the layers that a coordinator assigns. Runs in the foreground; Ctrl-C ends it.
    """
    folder = state_home(home)
    cluster = resolve_cluster(cluster, folder)
    settings = WorkerSettings(
        name=choose_worker_name(name, folder, cluster),
        home=folder,
        cluster=cluster,
        host=_host(host, interface),
        port=port,
        data_port=data_port,
        memory_limit=parse_size(memory_limit, "--memory-limit") if memory_limit else None,
        prefix_disk=parse_size(prefix_disk, "--prefix-disk") if prefix_disk else 0,
        profile=profile,
        interface=interface or "",
        throttle=throttle,
        standby=standby,
        rdma=rdma,
        log_level=log_level,
    )
    raise typer.Exit(_run(settings, log_file, exit_with_stdin))


def _run(settings: WorkerSettings, log_file: Path | None, exit_with_stdin: bool) -> int:
    from cluster.worker.daemon import run

    accept_signals()
    open_log(settings.log_level, log_file)
    if exit_with_stdin:
        end_with_stdin()
    allow_open_files()
    return run(settings)


def _host(host: str | None, interface: str | None) -> str:
    """Return the address to listen on: the interface's if one is named. Empty means automatic."""
    if interface is None:
        return host or ""
    if host is not None:
        raise InvalidOption("give --host or --interface, not both", field="interface")
    from cluster.discovery.interfaces import address_on, interfaces

    return address_on(interface, interfaces())
