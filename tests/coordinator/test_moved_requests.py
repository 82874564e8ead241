"""Requests that move from one engine loop to another: their readers notice nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from cluster.coordinator.active_requests import MovedRequest
from cluster.coordinator.answer_queue import AnswerQueue
from cluster.core.errors import Aborted, NotServing
from cluster.core.known_tokens import KnownTokens
from cluster.core.request import Accepted, FinishEvent, Request, SamplingParams, TokenEvent
from cluster.wire.frame_codec import decode
from coordinator.test_engine_loop import HANG_S, Bench, collect, read


def run(test: Callable[[Bench, Bench], Coroutine[Any, Any, None]]) -> None:
    async def body() -> None:
        source, target = Bench(), Bench()
        try:
            await test(source, target)
        finally:
            for bench in (source, target):
                await asyncio.to_thread(bench.loop.stop, NotServing("over"))

    asyncio.run(body())


async def move(source: Bench, target: Bench) -> list[MovedRequest]:
    """Move all that is live; what the target gave back."""
    moved = await asyncio.wrap_future(source.loop.hand_over())
    for one in moved:
        one.answer.move(target.loop.post, lambda _, one=one: target.loop.end(one.request.id, Aborted("gone")))
    return await asyncio.wrap_future(target.loop.take_over(moved))


def stall(bench: Bench, number: int) -> None:
    """Let no frame after this one come back, so that answers stop in the middle."""
    bench.network.faults["b:1"] = lambda message: None if decode(message).number > number else message


def test_answers_go_on_where_they_were_and_every_event_comes_once() -> None:
    async def body(source: Bench, target: Bench) -> None:
        stall(source, 12)
        answers = [source.ask(f"r{i}", first=10 * i + 1, max_tokens=9) for i in range(4)]
        seen: list[list[Any]] = [[] for _ in answers]
        readers = [asyncio.create_task(collect(a, s)) for a, s in zip(answers, seen, strict=True)]
        async with asyncio.timeout(HANG_S):
            while sum(isinstance(e, TokenEvent) for events in seen for e in events) < 8:
                await asyncio.sleep(0.01)
        assert await move(source, target) == []
        async with asyncio.timeout(HANG_S):
            await asyncio.gather(*readers)
        for i, events in enumerate(seen):
            assert isinstance(events[0], Accepted)
            assert isinstance(events[-1], FinishEvent)
            assert [e.token for e in events[1:-1]] == list(range(10 * i + 2, 10 * i + 11))
            assert [e.index for e in events[1:-1]] == list(range(9))
        assert (len(source.loop.answers), len(target.loop.answers)) == (0, 0)
        assert target.loop.answers.totals.finished == 4
        await target.emptied()

    run(body)


def test_the_samples_of_a_request_move_together() -> None:
    async def body(source: Bench, target: Bench) -> None:
        stall(source, 6)
        answer = AnswerQueue(source.loop.post, samples=3)
        source.loop.submit(Request("many", (1,), SamplingParams(), 5, samples=3), answer)
        await asyncio.wrap_future(source.loop.view())
        assert await move(source, target) == []
        tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
        async with asyncio.timeout(HANG_S):
            async for event in answer:
                if isinstance(event, TokenEvent):
                    tokens[event.sample].append(event.token)
        assert tokens == {key: [2, 3, 4, 5, 6] for key in range(3)}

    run(body)


def test_a_reader_that_leaves_after_the_move_ends_the_request_where_it_is() -> None:
    async def body(source: Bench, target: Bench) -> None:
        stall(source, 3)
        stall(target, 3)
        answer = source.ask("a", max_tokens=90)
        await move(source, target)
        answer.abandon()
        assert answer.abandoned
        with pytest.raises(Aborted):
            await read(answer)
        assert len(target.loop.answers) == 0

    run(body)


def test_a_resumed_request_moves_before_its_tokens_are_decoded() -> None:
    async def body(source: Bench, target: Bench) -> None:
        answer = AnswerQueue(source.loop.post)
        known = tuple(range(2, 3002))
        source.loop.submit(Request("long", (1,), SamplingParams(), 3005), answer, (known,), (KnownTokens(2990),))
        assert await move(source, target) == []
        assert (await read(answer))[0] == list(range(2992, 3007))

    run(body)


def test_what_cannot_be_answered_there_goes_back() -> None:
    async def body(source: Bench, target: Bench) -> None:
        stall(source, 3)
        stall(target, 3)
        same, other = source.ask("same", max_tokens=9), source.ask("other", first=21, max_tokens=9)
        target.ask("same", first=41, max_tokens=9)
        (left,) = await move(source, target)
        assert left.request.id == "same"
        left.answer.move(source.loop.post, lambda _: None)
        assert await asyncio.wrap_future(source.loop.take_over([left])) == []
        for bench in (source, target):
            bench.keep_waiting = True
            bench.loop.hold()
            bench.replace_ring()
        assert (await read(same))[0] == list(range(2, 11))
        assert (await read(other))[0] == list(range(22, 31))

    run(body)


def test_a_canary_stays_and_is_no_answer_that_counts() -> None:
    async def body(source: Bench, target: Bench) -> None:
        for bench in (source, target):
            stall(bench, -1)
        canary = AnswerQueue(source.loop.post)
        source.ask("a", max_tokens=9)
        source.loop.submit(Request("canary-6", (1,), SamplingParams(), 1, is_canary=True), canary)
        assert await move(source, target) == []
        assert (len(source.loop.answers), len(target.loop.answers)) == (1, 1)
        totals, ended_at = replace(source.loop.answers.totals), source.loop.answers.ended_at
        source.keep_waiting = True
        source.loop.hold()
        source.replace_ring()
        assert (await read(canary))[0] == [2]
        assert source.loop.proven == source.epoch
        assert (source.loop.answers.totals, source.loop.answers.ended_at) == (totals, ended_at)

    run(body)


def test_a_loop_that_refuses_requests_takes_none_over() -> None:
    async def body(source: Bench, target: Bench) -> None:
        stall(source, 3)
        source.ask("a", max_tokens=9)
        target.loop.refuse(NotServing("no Mac is left"))
        assert [one.request.id for one in await move(source, target)] == ["a"]

    run(body)
