"""A worker's description of itself: the fields for everybody, those for its coordinator, and those for clients."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from cluster.core.plan import LayerRange, Profile


@dataclass(frozen=True, slots=True)
class WorkerSummary:
    """A worker's description of itself, as far as the coordinator shows it to people.

    Sizes are in bytes: macpipe may use ``memory_limit`` of ``memory_total``. Addresses are ``host:port``; the worker
    itself leaves them empty, since only its callers know them. ``sequences`` counts its KV caches.
    """

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
    memory_used: int = 0
    memory_peak: int = 0
    """Peak memory since the engine started."""
    sequences: int = 0
    interface: str = ""
    gpu_cores: int = 0
    macos_version: str = ""
    memory_pressure: str = ""
    """normal, warning or critical; empty if the system does not report it."""
    draining: bool = False
    clock_ahead_seconds: float = 0.0
    """The worker's clock minus the coordinator's; negative if it is behind."""
    lag_seconds: float = 0.0
    """Scheduling delay on the worker's machine; 0.0 unless the machine is overloaded."""
    prefix_disk_limit: int = 0
    """Maximum bytes of prefixes on its disk; 0 without ``--prefix-disk``."""
    prefix_disk_bytes: int = 0
    prefix_disk_evictions: int = 0
    """Beginnings of sequences that were deleted from its disk to make room, since its engine started."""
    power_watts: float = 0.0
    """Power of the whole Mac; 0.0 without macmon."""
    energy_joules: float = 0.0
    """Energy of the whole Mac since the worker started, as far as it is known."""


@dataclass(frozen=True, slots=True)
class HeldSlice:
    """A slice that a worker holds in an engine of its own, whose data plane listens on ``data_port``."""

    epoch: int = 0
    layers: LayerRange | None = None
    model: str = ""
    fingerprint: str = ""
    kv_bits: int = 0
    weight_bits: int = 0
    adapters: tuple[str, ...] = ()
    """Keys of the adapters that it holds."""
    data_port: int = 0
    sequences: int = 0
    busy_ms: int = 0
    computing: bool = False
    """Whether the engine has had processor time in its present step."""
    problem: str = ""
    """Why its engine does not answer; "" if it does."""
    memory_used: int = 0
    memory_limit: int = 0
    """Bytes that it may use; 0 if it may use all."""
    ranks: int = 1
    """How many workers share its layers; 1 if it has them whole."""


@dataclass(frozen=True, slots=True)
class WorkerInfo(WorkerSummary):
    """A worker's full description for its coordinator. ``epoch`` is 0 and ``layers`` None if it holds no stage.

    The fields that describe a stage are those of the first of its ``slices``.
    """

    cluster: str = ""
    epoch: int = 0
    layers: LayerRange | None = None
    model: str = ""
    fingerprint: str = ""
    kv_bits: int = 0
    weight_bits: int = 0
    adapters: tuple[str, ...] = ()
    """Keys of the adapters that its stage holds."""
    owner: str = ""
    """Id of the coordinator that owns its stage, even if it has been silent."""
    live_owner: str = ""
    """The owner's id if its last heartbeat is recent; empty if not."""
    live_owner_process: str = ""
    """Random id of the owner's process if it was heard too recently to have restarted since; empty if not."""
    term: int = 0
    """Number of the highest term that it has granted; 0 if it never has."""
    instance: str = ""
    """Random id of its process."""
    profile: Profile = field(default_factory=Profile)
    busy_ms: int = 0
    computing: bool = False
    """Whether the engine has had processor time in its present step."""
    stopping: bool = False
    slices: tuple[HeldSlice, ...] = ()
    ranks: int = 1
    """How many workers share the layers of its stage; 1 if it has them whole."""
    data_hosts: tuple[str, ...] = ()
    """Further IP addresses at which its data port listens, beside that of ``data_address``."""
    certificate: tuple[float, float] = (0.0, 0.0)
    """Start and end of its validity, in seconds since the epoch; zeros without a cluster."""

    @property
    def load_key(self) -> tuple[str, LayerRange | None, int, int, int]:
        """What it loaded, in the form of ``StageSpec.load_key``."""
        return self.fingerprint, self.layers, self.kv_bits, self.weight_bits, self.ranks

    def showing(self, held: HeldSlice) -> WorkerInfo:
        """Return the worker with this slice as its stage."""
        return replace(self, **{name: getattr(held, name) for name in STAGE_FIELDS})


STAGE_FIELDS: Final = tuple(
    name
    for name in WorkerInfo.__dataclass_fields__
    if name in HeldSlice.__dataclass_fields__ and name not in WorkerSummary.__dataclass_fields__
)
"""The fields of a worker that describe its stage, as those of a slice do. They are copied by name."""


@dataclass(frozen=True, slots=True)
class WorkerState(WorkerSummary):
    """One worker as the coordinator sees it. ``problem`` says why it cannot be used; "" if it can."""

    reachable: bool = True
    problem: str = ""
    bandwidth: float = 0.0
    """Bytes of weights per second in decode, as measured; 0.0 if not measured."""
    standing: str = "up"
    silent_seconds: float = 0.0
    losses: int = 0
