"""Hold the settings of a coordinator, as chosen by the operator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.coordinator.journal import Fsync
from cluster.core.errors import InvalidOption
from cluster.core.leadership import Replicate
from cluster.core.limits import (
    DEFAULT_COORDINATOR_PORT,
    DEFAULT_MAX_CONTEXT,
    DISCOVERY_TIMEOUT_S,
    MAX_SCHEMA_BYTES,
    MAX_STEP_MS,
)
from cluster.core.load_limits import LOAD_WAIT_S
from cluster.core.plan import LayerRange, Objective, Route, Speculation


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """The model to serve and how to place it.

    ``worker_count`` None uses as many workers as are best for ``objective``, of those present once at least one is.
    ``layers`` are the layer ranges of the stages; None leaves the cuts to the planner. ``wait_s`` is the maximum wait
    for workers in seconds. With ``take_back``, lost workers get their layers back once they return; without it, they
    become spares.

    ``max_context`` is in tokens; None uses ``default_context``, or the model's own limit if that is lower. ``lanes``
    None means one per stage. ``max_step_ms`` is the longest time that a prefill chunk may occupy a stage while others
    decode. ``prefill_chunk`` is the number of tokens of a chunk while nobody decodes; None chooses it by measured cost.
    ``kv_bits`` 8 or 4 quantizes caches; 0 does not. ``quantize`` is the bits to which each worker quantizes its weights
    while it loads them; 0 leaves them. ``acceptance`` is the share of guessed tokens that the plan expects to be right,
    from 0 to 1. ``speculation`` says what guesses tokens before they are sampled; with ``exact``, a frame has one of
    them, so that they change no bit of an answer.
    ``cached_contexts`` is how many full contexts each stage has room for in its caches; None uses all memory that is
    left on its Mac.
    ``groups`` are the names of workers that share the layers of a stage, each group as one; ``insecure_links`` those of
    groups whose links may be neither authenticated nor encrypted.
    ``draft`` is the draft model, "" if there is none. ``adapters`` are names and folders.
    """

    model: str
    worker_count: int | None = None
    layers: tuple[LayerRange, ...] | None = None
    route: Route = Route.DIRECT
    max_context: int | None = None
    default_context: int = DEFAULT_MAX_CONTEXT
    wait_s: float = DISCOVERY_TIMEOUT_S
    lanes: int | None = None
    max_step_ms: float = MAX_STEP_MS
    prefill_chunk: int | None = None
    kv_bits: int = 0
    quantize: int = 0
    objective: Objective = Objective.LATENCY
    take_back: bool = False
    acceptance: float = 0.0
    speculation: Speculation = Speculation.OFF
    exact: bool = True
    cached_contexts: int | None = None
    draft: str = ""
    adapters: tuple[tuple[str, str], ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    insecure_links: tuple[tuple[str, ...], ...] = ()

    def check(self) -> None:
        """Raise ``InvalidOption`` for options that contradict each other."""
        if self.speculation is Speculation.DRAFT and not self.draft:
            raise InvalidOption("--speculate draft needs a draft model: name it with --draft", field="draft")
        if self.draft and self.speculation not in (Speculation.AUTO, Speculation.DRAFT):
            raise InvalidOption("--draft needs --speculate auto or draft", field="speculate")
        if not self.exact and self.speculation is Speculation.OFF:
            raise InvalidOption("--exact off needs guesses: add --speculate auto, ngram or draft", field="exact")
        if self.groups and self.speculation is not Speculation.OFF:
            raise InvalidOption("--speculate cannot be combined with --group: its ranks must not guess", field="group")
        if self.groups and self.adapters:
            raise InvalidOption("adapters cannot be combined with --group: they are not shared yet", field="group")
        if self.groups and self.acceptance:
            raise InvalidOption("--acceptance cannot be combined with --group: it never guesses", field="acceptance")
        named = [name for group in self.groups for name in group]
        if len(set(named)) < len(named):
            raise InvalidOption("a worker can be in one group only; name it in one --group", field="group")

    @property
    def stage_count(self) -> int | None:
        """The number of stages that the operator asks for; None leaves it to the planner."""
        return self.worker_count or (len(self.layers) if self.layers else None)

    @property
    def wanted_workers(self) -> int | None:
        """The least number of workers that the operator asks for; None leaves it to the planner."""
        stages, grouped = self.stage_count, sum(map(len, self.groups))
        return grouped + max(0, (stages or 0) - len(self.groups)) or None


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model that a coordinator may serve: what clients call it, how it is loaded, and when it may leave memory.

    ``aliases`` are further names; a ``*`` in one stands for any characters. ``pin`` keeps it in memory.
    ``idle_unload_s`` is the time in seconds without a request after which it is unloaded; None: never. ``replicas`` is
    how many copies answer requests; None uses idle Macs for as many as fit. Of models that want the same memory, the
    one with the higher ``priority`` stays. ``fallback`` is the name of the model that answers while this one cannot; ""
    for none.
    """

    name: str
    order: LoadOrder
    aliases: tuple[str, ...] = ()
    pin: bool = False
    idle_unload_s: float | None = None
    replicas: int | None = 1
    priority: int = 0
    fallback: str = ""


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """Settings of the HTTP server.

    ``address`` is the listening address; None disables HTTP. ``wanted`` is False if the address is only the default: a
    port in use is then not an error. ``hosts`` are the host names, besides this machine's own, under which clients may
    call it; ``origins`` are the web origins that may call it.
    ``certificate`` holds the paths of the PEM files of a certificate chain and its key; None uses the cluster's own.
    """

    address: tuple[str, int] | None = None
    wanted: bool = True
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    certificate: tuple[Path, Path] | None = None


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """All settings of ``macpipe serve``.

    ``order`` is that of the model to load first, and ``models`` are all that may be served, that one included.
    ``peers`` are ``host:port`` control addresses of workers that Zeroconf cannot see; ``peers_only`` disables the
    search for others.

    ``host`` is the listening address; "" means loopback, in a cluster also this machine's best address. ``home`` is the
    folder for parts of models, the coordinator's id and the journal. ``journal`` says when the journal is flushed to
    disk; None keeps no journal. ``join_port`` is the port on which a cluster admits Macs; None means the default one,
    which may be in use: then it is tried again later.
    ``replicate`` sends the journal to standbys; None sends them only the rest of the state. ``standby``: follow the
    coordinator that leads, perhaps one of ``coordinators``, and take its place if it is lost; then no models are named.
    ``max_schema_bytes`` is the maximum size of one answer's grammar. ``load_wait_s`` is how long a request that is not
    streamed waits for its model to be loaded. ``strict``: fields of a request that have no
    effect are errors.
    """

    order: LoadOrder
    home: Path
    models: tuple[ModelEntry, ...] = ()
    cluster: str = "default"
    host: str = ""
    port: int = DEFAULT_COORDINATOR_PORT
    http: HttpSettings = HttpSettings()
    join_port: int | None = None
    peers: tuple[str, ...] = ()
    peers_only: bool = False
    journal: Fsync | None = None
    max_schema_bytes: int = MAX_SCHEMA_BYTES
    load_wait_s: float = LOAD_WAIT_S
    strict: bool = False
    replicate: Replicate | None = None
    standby: bool = False
    coordinators: tuple[str, ...] = ()
