"""Adapters: LoRA layers that change a served model for the requests that ask for them.

An adapter is known by its key: its name, and a hash of its content. Two adapters of one name, or one adapter under two
names, have different keys. The key of the model without an adapter is empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from cluster.core.errors import InvalidOption
from cluster.core.plan import LayerRange, ModelShape, SharedWeight

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapters.safetensors"
"""The files of an adapter's folder, as mlx-lm names them."""
MAX_ADAPTERS: Final = 16
"""Adapters of one model at once. Each may have as many lanes as the plan."""
MAX_ADAPTER_KEY_CHARS: Final = 129
"""A name, "@" and a SHA-256 in hex."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter: its name, its folder on the coordinator, and the hex SHA-256 of its content."""

    name: str
    path: str
    fingerprint: str

    @property
    def key(self) -> str:
        """The key that requests, prefixes and stages name it by."""
        return f"{self.name}@{self.fingerprint}"


@dataclass(frozen=True, slots=True)
class AdapterTensor:
    """One tensor of an adapter. A stage with any of ``layers`` holds it."""

    name: str
    nbytes: int
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that fits a model, and its tensors."""

    ref: AdapterRef
    tensors: tuple[AdapterTensor, ...]

    @property
    def key(self) -> str:
        return self.ref.key

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def tensors_of(self, layers: LayerRange) -> tuple[AdapterTensor, ...]:
        """Return the tensors that a stage with these layers holds."""
        return tuple(t for t in self.tensors if any(layers.start <= layer < layers.end for layer in t.layers))


def stage_bytes(adapters: Iterable[Adapter], layers: LayerRange) -> int:
    """Return the bytes that a stage with these layers holds of the adapters."""
    return sum(tensor.nbytes for adapter in adapters for tensor in adapter.tensors_of(layers))


def count_adapters(shape: ModelShape, adapters: Iterable[Adapter]) -> ModelShape:
    """Return the shape of a model whose stages hold the adapters too. The predicted times do not count them."""
    tensors = [tensor for adapter in adapters for tensor in adapter.tensors]
    layer_bytes = list(shape.layer_bytes)
    for tensor in tensors:
        if len(tensor.layers) == 1:
            layer_bytes[tensor.layers[0]] += tensor.nbytes
    shared = (SharedWeight(t.name, t.nbytes, t.layers, lookup_bytes=0) for t in tensors if len(t.layers) > 1)
    return replace(
        shape,
        layer_bytes=tuple(layer_bytes),
        shared=(*shape.shared, *shared),
        active_bytes=shape.active_bytes or shape.layer_bytes,
    )


def join_model_name(base: str, adapter: str) -> str:
    """Return the name of a model with an adapter, ``BASE:NAME``; the model's own without one."""
    return f"{base}:{adapter}" if adapter else base


def split_model_name(name: str) -> tuple[str, str]:
    """Return the model and the adapter that ``BASE:NAME`` names. The model is empty if there is no colon."""
    base, _, adapter = name.rpartition(":")
    return base, adapter


def name_of_key(key: str) -> str:
    """Return the name of the adapter with this key; "" for the key of the model alone."""
    return key.partition("@")[0]


def require_adapter_name(name: str) -> str:
    """Return ``name``. Raises InvalidOption unless it is an adapter's name."""
    if not _NAME.fullmatch(name):
        raise InvalidOption(
            f"{name[:80]!r} cannot be the name of an adapter: it must have 1 to 64 letters, digits, dots, dashes or "
            "underscores, and begin with a letter or a digit",
            field="adapter",
        )
    return name


def parse_adapter(written: str) -> tuple[str, str]:
    """Return name and folder of ``NAME=FOLDER``. Raises InvalidOption."""
    name, equals, folder = written.partition("=")
    if not (equals and folder):
        raise InvalidOption(
            f"--adapter is {written[:80]!r}; write it as NAME=FOLDER, for example legal=./adapters", field="adapter"
        )
    return require_adapter_name(name), folder
