"""Guesses over real daemons: they change no token, and each surface tells of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.client import Client, Speculation
from integration.daemons import serve_model
from integration.reference import greedy

pytestmark = [pytest.mark.xdist_group("session-cluster"), pytest.mark.timeout(180)]

PROMPT = [(i * 37 + 11) % 250 for i in range(40)]
TOKENS = 40
TRIES = 50
"""The first answer gives the second one guesses. The policy may hold them back while the machine is loaded."""


def test_guesses_change_no_token_and_are_told(client: Client, llama: Path) -> None:
    expected = greedy(llama, PROMPT, TOKENS)
    serve_model(client, llama, 2, speculate=Speculation.NGRAM)
    guessed: list[str] = []
    for _ in range(TRIES):
        answer = client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True)
        assert answer.tokens == expected
        if guessed := [event.guess for event in answer.events if event.guess]:
            break
    assert set(guessed) == {"ngram"}
    state = client.cluster()
    assert state.speculation is Speculation.NGRAM
    (counts,) = state.guesses
    assert counts.source == "ngram"
    assert counts.guessed >= counts.accepted >= len(guessed)
    plain = client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True, speculate=False)
    assert plain.tokens == expected
    assert not any(event.guess for event in plain.events)


def test_without_speculation_nothing_is_guessed(client: Client, llama: Path) -> None:
    serve_model(client, llama, 2)
    for _ in range(2):
        answer = client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True, prediction="hello")
        assert not any(event.guess for event in answer.events)
    assert (client.cluster().speculation, client.cluster().guesses) == (Speculation.OFF, ())
