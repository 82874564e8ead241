"""The device that MLX computes on: what it is, what it may hold, and how to leave it tidy.

It knows MLX's device information and this machine's memory; it knows nothing of models. On Macs the limit is Metal's
recommended working set, on CUDA the GPU's memory, on a CPU a share of the RAM that this process may use.
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
    "set_limits",
]

CPU_SHARE: Final = 0.75
"""Of RAM: what a CPU worker takes by default, about what Metal recommends of a Mac's unified memory."""
CGROUPS: Final = Path("/sys/fs/cgroup")
VARIABLE: Final = "MACPIPE_DEVICE"
SPARE_SHARE: Final = 0.05
"""Of the limit: what MLX may keep of buffers that nothing uses, so that steps need not ask the driver for memory."""


def choose() -> None:
    """Compute on the device that MACPIPE_DEVICE names, ``cpu`` or ``gpu``; unset, on the best that is there.

    Raises InvalidOption. Call first: what has been computed stays where it was.
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
    """``backend`` is "metal", "cuda" or "cpu"; memory is in bytes. ``memory_limit`` is the default, before options."""

    chip: str
    backend: str
    mlx_version: str
    mlx_lm_version: str
    memory_total: int
    memory_limit: int


def device_facts() -> DeviceFacts:
    """What this process computes on. Touches no GPU memory."""
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
    """Whether kernels are compiled for a shape when it first comes, and not with MLX: on GPUs."""
    return _backend() != "cpu"


def memory_used() -> int:
    """Bytes in live arrays of this process; buffers that MLX keeps for reuse are not counted."""
    return mx.get_active_memory()


def memory_peak() -> int:
    """The most bytes that live arrays of this process took at once."""
    return mx.get_peak_memory()


def set_limits(limit: int) -> None:
    """Let MLX take at most ``limit`` bytes, few of them spare buffers; on a Mac also keep it resident: no paging."""
    mx.set_memory_limit(limit)
    mx.set_cache_limit(int(limit * SPARE_SHARE))
    if _backend() == "metal":
        mx.set_wired_limit(min(limit, int(_info()["max_recommended_working_set_size"])))


def release() -> None:
    """Give back what nothing refers to any more: Python's rings first, then MLX's spare buffers."""
    gc.collect()
    mx.clear_cache()


def close_thread() -> None:
    """Call as the MLX thread ends: streams that outlive their thread crash the process on its way out."""
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
    """Memory limits of this process's control groups and of those around them; none where there is no Linux."""
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
    except (OSError, ValueError):  # not there, not ours to read, or "max"
        return None
