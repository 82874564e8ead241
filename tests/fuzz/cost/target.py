"""A cost target: a public entry, the inputs that its bounds admit, and what the daemons do with them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from cluster.core.limits import MIB
from cluster.sandbox.limits import SANDBOX_OPEN_CPU_S, SANDBOX_OPEN_MEMORY_BYTES
from cluster.sandbox.sandboxed_tokenizer import prompt_limits
from fuzz.cost.measure import CPU_S, MEMORY_MIB
from fuzz.cost.recipe import Recipe

TAKEN = "taken"
"""The outcome of an input that was not refused."""
SANDBOX_CLOSED = "the sandbox is closed"
"""The outcome of an input that has to be measured with an open sandbox, and was not."""
KEPT_OUT = "kept out"
"""The outcome of one that an entry before refuses."""


Limit: TypeAlias = tuple[float, float]
"""Seconds, and MiB."""


def fixed_limit(size: int) -> Limit:
    """Return the maximal cost of any input."""
    return CPU_S, MEMORY_MIB


def job_limit(size: int) -> Limit:
    """What the sandbox allows a job for an input of ``size`` bytes."""
    limits = prompt_limits(size, size)
    return limits.cpu_s, limits.memory_bytes / MIB


def opening_limit(size: int) -> Limit:
    """Return the sandbox's limits of loading a model's tokenizer."""
    return SANDBOX_OPEN_CPU_S, SANDBOX_OPEN_MEMORY_BYTES / MIB


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry that is ready. ``take`` handles an input as the daemon does, on the running loop; what became of it:
    ``TAKEN``, a typed error's name, or an HTTP status. ``lets_in`` says whether the input comes so far, where another
    entry is before this one; that does not count. ``sandbox``: every input is measured with an open sandbox.
    """

    take: Callable[[bytes], Awaitable[str]]
    sandbox: bool = False
    lets_in: Callable[[bytes], Awaitable[bool]] | None = None


@dataclass(frozen=True, slots=True)
class CostTarget:
    """``prepare`` makes the entry once, for all measurements of a process, which are forks of it: it starts no thread.

    ``limit`` is the longest input in bytes, ``bounds`` the same in words. ``at_once``: how many are measured together,
    which is as many as the entry lets in, or enough to see how the cost grows. ``seeds`` are the worst inputs that a
    person thought of, ``atoms`` pieces for worse ones.
    """

    name: str
    bounds: str
    limit: int
    at_once: int
    prepare: Callable[[], Entry]
    seeds: Callable[[], Mapping[str, Recipe]]
    atoms: tuple[Recipe, ...] = ()
    children: Callable[[int], Limit] = fixed_limit
    """What child processes may cost for an input of so many bytes."""
    cpu_s: float = CPU_S
    """Seconds of this process that an input may cost."""
