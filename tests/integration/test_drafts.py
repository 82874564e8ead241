"""A draft model on a Mac of its own: it guesses and changes no token."""

from __future__ import annotations

import time

import pytest

from cluster.client import Client, Speculation
from cluster.core.errors import InvalidOption, MacpipeError
from integration.daemons import serve_model

pytestmark = [pytest.mark.xdist_group("session-cluster"), pytest.mark.timeout(180)]

QUESTION = [("user", "What is a hop?")]
MOVE_S = 60.0
TRIES = 400
"""The policy may hold guesses back while the machine is loaded. One try is enough otherwise."""


def test_a_draft_guesses_and_changes_no_token(client: Client) -> None:
    serve_model(client, "faq", 2)
    options = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 7}]
    plain = [client.chat(QUESTION, max_tokens=48, ignore_eos=True, **one).tokens for one in options]  # type: ignore[arg-type]
    serve_model(client, "faq", 2, speculate=Speculation.DRAFT, draft="faq-draft")
    sources: set[str] = set()
    for _ in range(TRIES):
        answers = [client.chat(QUESTION, max_tokens=48, ignore_eos=True, **one) for one in options]  # type: ignore[arg-type]
        assert [answer.tokens for answer in answers] == plain
        sources |= {event.guess for answer in answers for event in answer.events if event.guess}
        if sources:
            break
    assert sources == {"draft"}
    (counts,) = client.cluster().guesses
    assert counts.source == "draft"
    assert counts.guessed >= counts.accepted > 0
    assert client.cluster().warnings == ()
    drained = client.cluster().draft_worker
    client.drain(drained)
    try:
        deadline = time.monotonic() + MOVE_S
        while (state := client.cluster()).draft_worker in ("", drained):
            assert time.monotonic() < deadline, state
            time.sleep(0.05)
        assert state.draft_worker not in [stage.worker for stage in state.stages]
        assert client.chat(QUESTION, max_tokens=48, ignore_eos=True, temperature=0.0).tokens == plain[0]
    finally:
        client.drain(drained, undo=True)


def test_a_draft_that_does_not_fit_is_refused_and_the_model_goes_on(client: Client) -> None:
    serve_model(client, "faq", 2)
    refused: list[type[MacpipeError]] = []
    for options in (
        {"workers": 2, "speculate": "draft"},
        {"workers": 2, "draft": "faq-draft"},
    ):
        with pytest.raises(MacpipeError) as caught:
            client.load("faq", **options).wait()  # type: ignore[arg-type]
        refused.append(type(caught.value))
    assert refused == [InvalidOption, InvalidOption]
    assert client.chat(QUESTION, max_tokens=4).tokens
