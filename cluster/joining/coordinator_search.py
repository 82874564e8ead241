"""Find the coordinator among announced addresses: ask all of them, a few at once; the first that proves it wins.

Anybody on the network can announce anything. So the number of addresses is bounded, each has a deadline, and so has the
whole search.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from cluster.core.errors import ForeignAuthority, MacpipeError, Unreachable
from cluster.discovery.sighting import Source
from cluster.security.limits import JOIN_TRIES, MAX_JOIN_TRIED

T = TypeVar("T")


async def search(source: Source, look: Callable[[str], Awaitable[T]], cluster_id: str, wait_s: float) -> T:
    """Return what ``look`` returns for the first address in ``source`` for which it raises no ``MacpipeError``.

    Raises ``Unreachable`` after ``wait_s``, or ``ForeignAuthority`` if only impostors answered.
    """
    tried: dict[str, MacpipeError | None] = {}
    won: list[T] = []
    places = anyio.CapacityLimiter(JOIN_TRIES)

    async def attempt(address: str) -> None:
        async with places:
            try:
                won.append(await look(address))
            except MacpipeError as e:
                tried[address] = e
            else:
                tasks.cancel_scope.cancel()

    with anyio.move_on_after(wait_s):
        async with anyio.create_task_group() as tasks:
            while True:
                for sighting in source.current():
                    if sighting.address not in tried and len(tried) < MAX_JOIN_TRIED:
                        tried[sighting.address] = None
                        tasks.start_soon(attempt, sighting.address)
                await source.changed(wait_s)
    if won:
        return won[0]
    raise _failure(tried, cluster_id, wait_s)


def _failure(tried: dict[str, MacpipeError | None], cluster_id: str, wait_s: float) -> MacpipeError:
    peer = "name its coordinator with --peer HOST:PORT"
    if not tried:
        return Unreachable(
            f"no coordinator of cluster {cluster_id} was found in {wait_s:.0f} s: is `macpipe serve` or `macpipe init`"
            f" running there? Else {peer}"
        )
    if len(tried) == 1 and (only := next(iter(tried.values()))):
        return only
    return ForeignAuthority(
        f"{len(tried)} addresses claim to be cluster {cluster_id}, but none of them proved it in {wait_s:.0f} s;"
        f" no secret was sent; {peer}"
    )
