"""What a worker says about itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.core.plan import LayerRange, Profile


@dataclass(frozen=True, slots=True)
class WorkerInfo:
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
