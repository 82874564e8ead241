"""Clients while no model is served, and when a model stops being served during their answer."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest

from cluster.client import Client
from compat.conftest import Served

pytestmark = [pytest.mark.xdist_group("compat"), pytest.mark.timeout(120)]

LONG = {
    "model": "faq",
    "messages": [{"role": "user", "content": "What is a hop?"}],
    "max_tokens": 900,
    "ignore_eos": True,
    "stream": True,
}


def events(reply: httpx.Response, begun: threading.Event) -> list[dict[str, Any]]:
    """The stream's data; ``begun`` is set with the third."""
    found = []
    for line in reply.iter_lines():
        if line.startswith("data: "):
            found.append({"done": True} if line == "data: [DONE]" else json.loads(line.removeprefix("data: ")))
        if len(found) == 3:
            begun.set()
    return found


def test_an_answer_that_is_broken_off_says_why_and_what_comes_next_is_503(faq: Served) -> None:
    begun = threading.Event()
    found: list[dict[str, Any]] = []

    def stream() -> None:
        with httpx.stream("POST", f"{faq.openai}/chat/completions", json=LONG, headers=faq.bearer, timeout=60) as reply:
            found.extend(events(reply, begun))

    reading = threading.Thread(target=stream)
    reading.start()
    assert begun.wait(60)
    with Client(faq.grpc, timeout_s=30) as client:
        client.unload()
    reading.join(60)
    *answer, last = found
    assert all("choices" in chunk for chunk in answer)
    assert last["error"]["code"] == "not_serving"
    assert "unloaded" in last["error"]["message"]

    health = httpx.get(f"{faq.http}/health", headers=faq.bearer)
    assert (health.status_code, health.json()["status"]) == (503, "idle")
    assert "macpipe load" in health.json()["message"]
    assert httpx.get(f"{faq.http}/live", headers=faq.bearer).status_code == 200
    assert httpx.get(f"{faq.openai}/models", headers=faq.bearer).json()["data"] == []
    assert httpx.get(f"{faq.openai}/models/faq", headers=faq.bearer).status_code == 404
    idle = httpx.post(f"{faq.openai}/chat/completions", json=LONG, headers=faq.bearer)
    assert (idle.status_code, idle.headers["retry-after"]) == (503, "5")
    turns = {"model": "faq", "max_tokens": 5, "messages": LONG["messages"]}
    refused = httpx.post(f"{faq.http}/v1/messages", json=turns, headers=faq.bearer)
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded_error")
    assert 'macpipe_state{state="idle"} 1.0' in httpx.get(f"{faq.http}/metrics", headers=faq.bearer).text


def test_metrics_count_what_happened(faq: Served) -> None:
    def value(line: str) -> float:
        text = httpx.get(f"{faq.http}/metrics", headers=faq.bearer).text
        return next((float(one.rpartition(" ")[2]) for one in text.splitlines() if one.startswith(line + " ")), 0.0)

    before = value('macpipe_tokens_total{kind="completion"}'), value('macpipe_requests_total{outcome="length"}')
    body = {"prompt": "secret words", "max_tokens": 5, "ignore_eos": True}
    assert httpx.post(f"{faq.openai}/completions", json=body, timeout=60, headers=faq.bearer).status_code == 200
    assert value('macpipe_tokens_total{kind="completion"}') == before[0] + 5
    assert value('macpipe_requests_total{outcome="length"}') == before[1] + 1
    assert value('macpipe_kv_capacity_bytes{stage="0",worker="eve"}') + value(
        'macpipe_kv_capacity_bytes{stage="0",worker="fay"}'
    )
    assert "secret" not in httpx.get(f"{faq.http}/metrics", headers=faq.bearer).text
