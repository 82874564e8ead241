"""Fields that only advise: what is ignored is told in a header, what changes the answer's meaning is a 400."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from cluster.api.http.adjustments import Adjustments, join_fields
from cluster.client import Client
from cluster.core.errors import InvalidRequest
from cluster.v1 import inference_pb2 as pb
from cluster.v1.inference_pb2_grpc import InferenceServiceStub
from compat.conftest import Served
from integration.daemons import Cluster, free_port
from parties import mtls

pytestmark = [pytest.mark.xdist_group("compat"), pytest.mark.timeout(120)]

TURN = [{"role": "user", "content": "What is a hop?"}]
SCHEMA = {"type": "object", "properties": {"cmd": {"type": "string"}}}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": TURN, "max_tokens": 2},
    "/v1/responses": {"input": "What is a hop?", "max_output_tokens": 2},
    "/v1/messages": {"model": "default", "messages": TURN, "max_tokens": 2},
}
LENGTHS = {
    "/v1/chat/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/messages": "max_tokens",
}


def post(served: Served, path: str, more: dict[str, Any] | None = None) -> httpx.Response:
    body = {**ROUTES[path], **(more or {})}
    return httpx.post(served.http + path, json=body, headers=served.bearer, timeout=60)


@pytest.mark.parametrize(
    ("path", "more", "ignored"),
    [
        ("/v1/chat/completions", {}, None),
        ("/v1/chat/completions", {"user": None, "metadata": {}, "store": False}, None),
        ("/v1/chat/completions", {"store": True}, "store"),
        ("/v1/chat/completions", {"prediction": {"type": "content", "content": "A hop"}}, "prediction"),
        ("/v1/chat/completions", {"reasoning_effort": "high", "user": "amy"}, "user, reasoning_effort"),
        (
            "/v1/chat/completions",
            {"chat_template_kwargs": {"reasoning_effort": "low"}},
            "chat_template_kwargs.reasoning_effort",
        ),
        ("/v1/responses", {"reasoning": {"effort": "high", "summary": "auto"}}, "reasoning.summary, reasoning.effort"),
        (
            "/v1/responses",
            {
                "tools": [{"type": "web_search"}, {"type": "namespace", "name": "multi_agent_v1", "tools": [{}]}],
                "prompt_cache_key": "x",
                "include": ["reasoning.encrypted_content"],
            },
            "tools.web_search, tools.namespace, include.reasoning.encrypted_content, prompt_cache_key",
        ),
        (
            "/v1/messages",
            {
                "thinking": {"type": "adaptive", "display": "omitted"},
                "output_config": {"effort": "high"},
                "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
                "metadata": {"user_id": "x"},
                "tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}],
                "messages": [
                    {"role": "user", "content": [
                        {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in "ab"
                    ]}
                ],
            },
            "cache_control, tools.web_search_20250305, thinking.display, context_management, metadata, "
            "output_config.effort",
        ),
    ],
)  # fmt: skip
def test_what_only_advises_is_ignored_and_listed_once(
    faq: Served, path: str, more: dict[str, Any], ignored: str | None
) -> None:
    reply = post(faq, path, more)
    assert reply.status_code == 200, reply.text
    assert reply.headers.get("x-macpipe-ignored") == ignored
    assert "x-macpipe-max-tokens" not in reply.headers
    streamed = post(faq, path, {**more, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.headers.get("x-macpipe-ignored") == ignored


def test_deferred_tools_are_offered(tooled: Served) -> None:
    tool = {"name": "run", "input_schema": SCHEMA, "defer_loading": True}
    bare = post(tooled, "/v1/messages", {"tools": [{**tool, "defer_loading": False}]})
    reply = post(tooled, "/v1/messages", {"tools": [tool, {"type": "code_execution_20250825", "name": "code"}]})
    assert reply.headers["x-macpipe-ignored"] == "tools.defer_loading, tools.code_execution_20250825"
    assert "x-macpipe-ignored" not in bare.headers
    counts = [sum(r.json()["usage"][n] for n in ("input_tokens", "cache_read_input_tokens")) for r in (bare, reply)]
    assert counts[0] == counts[1], "the prompt has the client's own tool alone"
    known = post(tooled, "/v1/chat/completions", {"reasoning_effort": "high"})
    assert "x-macpipe-ignored" not in known.headers, "this template knows the effort"


def test_a_required_tool_that_the_server_would_run_is_refused(tooled: Served) -> None:
    search = {"tools": [{"type": "web_search"}], "tool_choice": "required"}
    reply = post(tooled, "/v1/responses", search)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tool_choice")


@pytest.mark.parametrize("path", ROUTES)
def test_an_answer_that_cannot_be_that_long_is_shortened(faq: Served, path: str) -> None:
    """The bundled model serves 1,024 tokens."""
    name = LENGTHS[path]
    ids = httpx.post(f"{faq.http}/tokenize", json={"messages": TURN}, headers=faq.bearer).json()
    room = ids["context_length"] - ids["count"]
    reply = post(faq, path, {name: 32_000})
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-macpipe-max-tokens"] == str(room)
    exact = post(faq, path, {name: room})
    assert "x-macpipe-max-tokens" not in exact.headers


def test_completions_are_not_shortened(faq: Served) -> None:
    body = {"prompt": "A hop", "max_tokens": 32_000}
    reply = httpx.post(f"{faq.openai}/completions", json=body, headers=faq.bearer)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_grpc_lists_what_is_ignored_in_its_metadata(faq: Served) -> None:
    if mtls():
        pytest.skip("a bare channel has no certificate")
    request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="x")], stop=pb.StopOptions(max_tokens=1))
    with grpc.insecure_channel(faq.grpc) as channel:
        for effort, ignored in (("", None), ("high", "reasoning_effort")):
            request.template.reasoning_effort = effort
            call = InferenceServiceStub(channel).Chat(request, timeout=60)
            assert dict(call.initial_metadata()).get("x-macpipe-ignored") == ignored
            assert list(call)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    cluster = Cluster(tmp_path_factory.mktemp("strict"), mtls=False)
    try:
        cluster.worker("gus")
        http = f"127.0.0.1:{free_port()}"
        _, address = cluster.serving("faq", 1, "--http", http, "--strict")
        yield Served(address, f"http://{http}", cluster.folder)
    finally:
        cluster.close()


@pytest.mark.parametrize(
    ("path", "more", "field"),
    [
        ("/v1/chat/completions", {"user": "amy"}, "user"),
        ("/v1/chat/completions", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("/v1/chat/completions", {"max_tokens": 32_000}, "max_tokens"),
        ("/v1/responses", {"tools": [{"type": "web_search"}]}, "tools.web_search"),
        ("/v1/messages", {"output_config": {"effort": "high"}}, "output_config.effort"),
        ("/v1/messages", {"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display"),
    ],
)
def test_a_strict_server_refuses_what_others_ignore(
    strict: Served, path: str, more: dict[str, Any], field: str
) -> None:
    reply = post(strict, path, more)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert field == error["param"] if "param" in error else field in error["message"]
    assert post(strict, path).status_code == 200
    with Client(strict.grpc, timeout_s=30) as client, pytest.raises(InvalidRequest, match="reasoning_effort"):
        list(client.chat([{"role": "user", "content": "x"}], reasoning_effort="high", max_tokens=1))


def test_the_header_is_bounded() -> None:
    adjustments = Adjustments()
    adjustments.ignore(f"field_{i}" for i in range(2000))
    listed = adjustments.headers()["x-macpipe-ignored"]
    assert listed.startswith("field_0, field_1, ")
    assert listed.endswith(", ...")
    assert len(listed) <= 1024 + len(", ...")
    assert join_fields(["a", "b"]) == "a, b"
