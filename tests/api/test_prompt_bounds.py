"""A prompt of more bytes than can fit is refused before any process tokenizes it, with its size and the bound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from cluster.api import request_validation
from cluster.api.requests import Caller, ChatParams, Conversation, GenerateParams
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import PromptTooLong
from cluster.core.limits import MAX_BYTES_PER_TOKEN, MAX_LISTED_TOKENS, MAX_PROMPT_BYTES
from cluster.core.request import ChatMessage, ChatOptions, Tool, ToolCall, prompt_size
from fuzz.targets.asked import served

pytestmark = pytest.mark.anyio
CALLER = Caller("client", None)
CONTEXT = 1024


def unread(context: int) -> ModelInfo:
    """A model whose tokenizer nobody may ask."""
    known = served()
    return replace(known, shape=replace(known.shape, max_context=context), text=cast(Any, None))


def chat(text: str) -> ChatParams:
    return ChatParams(conversation=Conversation([ChatMessage("user", text)], ChatOptions()))


@pytest.mark.parametrize(
    ("context", "text", "most"),
    [
        (CONTEXT, "a" * (CONTEXT * MAX_BYTES_PER_TOKEN + 1), CONTEXT * MAX_BYTES_PER_TOKEN),
        (10**6, "\u00e9" * (MAX_PROMPT_BYTES // 2 + 1), MAX_PROMPT_BYTES),
    ],
    ids=["context", "any"],
)
async def test_a_prompt_of_too_many_bytes_is_refused_unread(context: int, text: str, most: int) -> None:
    said = rf"{len(text.encode())} bytes; send at most {most}: the context has {context} tokens"
    with pytest.raises(PromptTooLong, match=f"the prompt has {said}") as caught:
        await request_validation.generate_request(GenerateParams(prompt=text), 0, unread(context), CALLER)
    assert caught.value.field == "prompt"
    with pytest.raises(PromptTooLong, match=f"the messages have {said}") as caught:
        await request_validation.chat_request(chat(text), 0, unread(context), CALLER)
    assert caught.value.field == "messages"


async def test_what_is_only_counted_may_be_longer_than_the_context() -> None:
    text = "a" * (CONTEXT * MAX_BYTES_PER_TOKEN + 1)
    known = served()
    model = replace(known, shape=replace(known.shape, max_context=CONTEXT))
    assert await request_validation.count_tokens(text, 0, model) <= MAX_LISTED_TOKENS
    too_long = "\u00e9" * (MAX_PROMPT_BYTES // 2 + 1)
    with pytest.raises(PromptTooLong, match="the text has") as caught:
        await request_validation.count_tokens(too_long, 0, unread(CONTEXT))
    assert caught.value.field == "prompt"


async def test_the_size_of_a_conversation_is_that_of_all_its_texts() -> None:
    call = ToolCall("1", "22", "{333}")
    messages = [ChatMessage("assistant", "\u00e9", "rr", (call,), "idid", "n"), ChatMessage("user", "x")]
    assert prompt_size(messages, [Tool("ab", "c", "{}")]) == (2 + 2 + 8 + 4 + 1) + 1 + 5
