"""Makes mlx-lm's own LoRA layers for a model or a slice of it, and exchanges them with the layers that they wrap.

A wrapper refers to the module that it wraps, so an adapter has no copy of the model's weights. To apply an adapter is
to put its wrappers in the places of those modules: a few references for each layer, and no computation. It knows trees
of modules and adapter files, nothing of sequences or frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx_lm.tuner.utils import linear_to_lora_layers

from cluster.core.adapter import ADAPTER_WEIGHTS, Adapter, AdapterRef, AdapterTensor
from cluster.core.errors import BadCheckpoint, ModelDiffers, ModelUnsupported
from cluster.core.plan import ModelShape
from cluster.model.adapter_files import AdapterConfig, open_adapter, read_adapter_config
from cluster.model.checkpoint import Checkpoint, TensorInfo
from cluster.model.device import settle_random_state
from cluster.model.library_errors import describe_error
from cluster.model.module_tree import Module, layer_prefixes, named_modules
from cluster.model.skeleton import open_skeleton

__all__ = ["LoraLayers", "fuse_adapter", "load_adapter", "read_adapter"]

LEAVES: Final = frozenset({"lora_a", "lora_b", "m"})
"""The names of an adapter's tensors in its modules, as in mlx-lm."""


@dataclass(frozen=True, slots=True)
class _WrapperPlace:
    """A place in the tree of modules: ``parent[name]`` is ``base`` without the adapter and ``wrapper`` with it."""

    path: str
    parent: Any
    name: str | int
    base: Module
    wrapper: Module


class LoraLayers:
    """The wrappers of one adapter. ``nbytes`` is the size of their own tensors."""

    def __init__(self, places: Sequence[_WrapperPlace], nbytes: int) -> None:
        self._places = places
        self.nbytes = nbytes

    def apply(self) -> None:
        """Put the wrappers into the model."""
        for place in self._places:
            place.parent[place.name] = place.wrapper

    def remove(self) -> None:
        """Put the model's own modules back."""
        for place in self._places:
            place.parent[place.name] = place.base


class _View:
    """What mlx-lm sees of a model: all layers, to find names, but only local modules to wrap."""

    def __init__(self, model: Module, is_local: Callable[[str], bool]) -> None:
        self._model, self._is_local = model, is_local
        prefixes = layer_prefixes(model)
        self.layers = _Layers(model.layers)
        self.layers.local = {id(layer) for p, layer in zip(prefixes, model.layers, strict=True) if is_local(p)}

    def named_modules(self) -> list[tuple[str, Module]]:
        return [(path, module) for path, module in named_modules(self._model) if self._is_local(path)]

    def update_modules(self, modules: Any) -> None:
        self._model.update_modules(modules)


class _Layers(list[Module]):
    """All layers, of which a slice has only the local ones."""

    local: set[int]

    def __getitem__(self, index: Any) -> Any:
        return [layer for layer in super().__getitem__(index) if id(layer) in self.local]


def read_adapter(ref_name: str, folder: Path, model_folder: Path, shape: ModelShape) -> Adapter:
    """Return the adapter in ``folder`` for the model in ``model_folder``, whose shape is ``shape``. Reads headers only.

    Raises the errors of ``open_adapter`` and ``open_skeleton``, and ModelDiffers if the adapter is for another model.
    """
    found = open_adapter(folder)
    model = open_skeleton(model_folder)
    places = _make_wrappers(model, read_adapter_config(found.config), lambda _path: True)
    _require_fit(places, found.tensors, ref_name, shape.model.name)
    prefixes = layer_prefixes(model)
    readers = {weight.name: weight.layers for weight in shape.shared}
    tensors = [
        AdapterTensor(tensor.name, tensor.nbytes, _layers_of(tensor.name, prefixes, readers))
        for tensor in found.tensors.values()
    ]
    return Adapter(AdapterRef(ref_name, str(folder), found.fingerprint), tuple(tensors))


def _layers_of(name: str, prefixes: Sequence[str], readers: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the layers whose stage holds a tensor: its own layer, or those that read its module."""
    own = next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix + ".")), None)
    return (own,) if own is not None else readers.get(name.rpartition(".")[0], ())


def load_adapter(model: Module, folder: Path, fingerprint: str, is_local: Callable[[str], bool]) -> LoraLayers:
    """Load the part of the adapter in ``folder`` that is for local modules, and leave the model as it is.

    ``is_local`` tells whether the slice has the module with a path. Raises ModelDiffers if the fingerprint or the model
    is another one, BadCheckpoint if the file cannot be read, and the errors of ``open_adapter``.
    """
    places = _open_wrappers(model, _open_expected(folder, fingerprint), is_local)
    loaded = [place.wrapper[leaf] for place in places for leaf in _leaves(place.wrapper)]
    try:
        mx.eval(loaded)
    except RuntimeError as error:  # MLX raises this for a file that vanishes or shrinks during the read
        raise BadCheckpoint(f"the adapter's file could not be read: {error}") from error
    return LoraLayers(places, sum(array.nbytes for array in loaded))


def fuse_adapter(model: Module, adapter: AdapterRef, *, dequantize: bool) -> None:
    """Fuse an adapter into a model's weights with mlx-lm's code. The weights stay lazy.

    Raises as ``load_adapter``, and ModelUnsupported if mlx-lm cannot fuse one of its layers.
    """
    found = _open_expected(Path(adapter.path), adapter.fingerprint)
    for place in _open_wrappers(model, found, lambda _path: True):
        if not hasattr(place.wrapper, "fuse"):
            raise ModelUnsupported(f"mlx-lm cannot fuse the adapter's layer {place.path}")
        place.parent[place.name] = place.wrapper.fuse(dequantize=dequantize)


def _open_expected(folder: Path, fingerprint: str) -> Checkpoint:
    """Open an adapter. Raises ModelDiffers if its fingerprint is another one."""
    found = open_adapter(folder)
    if found.fingerprint != fingerprint:
        raise ModelDiffers(
            f"the adapter in {str(folder)!r} differs from the coordinator's (fingerprint {found.fingerprint[:12]}, "
            f"expected {fingerprint[:12]}); copy the coordinator's folder to this machine"
        )
    return found


def _open_wrappers(model: Module, found: Checkpoint, is_local: Callable[[str], bool]) -> list[_WrapperPlace]:
    """Make the wrappers of an adapter's local modules, with its tensors, which are not read yet."""
    places = _make_wrappers(model, read_adapter_config(found.config), is_local)
    local = {name: tensor for name, tensor in found.tensors.items() if is_local(name.rpartition(".")[0])}
    _require_fit(places, local, str(found.path), "")
    arrays: Any = mx.load(str(found.path / ADAPTER_WEIGHTS))  # a dict, for a file of this kind
    for place in places:
        for leaf in _leaves(place.wrapper):
            place.wrapper[leaf] = arrays[f"{place.path}.{leaf}"]
        place.wrapper.eval()  # no dropout
    return places


def _make_wrappers(model: Module, config: AdapterConfig, is_local: Callable[[str], bool]) -> list[_WrapperPlace]:
    """Have mlx-lm wrap the local modules that a config names, and put the modules back. Their arrays are not computed.

    Raises ModelDiffers if mlx-lm cannot wrap them.
    """
    view = _View(model, is_local)
    before = dict(view.named_modules())
    places: list[_WrapperPlace] = []
    found: set[str] = set()
    try:
        linear_to_lora_layers(view, config.num_layers, dict(config.parameters), use_dora=config.dora)
    except (KeyError, ValueError, TypeError, AttributeError) as error:  # mlx-lm's answer to modules of another kind
        raise ModelDiffers(f"mlx-lm cannot apply the adapter to this model: {describe_error(error)}") from error
    finally:
        after = dict(view.named_modules())
        for path, base in before.items():
            wrapper = after.get(path)
            if wrapper is not None and wrapper is not base and found.isdisjoint(_ancestors(path)):
                found.add(path)
                places.append(_WrapperPlace(path, *_parent_of(model, path), base, wrapper))
        LoraLayers(places, 0).remove()
    settle_random_state()
    return places


def _ancestors(path: str) -> set[str]:
    parts = path.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def _parent_of(model: Module, path: str) -> tuple[Any, str | int]:
    """Return the module, list or dict that has the module at ``path``, and its name there."""
    parent: Any = model
    *above, last = path.split(".")
    for part in above:
        parent = parent[int(part)] if isinstance(parent, list) else parent[part]
    return parent, int(last) if isinstance(parent, list) else last


def _leaves(wrapper: Module) -> list[str]:
    return [key for key, value in wrapper.items() if key in LEAVES and isinstance(value, mx.array)]


def _require_fit(places: Iterable[_WrapperPlace], tensors: Mapping[str, TensorInfo], adapter: str, model: str) -> None:
    """Raise ModelDiffers unless the tensors are just those of the wrappers, each of its shape."""
    wanted = {f"{p.path}.{leaf}": tuple(p.wrapper[leaf].shape) for p in places for leaf in _leaves(p.wrapper)}
    of = f"the model {model}" if model else "this model"
    for name, tensor in tensors.items():
        if name not in wanted:
            raise ModelDiffers(f"the adapter {adapter} is not for {of}, which has no place for its tensor {name[:200]}")
        if wanted[name] != tensor.shape:
            raise ModelDiffers(
                f"the adapter {adapter} is not for {of}: its tensor {name} has the shape {list(tensor.shape)}, and "
                f"{list(wanted[name])} is needed"
            )
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ModelDiffers(
            f"the adapter {adapter} lacks the tensor {missing[0]} ({len(missing)} of {len(wanted)} are missing): its "
            f"files do not belong together, or it is not for {of}"
        )
