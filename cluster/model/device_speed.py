"""Measures the speed of a worker's device on model layers: the figures of a ``Profile``.

The layers are mlx-lm's own llama blocks with 4-bit weights, so kernels, launches and Python code are those of a real
step. Narrow layers show the fixed cost of a layer, wide layers the rate at which weights are read. Nothing is
downloaded: the weights are constants, and MLX reads every byte of them as it does for real weights.
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

from cluster.core.limits import MAX_VERIFIED
from cluster.core.plan import Profile
from cluster.model.module_tree import tree_bytes
from cluster.platform.disturbance import describe_load, describe_spread

__all__ = ["Stretch", "measure_device"]

Stretch = Callable[[float], None]
"""Called with the seconds that a step took. It may sleep to make a device look slower."""
ROWS: Final = 8
"""Sequences of the timed batch."""
BUDGET_S: Final = 1.5
"""Seconds for all timed rounds, without the first run of each job, which compiles kernels."""
MIN_ROUNDS, MAX_ROUNDS = 5, 100
"""Minimum and maximum number of rounds."""
SHALLOW, DEEP = 2, 18
"""Layers of the two narrow models."""
PACKED: Final = 0x76543210


@dataclass(frozen=True, slots=True)
class _Scale:
    """Size and number of the wide layers, and tokens of the timed prompt. The layers must not fit a processor cache.

    ``verified`` are the numbers of tokens in the timed steps of one sequence.
    """

    hidden: int
    intermediate: int
    layers: int
    tokens: int
    verified: tuple[int, ...]
    dtype: mx.Dtype


@dataclass(frozen=True, slots=True)
class _Measurement:
    """A step of ``tokens`` [rows, length], from empty caches."""

    model: Any
    tokens: mx.array

    def run(self) -> None:
        caches = make_prompt_cache(self.model)
        mx.eval(self.model(self.tokens, cache=caches)[:, -1], [c.state for c in caches])


_GPU: Final = _Scale(4096, 14336, 4, 512, tuple(range(2, MAX_VERIFIED + 1)), mx.bfloat16)
_CPU: Final = _Scale(512, 1024, 3, 4, (2, 4, MAX_VERIFIED), mx.float32)
_NARROW: Final = 64


def measure_device(stretch: Stretch) -> tuple[Profile, str]:
    """Return the device's profile, and in words what disturbed the measurement; "" if nothing did.

    Takes two or three seconds and half a gigabyte on a GPU; runs on the MLX thread.
    """
    before = describe_load()
    scale = _CPU if mx.default_device().type == mx.cpu else _GPU
    narrow, deeper = (_layers(_NARROW, 2 * _NARROW, n, scale.dtype) for n in (SHALLOW, DEEP))
    wide = _layers(scale.hidden, scale.intermediate, scale.layers, scale.dtype)
    jobs = [(narrow, 1, 1), (deeper, 1, 1), (wide, 1, 1), (wide, ROWS, 1), (wide, 1, scale.tokens)]
    jobs += [(wide, 1, tokens) for tokens in scale.verified]
    times = _times([_Measurement(m, mx.zeros((r, t), mx.int32)) for m, r, t in jobs], stretch)
    # Other load affects all jobs alike and only ever adds time, so the fastest round is the best estimate.
    shallow, deep, one, many, prompt, *verified = map(min, times)
    disturbed = before or describe_spread(times) or describe_load()
    mx.clear_cache()
    narrow_s = max((deep - shallow) / (DEEP - SHALLOW), 0.0)
    step_s = max(shallow - SHALLOW * narrow_s, 0.0)
    wide_s = (one - step_s) / scale.layers
    byte_s = max(wide_s - narrow_s, 1e-9) / (_layer_bytes(wide) - _layer_bytes(narrow))
    layer_s = max(narrow_s - byte_s * _layer_bytes(narrow), 0.0)
    reading_s = max(one - step_s - scale.layers * layer_s, 1e-9)
    profile = Profile(
        bandwidth=1 / byte_s,
        layer_s=layer_s,
        step_s=step_s,
        flops=2 * scale.tokens * _count_weights(scale) / max(prompt - one + reading_s, 1e-9),
        row_cost=min(max((many - one) / reading_s / (ROWS - 1), 0.0), 1.0),  # never above 1: rows can run in turn
        verify_costs=tuple(
            (tokens, max(1 + (taken - one) / reading_s, 1.0))
            for tokens, taken in zip(scale.verified, verified, strict=True)
        ),
    )
    return profile, disturbed


def _layer_bytes(model: Any) -> int:
    """Return the bytes of the first layer's weights."""
    return tree_bytes(model.model.layers[0].parameters())


def _layers(hidden: int, intermediate: int, layers: int, dtype: mx.Dtype) -> Any:
    """Build a llama with constant 4-bit weights and a vocabulary of negligible size."""
    heads = max(hidden // 128, 1)
    model: Any = Model(ModelArgs("llama", hidden, layers, intermediate, heads, rms_norm_eps=1e-5, vocab_size=64))
    model.set_dtype(dtype)
    quantize(model, 64, 4)
    model.update(tree_map(_constant, model.parameters()))
    mx.eval(model.parameters())
    return model


def _constant(array: mx.array) -> mx.array:
    return mx.full(array.shape, PACKED if array.dtype == mx.uint32 else 1e-3, array.dtype)


def _count_weights(scale: _Scale) -> int:
    """Count the weights that multiply a token: per layer, four square matrices and three feed-forward ones."""
    return scale.layers * scale.hidden * (4 * scale.hidden + 3 * scale.intermediate)


def _times(jobs: Sequence[_Measurement], stretch: Stretch) -> list[tuple[float, ...]]:
    """Return the seconds of each job's rounds. The jobs take turns, so that other load affects all of them alike."""
    for job in jobs:
        job.run()  # compiles kernels
    start = time.perf_counter()
    rounds: list[list[float]] = []
    while len(rounds) < MIN_ROUNDS or (len(rounds) < MAX_ROUNDS and time.perf_counter() - start < BUDGET_S):
        rounds.append([_time_call(job, stretch) for job in jobs])
    return list(zip(*rounds, strict=True))


def _time_call(job: _Measurement, stretch: Stretch) -> float:
    started = time.perf_counter()
    job.run()
    stretch(time.perf_counter() - started)
    return time.perf_counter() - started
