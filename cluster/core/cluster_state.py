"""The state of a cluster, as a coordinator reports it to its clients. Sizes are in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cluster.core.leadership import LeadershipState
from cluster.core.plan import Forecast, LayerRange, Objective, PlannedStage, Route, Spare, Speculation
from cluster.core.request import StageFigures
from cluster.core.text import count_in_words, names_in_words, place_in_words
from cluster.core.worker import WorkerState


class ServingState(StrEnum):
    """The coordinator's state. ``FAILED`` comes with a sentence that says why."""

    IDLE = "idle"
    LOADING = "loading"
    TRAINING = "training"
    SERVING = "serving"
    RECOVERING = "recovering"
    FAILED = "failed"
    UNKNOWN = "unknown"
    """A state that this client's version does not know."""


@dataclass(frozen=True, slots=True)
class Repair:
    """A recovery from a loss, or a planned move of layers.

    ``expected_seconds`` counts from the start; 0 means that it waits for a Mac.
    """

    worker: str
    cause: str
    since_seconds: float
    doing: str
    expected_seconds: float
    attempts: int


class EventKind(StrEnum):
    """What a ``ClusterEvent`` tells about."""

    LOAD = "load"
    """A model was loaded."""
    RECOVERY = "recovery"
    """A stage was lost, and answers went on without its Mac or after its return."""
    MOVE = "move"
    """Layers were moved as planned."""
    RETURN = "return"
    """A lost worker is back."""
    UNLOAD = "unload"
    """A model was unloaded."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    """Something that is over: ``age_seconds`` ago, after ``duration_seconds``, which is 0 for a moment.

    ``worker`` is "" if it concerns no worker or several.
    """

    kind: EventKind
    age_seconds: float
    duration_seconds: float
    worker: str
    sentence: str


class RequestState(StrEnum):
    """The phase of a live request."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class StageState:
    """The layers that a worker (by name) holds.

    ``cache_bytes`` is room for all sequences at the promised context length. ``input_route`` is the route of the
    stage's input; the coordinator feeds the first stage.
    """

    index: int
    worker: str
    layers: LayerRange
    weight_bytes: int
    cache_bytes: int
    input_route: Route
    reserved_bytes: int = 0
    prefix_bytes: int = 0
    bubble_share: float | None = None
    """Idle share of the last half minute's time with a frame in the ring; None if no frame came back in it."""
    predicted_ms: float = 0.0
    """Predicted time of a decode step of one row, from planning; 0 if the worker's speed was unknown."""
    measured_ms: float = 0.0
    """Median time of the last decode frames; 0 while there are too few."""
    expected_ms: float = 0.0
    """Predicted time of those same frames."""
    measured_frames: int = 0
    busy_seconds: float = 0.0
    """Compute time since the model was loaded."""
    active_seconds: float = 0.0
    """Time since the model was loaded with a frame in flight anywhere in the ring."""
    wasted_seconds: float = 0.0
    """Compute time since the last recovery of guesses that were wrong."""
    link_round_trip_ms: float = 0.0
    """Measured round trip of the link from the stage before it; 0 if not measured."""
    link_bandwidth: float = 0.0
    """Measured bytes per second of that link; 0 if not measured."""
    link_interface: str = ""
    """What carries it on the receiving Mac, such as ``Thunderbolt Bridge (bridge0)``; empty if not known."""
    rank: int = 0
    ranks: int = 1
    """How many workers share these layers as a group, with the same ``index``; this one is number ``rank`` of them."""

    @property
    def place(self) -> str:
        """Where it is in the plan, in words."""
        return place_in_words(self.index, self.rank, self.ranks)

    @property
    def share(self) -> str:
        """What it holds of the model, in words."""
        return f"{self.layers} (rank {self.rank} of {self.ranks})" if self.ranks > 1 else str(self.layers)


def first_ranks(stages: Iterable[StageState]) -> tuple[StageState, ...]:
    """Return the stages of a pipeline, each once: of a group, rank 0."""
    return tuple(stage for stage in stages if stage.rank == 0)


def count_stages(stages: Iterable[StageState]) -> str:
    """Return the number of stages, in words: the ranks of a group are one."""
    return count_in_words(len(first_ranks(stages)), "stage")


def exposure_in_words(workers: Sequence[str]) -> str:
    """Return a sentence about what protects the links between the ranks of groups: nothing."""
    return f"the links between {names_in_words(workers)}, which share layers, are neither authenticated nor encrypted"


def holders_in_words(stages: Iterable[StageState | PlannedStage], between: str = " ") -> str:
    """Return which workers hold which layers: ``ada 0-3, bob+cyd 4-7``, where bob and cyd are a group."""
    parts: list[tuple[str, LayerRange]] = []
    for stage in stages:
        name = f"{parts.pop()[0]}+{stage.worker}" if stage.rank else stage.worker
        parts.append((name, stage.layers))
    return ", ".join(f"{name}{between}{layers}" for name, layers in parts)


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """A request that has not ended. ``lane`` is None while it is queued."""

    request_id: str
    state: RequestState
    prompt_tokens: int
    prefilled_tokens: int
    completion_tokens: int
    lane: int | None
    age_seconds: float
    cached_tokens: int = 0
    guessed_tokens: int = 0
    """Tokens of the answer that were guessed before they were sampled."""
    window: int = 1
    """How many of its frames may be in flight at once; 1: no guess is worth it, or there is no memory for one."""
    tokens_per_second: float = 0.0
    """Since its first token; 0 before the second one."""
    stages: tuple[StageFigures, ...] = ()
    """Its time on each stage since it was accepted."""

    @property
    def tokens_per_pass(self) -> float:
        """Tokens of the answer for each one that a whole pass through the stages had to wait for."""
        return self.completion_tokens / max(self.completion_tokens - self.guessed_tokens, 1)


@dataclass(frozen=True, slots=True)
class GuessCounts:
    """Tokens that one source guessed: ``accepted`` were right, ``voided`` were of no use.

    ``rows`` of them followed another token in one frame.
    """

    source: str
    guessed: int
    accepted: int
    voided: int
    rows: int = 0


@dataclass(frozen=True, slots=True)
class AdapterState:
    """An adapter of the served model: the hex SHA-256 of its content, and its bytes on all stages together."""

    name: str
    fingerprint: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """How far a training of adapters is: ``iteration`` of ``iterations`` steps. ``seconds_left`` 0: not known yet."""

    iteration: int
    iterations: int
    seconds_left: float


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """A copy of a model that answers requests, on stages of its own. The fields are as in ``ClusterState``."""

    state: ServingState
    problem: str = ""
    epoch: int = 0
    stages: tuple[StageState, ...] = ()
    requests: tuple[LiveRequest, ...] = ()
    lane_sizes: tuple[int, ...] = ()
    queued: int = 0
    prefixes: int = 0


@dataclass(frozen=True, slots=True)
class DeploymentState:
    """A model under a name, loaded or not. ``state`` is IDLE if it is not.

    ``model`` is what is loaded, or would be: an id or a folder. ``pinned``: it is never unloaded to make room.
    ``idle_seconds`` are those since its last request ended, or since it was loaded; 0 while it has requests.
    ``adapters`` and ``speculation`` are those of a loaded model, as in ``ClusterState``.
    """

    name: str
    model: str
    state: ServingState
    aliases: tuple[str, ...] = ()
    problem: str = ""
    activity: str = ""
    max_context: int = 0
    pinned: bool = False
    idle_seconds: float = 0.0
    replicas: tuple[ReplicaState, ...] = ()
    adapters: tuple[AdapterState, ...] = ()
    speculation: Speculation = Speculation.OFF
    draft_worker: str = ""

    @property
    def requests(self) -> tuple[LiveRequest, ...]:
        """The live requests of all replicas."""
        return tuple(request for replica in self.replicas for request in replica.requests)

    @property
    def stages(self) -> tuple[StageState, ...]:
        """The stages of all replicas."""
        return tuple(stage for replica in self.replicas for stage in replica.stages)


@dataclass(frozen=True, slots=True)
class ClusterState:
    """A snapshot of workers, stages and live requests. ``model`` is empty if no model is loaded.

    In a training, ``model`` and ``stages`` are those that are trained.
    """

    cluster: str
    version: str
    state: ServingState
    problem: str = ""
    activity: str = ""
    """What a load or a training does or waits for, in words; "" if there is none."""
    training: TrainingProgress | None = None
    model: str = ""
    layers: int = 0
    max_context: int = 0
    max_sequences: int = 0
    epoch: int = 0
    route: Route = Route.DIRECT
    workers: tuple[WorkerState, ...] = ()
    stages: tuple[StageState, ...] = ()
    requests: tuple[LiveRequest, ...] = ()
    requests_finished: int = 0
    tokens_generated: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of all requests that got a first token, ..."""
    cached_tokens: int = 0
    """... and those of them that came from a kept prefix."""
    uptime_seconds: float = 0.0
    lane_sizes: tuple[int, ...] = ()
    queued: int = 0
    prefixes: int = 0
    disk_hits: int = 0
    """Prefixes read from the workers' disks since the model was loaded, ..."""
    disk_misses: int = 0
    """... those that could not be read, or not in time, ..."""
    disk_tokens: int = 0
    """... and the tokens that were not prefilled for it."""
    repair: Repair | None = None
    move: Repair | None = None
    recoveries: int = 0
    events: tuple[ClusterEvent, ...] = ()
    """The last loads, recoveries, moves and returns, oldest first. ``repair`` or ``move`` has one that is not over."""
    objective: Objective = Objective.LATENCY
    forecast: Forecast | None = None
    spares: tuple[Spare, ...] = ()
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """Options that are not in effect although the cluster serves; one sentence each."""
    adapters: tuple[AdapterState, ...] = ()
    speculation: Speculation = Speculation.OFF
    guesses: tuple[GuessCounts, ...] = ()
    guesses_without_room: int = 0
    """Times that a request was not guessed because there was no memory for the marks that its model needs."""
    draft_worker: str = ""
    """The worker that holds the draft model; "" if there is none, or if it is lost."""
    lag_seconds: float = 0.0
    """Scheduling delay on the coordinator's machine; 0.0 unless the machine is overloaded."""
    deployments: tuple[DeploymentState, ...] = ()
    """All models if there are several models or replicas, the default one first; the fields above are those of its
    first replica, but workers, events and totals are those of all."""
    leadership: LeadershipState | None = None
    """Who leads, if this coordinator has or is a standby; None if there never was one."""

    @property
    def rings(self) -> tuple[tuple[str, ReplicaState], ...]:
        """All replicas, each with the name of its model, or of the replica if there are several; no name without
        ``deployments``.
        """
        if not self.deployments or self.training:
            alone = ReplicaState(
                self.state,
                self.problem,
                self.epoch,
                self.stages,
                self.requests,
                self.lane_sizes,
                self.queued,
                self.prefixes,
            )
            return (("", alone),)
        return tuple(
            (f"{one.name} #{i}" if len(one.replicas) > 1 else one.name, replica)
            for one in self.deployments
            for i, replica in enumerate(one.replicas, 1)
        )

    @property
    def all_requests(self) -> tuple[LiveRequest, ...]:
        """The live requests of all models."""
        if not self.deployments:
            return self.requests
        return tuple(request for deployment in self.deployments for request in deployment.requests)

    @property
    def all_stages(self) -> tuple[StageState, ...]:
        """The stages of all models; in a training, those that train."""
        if not self.deployments or self.training:
            return self.stages
        return tuple(stage for deployment in self.deployments for stage in deployment.stages)


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A plan for a model that is not loaded. ``forecast`` is None if a worker's speed is unknown."""

    model: str
    layers: int
    max_context: int
    max_sequences: int
    route: Route
    objective: Objective
    stages: tuple[StageState, ...]
    forecast: Forecast | None
    spares: tuple[Spare, ...]
    reasons: tuple[str, ...]
