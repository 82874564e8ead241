"""What a client is told about the cluster itself. Frozen, typed, free of protobuf. Bytes are bytes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cluster.core.plan import Forecast, LayerRange, Objective, Route, Spare
from cluster.core.state import Repair, ServingState


class RequestState(StrEnum):
    """Where a live request is."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One Mac. ``memory_limit`` is what macpipe may use of ``memory_total``; ``sequences`` counts held caches."""

    id: str
    name: str
    version: str
    control_address: str
    data_address: str
    chip: str
    backend: str
    mlx_version: str
    memory_total: int
    memory_limit: int
    memory_used: int
    memory_peak: int
    sequences: int
    reachable: bool
    problem: str
    interface: str = ""
    gpu_cores: int = 0
    memory_pressure: str = ""
    bandwidth: float = 0.0
    standing: str = "up"
    silent_seconds: float = 0.0
    losses: int = 0
    draining: bool = False
    clock_ahead_seconds: float = 0.0
    """Its clock over the coordinator's; below 0: it is behind."""
    lag_seconds: float = 0.0
    """How late things happen on its machine; 0.0 unless that is overloaded."""


@dataclass(frozen=True, slots=True)
class StageState:
    """Which layers a worker (by its name) holds; ``cache_bytes`` is room for all sequences at the promised context.

    ``inlet`` is how its input arrives; the coordinator itself feeds the first stage.
    """

    index: int
    worker: str
    layers: LayerRange
    weight_bytes: int
    cache_bytes: int
    inlet: Route
    reserved_bytes: int = 0
    prefix_bytes: int = 0
    bubble_share: float = 0.0
    predicted_ms: float = 0.0
    """A decode step of one row, as predicted when it was planned; 0: the worker's speed was not known."""
    measured_ms: float = 0.0
    """What the last decode frames took (the median); 0: too few yet."""
    expected_ms: float = 0.0
    """What was predicted for the very same frames."""
    measured_frames: int = 0
    busy_seconds: float = 0.0
    """That it computed since the model was loaded, and ``active_seconds`` in which the ring held anything at all."""
    active_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """A request that has not ended. ``lane`` is None while it waits."""

    request_id: str
    state: RequestState
    prompt_tokens: int
    prefilled_tokens: int
    completion_tokens: int
    lane: int | None
    age_seconds: float
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ClusterState:
    """Everything at one moment: who is there, who holds what, what runs. Empty ``model``: none is loaded."""

    cluster: str
    version: str
    state: ServingState
    problem: str
    model: str
    layers: int
    max_context: int
    max_sequences: int
    epoch: int
    route: Route
    workers: tuple[WorkerState, ...]
    stages: tuple[StageState, ...]
    requests: tuple[LiveRequest, ...]
    requests_finished: int
    tokens_generated: int
    uptime_seconds: float
    lane_sizes: tuple[int, ...] = ()
    queued: int = 0
    prefixes: int = 0
    repair: Repair | None = None
    move: Repair | None = None
    recoveries: int = 0
    objective: Objective = Objective.LATENCY
    forecast: Forecast | None = None
    spares: tuple[Spare, ...] = ()
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """What does not work as asked for while answers go on, a sentence each."""
    lag_seconds: float = 0.0
    """How late things happen on the coordinator's machine; 0.0 unless that is overloaded."""


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """Who would hold what of a model. ``forecast`` is None where a worker's speed is not known."""

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
