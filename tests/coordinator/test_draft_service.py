"""Which draft models fit a target, where one is put, and what is refused."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest

from cluster.coordinator import draft_service
from cluster.coordinator.draft_service import DraftService, assign_draft, require_matching_draft
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import InvalidOption, NoPlan
from cluster.core.frames import Compute, Frame, Sample
from cluster.core.limits import GIB
from cluster.core.plan import LayerRange, Speculation
from cluster.core.request import Request, SamplingParams
from cluster.core.worker import WorkerInfo
from cluster.model.checkpoint import BUNDLED
from cluster.model.model_shape import read_shape
from cluster.model.tokenizer import load_tokenizer
from cluster.wire.frame_codec import decode, encode


def model_info(folder: Path) -> ModelInfo:
    unused: Any = None
    return ModelInfo(read_shape(folder, folder.name, None), load_tokenizer(folder), unused, unused, unused)


@pytest.fixture(scope="module")
def target() -> ModelInfo:
    return model_info(BUNDLED / "faq")


@pytest.fixture(scope="module")
def draft() -> ModelInfo:
    return model_info(BUNDLED / "faq-draft")


def worker(name: str, memory: int = GIB) -> WorkerInfo:
    return WorkerInfo(f"id-{name}", name, "1", f"{name}:1", f"{name}:2", "", "cpu", "", 0, memory, cluster="c")


def changed(folder: Path, swap: bool) -> ModelInfo:
    """The bundled draft with two tokens swapped, or with one more."""
    shutil.copytree(BUNDLED / "faq-draft", folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second, *_ = (token for token in vocabulary if len(token) > 3)
    if swap:
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    else:
        vocabulary["another"] = 1 + max(vocabulary.values())
    file.write_text(json.dumps(content))
    return model_info(folder)


def test_the_bundled_draft_fits_the_bundled_model(target: ModelInfo, draft: ModelInfo) -> None:
    require_matching_draft(target, draft)


def test_another_vocabulary_is_refused(target: ModelInfo, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match=r"has 769 tokens, but faq has 768: .* the same vocabulary") as caught:
        require_matching_draft(target, changed(tmp_path / "larger", swap=False))
    assert caught.value.field == "draft"


def test_another_tokenizer_of_the_same_size_is_refused(target: ModelInfo, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="as many tokens as faq, but others") as caught:
        require_matching_draft(target, changed(tmp_path / "other", swap=True))
    assert caught.value.field == "draft"


def test_a_draft_that_cannot_be_trimmed_is_refused(target: ModelInfo, draft: ModelInfo) -> None:
    with pytest.raises(InvalidOption, match="cannot be trimmed"):
        require_matching_draft(target, replace(draft, shape=replace(draft.shape, trimmable=False)))


def test_a_draft_is_put_whole_on_a_mac_without_layers(target: ModelInfo, draft: ModelInfo) -> None:
    chosen = assign_draft(7, target, draft, [worker("ada"), worker("bob"), worker("cyd")], ["ada", "cyd"])
    assert (chosen.worker.name, chosen.plan.epoch, chosen.target_vocabulary) == ("bob", 7, target.shape.vocabulary)
    assert [stage.layers for stage in chosen.plan.stages] == [LayerRange(0, draft.shape.layers)]


def test_a_draft_without_room_is_refused(target: ModelInfo, draft: ModelInfo) -> None:
    with pytest.raises(NoPlan, match="no Mac is left for the draft model faq-draft"):
        assign_draft(7, target, draft, [worker("ada")], ["ada"])
    with pytest.raises(NoPlan, match="the draft model faq-draft does not fit a Mac that is left: "):
        assign_draft(7, target, draft, [worker("ada"), worker("bob", 1000)], ["ada"])


@pytest.mark.parametrize(
    ("speculation", "draft", "field"),
    [(Speculation.DRAFT, "", "draft"), (Speculation.OFF, "d", "speculate"), (Speculation.NGRAM, "d", "speculate")],
)
def test_options_that_contradict_each_other_are_refused(speculation: Speculation, draft: str, field: str) -> None:
    with pytest.raises(InvalidOption, match="needs") as caught:
        LoadOrder("m", speculation=speculation, draft=draft).check()
    assert caught.value.field == field


def test_options_that_go_together() -> None:
    for speculation, draft in ((Speculation.OFF, ""), (Speculation.AUTO, ""), (Speculation.AUTO, "d")):
        LoadOrder("m", speculation=speculation, draft=draft).check()
    LoadOrder("m", speculation=Speculation.DRAFT, draft="d").check()


class DraftRing:
    """Stands for the builder of the draft's epoch and for its ring. It computes nothing."""

    def __init__(self, *arguments: Any) -> None:
        *_, self.received, self.lost = arguments
        self.sent: list[Frame] = []
        self.lost_at_once = self.closed = False

    async def load(self, *_: Any) -> None: ...

    async def link(self, *_: Any) -> None: ...

    async def connect(self, _epoch: Any) -> Self:
        if self.lost_at_once:
            self.lost(7, "bob", "it is gone")
        return self

    def send(self, message: bytes) -> None:
        self.sent.append(decode(message))

    def close(self) -> None:
        self.closed = True


REQUEST = Request("r", (5, 6, 7), SamplingParams(), 40)


class OpenDraft:
    """A draft service over a ring that computes nothing, with the engine loop's jobs done at once."""

    def __init__(self, target: ModelInfo, draft: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(draft_service, "EpochBuilder", self._build)
        unused: Any = None
        assignment = assign_draft(7, target, draft, [worker("ada"), worker("bob")], ["ada"])
        self.service = DraftService(assignment, unused, unused, unused)
        self.flushes: list[bool] = []
        self.lost_at_once = False

    def _build(self, *arguments: Any) -> DraftRing:
        self.ring = DraftRing(*arguments)
        self.ring.lost_at_once = self.lost_at_once
        return self.ring

    def open(self) -> None:
        asyncio.run(self.service.open(lambda _: None, lambda job: self.flushes.append(job())))

    def guess(self) -> tuple[int, ...]:
        guess = self.service.guesser.propose(REQUEST, REQUEST.prompt, 2)
        return guess.tokens if guess else ()


@pytest.fixture
def opened(target: ModelInfo, draft: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> OpenDraft:
    return OpenDraft(target, draft, monkeypatch)


def test_drafts_that_arrive_are_sent_as_guesses(opened: OpenDraft) -> None:
    assert opened.guess() == ()
    assert opened.service.problem == "the draft model is not loaded yet"
    opened.open()
    assert opened.service.problem == ""
    assert opened.guess() == ()
    prefill, decode_ = opened.ring.sent
    assert prefill.step
    assert decode_.step
    assert (prefill.step.compute, prefill.step.tokens, prefill.epoch) == (Compute.PREFILL, ((5, 6),), 7)
    assert (decode_.step.compute, decode_.step.tokens, decode_.step.drafts) == (Compute.DECODE, ((7,),), 10)
    samples = tuple(Sample(1, 3 + i, 20 + i) for i in range(10))
    opened.ring.received(encode(Frame(7, 0, 1, samples=samples)))
    assert opened.flushes == [False, True]
    assert opened.guess() == (20, 21)
    opened.service.close()
    assert opened.ring.closed


def test_a_lost_draft_is_told_and_guesses_no_more(opened: OpenDraft) -> None:
    opened.open()
    opened.guess()
    opened.ring.lost(7, "bob", "it is gone")
    assert opened.service.problem == "the draft model is lost (bob: it is gone); load the model again to have it back"
    assert opened.ring.closed
    sent = len(opened.ring.sent)
    assert opened.guess() == ()
    opened.service.guesser.forget(REQUEST)
    assert len(opened.ring.sent) == sent


def test_a_draft_that_is_lost_while_it_is_connected_stays_lost(opened: OpenDraft) -> None:
    opened.lost_at_once = True
    opened.open()
    assert "bob: it is gone" in opened.service.problem
    assert opened.guess() == ()
    assert not opened.ring.sent
    opened.service.close()
    assert opened.ring.closed


def test_an_invalid_reply_of_a_draft_ends_it_alone(opened: OpenDraft) -> None:
    opened.open()
    opened.guess()
    opened.ring.received(b"no frame")
    assert "the draft model is lost" in opened.service.problem
    assert opened.guess() == ()
