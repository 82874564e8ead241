"""``macpipe serve MODEL``: runs the coordinator."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli.config_file import ConfigFile
from cluster.cli.join_watch import JoinPort
from cluster.cli.log_stream import LogFile, open_log
from cluster.cli.model_options import model_options
from cluster.cli.models_toml import name_models, parse_models, require_models
from cluster.cli.options import Cluster, Home, Level, takes_options
from cluster.coordinator.journal import Fsync
from cluster.coordinator.models_file import ModelsFile
from cluster.coordinator.settings import HttpSettings, LoadOrder, ServeSettings
from cluster.core.errors import InvalidOption
from cluster.core.leadership import Replicate
from cluster.core.limits import (
    DEFAULT_COORDINATOR_PORT,
    DISCOVERY_TIMEOUT_S,
    MAX_SCHEMA_BYTES,
    MOST_SCHEMA_BYTES,
)
from cluster.core.load_limits import LOAD_WAIT_S, MAX_LOAD_WAIT_S
from cluster.core.text import parse_address
from cluster.platform.logs import LogLevel
from cluster.platform.paths import state_home
from cluster.platform.process import accept_signals, allow_open_files, end_with_stdin
from cluster.security.cluster_choice import resolve_cluster

DEFAULT_HTTP = "127.0.0.1:8080"
Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL...",
        callback=require_models,
        help="A Hugging Face id (OWNER/NAME[@REVISION]), a folder, or faq: the bundled model. The first of several is "
        "loaded at once; others when a request names them.",
    ),
]
ModelsFileOption = Annotated[
    Path | None,
    typer.Option(
        "--models",
        metavar="FILE",
        is_eager=True,
        help="Serve the models of this TOML file (see `macpipe models`). What changes in it is taken up.",
    ),
]


Http = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT", help="Serve HTTP on this address; off serves none.", show_default="127.0.0.1:8080"
    ),
]

ServedNames = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Another name of the model over HTTP. Repeatable.")
]
AllowHosts = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Accept this host name over HTTP too. Repeatable.")
]
AllowOrigins = Annotated[
    list[str] | None, typer.Option(metavar="ORIGIN", help="Allow web pages of this origin to use HTTP. Repeatable.")
]
HttpCert = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Certificate for HTTPS (PEM), instead of the cluster's own.")
]
HttpKey = Annotated[Path | None, typer.Option(metavar="FILE", help="The private key of --http-cert (PEM).")]
MaxSchemaBytes = Annotated[
    int,
    typer.Option(
        min=1, max=MOST_SCHEMA_BYTES, metavar="BYTES", help="Maximum size of a JSON schema, regex or Lark grammar."
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Reject fields that have no effect and answers that may not fit. By default headers report them.",
    ),
]
Wait = Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Wait this long for workers.")]
LoadWait = Annotated[
    float,
    typer.Option(
        min=0,
        max=MAX_LOAD_WAIT_S,
        metavar="SECONDS",
        help="A request whose model is being loaded waits this long, unless it is streamed.",
    ),
]
KeepJournal = Annotated[
    Fsync | None,
    typer.Option(help="Keep live requests on disk, synced this often, so that answers survive a coordinator restart."),
]
SendJournal = Annotated[
    Replicate | None,
    typer.Option(
        help="Send live requests to standbys, so that answers go on there. With sync, no token leaves before all have "
        "it; with async it need not wait. Keeps a journal, too."
    ),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(metavar="HOST:PORT", help="Address of a worker that cannot be discovered. Repeatable."),
]
StandsBy = Annotated[
    bool,
    typer.Option(
        "--standby",
        is_eager=True,
        help="Follow the coordinator that leads, and take its place if it is lost, with its models and settings. "
        "--peer and --peers-only count once it leads.",
    ),
]
Leaders = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOST:PORT", help="With --standby: address of a coordinator that cannot be discovered. Repeatable."
    ),
]
Port = Annotated[int, typer.Option(min=0, max=65535, metavar="PORT", help="Listen on this port.")]
Host = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS",
        help="Listen on this address.",
        show_default="127.0.0.1, and in a cluster this Mac's best address too",
    ),
]


@takes_options(model_options)
def serve(
    model: Models = None,
    options: Any = None,
    models: ModelsFileOption = None,
    peer: Peers = None,
    peers_only: Annotated[bool, typer.Option("--peers-only", help="Use --peer workers only.")] = False,
    host: Host = "",
    port: Port = DEFAULT_COORDINATOR_PORT,
    http: Http = "",
    served_model_name: ServedNames = None,
    http_allow_host: AllowHosts = None,
    http_allow_origin: AllowOrigins = None,
    http_cert: HttpCert = None,
    http_key: HttpKey = None,
    join_port: JoinPort = None,
    max_schema_bytes: MaxSchemaBytes = MAX_SCHEMA_BYTES,
    strict: Strict = False,
    standby: StandsBy = False,
    coordinator: Leaders = None,
    cluster: Cluster = None,
    wait: Wait = DISCOVERY_TIMEOUT_S,
    load_wait: LoadWait = LOAD_WAIT_S,
    home: Home = None,
    journal: KeepJournal = None,
    replicate: SendJournal = None,
    log_level: Level = LogLevel.INFO,
    log_file: LogFile = None,
    config: ConfigFile = None,
    exit_with_stdin: Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)] = False,
) -> None:
    """Find workers, load MODEL onto them, and serve requests. Runs in the foreground; Ctrl-C ends it.

    Of several models, requests name the one that they want; the first one is the default.
    """
    folder = state_home(home)
    options = {"wait_s": wait, **options}
    aliases = collect_values(served_model_name)
    file = ModelsFile(models, partial(parse_models, models, options, aliases)) if models else None
    entries = file.read() if file else name_models(model, options, aliases) if model else ()
    settings = ServeSettings(
        entries[0].order if entries else LoadOrder(""),
        home=folder,
        cluster=resolve_cluster(cluster, folder),
        host=host,
        port=port,
        models=entries,
        http=_http_settings(http, http_allow_host, http_allow_origin, http_cert, http_key),
        join_port=join_port,
        peers=collect_values(peer),
        peers_only=peers_only,
        journal=journal,
        replicate=replicate,
        max_schema_bytes=max_schema_bytes,
        load_wait_s=load_wait,
        strict=strict,
        standby=standby,
        coordinators=collect_values(coordinator),
    )
    raise typer.Exit(_run(settings, file, log_level, log_file, exit_with_stdin))


def _run(
    settings: ServeSettings, file: ModelsFile | None, log_level: LogLevel, log_file: Path | None, exit_with_stdin: bool
) -> int:
    from cluster.api.daemon import run
    from cluster.cli.load_progress import TerminalReport

    accept_signals()
    open_log(log_level, log_file)
    if exit_with_stdin:
        end_with_stdin()
    allow_open_files()
    with TerminalReport(sys.stderr) as report:
        return run(settings, report, file)


def _http_settings(
    http: str,
    hosts: list[str] | None,
    origins: list[str] | None,
    certificate: Path | None,
    key: Path | None,
) -> HttpSettings:
    return HttpSettings(
        parse_http_address(http),
        bool(http),
        collect_values(hosts),
        collect_values(origins),
        certificate_files(certificate, key),
    )


def collect_values(given: list[str] | None) -> tuple[str, ...]:
    """Return the values of a repeatable option."""
    return tuple(given or ())


def parse_http_address(given: str) -> tuple[str, int] | None:
    """Parse the HTTP address. Return None for ``off``; port 0 picks a free one. Raise InvalidOption."""
    if given == "off":
        return None
    host, _, port = given.rpartition(":")
    return (host.strip("[]"), 0) if host and port == "0" else parse_address(given or DEFAULT_HTTP)


def certificate_files(certificate: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    """Return both files, or None if neither is given. Raise InvalidOption for only one."""
    if certificate and key:
        return certificate, key
    if certificate or key:
        raise InvalidOption("--http-cert and --http-key must be given together", field="http_cert")
    return None
