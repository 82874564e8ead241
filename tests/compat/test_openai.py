"""The openai package, as people use it, against real daemons."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import openai
import pytest
from mlx_lm.utils import load_model
from openai import AsyncOpenAI, OpenAI

from cluster.model.checkpoint import resolve_model
from cluster.model.tokenizer import load_tokenizer
from compat.conftest import ALIAS, Served

pytestmark = [pytest.mark.xdist_group("compat"), pytest.mark.timeout(120)]

HOP = "A hop is the journey of an activation from one stage to the next."
ASK = [{"role": "user", "content": "What is a hop?"}]


@pytest.fixture
def client(faq: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=faq.openai, api_key=faq.key, max_retries=0) as client:
        yield client


def test_chat(client: OpenAI) -> None:
    done = client.chat.completions.create(model="faq", messages=ASK, temperature=0, max_tokens=19)
    assert done.choices[0].message.content == HOP
    assert done.choices[0].message.tool_calls is None
    assert (done.object, done.model, done.choices[0].finish_reason) == ("chat.completion", "faq", "length")
    assert done.usage
    assert done.usage.total_tokens == done.usage.prompt_tokens + 19


def test_an_answer_may_be_as_long_as_the_context_lets_it(client: OpenAI) -> None:
    done = client.chat.completions.create(model="faq", messages=ASK, temperature=0)
    assert done.choices[0].finish_reason == "stop"
    assert done.choices[0].message.content
    assert done.choices[0].message.content.startswith(HOP)


def test_stream(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="faq", messages=ASK, temperature=0, max_tokens=19, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    *answer, usage = chunks
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1
    assert answer[0].choices[0].delta.role == "assistant"
    assert all(c.choices[0].delta.role is None for c in answer[1:])
    assert "".join(c.choices[0].delta.content or "" for c in answer) == HOP
    assert [c.choices[0].finish_reason for c in answer[-2:]] == [None, "length"]
    assert answer[-1].choices[0].delta.model_fields_set == set()
    assert usage.choices == []
    assert usage.usage
    assert usage.usage.completion_tokens == 19


def test_the_stream_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(model="faq", messages=ASK, temperature=0, max_tokens=19) as stream:
        text = "".join(e.delta for e in stream if e.type == "content.delta")
    assert text == HOP


def test_async(faq: Served) -> None:
    async def ask() -> list[str | None]:
        async with AsyncOpenAI(base_url=faq.openai, api_key=faq.key) as client:
            asked = (
                client.chat.completions.create(model="faq", messages=ASK, temperature=0, max_tokens=19)
                for _ in range(4)
            )
            return [done.choices[0].message.content for done in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == [HOP] * 4


def test_logprobs(client: OpenAI) -> None:
    done = client.chat.completions.create(
        model="faq", messages=ASK, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    logprobs = done.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert "".join(t.token for t in logprobs.content) == done.choices[0].message.content
    for token in logprobs.content:
        assert bytes(token.bytes or ()).decode() == token.token
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(t.logprob for t in token.top_logprobs) <= 0


def test_seed(client: OpenAI) -> None:
    def say(seed: int) -> str | None:
        done = client.chat.completions.create(model="faq", messages=ASK, temperature=2, max_tokens=20, seed=seed)
        return done.choices[0].message.content

    assert say(7) == say(7) != say(8)


def test_stop(client: OpenAI) -> None:
    done = client.chat.completions.create(model="faq", messages=ASK, temperature=0, stop=[" activation", "zzz"])
    assert done.choices[0].message.content == "A hop is the journey of an"
    assert done.choices[0].finish_reason == "stop"
    one = client.chat.completions.create(model="faq", messages=ASK, temperature=0, stop=" hop")
    assert one.choices[0].message.content == "A"


def test_two_answers(client: OpenAI) -> None:
    strange = [{"role": "user", "content": "zebra"}]  # nothing that it has memorised: the draws differ
    done = client.chat.completions.create(model="faq", messages=strange, temperature=2, max_tokens=30, n=2, seed=1)
    assert [c.index for c in done.choices] == [0, 1]
    assert done.choices[0].message.content != done.choices[1].message.content
    assert done.usage
    assert done.usage.completion_tokens <= 60


def test_two_answers_streamed(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="faq", messages=ASK, temperature=0, max_tokens=19, n=2, seed=1, stream=True
    )
    texts, reasons = ["", ""], []
    for chunk in stream:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons.append((choice.index, choice.finish_reason))
    assert texts == [HOP, HOP]
    assert sorted(reasons) == [(0, "length"), (1, "length")]


def test_logit_bias(client: OpenAI) -> None:
    token = client.post("/../tokenize", body={"prompt": " hop"}, cast_to=dict[str, object])["tokens"]
    assert isinstance(token, list)
    done = client.chat.completions.create(
        model="faq", messages=ASK, temperature=0, max_tokens=3, logit_bias={str(token[-1]): 100}
    )
    assert done.choices[0].message.content == " hop hop hop"


def test_completions(client: OpenAI) -> None:
    done = client.completions.create(model="faq", prompt=["macpipe is", "A hop"], temperature=0, max_tokens=4, n=2)
    assert [c.index for c in done.choices] == [0, 1, 2, 3]
    assert done.choices[0].text == done.choices[1].text
    stream = client.completions.create(
        model="faq", prompt=["macpipe is", "A hop"], temperature=0, max_tokens=4, stream=True
    )
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [done.choices[0].text, done.choices[2].text]


def test_completions_take_tokens_echo_and_logprobs(client: OpenAI) -> None:
    done = client.completions.create(model="faq", prompt=[300, 301], temperature=0, max_tokens=3, echo=True)
    again = client.completions.create(model="faq", prompt=[300, 301], temperature=0, max_tokens=3, logprobs=2)
    assert done.choices[0].text.endswith(again.choices[0].text)
    logprobs = again.choices[0].logprobs
    assert logprobs
    assert logprobs.tokens
    assert "".join(logprobs.tokens) == again.choices[0].text
    assert logprobs.top_logprobs
    unlikely = (
        client.completions.create(
            model="faq", prompt=[300, 301], temperature=0, max_tokens=1, logprobs=2, logit_bias={"302": 100}
        )
        .choices[0]
        .logprobs
    )
    assert unlikely
    assert unlikely.tokens
    assert unlikely.top_logprobs
    for columns in (logprobs, unlikely):
        for token, logprob, top in zip(columns.tokens, columns.token_logprobs, columns.top_logprobs, strict=True):
            assert top[token] == logprob
            assert 2 <= len(top) <= 3
    assert logprobs.text_offset
    assert logprobs.text_offset[0] == 0


def reference_logprobs(prompt: list[int]) -> mx.array:
    """Return the log-probabilities [position, vocabulary] of one forward of mlx-lm."""
    model, _ = load_model(resolve_model("faq"))
    logits: mx.array = model(mx.array([prompt]))[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize(("length", "max_tokens", "n"), [(1, 0, 1), (1, 2, 1), (700, 0, 1), (60, 3, 2)])
def test_an_echoed_prompt_has_its_log_probabilities(client: OpenAI, length: int, max_tokens: int, n: int) -> None:
    prompt = [i * 37 % 300 + 100 for i in range(length)]
    done = client.completions.create(
        model="faq", prompt=prompt, temperature=0, echo=True, n=n, max_tokens=max_tokens, logprobs=2
    )
    want = reference_logprobs(prompt)
    for choice in done.choices:
        found: Any = choice.logprobs
        assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
        values = [want[i, token].item() for i, token in enumerate(prompt[1:])]
        assert found.token_logprobs[1:length] == pytest.approx(values, abs=1e-4)
        for i, top in enumerate(found.top_logprobs[1:length]):
            if not any("\ufffd" in text for text in top):  # incomplete characters have one text
                assert max(top.values()) == pytest.approx(want[i].max().item(), abs=1e-4)
        assert [t[token] for t, token in zip(found.top_logprobs[1:], found.tokens[1:], strict=True)] == list(
            found.token_logprobs[1:]
        )
        assert len(found.tokens) == length + max_tokens
        assert choice.finish_reason == "length"
        offsets = [*found.text_offset, len(choice.text)]
        assert offsets == sorted(offsets)
        whole = [(t, a, b) for t, a, b in zip(found.tokens, offsets, offsets[1:], strict=False) if "\ufffd" not in t]
        assert [choice.text[a:b][-len(token) :] for token, a, b in whole if b > a] == [t for t, a, b in whole if b > a]
    assert done.usage
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (length, n * max_tokens)


def test_an_echoed_prompt_is_streamed_with_its_log_probabilities(client: OpenAI) -> None:
    asked: Any = {"model": "faq", "prompt": list(range(100, 300)), "temperature": 0, "echo": True, "logprobs": 1}
    whole = client.completions.create(**asked, max_tokens=4)
    chunks = list(client.completions.create(**asked, max_tokens=4, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert len(parts) > 5
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [v for part in parts for v in getattr(part, name)] == getattr(whole.choices[0].logprobs, name)


def test_an_end_token_is_the_last_entry_after_an_echoed_prompt(client: OpenAI) -> None:
    """Evaluations drop the last entry as the token that was generated."""
    eos = min(load_tokenizer(resolve_model("faq")).eos)
    done = client.completions.create(
        model="faq", prompt=[300, 301], temperature=0, max_tokens=1, echo=True, logprobs=1, logit_bias={str(eos): 100}
    )
    found: Any = done.choices[0].logprobs
    assert (len(found.token_logprobs), done.choices[0].finish_reason) == (3, "stop")
    assert found.token_logprobs[2] == pytest.approx(0.0, abs=1e-6)
    assert done.usage
    assert done.usage.completion_tokens == 0


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True}, "max_tokens"),
        ({"max_tokens": 0, "logprobs": 1}, "max_tokens"),
        ({"echo": True, "logprobs": 20, "prompt": [[300] * 400] * 8}, "logprobs"),
        ({"echo": True, "logprobs": 20, "prompt": [300] * 400, "n": 8}, "logprobs"),
    ],
)
def test_log_probabilities_of_prompts_have_bounds(client: OpenAI, more: dict[str, Any], param: str) -> None:
    asked: Any = {"model": "faq", "prompt": [300, 301], **more}
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**asked)
    assert refused.value.param == param


def test_responses(client: OpenAI) -> None:
    done = client.responses.create(model="faq", input="What is a hop?", temperature=0)
    assert done.output_text.startswith(HOP)
    assert done.status == "completed"
    with client.responses.stream(model="faq", input="What is a hop?", temperature=0, max_output_tokens=19) as stream:
        *_, last = events = list(stream)
    assert [e.sequence_number for e in events] == list(range(len(events)))  # type: ignore[attr-defined]
    assert last.type == "response.incomplete"
    assert last.response.output_text == HOP
    assert last.response.incomplete_details
    assert last.response.incomplete_details.reason == "max_output_tokens"


def test_responses_take_a_conversation_back(client: OpenAI) -> None:
    first = client.responses.create(model="faq", input="What is a hop?", temperature=0)
    items = [{"role": "user", "content": "What is a hop?"}, *(o.model_dump() for o in first.output)]
    again = client.responses.create(
        model="faq", input=[*items, {"role": "user", "content": "What is macpipe?"}], temperature=0, instructions=" "
    )
    assert again.status == "completed"
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="faq", input="x", previous_response_id=first.id)
    assert caught.value.param == "previous_response_id"


def test_models(client: OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["faq", ALIAS]
    assert client.models.retrieve(ALIAS).id == ALIAS
    assert client.chat.completions.create(model=ALIAS, messages=ASK, max_tokens=1).model == ALIAS
    assert client.chat.completions.create(model="default", messages=ASK, max_tokens=1).model == "faq"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=ASK)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_what_cannot_be_done_is_refused_by_name(client: OpenAI) -> None:
    cases: dict[str, dict[str, object]] = {
        "temperature": {"temperature": 3},
        "made_up": {"extra_body": {"made_up": 1}},
        "functions": {"functions": []},
        "top_logprobs": {"top_logprobs": 2},
        "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        "messages[0].content[0]": {
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        },
    }
    for field, more in cases.items():
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": "faq", "messages": ASK, **more})  # type: ignore[call-overload]
        assert caught.value.param == field


def test_a_prompt_that_is_too_long(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="faq", messages=[{"role": "user", "content": "hop " * 5000}])
    assert caught.value.code == "context_length_exceeded"


def test_a_deadline(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(
            model="faq",
            messages=ASK,
            max_tokens=900,
            extra_body={"ignore_eos": True},
            extra_headers={"x-request-timeout": "0.3"},
        )
    assert caught.value.status_code == 408


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_its_sequence(faq: Served, streamed: bool) -> None:
    async def leave() -> None:
        async with AsyncOpenAI(base_url=faq.openai, api_key=faq.key, max_retries=0) as client:
            asked = asyncio.create_task(
                client.chat.completions.create(
                    model="faq", messages=ASK, max_tokens=1000, extra_body={"ignore_eos": True}, stream=streamed
                )  # type: ignore[call-overload]
            )
            while await asyncio.to_thread(faq.live) != 1:
                await asyncio.sleep(0.02)
            if streamed:
                await (await asked).close()
            else:
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(leave())
    gone = time.monotonic()
    while faq.live():
        assert time.monotonic() - gone < 5, "the sequence is still there"
        time.sleep(0.02)
    print(f"freed within {time.monotonic() - gone:.3f} s")
