"""What a person decided when starting a coordinator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.coordinator.journal import Fsync
from cluster.core.limits import DISCOVERY_TIMEOUT_S, MAX_SCHEMA_BYTES, MAX_STEP_MS
from cluster.core.plan import LayerRange, Objective, Route
from cluster.security.bounds import DEFAULT_JOIN_PORT


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Which model to serve and how to lay it out; the fields mean what they mean in ``ServeSettings``."""

    model: str
    workers: int | None = None
    layers: tuple[LayerRange, ...] | None = None
    route: Route = Route.DIRECT
    max_context: int | None = None
    wait_s: float = DISCOVERY_TIMEOUT_S
    lanes: int | None = None
    max_step_ms: float = MAX_STEP_MS
    kv_bits: int = 0
    objective: Objective = Objective.LATENCY
    take_back: bool = False


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """``address`` is where HTTP is answered, None nowhere; where ``wanted`` is false nobody asked for it, and a
    taken port is no reason to give up. ``names`` are further names of the model. ``hosts`` and ``origins`` are by which
    names, beside this machine's own, and from whose pages it may be called; ``certificate`` are PEM files of a chain
    and its key, None takes the cluster's own.
    """

    address: tuple[str, int] | None = None
    wanted: bool = True
    names: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    certificate: tuple[Path, Path] | None = None


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """``workers`` None takes as many as are best for ``objective``, of those that are there once one is; ``layers``
    None leaves the cuts to the planner.

    ``host`` empty is loopback, and in a cluster this machine's best address beside it. ``home`` is the folder where
    parts of models are kept, the coordinator's id, and the journal where there is one:
    ``journal`` says how it reaches the disk, None keeps none. ``peers`` are ``host:port`` control addresses of workers
    that Zeroconf cannot see; with ``peers_only`` nobody else is looked for. ``max_context`` None takes the default,
    less where the model allows less. ``wait_s`` bounds the wait for workers. ``lanes`` None makes one a stage.
    ``max_step_ms`` bounds what a prefill chunk takes of a stage while others decode. ``kv_bits`` 8 or 4 quantises
    caches; 0 leaves them as they are. ``max_schema_bytes`` bounds the grammar of one answer. With ``take_back`` workers
    that were lost get their layers back once they are there again; without, they are spares.

    ``join_port`` is where a cluster admits Macs, None nowhere; where ``join_wanted`` is false nobody asked for it,
    and a taken port is no reason to give up.
    """

    model: str
    home: Path
    cluster: str = "default"
    host: str = ""
    port: int = 7700
    http: HttpSettings = HttpSettings()
    join_port: int | None = DEFAULT_JOIN_PORT
    join_wanted: bool = False
    workers: int | None = None
    peers: tuple[str, ...] = ()
    peers_only: bool = False
    journal: Fsync | None = None
    layers: tuple[LayerRange, ...] | None = None
    route: Route = Route.DIRECT
    max_context: int | None = None
    wait_s: float = DISCOVERY_TIMEOUT_S
    lanes: int | None = None
    max_step_ms: float = MAX_STEP_MS
    kv_bits: int = 0
    objective: Objective = Objective.LATENCY
    max_schema_bytes: int = MAX_SCHEMA_BYTES
    take_back: bool = False

    @property
    def order(self) -> LoadOrder:
        return LoadOrder(
            model=self.model,
            workers=self.workers,
            layers=self.layers,
            route=self.route,
            max_context=self.max_context,
            wait_s=self.wait_s,
            lanes=self.lanes,
            max_step_ms=self.max_step_ms,
            kv_bits=self.kv_bits,
            objective=self.objective,
            take_back=self.take_back,
        )
