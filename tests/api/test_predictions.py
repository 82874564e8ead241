"""Predictions of an answer: which are used, which are ignored and told, and which are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.api import request_validation
from cluster.api.requests import Caller, ChatParams, Conversation, GenerateParams
from cluster.core.errors import InvalidRequest
from cluster.core.limits import MAX_BYTES_PER_TOKEN
from cluster.core.request import ChatMessage, ChatOptions
from fuzz.targets.asked import served

pytestmark = pytest.mark.anyio
CALLER = Caller("client", None)
TURN = Conversation([ChatMessage("user", "hello")], ChatOptions())


async def test_a_prediction_is_tokenized_as_a_part_of_the_answer() -> None:
    model = served()
    expected = model.tokenizer.encode("a file", add_special_tokens=False)
    for prepared in (
        await request_validation.chat_request(ChatParams(conversation=TURN, prediction="a file"), 0, model, CALLER),
        await request_validation.generate_request(GenerateParams(prompt="x", prediction="a file"), 0, model, CALLER),
    ):
        assert prepared.request.prediction == expected
        assert prepared.request.speculate
        assert prepared.ignored == ()


@pytest.mark.parametrize(("speculates", "speculate", "why"), [(False, True, "server"), (True, False, "speculate is")])
async def test_one_without_effect_is_ignored_or_refused(speculates: bool, speculate: bool, why: str) -> None:
    params = ChatParams(conversation=TURN, prediction="a file", speculate=speculate)
    model = replace(served(), speculates=speculates)
    prepared = await request_validation.chat_request(params, 0, model, CALLER)
    assert (prepared.request.prediction, prepared.ignored) == ((), ("prediction",))
    assert prepared.request.speculate is speculate
    with pytest.raises(InvalidRequest, match=f"no effect, since .*{why}") as caught:
        await request_validation.chat_request(params, 0, model, replace(CALLER, strict=True))
    assert caught.value.field == "prediction"


async def test_one_that_is_longer_than_any_answer_is_refused() -> None:
    model = served()
    model = replace(model, shape=replace(model.shape, max_context=16))
    for text in ("a b c d e f g h i j k l m n o p q r", "a" * (16 * MAX_BYTES_PER_TOKEN + 1)):
        with pytest.raises(InvalidRequest, match=r"the prediction (has|is longer)") as caught:
            await request_validation.generate_request(GenerateParams(prompt="x", prediction=text), 0, model, CALLER)
        assert caught.value.field == "prediction"
