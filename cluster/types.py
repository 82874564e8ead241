"""The nouns that rooms hand to each other. Frozen, without behaviour beyond what their own fields say.

Tools are in ``cluster.chat``, grammars in ``cluster.grammar``. It knows the standard library alone: all can import it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from cluster.chat import ChatMessage as ChatMessage
from cluster.chat import Parsing, ToolCallDelta
from cluster.grammar import Grammar
from cluster.profiles import Forecast, Objective, Profile, Spare


@dataclass(frozen=True, slots=True, order=True)
class LayerRange:
    """The layers ``start .. end - 1`` of a model."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"layer range [{self.start}, {self.end}) is empty or negative")

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}-{self.end - 1}"


@dataclass(frozen=True, slots=True)
class ModelRef:
    """Which checkpoint is meant: a name for people, a folder, and what its bytes must hash to.

    ``fingerprint`` is a hex SHA-256 over the config, the tokenizer, the safetensors headers and the files' editions.
    """

    name: str
    path: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class SharedWeight:
    """A module outside the layers (embedding, norm, head) and the layers whose stage has to read it.

    A tied embedding names the first and the last layer: both stages hold a copy.
    """

    name: str
    nbytes: int
    layers: tuple[int, ...]
    lookup_bytes: int | None = None
    """What one token reads of it where it is only looked up (a row of an embedding); None: always all of it."""
    head: bool = False
    """Looked up, but the stage with the last layer multiplies with all of it (a tied embedding)."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What placement needs to know of a model; found without reading a weight. All sizes are bytes.

    ``cut`` e lies before layer e. ``layer_bytes`` and ``cache_bytes`` (one sequence of ``max_context`` tokens) have
    an entry a layer. ``unclean`` says why the other cuts are not clean. ``batchable``: sequences can share a lane;
    where not, each needs a lane of its own. ``trimmable``: a sequence, or a kept prefix, can forget any number of its
    last tokens.
    """

    model: ModelRef
    layers: int
    layer_bytes: tuple[int, ...]
    cache_bytes: tuple[int, ...]
    shared: tuple[SharedWeight, ...]
    clean_cuts: tuple[int, ...]
    unclean: tuple[tuple[int, str], ...]
    max_context: int
    batchable: bool = True
    trimmable: bool = True
    cache_curve: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Sizes of shorter sequences: (tokens, bytes a layer), ascending, without the one of ``max_context``."""
    active_bytes: tuple[int, ...] = ()
    """What one token reads of each layer: of stacked experts only those it is sent to. Empty: all of every layer."""
    expert_bytes: tuple[int, ...] = ()
    """Of each layer: its stacked experts, all of them. Empty: there are none."""
    flops: tuple[float, ...] = ()
    """Floating-point operations of one token a layer, attention's part that grows with the context aside."""
    boundary_bytes: tuple[int, ...] = ()
    """What crosses the cut before each layer, for one token; the first entry is for token ids."""

    def stage_bytes(self, layers: LayerRange) -> int:
        """Bytes of weights that a stage with these layers holds."""
        mine = range(layers.start, layers.end)
        shared = sum(w.nbytes for w in self.shared if any(i in mine for i in w.layers))
        return sum(self.layer_bytes[layers.start : layers.end]) + shared

    def stage_cache_bytes(self, layers: LayerRange, tokens: int | None = None) -> int:
        """Bytes of caches that one sequence of so many tokens (None: full-length) takes on that stage, at most."""
        fitting = (sizes for known, sizes in self.cache_curve if tokens is not None and known >= tokens)
        return sum(next(fitting, self.cache_bytes)[layers.start : layers.end])


@dataclass(frozen=True, slots=True)
class StageSpec:
    """What one worker is asked to hold: stage ``index`` of ``count`` of a plan's epoch.

    ``kv_bits`` 4 or 8 keeps keys and values in so many bits; 0 keeps them in the model's own type.
    """

    epoch: int
    index: int
    count: int
    model: ModelRef
    layers: LayerRange
    max_context: int
    kv_bits: int = 0

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.count - 1


class Route(StrEnum):
    """How activations cross a hop: worker to worker, or by way of the coordinator."""

    DIRECT = "direct"
    RELAY = "relay"


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One line of a plan: who holds what, and how many bytes that is."""

    spec: StageSpec
    worker: str
    weight_bytes: int
    cache_bytes: int
    """What is left for caches."""
    decode_ms: float = 0.0
    """What a decode step of one row is predicted to take here; 0 where the worker's speed is not known."""

    @property
    def layers(self) -> LayerRange:
        return self.spec.layers


@dataclass(frozen=True, slots=True)
class Plan:
    """Who holds which layers in one epoch, in pipeline order.

    ``max_sequences`` is how many may be answered at once if each takes the whole ``max_context``; more if they take
    less, up to ``lanes`` x ``rows``.
    """

    epoch: int
    model: ModelRef
    stages: tuple[PlannedStage, ...]
    route: Route
    max_context: int
    max_sequences: int
    lanes: int
    rows: int
    objective: Objective = Objective.LATENCY
    forecast: Forecast | None = None
    """None where a worker's speed is not known."""
    spares: tuple[Spare, ...] = ()
    reasons: tuple[str, ...] = ()

    def of_epoch(self, epoch: int) -> Plan:
        """The same plan under another number."""
        stages = tuple(replace(s, spec=replace(s.spec, epoch=epoch)) for s in self.stages)
        return replace(self, epoch=epoch, stages=stages)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the last stage picks a token; the defaults are greedy decoding without penalties.

    ``repetition_penalty`` looks at the prompt and the answer; ``presence_penalty`` and ``frequency_penalty`` look at
    the answer alone, as OpenAI defines them. ``logit_bias`` holds pairs of token id and bias. ``logprobs`` asks for
    the chosen token's log-probability, ``top_logprobs`` for that many alternatives too. The draw for a token depends
    on ``seed`` and the token's position alone. A ``grammar`` rules out, before any other filter, every token with
    which the answer could no longer become what it says; log-probabilities are those among the tokens that are left.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: bool = False
    top_logprobs: int = 0
    grammar: Grammar | None = None


class FinishReason(StrEnum):
    """Why an answer is complete; whatever ends one early is an error instead."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class Accepted:
    """First event of an answer: the request has a lane or a place in the queue."""


@dataclass(frozen=True, slots=True)
class Request:
    """One accepted request, tokenized. ``deadline`` is in the injected clock's seconds; None means no deadline.

    ``client`` is whose it is: turns are shared between clients, and kept prefixes stay with theirs. A request of
    priority n counts for 1 / (1 + n) of its cost when turns are shared. ``samples`` answers are asked for, each with a
    seed of its own; sample 0 is what one alone would be. ``parsing`` None leaves the answer's text as it is; with
    ``stage_timings`` every token tells where its time went.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    deadline: float | None = None
    client: str = ""
    priority: int = 0
    samples: int = 1
    parsing: Parsing | None = None
    stage_timings: bool = False


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative at a position, most probable first."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class StageFigures:
    """Milliseconds of a request, or of a token, on one stage; ``wire_ms`` is its share of the ring's outside stages."""

    worker: str
    layers: LayerRange
    compute_ms: float
    wire_ms: float
    wait_ms: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Token ``index`` of answer ``sample``. ``text`` is what became printable with it: whole characters, perhaps none.

    Where the answer is parsed, that is content alone; reasoning before it and calls after it stand beside it.
    ``stages``: the frames since the token before, if asked for. ``cached_tokens`` of the prompt were kept from before.
    """

    index: int
    token: int
    text: str
    logprob: float | None = None
    top: tuple[TopLogprob, ...] = ()
    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()
    sample: int = 0
    stages: tuple[StageFigures, ...] = ()
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The end of a complete answer, one a sample. ``stop`` is the stop string that ended it, if one did."""

    reason: FinishReason
    text: str
    usage: Usage
    ttft_ms: float
    tpot_ms: float
    stages: tuple[StageFigures, ...] = ()
    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()
    sample: int = 0
    stop: str = ""


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a worker says of itself: sizes in bytes, addresses ``host:port``, ``certificate`` from when to when."""

    id: str
    name: str
    version: str
    cluster: str
    control_address: str
    data_address: str
    chip: str
    backend: str
    mlx_version: str
    memory_total: int
    memory_limit: int
    epoch: int = 0
    layers: LayerRange | None = None
    model: str = ""
    memory_used: int = 0
    memory_peak: int = 0
    """The most that was used at once since the engine started."""
    sequences: int = 0
    holder: str = ""
    """The coordinator whose stage it holds, by id; empty for nobody's."""
    profile: Profile = field(default_factory=Profile)
    interface: str = ""
    gpu_cores: int = 0
    memory_pressure: str = ""
    """The system's own word for it, where it has one: normal, warning or critical."""
    busy_ms: int = 0
    instance: str = ""
    """Of its process, random at each start."""
    holder_instance: str = ""
    """Of the coordinator's process that holds its stage; empty for nobody's."""
    lag_s: float = 0.0
    """How late things happen on its machine; 0.0 where that is not overloaded."""
    computing: bool = False
    """Whether the engine has had processor time in its present step."""
    owner: str = ""
    """Whose stage it is, also where that coordinator has not been heard of late."""
    fingerprint: str = ""
    kv_bits: int = 0
    draining: bool = False
    stopping: bool = False
    clock_ahead_s: float = 0.0
    certificate: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class StageTiming:
    """One stage's microseconds with one frame: queued, computed; ``pack_us``: pack and hand over the one before it."""

    stage: int
    wait_us: int
    compute_us: int
    pack_us: int
