"""The messages between daemon and engine over a pipe: msgpack lists that start with the message's name.

Commands carry a ``call`` number; ``Progress``, ``Done`` and ``CommandFailed`` return it. ``Hello`` is the engine's
first message, its answer to ``Begin``. Both ends run the same version, but an engine that a fault has damaged may send
anything, so the shape and the types of each message are checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any, get_args

import msgpack

from cluster.core.adapter import AdapterRef
from cluster.core.errors import BadFrame, Reason
from cluster.core.limits import MAX_ENGINE_MESSAGE_BYTES, MAX_VERIFIED
from cluster.core.plan import LayerRange, ModelRef, Profile, StageSpec, valid_verify_costs
from cluster.core.process_groups import GroupAddresses


@dataclass(frozen=True, slots=True)
class Begin:
    """Open the device and the data port, and answer ``Hello``. The first command; an engine stands by until then.

    ``number`` tells a worker's engines apart. The first is 0, and only it keeps prefixes on disk. A data port that a
    person chose is the first engine's; each further engine takes the port that is its number higher.
    """

    call: int = 0
    number: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """Load this slice and drop the present one."""

    call: int
    epoch: int
    index: int
    count: int
    model: str
    path: str
    fingerprint: str
    start_layer: int
    end_layer: int
    max_context: int
    kv_bits: int = 0
    weight_bits: int = 0
    memory_limit: int = 0
    """Bytes that the slice may use, with its caches; 0: all that the engine may use."""
    term: int = 0
    """Streams to and from the slice open for this term alone."""
    rank: int = 0
    ranks: int = 1
    """With more than one, the engine must have joined a group of so many as this rank."""
    readers: int = 1

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            epoch=self.epoch,
            index=self.index,
            count=self.count,
            model=ModelRef(self.model, self.path, self.fingerprint),
            layers=LayerRange(self.start_layer, self.end_layer),
            max_context=self.max_context,
            kv_bits=self.kv_bits,
            weight_bits=self.weight_bits,
            rank=self.rank,
            ranks=self.ranks,
            readers=self.readers,
        )


@dataclass(frozen=True, slots=True)
class HoldGroupPort:
    """Keep a port free for the other ranks of a group; answered with ``GroupPortHeld``."""

    call: int


@dataclass(frozen=True, slots=True)
class GroupPortHeld:
    """``rdma``: this MLX can connect groups by RDMA."""

    call: int
    port: int
    rdma: bool = False


@dataclass(frozen=True, slots=True)
class JoinGroup:
    """Become this rank of a group, for the rest of the process's life. Returns once all ranks have met.

    ``hosts`` has the address and port of each rank; ``devices``, for RDMA, the rows of a table: the device of each rank
    towards each rank.
    """

    call: int
    rank: int
    hosts: tuple[str, ...]
    backend: str
    devices: tuple[str, ...] = ()

    @property
    def addresses(self) -> GroupAddresses:
        count = len(self.hosts)
        rows = tuple(self.devices[start : start + count] for start in range(0, len(self.devices), count))
        return GroupAddresses(self.hosts, self.backend, rows)

    @classmethod
    def of(cls, call: int, rank: int, found: GroupAddresses) -> JoinGroup:
        """Return the command to join a group at these addresses."""
        return cls(call, rank, found.hosts, found.backend, tuple(name for row in found.devices for name in row))


@dataclass(frozen=True, slots=True)
class MeasureSums:
    """Time sums over the group that the engine has joined, on all ranks at once; answered with ``SumsMeasured``."""

    call: int


@dataclass(frozen=True, slots=True)
class SumsMeasured:
    """The figures of an ``AllReduce``."""

    call: int
    seconds: float
    bandwidth: float
    disturbed: bool


@dataclass(frozen=True, slots=True)
class Fence:
    """Close the slice's streams now, and answer once no frame of theirs is computed any more. Weights stay loaded."""

    call: int


@dataclass(frozen=True, slots=True)
class LayOutCopy:
    """Create a quantized copy of the checkpoint in ``source``, without tensors, in the folder ``models``.

    ``model`` is the name by which people know the checkpoint.
    """

    call: int
    models: str
    key: str
    source: str
    weight_bits: int
    model: str


@dataclass(frozen=True, slots=True)
class QuantizeLayers:
    """Compute the tensors of these layers that the copy with ``key`` lacks, from the checkpoint in ``source``."""

    call: int
    models: str
    key: str
    source: str
    weight_bits: int
    start_layer: int
    end_layer: int


@dataclass(frozen=True, slots=True)
class LinkStage:
    """Pull frames from the stage at ``pull_from``, which ``peer`` holds; empty: the coordinator feeds them."""

    call: int
    epoch: int
    pull_from: str
    peer: str
    reader: int = 0
    """Which of its readers it is there."""


@dataclass(frozen=True, slots=True)
class OpenPrefixes:
    """Use the prefixes on disk in this epoch; answered with ``PrefixesOpened``. ``owners`` are names, one a line.

    The prefixes of all others are deleted, but with ``anonymous`` those of callers without a key are kept.
    """

    call: int
    epoch: int
    edition: str
    owners: str
    anonymous: bool


@dataclass(frozen=True, slots=True)
class PrefixesOpened:
    """``beginnings`` has 16 bytes of name and 4 of length for each beginning that the stage can start from."""

    call: int
    beginnings: bytes


@dataclass(frozen=True, slots=True)
class ReadPrefix:
    """Read the beginning ``node`` of ``length`` tokens from disk, and keep it as prefix ``prefix``."""

    call: int
    epoch: int
    prefix: int
    owner: str
    adapter: str
    node: bytes
    length: int


@dataclass(frozen=True, slots=True)
class SetAdapters:
    """Hold just these adapters: their names, their folders on this machine, and their fingerprints."""

    call: int
    epoch: int
    names: tuple[str, ...]
    folders: tuple[str, ...]
    fingerprints: tuple[str, ...]

    @property
    def refs(self) -> list[AdapterRef]:
        return [AdapterRef(*fields) for fields in zip(self.names, self.folders, self.fingerprints, strict=True)]


@dataclass(frozen=True, slots=True)
class Unload:
    """Free everything of this epoch or an older one."""

    call: int
    epoch: int


@dataclass(frozen=True, slots=True)
class GetReport:
    """Request a ``Reported``, which is answered even while the model computes."""

    call: int


@dataclass(frozen=True, slots=True)
class Measure:
    """Time the device; answered with ``Measured``."""

    call: int


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of a ``Profile``. ``verify_costs`` begins with that of two tokens; 0 if it was not measured.

    ``disturbed`` says in words why the figures may be too slow; empty if nothing disturbed the measurement.
    """

    call: int
    bandwidth: float
    layer_s: float
    step_s: float
    flops: float
    row_cost: float
    verify_costs: tuple[float, ...] = ()
    disturbed: str = ""

    @property
    def profile(self) -> Profile:
        costs = tuple((tokens, cost) for tokens, cost in enumerate(self.verify_costs, 2) if cost)
        valid = costs if valid_verify_costs(costs) else ()
        return Profile(self.bandwidth, self.layer_s, self.step_s, self.flops, self.row_cost, verify_costs=valid)

    @classmethod
    def of(cls, call: int, p: Profile, disturbed: str) -> Measured:
        costs = dict(p.verify_costs)
        every = tuple(costs.get(tokens, 0.0) for tokens in range(2, MAX_VERIFIED + 1))
        return cls(call, p.bandwidth, p.layer_s, p.step_s, p.flops, p.row_cost, every, disturbed)


@dataclass(frozen=True, slots=True)
class Hello:
    """The engine is running: its data port, and the facts of its device. Memory is in bytes."""

    port: int
    chip: str
    backend: str
    mlx_version: str
    mlx_lm_version: str
    memory_total: int
    memory_limit: int


@dataclass(frozen=True, slots=True)
class Progress:
    call: int
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Done:
    call: int


@dataclass(frozen=True, slots=True)
class CommandFailed:
    """A command failed with the ``MacpipeError`` of that reason and sentence. Call 0: the engine failed to start.

    ``epoch`` is the loaded one if the command named another.
    """

    call: int
    reason: Reason
    sentence: str
    epoch: str = ""


@dataclass(frozen=True, slots=True)
class Reported:
    """``busy_ms`` is how long the MLX thread has worked on its present job; 0 while it waits for one."""

    call: int
    memory_used: int
    sequences: int
    memory_peak: int = 0
    busy_ms: int = 0
    prefix_disk_bytes: int = 0
    prefix_disk_evictions: int = 0
    adapters: tuple[str, ...] = ()
    """Keys of the adapters that the stage holds."""
    data_hosts: tuple[str, ...] = ()
    """Further addresses at which the data port listens."""


Command = (
    Load
    | HoldGroupPort
    | JoinGroup
    | MeasureSums
    | Fence
    | LayOutCopy
    | QuantizeLayers
    | LinkStage
    | SetAdapters
    | OpenPrefixes
    | ReadPrefix
    | Unload
    | GetReport
    | Measure
)
Event = Hello | Progress | Done | CommandFailed | Reported | Measured | PrefixesOpened | GroupPortHeld | SumsMeasured
_KINDS = (Begin, *get_args(Command), *get_args(Event))
_TYPES = {t.__name__: t for t in _KINDS}
_PLAIN: Mapping[str, tuple[type, ...]] = {
    "int": (int,), "float": (float, int), "str": (str,), "bytes": (bytes,), "bool": (bool,), "Reason": (str,)
}  # fmt: skip
"""Types of the fields' annotations."""
_LISTS: Mapping[str, tuple[type, ...]] = {"tuple[float, ...]": (float, int), "tuple[str, ...]": (str,)}


def pack(message: Begin | Command | Event) -> bytes:
    return bytes(msgpack.packb((type(message).__name__, *astuple(message))))


def unpacker() -> msgpack.Unpacker:
    """Return a stream for ``read``."""
    return msgpack.Unpacker(max_buffer_size=MAX_ENGINE_MESSAGE_BYTES)


def read(stream: msgpack.Unpacker, data: bytes) -> Iterator[Begin | Command | Event]:
    """Yield the messages that ``data`` completes. Raises ``BadFrame`` for an invalid one, which ends the stream."""
    try:
        stream.feed(data)
        for item in stream:
            yield _message(item)
    except (ValueError, msgpack.UnpackException) as e:
        raise BadFrame(f"the engine's pipe has an invalid message: {type(e).__name__}") from e


def _message(item: object) -> Begin | Command | Event:
    name, *values = item if isinstance(item, list) and item else [None]
    message_type = _TYPES.get(name) if isinstance(name, str) else None
    annotations = [str(field.type) for field in fields(message_type)] if message_type else []
    if message_type is None or len(annotations) != len(values):
        raise BadFrame("the engine's pipe has a message that this version does not know")
    if not all(_has_type(value, annotation) for annotation, value in zip(annotations, values, strict=True)):
        raise BadFrame(f"a message {name} on the engine's pipe has a field of a wrong type")
    arguments = [_convert(value, annotation) for value, annotation in zip(values, annotations, strict=True)]
    message: Begin | Command | Event = message_type(*arguments)
    return message


def _convert(value: Any, annotation: str) -> Any:
    if annotation == "Reason":
        return Reason.parse(value)
    return tuple(value) if isinstance(value, list) else value


def _has_type(value: object, annotation: str) -> bool:
    if annotation in _LISTS:
        return isinstance(value, list) and all(type(v) in _LISTS[annotation] for v in value)
    return type(value) in _PLAIN[annotation]
