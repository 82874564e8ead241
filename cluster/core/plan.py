"""Models, plans and speeds: what placement needs to know, what a plan promises, how a prompt is cut."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from cluster.core.limits import PREFILL_CHUNK


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


class Objective(StrEnum):
    """What a plan is best at: one user's next token, or many users' tokens together."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


@dataclass(frozen=True, slots=True)
class Profile:
    """What a worker's engine was measured to do, in bytes, seconds and operations; ``bandwidth`` 0: not measured.

    A decode step of one row takes ``step_s``, ``layer_s`` a layer, and its weights' and caches' bytes at
    ``bandwidth``; each further row adds ``row_cost`` (0 to 1) of the weights' time. ``flops`` is the rate of prompts.
    ``corrections`` are (model fingerprint, measured over predicted), the last learned last.
    """

    bandwidth: float = 0.0
    layer_s: float = 0.0
    step_s: float = 0.0
    flops: float = 0.0
    row_cost: float = 0.0
    corrections: tuple[tuple[str, float], ...] = ()

    @property
    def known(self) -> bool:
        return self.bandwidth > 0

    def correction(self, fingerprint: str) -> float:
        """By what its predictions are multiplied: as learned with that model, else the median over all models."""
        learned = dict(self.corrections)
        if fingerprint in learned:
            return learned[fingerprint]
        ratios = sorted(learned.values())
        return (ratios[len(ratios) // 2] + ratios[(len(ratios) - 1) // 2]) / 2 if ratios else 1.0


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two workers, as measured: seconds there and back, and bytes a second."""

    round_trip_s: float
    bandwidth: float

    def hop_s(self, nbytes: float) -> float:
        """Seconds until a message has arrived."""
        return self.round_trip_s / 2 + nbytes / self.bandwidth


@dataclass(frozen=True, slots=True)
class Spare:
    """A worker that a plan leaves out, and why."""

    worker: str
    why: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a plan is predicted to do: tokens a second for one and for eight users, seconds to the first one of a prompt
    of ``prompt_tokens``, which are as many as the context has room for, up to 2,048.
    """

    one_user: float
    eight_users: float
    first_token_s: float
    prompt_tokens: int


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
class LoadProgress:
    """How far one stage's load is; ``state`` says what it is doing in a word."""

    worker: str
    layers: LayerRange
    done_bytes: int
    total_bytes: int
    state: str = field(default="reading")
    hub_bytes: int = 0
    peer_bytes: int = 0
    notices: tuple[str, ...] = ()
    """What a person should know of the bytes that were found: all sentences so far."""


@dataclass(frozen=True, slots=True)
class StorePlace:
    """A Mac that answers StoreService: a name for people, an address, and who answers there (``ROLE.ID``)."""

    name: str
    address: str
    party: str


@dataclass(frozen=True, slots=True)
class FetchOrder:
    """What a stage needs of the model's files, and who has it.

    ``tensors`` are names, in the order in which they are wanted; those in ``deferred`` come from another worker that
    fetches them first. ``repo`` and ``commit`` say where on the hub the model is; empty: nowhere.
    """

    tensors: tuple[str, ...]
    deferred: tuple[str, ...] = ()
    peers: tuple[StorePlace, ...] = ()
    repo: str = ""
    commit: str = ""


@dataclass(frozen=True, slots=True)
class StageProof:
    """What a stage's tensors hash to on its worker: pairs of name and SHA-256 in hex."""

    worker: str
    digests: tuple[tuple[str, str], ...]


_FILLS: Final = 4
"""A prompt goes out in so many chunks a stage: filling and draining the pipeline costs 1 / _FILLS of its time then."""
_LEAST_SPLIT: Final = 128
"""A shorter chunk would lose more to thin matrices than overlap wins."""
_BLOCK: Final = 64
"""Attention over whole blocks is what GPUs' kernels are fastest at, and there are few such lengths."""


def overlapping_chunk(prompt: int, stages: int, most: int = PREFILL_CHUNK) -> int:
    """Tokens a chunk of a prompt of so many tokens, over so many stages; at most ``most``.

    Whole blocks, so that what a GPU makes for the lengths of one prompt serves the next.
    """
    if stages == 1:
        return most
    return min(most, max(_LEAST_SPLIT, -(-prompt // (_FILLS * stages * _BLOCK)) * _BLOCK))


def next_chunk(left: int, chunk: int, most: int = PREFILL_CHUNK) -> int:
    """How many of the ``left`` tokens of a prompt go out next, in chunks of ``chunk``, at most ``most``.

    The last chunk takes what would be less than a block by itself, which would read all weights for a few tokens, where
    it has room for that.
    """
    return left if left <= most and left - chunk < _BLOCK else chunk


def chunks(prompt: int, stages: int, most: int = PREFILL_CHUNK) -> list[int]:
    """Tokens of each piece of a prompt that has the stages to itself, in order."""
    chunk, pieces, left = overlapping_chunk(prompt, stages, most), list[int](), prompt
    while left:
        pieces.append(next_chunk(left, chunk, most))
        left -= pieces[-1]
    return pieces
