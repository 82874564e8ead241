"""The requests of lm-eval's ``local-completions`` for a multiple-choice task, scored as lm-eval scores them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import httpx
import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from cluster.model.checkpoint import resolve_model
from cluster.model.tokenizer import Tokenizer, load_tokenizer
from compat.conftest import Served

pytestmark = [pytest.mark.xdist_group("compat"), pytest.mark.timeout(60)]

BATCH = 4
TASK = (
    ("A hop is the journey of an", (" activation from one stage", " apple", " stage from one layer"), 0),
    ("A lane is a batch of", (" bread", " sequences that decode together", " Macs"), 1),
    ("An activation travels from one stage to the", (" sea", " first", " next"), 2),
    ("The workers are found over", (" Zeroconf", " night", " the radio"), 0),
)
"""Questions, their choices, and the right one."""


class Score(NamedTuple):
    """A choice's log-likelihood, and whether it is what greedy decoding would answer."""

    logprob: float
    greedy: bool


class Scored(NamedTuple):
    """The token ids of a question and one of its choices; the question has the first ``context`` of them."""

    ids: list[int]
    context: int


def _pairs(tokenizer: Tokenizer) -> Iterator[Scored]:
    for question, choices, _ in TASK:
        context = len(tokenizer.encode(question))
        for choice in choices:
            yield Scored(list(tokenizer.encode(question + choice)), context)


def _served_scores(served: Served, pairs: Sequence[Scored]) -> Iterator[Score]:
    """Ask for several pairs at once. The entries after the prompt's are of the token that is generated."""
    body = {"model": "default", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        asked = body | {"prompt": [pair.ids for pair in batch]}
        reply = httpx.post(f"{served.openai}/completions", json=asked, headers=served.bearer, timeout=60)
        assert reply.status_code == 200, reply.text
        choices: list[Any] = sorted(reply.json()["choices"], key=lambda choice: choice["index"])
        for pair, choice in zip(batch, choices, strict=True):
            found = choice["logprobs"]
            values, tops = (found[name][pair.context : -1] for name in ("token_logprobs", "top_logprobs"))
            assert len(values) == len(pair.ids) - pair.context
            greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
            yield Score(sum(values), greedy)


def _mlx_scores(pairs: Sequence[Scored]) -> Iterator[Score]:
    """Score the pairs with one forward of mlx-lm each, as its own ``evaluate`` does."""
    model, _ = load_model(resolve_model("faq"))
    for ids, context in pairs:
        logits: mx.array = model(mx.array([ids[:-1]]))[0].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        rows = [(logprobs[at - 1], ids[at]) for at in range(context, len(ids))]
        total = sum(row[token].item() for row, token in rows)
        yield Score(total, all(mx.argmax(row).item() == token for row, token in rows))


def _chosen(scores: Sequence[Score]) -> list[int]:
    """Return the most likely choice of each question."""
    left = iter(scores)
    return [max(range(len(choices)), key=[next(left).logprob for _ in choices].__getitem__) for _, choices, _ in TASK]


def test_a_multiple_choice_task_has_the_score_of_mlx_lm(faq: Served) -> None:
    pairs = list(_pairs(load_tokenizer(resolve_model("faq"))))
    served, reference = list(_served_scores(faq, pairs)), list(_mlx_scores(pairs))
    assert [score.logprob for score in served] == pytest.approx([score.logprob for score in reference], abs=1e-3)
    assert [score.greedy for score in served] == [score.greedy for score in reference]
    assert any(score.greedy for score in served)
    assert _chosen(served) == _chosen(reference)
    right = sum(chosen == answer for chosen, (_, _, answer) in zip(_chosen(served), TASK, strict=True))
    assert right / len(TASK) > 0.5
