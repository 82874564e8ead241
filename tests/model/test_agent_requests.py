"""What coding agents send, in the chat template of each model family: nothing is refused that could be served.

The requests in ``agent_requests/`` have the structure of real ones: their roles, tools, ids and fields. Their texts are
numbered, in the order of the prompt. One file has the requests of one client.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cluster.api.http.chat_form import ChatForm
from cluster.api.http.messages_form import MessagesForm
from cluster.api.http.responses_form import ResponsesForm
from cluster.api.requests import ChatParams
from cluster.core.errors import InvalidRequest
from cluster.core.request import ChatMessage, ChatOptions
from cluster.model.tokenizer import Tokenizer
from model.template_families import FAMILIES, Family, in_order, make

REQUESTS = Path(__file__).parent / "agent_requests"
CLIENTS = sorted(file.stem for file in REQUESTS.iterdir())
FORMS: dict[str, type[ChatForm | ResponsesForm | MessagesForm]] = {
    "/v1/chat/completions": ChatForm,
    "/v1/responses": ResponsesForm,
    "/v1/messages": MessagesForm,
}
IGNORED = {
    "claude-code-2.1": "cache_control, context_management, metadata, thinking.display, tools.defer_loading, "
    "tools.web_search_20250305",
    "codex-0.171-launch": "client_metadata, include.reasoning.encrypted_content, prompt_cache_key, reasoning.summary",
    "codex-0.171-plain": "client_metadata, include.reasoning.encrypted_content, prompt_cache_key, reasoning.summary, "
    "tools.namespace, tools.web_search",
}
TEXT = re.compile(r"Text \d+\.")


@cache
def read_requests(client: str) -> tuple[tuple[str, ChatParams, frozenset[str]], ...]:
    """Return the body, the parameters and the ignored fields of each of the client's requests."""
    read = []
    for line in (REQUESTS / f"{client}.jsonl").read_text(encoding="utf-8").splitlines():
        request: dict[str, Any] = json.loads(line)
        hints: dict[str, None] = {}
        form = FORMS[request["path"]].model_validate(request["body"], context=hints)
        read.append((line, form.params("id"), frozenset(hints)))
    return tuple(read)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Tokenizer]:
    return request.param, make(request.param, tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize("client", CLIENTS)
def test_only_hints_of_a_clients_requests_are_ignored(client: str) -> None:
    ignored = frozenset[str]().union(*(hints for *_, hints in read_requests(client)))
    assert ", ".join(sorted(ignored)) == IGNORED.get(client, "")


@pytest.mark.parametrize("client", CLIENTS)
def test_each_request_of_a_client_becomes_a_whole_prompt(client: str, family: tuple[Family, Tokenizer]) -> None:
    kind, tokenizer = family
    for body, params, _ in read_requests(client):
        conversation = params.conversation
        if conversation.options.offered and not kind.answer:
            with pytest.raises(InvalidRequest) as refused:
                tokenizer.chat(conversation.messages, conversation.options)
            assert refused.value.field == "tools", "the template takes none, so no server could use them"
            continue
        text = tokenizer.decode(tokenizer.chat(conversation.messages, conversation.options))
        left_out = {m.content for m in conversation.messages if m.tool_calls} if kind.drops_text else set()
        texts = sorted({*TEXT.findall(body)} - left_out, key=lambda each: int(each[5:-1]))
        assert len(texts) > 1
        assert in_order(text, *texts)
        for message in conversation.messages:
            assert all(call.name in text for call in message.tool_calls)


@pytest.mark.parametrize("enable", [True, False])
def test_thinking_that_cannot_be_switched_is_refused_unless_it_is_a_hint(
    enable: bool, family: tuple[Family, Tokenizer]
) -> None:
    kind, tokenizer = family
    asked = ChatOptions(enable_thinking=enable)
    hint = replace(asked, thinking_is_hint=True)
    tokenizer.chat([ChatMessage("user", "Hello")], hint)
    ignored = tokenizer.ignored_options(hint)
    assert ignored == (() if kind.has_switch or not (enable or kind.always_thinks) else ("enable_thinking",))
    if ignored:
        with pytest.raises(InvalidRequest) as refused:
            tokenizer.chat([ChatMessage("user", "Hello")], asked)
        assert refused.value.field == "enable_thinking"
    none = ChatOptions(reasoning_effort="none")
    tokenizer.chat([ChatMessage("user", "Hello")], none)
    assert tokenizer.ignored_options(none) == (("reasoning_effort",) if kind.always_thinks else ())
