"""Several workers are asked at once."""

from __future__ import annotations

import asyncio

import pytest

from cluster.coordinator.concurrent_calls import call_for_each

pytestmark = pytest.mark.anyio


async def test_all_are_called_at_once_and_their_results_keep_the_order() -> None:
    begun = asyncio.Event()

    async def call(number: int) -> str:
        if number == 2:
            begun.set()
        await begun.wait()
        return str(number)

    assert await call_for_each(call, iter(range(3))) == ["0", "1", "2"]
    assert await call_for_each(call, []) == []


async def test_the_first_error_ends_the_other_calls() -> None:
    ended: list[int] = []

    async def call(number: int) -> None:
        if number == 1:
            raise ValueError(number)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    with pytest.raises(ExceptionGroup) as raised:
        await call_for_each(call, range(3))
    assert [str(error) for error in raised.value.exceptions] == ["1"]
    assert sorted(ended) == [0, 2]
