"""What coding agents rely on besides an answer: words of errors, names of models, signs of life, lines left out."""

from __future__ import annotations

import json
import os
import re
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest

from cluster.client import Client
from compat.conftest import Served
from integration.daemons import serve_model

pytestmark = [pytest.mark.xdist_group("compat"), pytest.mark.timeout(120)]

TURN = [{"role": "user", "content": "What is a hop?"}]
LONG = [{"role": "user", "content": "hop " * 5000}]
HUGE = [{"role": "user", "content": "hop " * 50_000}]
PROMPT_TOO_LONG = re.compile(r"prompt is too long: (\d+) tokens > 1023 maximum")
"""Claude Code compacts its conversation on exactly these words."""


@pytest.mark.parametrize("turns", [LONG, HUGE], ids=["tokens", "bytes"])
def test_a_prompt_that_is_too_long_is_told_in_each_apis_words(faq: Served, turns: list[dict[str, str]]) -> None:
    body = {"model": "faq", "max_tokens": 5, "messages": turns}
    refused = httpx.post(f"{faq.http}/v1/messages", json=body, headers=faq.bearer, timeout=60)
    assert refused.status_code == 400
    said = PROMPT_TOO_LONG.fullmatch(refused.json()["error"]["message"])
    assert said
    assert int(said.group(1)) > 1023
    for path, asked in (("chat/completions", {"messages": turns}), ("responses", {"input": turns[0]["content"]})):
        refused = httpx.post(f"{faq.openai}/{path}", json=asked, headers=faq.bearer, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_claudes_line_about_billing_is_left_out(faq: Served) -> None:
    def count(*system: str) -> int:
        blocks = [{"type": "text", "text": text} for text in system]
        body = {"model": "faq", "messages": TURN, **({"system": blocks} if system else {})}
        reply = httpx.post(f"{faq.http}/v1/messages/count_tokens", json=body, headers=faq.bearer, timeout=60)
        return int(reply.json()["input_tokens"])

    billing = "x-anthropic-billing-header: cc_version=2.1.332; cc_entrypoint=cli; cch=%s;"
    assert count(billing % "00000", "Be short.") == count(billing % "12345", "Be short.") == count("Be short.")
    assert count(f"{billing % '1'}\nBe short.") == count("Be short.")
    assert count(billing % "1") == count()
    assert count(f"Be short. {billing % '1'}") > count("Be short.")


def test_claude_asks_whether_the_address_answers(faq: Served) -> None:
    reply = httpx.head(f"{faq.http}/api/hello")
    assert (reply.status_code, reply.content) == (200, b"")


def test_a_folder_is_listed_and_found_by_its_last_part(served: Served) -> None:
    relative = os.path.relpath(served.tooled)  # the coordinator runs in this process's folder
    with Client(served.grpc, timeout_s=60) as client:
        serve_model(client, relative, 2)
        assert client.generate("x", max_tokens=1, model=served.tooled.name).tokens
    (listed, *_) = httpx.get(f"{served.openai}/models", headers=served.bearer).json()["data"]
    assert listed["id"] == served.tooled.name
    assert httpx.get(f"{served.openai}/models/{listed['id']}", headers=served.bearer).status_code == 200
    assert httpx.get(f"{served.openai}/models/{relative}x", headers=served.bearer).status_code == 404


def test_a_codex_that_hangs_up_after_the_last_event_has_ended_its_request(faq: Served) -> None:
    def aborted() -> str:
        text = httpx.get(f"{faq.http}/metrics", headers=faq.bearer).text
        return "".join(line for line in text.splitlines() if 'outcome="aborted"' in line)

    before = aborted()
    for _ in range(5):
        connection = HTTPConnection(faq.http.removeprefix("http://"), timeout=60)
        body = json.dumps({"input": "What is a hop?", "max_output_tokens": 3, "stream": True})
        connection.request("POST", "/v1/responses", body, faq.bearer)
        reply = connection.getresponse()
        while b"event: response.incomplete" not in reply.readline():
            pass
        reply.readline()
        connection.close()
    assert aborted() == before


def test_a_call_that_is_cut_shows_what_is_complete(tooled: Served) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"a": {"enum": [7]}, "b": {"type": "string", "minLength": 400}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    body = {
        "model": "default", "messages": TURN, "max_tokens": 90, "temperature": 0,
        "tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "tool", "name": "f"},
    }  # fmt: skip
    done = httpx.post(f"{tooled.http}/v1/messages", json=body, headers=tooled.bearer, timeout=60).json()
    (block,) = done["content"]
    assert (done["stop_reason"], block["type"], block["name"]) == ("max_tokens", "tool_use", "f")
    assert block["input"] == {"a": 7}
    cut = httpx.post(
        f"{tooled.http}/v1/messages", json={**body, "max_tokens": 8}, headers=tooled.bearer, timeout=60
    ).json()
    assert (cut["stop_reason"], cut["content"]) == ("max_tokens", [])
