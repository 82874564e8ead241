"""Builds the slice of one stage for fine-tuning: mlx-lm's own adapters on the local layers, everything else frozen.

mlx-lm converts the whole model while its weights are lazy, so that the random start of an adapter is that of one
process, wherever the model is cut. Then the other layers' arrays are dropped. It knows layers and adapters, nothing of
batches or optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.dropout import Dropout
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers

from cluster.core.errors import InvalidOption, ModelUnsupported
from cluster.core.plan import StageSpec
from cluster.core.training import TrainingOptions
from cluster.model.loading import read_arrays
from cluster.model.module_tree import Module, named_modules, trainable_parameters
from cluster.model.skeleton import open_skeleton
from cluster.model.slice import ModelSlice
from cluster.model.symbolic_run import replace_call
from cluster.model.trace import Boundary, trace

__all__ = ["TrainingSlice", "load_training_slice"]


@dataclass(frozen=True, slots=True)
class TrainingSlice:
    """A slice with adapters. ``key`` is the random state after they were made.

    ``draws_before`` and ``draws_after`` are the random numbers that one process draws for the layers before and after
    the slice in a step; ``draws`` are those of the slice.
    """

    model: Module
    part: ModelSlice
    key: mx.array
    draws_before: int
    draws: int
    draws_after: int


def load_training_slice(spec: StageSpec, path: Path, options: TrainingOptions) -> TrainingSlice:
    """Load the local layers from the checkpoint in ``path`` and give them adapters.

    Raises InvalidOption if the options do not fit the model, ModelUnsupported if it cannot be trained in slices, and
    the errors of ``open_skeleton``, ``trace`` and ``ModelSlice``.
    """
    model = open_skeleton(path, spec.weight_bits)
    mx.random.seed(options.seed)
    model.freeze()
    _add_adapters(model, options)
    model.eval()
    state: Any = mx.random.state
    key: mx.array = state[0]
    traced = trace(model)
    _require_only_layers(model, traced.prefixes)
    start, end = spec.layers.start, spec.layers.end
    if options.grad_checkpoint:
        for layer in model.layers[start:end]:
            _recompute_backward(layer)
    part = ModelSlice(model, traced, spec.layers, early_start=False)
    _require_gradients(part.inlet, part.outlet)
    read_arrays(part, lambda done, total: None)
    mx.eval(key)
    draws = [_dropouts(layer) if options.lora_parameters.dropout else 0 for layer in model.layers]
    return TrainingSlice(model, part, key, sum(draws[:start]), sum(draws[start:end]), sum(draws[end:]))


def _add_adapters(model: Module, options: TrainingOptions) -> None:
    options.require_layers(len(model.layers))
    parameters = options.lora_parameters
    config: dict[str, Any] = {"rank": parameters.rank, "scale": parameters.scale, "dropout": parameters.dropout}
    if parameters.keys is not None:
        config["keys"] = set(parameters.keys)
    try:
        linear_to_lora_layers(model, options.num_layers, config, use_dora=options.fine_tune_type == "dora")
    except ValueError as error:  # a kind of layer that has no such adapter
        raise InvalidOption(f"this model cannot be trained so: {error}", field="fine_tune_type") from error
    if not trainable_parameters(model):
        raise InvalidOption(
            "no module of the model gets an adapter: lora_parameters.keys names none of them", field="lora_parameters"
        )


def _require_only_layers(model: Module, prefixes: Sequence[str]) -> None:
    """Raise InvalidOption if a module outside the layers has an adapter: several stages may share it."""
    outside = [name for name in trainable_parameters(model) if not name.startswith(tuple(f"{p}." for p in prefixes))]
    if outside:
        module = outside[0].rpartition(".")[0]
        raise InvalidOption(
            f"lora_parameters.keys names {module}, which is outside the layers; only modules of layers can be trained",
            field="lora_parameters",
        )


def _require_gradients(*boundaries: Boundary | None) -> None:
    """Raise ModelUnsupported if the values of a cut have no gradients, or sizes that are not known beforehand."""
    leaves = [leaf for boundary in boundaries if boundary for leaf in boundary.leaves]
    if not all(mx.issubdtype(leaf.dtype, mx.floating) and None not in leaf.dims for leaf in leaves):
        raise ModelUnsupported("this model cannot be trained in slices: what crosses its cuts has no gradient")


def _recompute_backward(layer: Module) -> None:
    """Have this one layer recompute its activations in the backward pass. mlx-lm would change its whole class."""
    replace_call(layer, type(layer).__call__)
    grad_checkpoint(layer)  # type: ignore[no-untyped-call]


def _dropouts(layer: Module) -> int:
    """Return how many random numbers one call of a layer draws in training, if adapters have a dropout."""
    return sum(isinstance(module, Dropout) for _, module in named_modules(layer))
