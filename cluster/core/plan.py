"""Models, plans and speeds: what placement needs of a model, what a plan contains, how a prompt is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from math import isfinite, sqrt
from typing import Final

from cluster.core.limits import ACTIVE_LAYERS, MAX_VERIFIED, PREFILL_CHUNK, SCORE_BYTES
from cluster.core.link_limits import DECODE_FRAME_BYTES, PREFILL_FRAME_BYTES


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
    """A checkpoint: its name for people, its folder, and its hash.

    ``fingerprint`` is a hex SHA-256 over the config, the tokenizer, the safetensors headers and the file versions.
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
    """Bytes that one token reads if it is only looked up (a row of an embedding); None: always all bytes."""
    head: bool = False
    """It is looked up, but the stage with the last layer multiplies with all of it (a tied embedding)."""


@dataclass(frozen=True, slots=True)
class RankSizes:
    """What one of ``ranks`` workers that share each layer holds and computes of a model, as in ``ModelShape``."""

    ranks: int
    layer_bytes: tuple[int, ...]
    cache_bytes: tuple[int, ...]
    shared: tuple[SharedWeight, ...]
    cache_curve: tuple[tuple[int, tuple[int, ...]], ...] = ()
    mark_curve: tuple[tuple[int, tuple[int, ...]], ...] = ()
    active_bytes: tuple[int, ...] = ()
    expert_bytes: tuple[int, ...] = ()
    flops: tuple[float, ...] = ()
    heads: int = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What placement needs to know of a model, found without reading a weight. All sizes are bytes.

    Cut e lies before layer e. A cut is clean if a stage may begin there; ``unclean`` says why the other cuts are not.
    ``layer_bytes`` and ``cache_bytes`` (one sequence of ``max_context`` tokens) have an entry per layer. ``batchable``:
    sequences can share a lane; otherwise each needs its own lane. ``trimmable``: a sequence or a kept prefix can drop
    any number of its last tokens; otherwise ``mark_curve`` has the sizes of marks.
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
    """Sizes of shorter sequences: (tokens, bytes per layer), ascending, without the one of ``max_context``."""
    mark_curve: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Sizes of marks: (length in tokens, bytes per layer), ascending, up to ``max_context``; empty if trimmable."""
    active_bytes: tuple[int, ...] = ()
    """Bytes that one token reads of each layer; of stacked experts only its own. Empty: all of every layer."""
    expert_bytes: tuple[int, ...] = ()
    """Bytes of each layer's stacked experts, all of them. Empty: there are none."""
    flops: tuple[float, ...] = ()
    """Floating-point operations of one token per layer, without the part of attention that grows with the context."""
    boundary_bytes: tuple[int, ...] = ()
    """Bytes that cross the cut before each layer for one token; the first entry is for token ids."""
    vocabulary: int = 0
    """Logits of one position; 0 if unknown."""
    heads: int = 0
    """Attention heads of a layer; 0 if unknown."""
    max_chunk: int = PREFILL_CHUNK
    """Tokens of the longest prompt chunk for which the sizes of caches hold."""
    given_name: str = ""
    """What people call the model; "" if they call it by its source."""

    @property
    def title(self) -> str:
        """The model's name for people."""
        return self.given_name or self.model.name

    rank_sizes: tuple[RankSizes, ...] = ()
    """Of the groups that were asked for, by their number of ranks."""

    def of_rank(self, ranks: int) -> ModelShape:
        """Return the shape of the part that one of ``ranks`` workers holds, which share each layer.

        Raises ``ValueError`` for a number that was not asked for.
        """
        if ranks == 1:
            return self
        sizes = next((sizes for sizes in self.rank_sizes if sizes.ranks == ranks), None)
        if sizes is None:
            raise ValueError(f"the part of one of {ranks} ranks is not known")
        return replace(
            self,
            layer_bytes=sizes.layer_bytes,
            cache_bytes=sizes.cache_bytes,
            shared=sizes.shared,
            cache_curve=sizes.cache_curve,
            mark_curve=sizes.mark_curve,
            active_bytes=sizes.active_bytes,
            expert_bytes=sizes.expert_bytes,
            flops=sizes.flops,
            heads=sizes.heads,
        )

    def stage_bytes(self, layers: LayerRange) -> int:
        """Return the bytes of weights that a stage with these layers holds."""
        own = range(layers.start, layers.end)
        shared = sum(w.nbytes for w in self.shared if any(i in own for i in w.layers))
        return sum(self.layer_bytes[layers.start : layers.end]) + shared

    def stage_cache_bytes(self, layers: LayerRange, tokens: int | None = None) -> int:
        """Return the maximal cache bytes of one sequence of ``tokens`` (None: full length) on that stage."""
        fitting = (sizes for known, sizes in self.cache_curve if tokens is not None and known >= tokens)
        return sum(next(fitting, self.cache_bytes)[layers.start : layers.end])

    def stage_mark_bytes(self, layers: LayerRange, length: int) -> int:
        """Return the most bytes that a mark at ``length`` tokens takes on that stage."""
        fitting = (sizes for known, sizes in self.mark_curve if known >= length)
        return sum(next(fitting, self.mark_curve[-1][1])[layers.start : layers.end])

    def chunk_within(self, room: int, layers: LayerRange, context: int) -> int:
        """Return how many tokens after ``context`` others a stage can compute at once in ``room`` bytes.

        A layer has a value for each row of its weights, and several layers are held at once. On a GPU, a chunk of 2,048
        took 2.3 times ``flops / width`` bytes of each of 16 dense layers, and 4.7 times of sparse ones. Attention
        scores of one layer count in full, as where no kernel keeps them to itself. The result is 0 if the model's sizes
        are unknown.
        """
        width = max(self.boundary_bytes, default=0)
        flops = max(self.flops[layers.start : layers.end], default=0.0) * min(len(layers), ACTIVE_LAYERS)
        if not (width and flops and self.heads):
            return 0
        score = self.heads * SCORE_BYTES
        token = 5 * flops / width + score * context
        return int((sqrt(token * token + 4 * score * room) - token) / (2 * score))


class Speculation(StrEnum):
    """What guesses tokens: nothing, whatever there is, texts that the client has, or a draft model alone."""

    OFF = "off"
    AUTO = "auto"
    NGRAM = "ngram"
    DRAFT = "draft"


class Objective(StrEnum):
    """What a plan optimizes: one user's next token, or many users' tokens together."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


@dataclass(frozen=True, slots=True)
class Profile:
    """Measured speed of a worker's engine, in bytes, seconds and operations; ``bandwidth`` 0: not measured.

    A decode step of one row takes ``step_s``, ``layer_s`` per layer, and the time of its weights' and caches' bytes at
    ``bandwidth``. Each further row adds ``row_cost`` (0 to 1) of the weights' time. ``flops`` is the rate of prompts.
    ``corrections`` are pairs of model fingerprint and measured over predicted time, the latest last.

    ``verify_costs`` is for steps of several tokens of one sequence: pairs of their number and how often such a step
    takes the weights' time of one token, in ascending order. The costs need not ascend, since MLX has other kernels
    for other numbers. Steps of as many sequences cost something else.
    """

    bandwidth: float = 0.0
    layer_s: float = 0.0
    step_s: float = 0.0
    flops: float = 0.0
    row_cost: float = 0.0
    corrections: tuple[tuple[str, float], ...] = ()
    verify_costs: tuple[tuple[int, float], ...] = ()

    @property
    def known(self) -> bool:
        return self.bandwidth > 0

    def correction(self, fingerprint: str) -> float:
        """Return the factor for predictions: as learned with that model, else the median over all models."""
        learned = dict(self.corrections)
        if fingerprint in learned:
            return learned[fingerprint]
        ratios = sorted(learned.values())
        return (ratios[len(ratios) // 2] + ratios[(len(ratios) - 1) // 2]) / 2 if ratios else 1.0


def valid_verify_costs(costs: Sequence[tuple[int, float]]) -> bool:
    """Return whether ``costs`` can be those of a ``Profile``: few, of ascending numbers of tokens, and each finite."""
    tokens = [1, *(n for n, _ in costs), MAX_VERIFIED + 1]
    ascending = all(type(n) is int and n < other for n, other in pairwise(tokens))
    return ascending and all(isfinite(cost) and cost > 0 for _, cost in costs)


@dataclass(frozen=True, slots=True)
class Link:
    """One measured direction between two workers: seconds of a round trip, and bytes a second.

    ``interface`` names what carries it on the Mac that receives; empty if it is not known. ``address`` is the data
    address of the Mac that sends, over which it was measured; empty if that is not told.
    """

    round_trip_s: float
    bandwidth: float
    interface: str = ""
    address: str = field(default="", compare=False)

    @property
    def cost_s(self) -> float:
        """Seconds of a typical decode frame and a typical prefill frame: what links between the same Macs differ in."""
        return self.hop_s(DECODE_FRAME_BYTES) + self.hop_s(PREFILL_FRAME_BYTES)

    def hop_s(self, nbytes: float) -> float:
        """Return the seconds that a message of ``nbytes`` takes to arrive."""
        return self.round_trip_s / 2 + nbytes / self.bandwidth


@dataclass(frozen=True, slots=True)
class Spare:
    """A worker that a plan leaves out, and why."""

    worker: str
    why: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """A plan's predicted speed: tokens a second for one and for eight users, seconds to the first token of a prompt.

    The prompt has ``prompt_tokens`` tokens: as many as the context has room for, up to 2,048. A plan that counts on
    guesses has the speed of one user whose tokens are guessed.
    """

    one_user: float
    eight_users: float
    first_token_s: float
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class StageSpec:
    """What one worker holds: stage ``index`` of ``count`` of a plan's epoch.

    ``kv_bits`` 4 or 8 quantizes keys and values; 0 keeps them in the model's own type. ``weight_bits`` quantizes the
    weights while they are loaded; 0 keeps them as they are stored.
    """

    epoch: int
    index: int
    count: int
    model: ModelRef
    layers: LayerRange
    max_context: int
    kv_bits: int = 0
    weight_bits: int = 0
    rank: int = 0
    ranks: int = 1
    """How many workers share each of its layers, as a group; this one is number ``rank`` of them."""
    readers: int = 1
    """How many read its output: the ranks of the next stage, or the coordinator alone."""

    @property
    def load_key(self) -> tuple[str, LayerRange | None, int, int, int]:
        """The fields that only a new load can change; a worker's has the same form."""
        return self.model.fingerprint, self.layers, self.kv_bits, self.weight_bits, self.ranks

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.count - 1


class Route(StrEnum):
    """How activations cross a hop: from worker to worker, or through the coordinator."""

    DIRECT = "direct"
    RELAY = "relay"


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """What a plan gives to one worker: a stage or its part of one, with sizes in bytes."""

    spec: StageSpec
    worker: str
    weight_bytes: int
    cache_bytes: int
    """Memory left for caches."""
    decode_ms: float = 0.0
    """Predicted time of a decode step of one row on this stage; 0 if the worker's speed is unknown."""

    @property
    def layers(self) -> LayerRange:
        return self.spec.layers

    @property
    def rank(self) -> int:
        return self.spec.rank


@dataclass(frozen=True, slots=True)
class Plan:
    """The workers and their layers in one epoch, in pipeline order; the ranks of a group follow one another.

    ``max_sequences`` is how many sequences fit at once if each takes the whole ``max_context``; more fit if they are
    shorter, up to ``lanes`` x ``rows``.
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
    """None if a worker's speed is unknown."""
    spares: tuple[Spare, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def pipeline(self) -> tuple[PlannedStage, ...]:
        """The stages that a frame passes one after another: of a group, rank 0."""
        return tuple(stage for stage in self.stages if stage.spec.rank == 0)

    @property
    def is_grouped(self) -> bool:
        """Whether several workers share the layers of a stage."""
        return any(stage.spec.ranks > 1 for stage in self.stages)

    def of_epoch(self, epoch: int) -> Plan:
        """Return the same plan with another epoch number."""
        stages = tuple(replace(s, spec=replace(s.spec, epoch=epoch)) for s in self.stages)
        return replace(self, epoch=epoch, stages=stages)


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Progress of one stage's load; ``state`` names the present activity in a word."""

    worker: str
    layers: LayerRange
    done_bytes: int
    total_bytes: int
    state: str = field(default="reading")
    hub_bytes: int = 0
    peer_bytes: int = 0
    notices: tuple[str, ...] = ()
    """All sentences so far that a person should read about the bytes that were found."""
    draft: str = ""
    """The name of the draft model that is being loaded; "" if it is the model that serves."""
    model: str = ""
    """The name of the model that serves, or will; "" if there is one alone."""


@dataclass(frozen=True, slots=True)
class TensorMap:
    """Tensor names by layer and by shared module.

    ``shared`` has, for each module outside the layers, its tensor names and the layers that read it.
    """

    layers: tuple[frozenset[str], ...]
    shared: tuple[tuple[frozenset[str], tuple[int, ...]], ...]

    @property
    def names(self) -> frozenset[str]:
        """The names of all tensors that a layer needs."""
        return self.of(LayerRange(0, len(self.layers)))

    def of(self, layers: LayerRange) -> frozenset[str]:
        """Return the names of the tensors that a stage with ``layers`` reads."""
        local = range(layers.start, layers.end)
        outside = (names for names, readers in self.shared if any(layer in local for layer in readers))
        return frozenset().union(*self.layers[layers.start : layers.end], *outside)


@dataclass(frozen=True, slots=True)
class StorePlace:
    """A Mac that answers StoreService: its name, address, and party (``ROLE.ID``)."""

    name: str
    address: str
    party: str


@dataclass(frozen=True, slots=True)
class FetchOrder:
    """The tensors of the model's files that a stage needs, and where to fetch them.

    ``tensors`` are names in the order in which they are needed; another worker fetches those in ``deferred`` first.
    ``repo`` and ``commit`` locate the model on the hub; empty if it is not there.
    """

    tensors: tuple[str, ...]
    deferred: tuple[str, ...] = ()
    peers: tuple[StorePlace, ...] = ()
    repo: str = ""
    commit: str = ""


@dataclass(frozen=True, slots=True)
class LoadedStage:
    """A stage on its worker: the hashes of its tensors, pairs of name and SHA-256 in hex, and its data plane's port.

    ``data_port`` 0: that of the worker's description.
    """

    worker: str
    digests: tuple[tuple[str, str], ...]
    data_port: int = 0


_FILLS: Final = 4
"""Chunks of a prompt per stage: filling and draining the pipeline then costs 1 / _FILLS of its time."""
_LEAST_SPLIT: Final = 128
"""A shorter chunk would lose more to thin matrices than overlapping gains."""
CHUNK_BLOCK: Final = 64
"""GPU kernels are fastest at attention over whole blocks, and there are few such lengths."""


def overlapping_chunk(prompt_tokens: int, stage_count: int, max_chunk: int = PREFILL_CHUNK) -> int:
    """Return the tokens per chunk for a prompt of ``prompt_tokens`` over ``stage_count`` stages, at most ``max_chunk``.

    Chunks are whole blocks, so that kernels compiled for one prompt's lengths serve the next prompt.
    """
    if stage_count == 1:
        return max_chunk
    return min(max_chunk, max(_LEAST_SPLIT, -(-prompt_tokens // (_FILLS * stage_count * CHUNK_BLOCK)) * CHUNK_BLOCK))


def next_chunk(left: int, chunk: int, max_chunk: int = PREFILL_CHUNK) -> int:
    """Return how many of the ``left`` tokens of a prompt go out next, in chunks of ``chunk``, at most ``max_chunk``.

    The last chunk includes a remainder of less than a block, or than half a short chunk, if it has room: the remainder
    alone would read all weights for a few tokens.
    """
    return left if left <= max_chunk and left - chunk < min(CHUNK_BLOCK, chunk // 2) else chunk


def chunks(prompt_tokens: int, stage_count: int, max_chunk: int = PREFILL_CHUNK) -> list[int]:
    """Return the tokens of each piece of a prompt that has the stages to itself, in order."""
    chunk = overlapping_chunk(prompt_tokens, stage_count, max_chunk)
    pieces: list[int] = []
    left = prompt_tokens
    while left:
        pieces.append(next_chunk(left, chunk, max_chunk))
        left -= pieces[-1]
    return pieces
