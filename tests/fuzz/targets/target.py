"""A fuzz target: a decoder of foreign bytes, valid inputs for it, and the errors that it may raise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError, Message

from cluster.core.errors import MacpipeError
from fuzz.mutation import Mutate, spoil_bytes, spoil_proto


@dataclass(frozen=True)
class Prepared:
    """A target that is ready to run. ``decode`` raises nothing but ``allowed``; what it returns does not matter."""

    decode: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    spoil: Mutate = spoil_bytes
    allowed: tuple[type[BaseException], ...] = (MacpipeError,)


def prepare_message(kind: type[Message], take: Callable[[Any], object], *seeds: Message) -> Prepared:
    """Prepare a target that has ``take`` read messages of one kind."""

    def run(data: bytes) -> None:
        take(kind.FromString(data))

    return Prepared(run, tuple(one.SerializeToString() for one in seeds), spoil_proto, (MacpipeError, DecodeError))


@dataclass(frozen=True)
class Target:
    """``share`` is its part of a run's inputs, against the other targets': what takes long gets fewer."""

    name: str
    share: int
    prepare: Callable[[], Prepared]
