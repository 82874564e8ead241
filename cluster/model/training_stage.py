"""Trains the adapters of one stage: forward, backward and update of a slice, with mlx-lm's loss and mlx's optimizers.

A batch passes forward through all stages and back. What a stage does with it is what one process does with the same
layers: the same operations in the same order, so the same bits in float32 on a CPU. It knows arrays and batches,
nothing of frames or who waits for them. One thread per process loads and uses it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import build_schedule

from cluster.core.errors import BadFrame, InvalidOption
from cluster.core.plan import StageSpec
from cluster.core.training import TrainingOptions
from cluster.core.training_frames import ADAPTER
from cluster.model.module_tree import named_modules, trainable_parameters
from cluster.model.trace import Boundary
from cluster.model.training_slice import TrainingSlice, load_training_slice

__all__ = ["BatchLoss", "TrainingStage", "load_training_stage"]

OPTIMIZERS: Final[Mapping[str, type[optim.Optimizer]]] = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}
_OPTIMIZER, _SUM, _KEY = "optimizer/", "gradients/", "random/key"
"""How the names of a state's other tensors begin: the optimizer's state, sums of gradients, the random state."""


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """The mean loss over the ``tokens`` of a batch that count."""

    loss: float
    tokens: int


Forward = Callable[[Sequence[mx.array]], list[mx.array]]
"""Takes the arrays that come in, and returns those that leave."""
Backward = Callable[[Sequence[mx.array]], list[mx.array]]
"""Takes the gradients of the arrays that left. Returns those of the parameters, in order, then of what came in."""


@dataclass(frozen=True, slots=True)
class _KeptGraph:
    """A backward pass that is built but not evaluated, over ``buffers`` that get the gradients of what left later.

    As long as it is there, MLX keeps the activations that it needs: of layers that compute theirs again, the inputs.
    """

    buffers: Sequence[mx.array]
    gradients: list[mx.array]

    def backward(self, given: Sequence[mx.array]) -> list[mx.array]:
        """Return the gradients. The bytes of ``given`` are copied into the buffers, which the graph then reads."""
        mx.eval(list(given))
        for buffer, array in zip(self.buffers, given, strict=True):
            target: Any = buffer
            source: Any = mx.contiguous(array)
            memoryview(target).cast("B")[:] = memoryview(source).cast("B")
        return self.gradients


def load_training_stage(spec: StageSpec, path: Path, options: TrainingOptions) -> TrainingStage:
    """Load the stage that ``spec`` describes for training. Raises the errors of ``load_training_slice``."""
    optimizer = _build_optimizer(options)
    return TrainingStage(spec, load_training_slice(spec, path, options), options, optimizer)


class TrainingStage:
    """A slice whose adapters are trained. ``names`` are the paths of its trainable parameters, in order."""

    def __init__(
        self, spec: StageSpec, own: TrainingSlice, options: TrainingOptions, optimizer: optim.Optimizer
    ) -> None:
        self.spec = spec
        self.part = own.part
        self._own, self._model, self._options, self._optimizer = own, own.model, options, optimizer
        self.names = tuple(trainable_parameters(own.model))
        self._key = own.key
        self._sums: list[mx.array] | None = None
        self._backward: dict[int, Backward] = {}

    @property
    def learning_rate(self) -> float:
        """Return the optimizer's present learning rate."""
        return float(_number(self._optimizer.learning_rate))

    @property
    def trained(self) -> int:
        """Return how many numbers are trained here."""
        return sum(array.size for array in self._values())

    def forward(
        self, number: int, batch: mx.array, incoming: Sequence[mx.array], *, train: bool, gradient: bool
    ) -> list[mx.array]:
        """Return what a batch of tokens [rows, length + 1] passes to the next stage; the last ones are only targets.

        With ``train``, keep what ``backward`` needs; ``gradient``: it shall return gradients of ``incoming``.
        """
        tokens = batch[:, :-1]
        run = self._forward_function(tokens, train=train)
        if train and (self.names or gradient):
            buffers = [mx.zeros(*shape) for shape in _shapes(self.part.outlet, tokens)]
            mx.eval(buffers)
            outputs, gradients = self._differentiate(run, incoming, buffers, gradient=gradient)
            self._backward[number] = _KeptGraph(buffers, gradients).backward
        else:
            outputs = run(incoming)
        outgoing = [mx.contiguous(array) for array in outputs]
        mx.eval(outgoing)
        return outgoing

    def backward(self, number: int, gradients: Sequence[mx.array], *, update: bool) -> list[mx.array]:
        """Add a batch's gradients to their sums; with ``update``, then update the adapters.

        ``gradients`` are those of what ``forward`` returned. Return those of what came in, if ``forward`` was told to.
        Raises BadFrame if the batch has not passed forward.
        """
        backward = self._backward.pop(number, None)
        if backward is None:
            raise BadFrame(f"batch {number} comes back to a stage that it has not passed")
        return self._add(backward(gradients), update=update)

    def loss(
        self,
        batch: mx.array,
        lengths: mx.array,
        incoming: Sequence[mx.array],
        *,
        train: bool,
        gradient: bool = False,
        update: bool = False,
        weight: float = 1.0,
    ) -> tuple[BatchLoss, list[mx.array]]:
        """Return a batch's loss on the last stage. With ``train``, go backward as well, and return as ``backward``.

        ``batch`` has the shape [rows, length + 1]. ``lengths`` [rows, 2] say which of the targets count: from the first
        number to the second, counted from one. Gradients are those of the loss times ``weight``.
        """
        logits = self._forward_function(batch[:, :-1], train=train)
        counted: list[mx.array] = []

        def run(arrays: Sequence[mx.array]) -> list[mx.array]:
            loss, count = default_loss(lambda _: logits(arrays)[0], batch, lengths)  # type: ignore[no-untyped-call]
            counted[:] = [count]
            return [loss]

        if not train:
            (loss,) = run(incoming)
            mx.eval(loss, counted)
            return BatchLoss(_number(loss), int(_number(counted[0]))), []
        (loss,), gradients = self._differentiate(run, incoming, [mx.array(weight)], gradient=gradient)
        mx.eval(loss, counted)
        outgoing = self._add(gradients, update=update)
        return BatchLoss(_number(loss), int(_number(counted[0]))), outgoing

    def state(self) -> dict[str, mx.array]:
        """Return all that another process needs to continue from here; empty if nothing is trained here."""
        if not self.names:
            return {}
        kept: Any = tree_flatten(self._optimizer.state)
        state = {ADAPTER + name: value for name, value in zip(self.names, self._values(), strict=True)}
        state |= {_OPTIMIZER + name: value for name, value in kept}
        state |= {_SUM + name: value for name, value in zip(self.names, self._sums or (), strict=False)}
        return state | {_KEY: self._key}

    def restore(self, state: Mapping[str, mx.array]) -> None:
        """Continue from the tensors of a state that belong to this stage; those of other stages are ignored.

        Without an optimizer's state, only the adapters are set. Raises InvalidOption if an adapter has another shape.
        """
        values = [
            _require_shape(name, state.get(ADAPTER + name, own), own)
            for name, own in zip(self.names, self._values(), strict=True)
        ]
        self._assign(values)
        self._key = state.get(_KEY, self._key)
        sums = [state[_SUM + name] for name in self.names if _SUM + name in state]
        self._sums = sums if self.names and len(sums) == len(self.names) else None
        own = tuple(f"{name}." for name in self.names)
        kept = {n.removeprefix(_OPTIMIZER): array for n, array in state.items() if n.startswith(_OPTIMIZER)}
        kept = {n: array for n, array in kept.items() if "." not in n or n.startswith(own)}
        if kept:
            self._optimizer.state = tree_unflatten(list(kept.items()))
        mx.eval(values)

    def close(self) -> None:
        """Free the slice, its adapters and what is kept of batches."""
        self._backward.clear()
        self._sums = None
        for _, module in named_modules(self._model):
            module.clear()
        gc.collect()  # a slice's replaced calls refer back to it: only the collector frees such a cycle
        mx.clear_cache()

    def _values(self) -> list[mx.array]:
        return list(trainable_parameters(self._model).values())

    def _assign(self, values: Sequence[mx.array]) -> None:
        self._model.update(tree_unflatten(list(zip(self.names, values, strict=True))))

    def _forward_function(self, tokens: mx.array, *, train: bool) -> Forward:
        """Return the forward of one batch. However often it runs, it draws the same random numbers."""
        own = self._own
        start = _advance(self._key, own.draws_before) if train else self._key
        if train:
            self._key = _advance(start, own.draws + own.draws_after)
        if self._model.training != train:
            self._model.train(train)

        def run(arrays: Sequence[mx.array]) -> list[mx.array]:
            _set_random_state(start)
            return self.part.run_without_caches(tokens, arrays)

        return run

    def _differentiate(
        self,
        run: Forward,
        incoming: Sequence[mx.array],
        cotangents: Sequence[mx.array],
        *,
        gradient: bool,
    ) -> tuple[list[mx.array], list[mx.array]]:
        """Build forward and backward of ``run`` without evaluating them. Return its outputs and all gradients."""
        values, count = self._values(), len(self.names)

        def function(*arrays: mx.array) -> list[mx.array]:
            self._assign(arrays[:count])
            return run(arrays[count:] if gradient else incoming)

        try:
            outputs, gradients = mx.vjp(function, [*values, *(incoming if gradient else ())], list(cotangents))
        finally:
            self._assign(values)
        return outputs, gradients

    def _add(self, gradients: Sequence[mx.array], *, update: bool) -> list[mx.array]:
        count = len(self.names)
        own = gradients[:count]
        self._sums = [new + old for new, old in zip(own, self._sums, strict=True)] if self._sums else list(own)
        outgoing = [mx.contiguous(array) for array in gradients[count:]]
        mx.eval(self._sums, outgoing)
        if update and self.names:
            self._update()
        return outgoing

    def _update(self) -> None:
        assert self._sums is not None
        steps = self._options.grad_accumulation_steps
        means = [total / steps for total in self._sums] if steps > 1 else self._sums
        self._sums = None
        self._optimizer.update(self._model, tree_unflatten(list(zip(self.names, means, strict=True))))
        mx.eval(self._values(), self._optimizer.state)
        mx.clear_cache()


def _build_optimizer(options: TrainingOptions) -> optim.Optimizer:
    """Raises InvalidOption if the optimizer has no such settings, or the schedule no such arguments."""
    schedule = options.lr_schedule
    try:
        rate = build_schedule(schedule.model_dump()) if schedule else options.learning_rate
        kind: Any = OPTIMIZERS[options.optimizer]
        optimizer: optim.Optimizer = kind(learning_rate=rate, **options.optimizer_config.get(options.optimizer, {}))
        return optimizer
    except (TypeError, ValueError) as error:
        raise InvalidOption(
            f"the optimizer {options.optimizer} cannot be made so: {error}", field="optimizer_config"
        ) from error


def _shapes(outlet: Boundary | None, tokens: mx.array) -> list[tuple[list[int], mx.Dtype]]:
    """Return shape and type of each array that a batch passes to the next stage."""
    known = {"batch": tokens.shape[0], "length": tokens.shape[1]}
    leaves = outlet.leaves if outlet else ()
    return [([known[d] if isinstance(d, str) else d or 0 for d in leaf.dims], leaf.dtype) for leaf in leaves]


def _number(array: mx.array) -> float:
    value: Any = array.item()
    return float(value)


def _set_random_state(key: mx.array) -> None:
    """Set MLX's random state, which only a seed can do: the two halves of a seed are its key."""
    high, low = (int(_number(half)) for half in key)
    mx.random.seed(high << 32 | low)


def _advance(key: mx.array, draws: int) -> mx.array:
    """Return the random state after so many draws."""
    for _ in range(draws):
        key = mx.random.split(key)[0]
    return key


def _require_shape(name: str, given: mx.array, own: mx.array) -> mx.array:
    if given.shape != own.shape:
        raise InvalidOption(
            f"the adapter has {name} of shape {list(given.shape)}, but this model and these options need "
            f"{list(own.shape)}: it was trained on another base or with other parameters",
            field="resume_adapter_file",
        )
    return given
