"""Many concurrent HTTP streams: each ends once, complete or with an error that says why, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest

from compat.conftest import Served

pytestmark = [pytest.mark.xdist_group("compat"), pytest.mark.timeout(600)]


async def stream(client: httpx.AsyncClient, number: int) -> str:
    """How one stream ended: its finish reason, ``error`` in it, or the status that refused it."""
    body = {
        "messages": [{"role": "user", "content": f"What is a hop? {number}"}],
        "max_tokens": 4 + number % 5,
        "seed": number,
        "stream": True,
        "ignore_eos": True,
    }
    ends: list[str] = []
    async with client.stream("POST", "/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            assert reply.headers["retry-after"]
            return str(reply.status_code)
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                ends.append("done")
            elif line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                ends += ["error"] if "error" in chunk else []
                ends += [c["finish_reason"] for c in chunk.get("choices", ()) if c["finish_reason"]]
    assert ends == ["length", "done"], ends
    return "length"


async def crowd(served: Served, size: int) -> list[str]:
    limits = httpx.Limits(max_connections=size)
    async with httpx.AsyncClient(base_url=served.openai, headers=served.bearer, limits=limits, timeout=500) as client:
        return await asyncio.gather(*(stream(client, i) for i in range(size)))


@pytest.mark.parametrize("size", [60, pytest.param(500, marks=pytest.mark.long)])
def test_every_stream_of_a_crowd_ends_once(faq: Served, size: int) -> None:
    began = time.monotonic()
    ends = asyncio.run(crowd(faq, size))
    print(f"{size} streams: {[(e, ends.count(e)) for e in sorted(set(ends))]} in {time.monotonic() - began:.1f} s")
    assert set(ends) <= {"length", "429"}
    assert ends.count("length") >= min(size, 300)
    assert faq.live() == 0
