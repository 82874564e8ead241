"""What daemon and engine say to each other over a pipe: msgpack lists, a message's name first.

Commands go down and carry a ``call`` number; ``Progress``, ``Done`` and ``Failed`` come back with it. ``Hello`` is the
engine's first word, and its answer to ``Begin``. Both ends are one version of one program, but an engine that a fault
has spoiled may say anything: each message's shape and types are checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, fields

import msgpack

from cluster.core.errors import BadFrame
from cluster.core.limits import MAX_ENGINE_MESSAGE_BYTES
from cluster.core.plan import LayerRange, ModelRef, StageSpec


@dataclass(frozen=True, slots=True)
class Begin:
    """Take the device and the data port, and say hello. An engine is told this first: until then it may stand by."""

    call: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """Hold this slice; what was held before is dropped."""

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
        )


@dataclass(frozen=True, slots=True)
class LinkStage:
    """Take frames from the stage at ``pull_from``, which ``peer`` holds; empty: they are fed."""

    call: int
    epoch: int
    pull_from: str
    peer: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Free everything of this epoch or an older one."""

    call: int
    epoch: int


@dataclass(frozen=True, slots=True)
class GetReport:
    """Say what is held; answered with ``Reported``, also while the model computes."""

    call: int


@dataclass(frozen=True, slots=True)
class Measure:
    """Time the device; answered with ``Measured``."""

    call: int


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of a ``Profile``."""

    call: int
    bandwidth: float
    layer_s: float
    step_s: float
    flops: float
    row_cost: float


@dataclass(frozen=True, slots=True)
class Hello:
    """The engine is up: its data port and what it found of the device. Bytes are bytes."""

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
    """``reason`` and ``sentence`` are those of a ``MacpipeError``. Call 0 is the engine's own start.

    ``epoch`` is the one that is loaded, where that is why.
    """

    call: int
    reason: str
    sentence: str
    epoch: str = ""


@dataclass(frozen=True, slots=True)
class Reported:
    """``busy_ms`` is how long the MLX thread has been at its present job; 0 where it waits for one."""

    call: int
    memory_used: int
    sequences: int
    memory_peak: int = 0
    busy_ms: int = 0


Command = Load | LinkStage | Unload | GetReport | Measure
Event = Hello | Progress | Done | CommandFailed | Reported | Measured
_KINDS = (Begin, Load, LinkStage, Unload, GetReport, Measure, Hello, Progress, Done, CommandFailed, Reported, Measured)
_TYPES = {t.__name__: t for t in _KINDS}
_PLAIN: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,)}
"""What the fields' annotations stand for."""


def pack(message: Begin | Command | Event) -> bytes:
    return bytes(msgpack.packb((type(message).__name__, *astuple(message))))


def unpacker() -> msgpack.Unpacker:
    """A stream for ``read``."""
    return msgpack.Unpacker(max_buffer_size=MAX_ENGINE_MESSAGE_BYTES)


def read(stream: msgpack.Unpacker, data: bytes) -> Iterator[Begin | Command | Event]:
    """The messages that became whole with ``data``. Raises ``BadFrame`` for what is none; the stream ends with that."""
    try:
        stream.feed(data)
        for item in stream:
            yield _message(item)
    except (ValueError, msgpack.UnpackException) as e:
        raise BadFrame(f"what came over the engine's pipe is no message: {type(e).__name__}") from e


def _message(item: object) -> Begin | Command | Event:
    name, *values = item if isinstance(item, list) and item else [None]
    kind = _TYPES.get(name) if isinstance(name, str) else None
    wanted = [str(field.type) for field in fields(kind)] if kind else []
    if kind is None or len(wanted) != len(values):
        raise BadFrame("what came over the engine's pipe is no message that this version knows")
    if not all(type(value) in _PLAIN[plain] for plain, value in zip(wanted, values, strict=True)):
        raise BadFrame(f"a message {name} over the engine's pipe has a field of another type")
    made: Begin | Command | Event = kind(*values)
    return made
