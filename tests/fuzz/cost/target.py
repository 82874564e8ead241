"""What a cost target is: a public entry, what its bounds let in, and what the daemons do with it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from fuzz.cost.recipe import Recipe

TAKEN = "taken"
"""The outcome of an input that was not refused."""
KEPT_OUT = "kept out"
"""The outcome of one that an entry before refuses."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry that is ready. ``take`` handles an input as the daemon does, on the running loop; what became of it:
    ``TAKEN``, a typed error's name, or an HTTP status. ``warm`` does what is done once, before any input; ``lets_in``
    says whether the input comes so far, where another entry is before this one. Neither counts.
    """

    take: Callable[[bytes], Awaitable[str]]
    warm: Callable[[], Awaitable[None]] | None = None
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
