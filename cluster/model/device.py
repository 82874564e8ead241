"""Selects and describes MLX's compute device, sets its memory limits and releases its memory.

It knows MLX's device information and this machine's memory, nothing of models. The memory limit is Metal's recommended
working set on Macs, the GPU's memory on CUDA, and a share of the RAM that this process may use on a CPU.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from cluster.core.errors import InvalidOption

__all__ = [
    "DeviceFacts",
    "choose",
    "close_thread",
    "compiles",
    "device_facts",
    "memory_peak",
    "memory_used",
    "release",
    "reset_memory_peak",
    "set_limits",
    "settle_random_state",
]

CPU_SHARE: Final = 0.75
"""Share of RAM that a CPU worker may use by default, similar to Metal's recommendation for unified memory."""
CGROUPS: Final = Path("/sys/fs/cgroup")
VARIABLE: Final = "MACPIPE_DEVICE"
SPARE_SHARE: Final = 0.05
"""Share of the limit that MLX may keep as unused buffers, so that steps do not have to allocate from the driver."""


def choose() -> None:
    """Select the device that MACPIPE_DEVICE names, ``cpu`` or ``gpu``; if it is unset, keep MLX's default.

    Call this before any computation: existing arrays stay on their device. Raises InvalidOption for another value, or
    for ``gpu`` if there is none.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "cpu", "gpu"):
        raise InvalidOption(f"{VARIABLE} is {asked!r}; it must be cpu or gpu", field=VARIABLE)
    if asked == "gpu" and not mx.is_available(mx.gpu):
        raise InvalidOption(f"{VARIABLE} is gpu, but MLX finds no GPU here; unset it", field=VARIABLE)
    if asked:
        mx.set_default_device(mx.cpu if asked == "cpu" else mx.gpu)


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A compute device. ``backend`` is "metal", "cuda" or "cpu"; memory is in bytes.

    ``memory_limit`` is the default limit, before options.
    """

    chip: str
    backend: str
    mlx_version: str
    mlx_lm_version: str
    memory_total: int
    memory_limit: int


def device_facts() -> DeviceFacts:
    """Describe the device of this process. Allocates no GPU memory."""
    info = _info()
    backend = _backend()
    total = _memory_total(info)
    return DeviceFacts(
        chip=str(info.get("device_name") or info.get("architecture") or "unknown"),
        backend=backend,
        mlx_version=version("mlx"),
        mlx_lm_version=version("mlx-lm"),
        memory_total=total,
        memory_limit=_memory_limit(backend, info, total),
    )


def compiles() -> bool:
    """Return whether kernels are compiled at the first use of a shape: true on GPUs. CPU kernels come with MLX."""
    return _backend() != "cpu"


def memory_used() -> int:
    """Return the bytes in live arrays of this process, without the buffers that MLX keeps for reuse."""
    return mx.get_active_memory()


def memory_peak() -> int:
    """Return the peak number of bytes in live arrays of this process since the last ``reset_memory_peak``."""
    return mx.get_peak_memory()


def reset_memory_peak() -> None:
    """Begin a new measurement of ``memory_peak``."""
    mx.reset_peak_memory()


def set_limits(limit: int) -> None:
    """Limit MLX to ``limit`` bytes, of which a small share are spare buffers. On a Mac also wire them: no paging."""
    mx.set_memory_limit(limit)
    mx.set_cache_limit(int(limit * SPARE_SHARE))
    if _backend() == "metal":
        mx.set_wired_limit(min(limit, int(_info()["max_recommended_working_set_size"])))


def release() -> None:
    """Free unreferenced memory: collect Python's reference cycles first, then clear MLX's spare buffers."""
    gc.collect()
    mx.clear_cache()


def settle_random_state() -> None:
    """Compute this thread's random key. Call it after layers were built.

    Each random initialization derives the key from the one before, and computes neither. The graph of all of them would
    be kept: 2 KiB for each array of each model that was ever built. The key's value stays the same.
    """
    mx.eval(mx.random.state)


def close_thread() -> None:
    """Clear the thread's streams at the end of the MLX thread: leftover streams crash the process at exit."""
    mx.clear_streams()


def _info() -> dict[str, Any]:
    return dict(mx.device_info())


def _backend() -> str:
    if mx.default_device().type == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def _memory_total(info: dict[str, Any]) -> int:
    return int(info.get("memory_size") or info.get("total_memory") or _ram())


def _memory_limit(backend: str, info: dict[str, Any], total: int) -> int:
    if backend == "metal":
        return int(info["max_recommended_working_set_size"])
    if backend == "cuda":
        return total
    return int(min([_ram(), *_cgroup_limits()]) * CPU_SHARE)


def _ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_limits() -> list[int]:
    """Return the memory limits (bytes) of this process's control group and its ancestors; empty outside Linux."""
    try:
        own = Path("/proc/self/cgroup").read_text().partition("0::")[2].strip().lstrip("/")
    except OSError:
        return []
    folders = [CGROUPS / own, *(CGROUPS / own).parents]
    files = [folder / "memory.max" for folder in folders if folder.is_relative_to(CGROUPS)]
    return [limit for file in (*files, CGROUPS / "memory/memory.limit_in_bytes") if (limit := _limit_in(file))]


def _limit_in(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # missing, not readable, or "max"
        return None
