"""Drafts: one step for several tokens, drawn with a target's noise, and the guesser that asks for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from cluster.core.errors import BadFrame
from cluster.core.frames import Compute, Frame, Join, Leave, Step, Trim
from cluster.core.plan import ModelShape
from cluster.core.request import Request, SamplingParams
from cluster.model.sampler import Sampler
from cluster.scheduler.draft_guesser import DraftGuesser, DraftModel
from cluster.scheduler.guessing import GuessSource
from cluster.wire.frame_codec import decode, encode
from model.ring import PROMPT, Ring, tokens

VOCABULARY = 320
HOT = SamplingParams(temperature=0.8, top_p=0.9, seed=5, presence_penalty=0.5)


@pytest.fixture
def ring(checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape]) -> Ring:
    return Ring(shape("llama"), checkpoint("llama"), 1)


@pytest.mark.parametrize("sampling", [SamplingParams(), HOT], ids=["greedy", "hot"])
def test_a_step_drafts_what_single_steps_sample(ring: Ring, sampling: SamplingParams) -> None:
    expected = tokens(ring.answer(sampling, 9))
    ring.send(Join(1, len(PROMPT), sampling))
    ring.prefill(1, PROMPT[:-1])
    reply = ring.send(step=Step(Compute.DECODE, (1,), ((PROMPT[-1],),), drafts=5))
    assert tokens(reply.samples) == expected[:5]
    assert [s.position for s in reply.samples] == list(range(len(PROMPT), len(PROMPT) + 5))
    reply = ring.send(step=Step(Compute.DECODE, (1,), ((expected[4],),), drafts=4))
    assert tokens(reply.samples) == expected[5:]
    reply = ring.send(Trim(1, len(PROMPT) + 2), step=Step(Compute.DECODE, (1,), ((expected[2],),), drafts=3))
    assert tokens(reply.samples) == expected[3:6]
    ring.send(Leave(1))


def test_a_draft_ends_where_the_context_ends(ring: Ring) -> None:
    ring.send(Join(1, len(PROMPT), SamplingParams()))
    context = ring.stages[0].spec.max_context
    fill = tuple(i % 250 for i in range(context - 2))
    for first in range(0, len(fill), 256):
        ring.prefill(1, fill[first : first + 256])
    reply = ring.send(step=Step(Compute.DECODE, (1,), ((7,),), drafts=9))
    assert len(reply.samples) == 2


def test_only_a_whole_model_drafts_and_one_sequence(
    ring: Ring, checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape]
) -> None:
    two = Ring(shape("llama"), checkpoint("llama"), 2)
    two.send(Join(1, 1, SamplingParams()))
    with pytest.raises(BadFrame, match="holds the whole model"):
        two.send_alone(step=Step(Compute.DECODE, (1,), ((7,),), drafts=2))
    ring.send(Join(1, 1, SamplingParams()), Join(2, 1, SamplingParams()))
    with pytest.raises(BadFrame, match="one sequence"):
        ring.send_alone(step=Step(Compute.DECODE, (1, 2), ((7,), (8,)), drafts=2))


def test_a_draft_draws_with_the_noise_of_its_target() -> None:
    """The first tokens of both vocabularies are the same: where their logits agree, so do their draws."""
    logits = mx.random.normal((1, 300), key=mx.array([4, 2], dtype=mx.uint32)) * 2
    params = SamplingParams(temperature=1.0, seed=3)
    narrow = mx.where(mx.arange(300) < 200, logits, -mx.inf)
    for at in range(50):
        target = Sampler(params, 0, 300).pick(narrow, [], at).token.item()
        assert Sampler(params, 0, 200, noise=300).pick(logits[:, :200], [], at).token.item() == target
        assert Sampler(params, 0, 400, noise=300).pick(mx.pad(logits, ((0, 0), (0, 100))), [], at).token.item() == (
            Sampler(params, 0, 300).pick(logits, [], at).token.item()
        )


class Drafting:
    """A guesser whose draft model is the ring's, so that it is always right. Its frames are computed on demand."""

    def __init__(self, ring: Ring, capacity: int = 1000) -> None:
        self.stage = ring.stages[0]
        model = DraftModel(1, VOCABULARY, VOCABULARY, 512, capacity, 16)
        self.guesser = DraftGuesser(model, self._send)
        self.guesser.open(model)
        self.waiting: list[Frame] = []
        self.decodes = 0

    def _send(self, frame: Frame) -> None:
        self.waiting.append(decode(encode(frame)))
        self.decodes += frame.step is not None and frame.step.compute is Compute.DECODE

    def compute(self) -> None:
        """Compute the frames that wait, and deliver their replies."""
        waiting, self.waiting = self.waiting, []
        for frame in waiting:
            self.guesser.receive(decode(encode(self.stage.step(frame))))

    def guess(self, request: Request, known: list[int], count: int) -> tuple[int, ...]:
        if (guess := self.guesser.propose(request, known, count)) is None:
            self.compute()
            guess = self.guesser.propose(request, known, count)
        if guess is None:  # what was asked for before was for other tokens
            self.compute()
            guess = self.guesser.propose(request, known, count)
        assert guess
        assert guess.source is GuessSource.DRAFT
        return guess.tokens


def ask(sampling: SamplingParams, name: str = "r") -> Request:
    return Request(name, PROMPT, sampling, 40)


@pytest.mark.parametrize("sampling", [SamplingParams(), HOT], ids=["greedy", "hot"])
def test_drafts_are_ahead_and_a_model_guesses_itself(ring: Ring, sampling: SamplingParams) -> None:
    expected = tokens(ring.answer(sampling, 40))
    drafting, request = Drafting(ring), ask(sampling)
    known = list(PROMPT)
    for token in expected[:-2]:
        guessed = drafting.guess(request, known, 2)
        at = len(known) - len(PROMPT)
        assert guessed == tuple(expected[at : at + len(guessed)])
        known.append(token)
        drafting.compute()
    assert drafting.decodes <= 40 // 4
    drafting.guesser.forget(request)
    drafting.compute()
    assert drafting.stage.sequences == 0


def test_a_wrong_draft_is_taken_back(
    ring: Ring, checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape]
) -> None:
    """Whatever came instead, and however far the draft was ahead, the next drafts are those of a fresh start."""
    drafting, request = Drafting(ring), ask(HOT)
    fresh = Drafting(Ring(shape("llama"), checkpoint("llama"), 1))
    known = list(PROMPT)
    for token in (3, 14, 15, 92, 65):
        drafting.guess(request, known, 1)
        known.append(token)
        guessed = drafting.guess(request, known, 3)
        anew = ask(HOT, f"fresh-{token}")
        assert fresh.guess(anew, known, 3)[: len(guessed)] == guessed
        fresh.guesser.forget(anew)
        drafting.compute()


def test_guesses_in_flight_that_were_wrong_are_not_continued(ring: Ring) -> None:
    drafting, request = Drafting(ring), ask(SamplingParams())
    first = drafting.guess(request, list(PROMPT), 4)
    drafting.guess(request, [*PROMPT, *first], 2)
    other = [*PROMPT, (first[0] + 1) % 250]
    assert drafting.guesser.propose(request, other, 2) is None
    assert drafting.guess(request, other, 2)


def test_what_has_no_room_gets_no_drafts(ring: Ring) -> None:
    drafting = Drafting(ring, capacity=150)
    first, second = ask(SamplingParams()), ask(SamplingParams(), "second")
    drafting.guess(first, list(PROMPT), 1)
    drafting.compute()
    assert drafting.guesser.propose(second, list(PROMPT), 1) is None
    assert not drafting.waiting
    drafting.guesser.forget(first)
    assert drafting.guess(second, list(PROMPT), 1)
    drafting.guesser.close()
    assert drafting.guesser.propose(second, list(PROMPT), 1) is None


def test_a_reply_for_other_positions_is_refused(ring: Ring) -> None:
    drafting, request = Drafting(ring), ask(SamplingParams())
    assert drafting.guesser.propose(request, list(PROMPT), 1) is None
    replies = [drafting.stage.step(frame) for frame in drafting.waiting]
    wrong = replace(replies[-1], samples=replies[-1].samples[1:])
    with pytest.raises(BadFrame, match="its positions are not those requested"):
        drafting.guesser.receive(wrong)
