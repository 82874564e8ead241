"""Splits a model over workers by memory, and minimises the relative memory use of the fullest worker.

The solution is exact, by dynamic programming over clean cuts, in the workers' given order. It knows bytes; it refuses
to know speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from cluster.core.errors import DoesNotFit, NoPlan
from cluster.core.limits import MEMORY_MARGIN
from cluster.core.plan import LayerRange, ModelShape
from cluster.core.text import count_in_words, gib_in_words

W = TypeVar("W")
Placed = TypeVar("Placed")


@dataclass(frozen=True, slots=True)
class WorkerMemory:
    """The memory of a worker: the bytes that it offers for weights, caches and work.

    ``adjustable``: whether the user may raise the offer. ``taken`` are the bytes that other models use of it.
    ``ranks``: this is the memory of each of so many workers, which share every layer.
    """

    worker: str
    nbytes: int
    adjustable: bool = True
    taken: int = 0
    ranks: int = 1

    @property
    def usable(self) -> int:
        return max(int(self.nbytes * (1 - MEMORY_MARGIN)) - self.taken, 0)


def memory_for(used: int) -> int:
    """Return the bytes that a worker must offer, so that ``used`` of them are usable."""
    return int(used / (1 - MEMORY_MARGIN))


def needed_bytes(shape: ModelShape, layers: LayerRange, sequences: int, ranks: int = 1) -> int:
    """Return the bytes that a stage needs: its weights, and the caches of ``sequences`` full-length sequences.

    Of a stage that several ranks share, those of one rank.
    """
    shape = shape.of_rank(ranks)
    return shape.stage_bytes(layers) + sequences * shape.stage_cache_bytes(layers)


def is_too_small(shape: ModelShape, memory: WorkerMemory, sequences: int = 1) -> bool:
    """Return whether the worker cannot hold even the smallest piece of the model."""
    pieces = (LayerRange(a, b) for a, b in pairwise((0, *shape.clean_cuts, shape.layers)))
    return min(needed_bytes(shape, piece, sequences, memory.ranks) for piece in pieces) > memory.usable


def place_on_largest(workers: Sequence[W], size: Callable[[W], int], place: Callable[[Sequence[W]], Placed]) -> Placed:
    """Return ``place(workers)``. While that does not fit, leave out the smallest worker and try again.

    Anybody whose Mac is admitted could otherwise stop every load with a worker that offers a thousand bytes. Raise the
    first ``DoesNotFit``, which has the figures of all workers.
    """
    remaining = list(workers)
    refusal: DoesNotFit | None = None
    while True:
        try:
            return place(remaining)
        except DoesNotFit as e:
            refusal = refusal or e
            if len(remaining) == 1:
                raise refusal from None
            remaining.remove(min(remaining, key=size))


def solve(shape: ModelShape, memories: Sequence[WorkerMemory], sequences: int) -> tuple[LayerRange, ...]:
    """Return one layer range per worker, in order.

    Raise ``NoPlan`` if there are too few clean cuts, and ``DoesNotFit``, with the missing GiB, if memory is too small.
    """
    require_pieces(shape, len(memories))
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for i, memory in enumerate(memories):
        last = i == len(memories) - 1
        ends = [shape.layers] if last else list(shape.clean_cuts)
        best = _extend(shape, best, ends, memory, sequences)
    _, ends_found = best[shape.layers]
    ranges = tuple(LayerRange(a, b) for a, b in zip((0, *ends_found), ends_found, strict=False))
    require_fit(shape, memories, ranges, sequences)
    return ranges


def _extend(
    shape: ModelShape,
    best: dict[int, tuple[float, tuple[int, ...]]],
    ends: list[int],
    memory: WorkerMemory,
    sequences: int,
) -> dict[int, tuple[float, tuple[int, ...]]]:
    """Return the best relative memory use for each possible end of a worker's range, over all ends of the previous."""
    found: dict[int, tuple[float, tuple[int, ...]]] = {}
    for end in ends:
        options = [
            (max(full, _fullness(shape, LayerRange(start, end), sequences, memory)), (*cuts, end))
            for start, (full, cuts) in best.items()
            if start < end
        ]
        if options:
            found[end] = min(options)
    return found


def _fullness(shape: ModelShape, layers: LayerRange, sequences: int, memory: WorkerMemory) -> float:
    return needed_bytes(shape, layers, sequences, memory.ranks) / max(memory.usable, 1)


def require_fit(
    shape: ModelShape, memories: Sequence[WorkerMemory], ranges: Sequence[LayerRange], sequences: int
) -> None:
    """Check a layout against clean cuts and memory. Raise ``NoPlan`` or ``DoesNotFit``."""
    check_cuts(shape, ranges)
    short = [
        (memory, missing)
        for memory, layers in zip(memories, ranges, strict=True)
        if (missing := needed_bytes(shape, layers, sequences, memory.ranks) - memory.usable) > 0
    ]
    if short:
        raise DoesNotFit(_does_not_fit(shape, memories, ranges, sequences, short), missing_bytes=str(_sum(short)))


def require_pieces(shape: ModelShape, count: int) -> None:
    """Raise ``NoPlan`` if the model cannot be cut into so many pieces."""
    if len(shape.clean_cuts) < count - 1:
        raise NoPlan(_too_few_cuts(shape, count))


def check_cuts(shape: ModelShape, ranges: Sequence[LayerRange]) -> None:
    """Raise ``NoPlan`` unless the model has these layers and may be cut between the ranges."""
    if ranges[-1].end != shape.layers:
        raise NoPlan(f"{shape.title} has layers 0-{shape.layers - 1}, but the ranges end at layer {ranges[-1].end - 1}")
    reasons = dict(shape.unclean)
    for layers in ranges[1:]:
        if layers.start in reasons:
            raise NoPlan(
                f"{shape.title} cannot be cut before layer {layers.start}: {reasons[layers.start]}; "
                f"it can be cut before {_join_numbers(shape.clean_cuts)}"
            )


def _join_remedies(remedies: Sequence[str]) -> str:
    *most, last = remedies
    return f"{', '.join(most)}, or {last}" if most else last


def _sum(short: list[tuple[WorkerMemory, int]]) -> int:
    return sum(missing for _, missing in short)


def _join_numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _too_few_cuts(shape: ModelShape, workers: int) -> str:
    most = len(shape.clean_cuts) + 1
    return (
        f"{shape.title} has {shape.layers} layers and can be cut into {count_in_words(most, 'stage')} at most, "
        f"not {workers}; use --workers {most} or fewer"
    )


def _does_not_fit(
    shape: ModelShape,
    memories: Sequence[WorkerMemory],
    ranges: Sequence[LayerRange],
    sequences: int,
    short: list[tuple[WorkerMemory, int]],
) -> str:
    total = sum(
        memory.ranks * needed_bytes(shape, layers, sequences, memory.ranks)
        for memory, layers in zip(memories, ranges, strict=True)
    )
    names = "; ".join(f"{memory.worker} lacks {gib_in_words(missing)}" for memory, missing in short)
    offered = gib_in_words(sum(memory.ranks * memory.usable for memory in memories))
    if taken := sum(memory.taken for memory in memories):
        offered += f" beside the {gib_in_words(taken)} of other models"
    remedies = ["add a worker"]
    if any(memory.adjustable for memory in memories):
        remedies.append("raise --memory-limit")
    if sum(shape.stage_bytes(layers) for layers in ranges) <= sum(memory.usable for memory in memories):
        remedies.append("lower --max-context")
    return (
        f"{shape.title} does not fit: it needs {gib_in_words(total)} with {sequences} x {shape.max_context} "
        f"tokens of context, the workers offer {offered}; {names}; {_join_remedies(remedies)}"
    )
