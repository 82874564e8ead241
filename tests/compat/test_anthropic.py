"""The anthropic package against real daemons."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pytest
from anthropic import Anthropic

from compat.conftest import ALIAS, Served

pytestmark = [pytest.mark.xdist_group("compat"), pytest.mark.timeout(120)]

HOP = "A hop is the journey of an activation from one stage to the next."
GREEDY = {"temperature": 0}
ASK = [{"role": "user", "content": "What is a hop?"}]


@pytest.fixture
def client(faq: Served) -> Iterator[Anthropic]:
    with Anthropic(base_url=faq.http, api_key=faq.key, max_retries=0) as client:
        yield client


def test_messages(client: Anthropic) -> None:
    done = client.messages.create(model="faq", messages=ASK, extra_body=GREEDY, max_tokens=19)
    (block,) = done.content
    assert (block.type, block.text) == ("text", HOP)
    assert (done.role, done.stop_reason, done.usage.output_tokens) == ("assistant", "max_tokens", 19)
    counted = client.messages.count_tokens(model="faq", messages=ASK)
    assert counted.input_tokens == done.usage.input_tokens + (done.usage.cache_read_input_tokens or 0)


def test_stream(client: Anthropic) -> None:
    with client.messages.stream(model="faq", messages=ASK, extra_body=GREEDY, max_tokens=19) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == HOP
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 19


def test_a_stream_says_at_its_start_what_of_the_prompt_was_kept(client: Anthropic) -> None:
    for kept in (False, True):
        turn = [{"role": "user", "content": "What was kept of these words, which nobody said before?"}]
        start, *_, delta, _ = client.messages.create(model="faq", messages=turn, max_tokens=3, stream=True)
        assert start.type == "message_start"
        assert delta.type == "message_delta"
        usage = start.message.usage
        assert (usage.input_tokens, usage.cache_read_input_tokens) == (
            delta.usage.input_tokens,
            delta.usage.cache_read_input_tokens,
        )
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) > 10
        if kept:
            assert usage.cache_read_input_tokens


def test_models(client: Anthropic) -> None:
    models = list(client.models.list())
    assert [(m.id, m.type, m.display_name) for m in models] == [(n, "model", n) for n in ("faq", ALIAS)]
    assert client.models.retrieve("faq").created_at == models[0].created_at
    assert models[0].created_at.tzinfo


def test_a_prefill_is_refused(client: Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="prefill"):
        client.messages.create(model="faq", messages=[*ASK, {"role": "assistant", "content": "A hop"}], max_tokens=1)


def test_a_stop_sequence_is_named(client: Anthropic) -> None:
    done = client.messages.create(
        model="faq", messages=ASK, extra_body=GREEDY, max_tokens=50, stop_sequences=["zzz", " activation"]
    )
    assert done.content[0].text == "A hop is the journey of an"
    assert (done.stop_reason, done.stop_sequence) == ("stop_sequence", " activation")


def test_system_and_blocks(client: Anthropic) -> None:
    turns = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is a hop?", "cache_control": {"type": "ephemeral"}}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": HOP}]},
        {"role": "user", "content": "What is macpipe?"},
    ]
    done = client.messages.create(
        model="faq", system=[{"type": "text", "text": "Be short."}], messages=turns, extra_body=GREEDY, max_tokens=200
    )
    assert done.stop_reason == "end_turn"


def test_refusals_have_anthropics_shape(client: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(model="claude-9", messages=ASK, max_tokens=1)
    assert unknown.value.body == {
        "type": "error",
        "error": {
            "type": "not_found_error",
            "message": "the model claude-9 is not served here; use faq, gpt-4o-mini",
        },
    }
    image = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.messages.create(model="faq", messages=[{"role": "user", "content": [image]}], max_tokens=1)
    assert "messages[0].content[0]" in str(refused.value)
