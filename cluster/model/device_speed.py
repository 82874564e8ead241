"""Times what a worker's device does with a model's layers: the figures of a ``Profile``.

The layers are mlx-lm's own llama blocks with 4-bit weights, so kernels, launches and Python are those of a real step.
Narrow ones show what a layer costs whatever its size, wide ones at what rate weights are read. Nothing is downloaded;
the weights are constants, of which MLX reads every byte like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.llama import Model, ModelArgs

from cluster.core.plan import Profile
from cluster.model.module_tree import tree_bytes

__all__ = ["Stretch", "measure"]

Stretch = Callable[[float], None]
"""Told how long a step took; may wait, to make a device look slower."""
ROWS: Final = 8
BUDGET_S: Final = 1.5
"""For all timings, beside one run of each that compiles kernels."""
LEAST, MOST = 5, 100
"""Rounds."""
SHALLOW, DEEP = 2, 18
PACKED: Final = 0x76543210


@dataclass(frozen=True, slots=True)
class _Scale:
    """How large the wide layers are, how many, and the tokens of the timed prompt. No cache may hold them."""

    hidden: int
    intermediate: int
    layers: int
    tokens: int
    dtype: mx.Dtype


@dataclass(frozen=True, slots=True)
class _Measurement:
    """A step of some tokens in each of some sequences, from empty caches."""

    model: Any
    tokens: mx.array

    def run(self) -> None:
        caches = make_prompt_cache(self.model)
        mx.eval(self.model(self.tokens, cache=caches)[:, -1], [c.state for c in caches])


_GPU: Final = _Scale(4096, 14336, 4, 512, mx.bfloat16)
_CPU: Final = _Scale(512, 1024, 3, 4, mx.float32)
_NARROW: Final = 64


def measure(stretch: Stretch) -> Profile:
    """Takes two or three seconds, half a gigabyte on a GPU, and the MLX thread."""
    scale = _CPU if mx.default_device().type == mx.cpu else _GPU
    narrow, deeper = (_layers(_NARROW, 2 * _NARROW, n, scale.dtype) for n in (SHALLOW, DEEP))
    wide = _layers(scale.hidden, scale.intermediate, scale.layers, scale.dtype)
    jobs = [(narrow, 1, 1), (deeper, 1, 1), (wide, 1, 1), (wide, ROWS, 1), (wide, 1, scale.tokens)]
    shallow, deep, one, many, prompt = _times(
        [_Measurement(m, mx.zeros((r, t), mx.int32)) for m, r, t in jobs], stretch
    )
    mx.clear_cache()
    narrow_s = max((deep - shallow) / (DEEP - SHALLOW), 0.0)
    step_s = max(shallow - SHALLOW * narrow_s, 0.0)
    wide_s = (one - step_s) / scale.layers
    a_byte = max(wide_s - narrow_s, 1e-9) / (_bytes(wide) - _bytes(narrow))
    layer_s = max(narrow_s - a_byte * _bytes(narrow), 0.0)
    reading = max(one - step_s - scale.layers * layer_s, 1e-9)
    return Profile(
        bandwidth=1 / a_byte,
        layer_s=layer_s,
        step_s=step_s,
        flops=2 * scale.tokens * _numbers(scale) / max(prompt - one + reading, 1e-9),
        row_cost=min(max((many - one) / reading / (ROWS - 1), 0.0), 1.0),  # rows can be run one after another
    )


def _bytes(model: Any) -> int:
    """Bytes of a layer's weights."""
    return tree_bytes(model.model.layers[0].parameters())


def _layers(hidden: int, intermediate: int, layers: int, dtype: mx.Dtype) -> Any:
    """A llama of so many layers with 4-bit weights that are all alike; its vocabulary weighs next to nothing."""
    heads = max(hidden // 128, 1)
    model: Any = Model(ModelArgs("llama", hidden, layers, intermediate, heads, rms_norm_eps=1e-5, vocab_size=64))
    model.set_dtype(dtype)
    quantize(model, 64, 4)
    model.update(tree_map(_constant, model.parameters()))
    mx.eval(model.parameters())
    return model


def _constant(array: mx.array) -> mx.array:
    return mx.full(array.shape, PACKED if array.dtype == mx.uint32 else 1e-3, array.dtype)


def _numbers(scale: _Scale) -> int:
    """Weights that a token is multiplied with: four square matrices and three of the feed-forward a layer."""
    return scale.layers * scale.hidden * (4 * scale.hidden + 3 * scale.intermediate)


def _times(jobs: Sequence[_Measurement], stretch: Stretch) -> list[float]:
    """Each job's seconds. They take turns, so that what else the machine does falls on all of them alike; and since
    that only ever adds, the quickest round counts.
    """
    for job in jobs:
        job.run()  # compiles kernels
    began, rounds = time.perf_counter(), list[list[float]]()
    while len(rounds) < LEAST or (len(rounds) < MOST and time.perf_counter() - began < BUDGET_S):
        rounds.append([_time_call(job, stretch) for job in jobs])
    return [min(times) for times in zip(*rounds, strict=True)]


def _time_call(job: _Measurement, stretch: Stretch) -> float:
    started = time.perf_counter()
    job.run()
    stretch(time.perf_counter() - started)
    return time.perf_counter() - started
