"""Choose which models leave memory for another one. Pure: it knows names and times, and asks whether the model fits.

Whether it fits is asked of the planner with the memory of the victims given back, since a model that is cut into layers
may not fit where a sum of bytes says that it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from cluster.core.errors import DoesNotFit, ModelTooLarge
from cluster.core.load_limits import BUSY_RETRY_S, MIN_RESIDENT_S
from cluster.core.text import gib_in_words, names_in_words

COPY_PRIORITY: Final = -(2**31)
"""Less than any model's."""
Refusal = Callable[[AbstractSet[str]], DoesNotFit | None]
"""Tell why the model does not fit once these models have left; None if it fits."""


@dataclass(frozen=True, slots=True)
class Resident:
    """A loaded model. ``used_at`` is when it was used last and ``loaded_at`` when it was loaded, by one clock.

    Those of lower ``priority`` leave first. ``busy``: it has live or queued requests, or its load is not complete.
    """

    name: str
    used_at: float
    loaded_at: float
    busy: bool = False
    pinned: bool = False
    priority: int = 0

    @staticmethod
    def of_copy(holder: str, order: int) -> Resident:
        """Return a copy of a model, whose requests go on elsewhere: it may leave at any time, and before any model."""
        return Resident(holder, float(order), -MIN_RESIDENT_S, priority=COPY_PRIORITY)


@dataclass(frozen=True, slots=True)
class Room:
    """How a model gets its memory: once ``victims`` have left, in this order.

    If ``wait_s`` is more than 0, there are no victims yet: ask again after so many seconds, when what was loaded a
    moment ago may leave.
    """

    victims: tuple[str, ...] = ()
    wait_s: float = 0.0


def find_room(
    model: str, residents: Sequence[Resident], refusal: Refusal, now: float, lacks_macs: bool = False
) -> Room:
    """Return how ``model`` gets its memory, at the cost of few models, and of those that were used least recently.

    None of the victims could stay. Raises ``ModelTooLarge`` if it would not fit even alone, with the planner's
    sentence, or if it does not fit beside what is pinned, and ``DoesNotFit`` if it does not fit beside what is busy,
    with the names of these. ``lacks_macs``: Macs are away that may come back, so nothing is too large for now.
    """
    why = refusal(frozenset())
    if why is None:
        return Room()
    ordered = sorted(residents, key=lambda one: (one.priority, one.used_at, one.name))
    evictable = [one for one in ordered if not one.busy and not one.pinned]
    settled = [one.name for one in evictable if now - one.loaded_at >= MIN_RESIDENT_S]
    if victims := _choose_victims(settled, refusal):
        return Room(victims)
    why = refusal({one.name for one in evictable})
    if why is None:
        return Room(wait_s=_wait_for_young(evictable, refusal, now))
    for_good = DoesNotFit if lacks_macs else ModelTooLarge
    if alone := refusal({one.name for one in ordered}):
        raise for_good(alone.sentence, missing_bytes=alone.details.get("missing_bytes", "0"))
    pinned = [one.name for one in ordered if one.pinned]
    if why_pinned := refusal({one.name for one in ordered if not one.pinned}):
        raise _no_room(for_good, model, [], pinned, why_pinned)
    busy = [one.name for one in ordered if one.busy]
    raise _no_room(DoesNotFit, model, busy, [name for name in pinned if name not in busy], why)


def _choose_victims(names: Sequence[str], refusal: Refusal) -> tuple[str, ...]:
    """Return the first of ``names`` that suffice, without those that may stay; () if all do not suffice."""
    count = next((count for count in range(1, len(names) + 1) if refusal(set(names[:count])) is None), 0)
    victims = list(names[:count])
    for name in reversed(names[: max(count - 1, 0)]):
        fewer = [one for one in victims if one != name]
        if fewer and refusal(set(fewer)) is None:
            victims = fewer
    return tuple(victims)


def _wait_for_young(evictable: Sequence[Resident], refusal: Refusal, now: float) -> float:
    """Return after how many seconds enough models have been loaded for ``MIN_RESIDENT_S``."""
    waits = sorted({max(one.loaded_at + MIN_RESIDENT_S - now, 0.0) for one in evictable})
    for wait_s in waits:
        old = {one.name for one in evictable if now + wait_s - one.loaded_at >= MIN_RESIDENT_S}
        if wait_s and refusal(old) is None:
            return wait_s
    return waits[-1]


def _no_room(
    kind: type[DoesNotFit], model: str, busy: Sequence[str], pinned: Sequence[str], why: DoesNotFit
) -> DoesNotFit:
    """Return the refusal of a model that does not fit beside these."""
    parts = [f"{names_in_words(busy)}, which {_are(busy)} busy"] if busy else []
    parts += [f"{names_in_words(pinned)}, which {_are(pinned)} pinned"] if pinned else []
    missing = int(why.details.get("missing_bytes", "0"))
    amount = f"it needs {gib_in_words(missing)} more" if missing else "there is not enough memory"
    remedy = "try again in a moment"
    if not busy:  # one that was loaded alone has all memory for its caches
        remedy = f"unload {pinned[0]} first, or load it again with `macpipe load {pinned[0]}` if its caches may shrink"
    return kind(
        f"{model} does not fit beside {', and '.join(parts)}: {amount}; {remedy}",
        retry_after_s=BUSY_RETRY_S if busy else None,
        missing_bytes=str(missing),
        model=model,
    )


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
