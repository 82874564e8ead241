"""Calls something for several workers at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import anyio

Item = TypeVar("Item")
Result = TypeVar("Result")


async def call_for_each(call: Callable[[Item], Awaitable[Result]], items: Iterable[Item]) -> list[Result]:
    """Call ``call`` for all items at once and return the results, in the order of the items.

    The first error cancels the other calls. It is raised in an ExceptionGroup.
    """
    results: dict[int, Result] = {}

    async def keep(number: int, item: Item) -> None:
        results[number] = await call(item)

    async with anyio.create_task_group() as tasks:
        for number, item in enumerate(items):
            tasks.start_soon(keep, number, item)
    return [results[number] for number in range(len(results))]
