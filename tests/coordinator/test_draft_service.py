"""Which draft models fit a target, where one is put, what is refused, and how one comes back after a loss."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import pytest

from cluster.coordinator import draft_service
from cluster.coordinator.draft_assignment import assign_draft, require_matching_draft
from cluster.coordinator.draft_service import (
    DRAFT_OVERDUE_S,
    DRAFT_RETRY_S,
    MOST_DRAFT_RETRY_S,
    MOST_DRAFT_SEARCH_S,
    DraftService,
)
from cluster.coordinator.epoch_numbers import EpochNumbers
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.roster import RosterEntry
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import InvalidOption, NoPlan, StaleEpoch, WorkerLost
from cluster.core.frames import Compute, Frame, Sample
from cluster.core.limits import GIB
from cluster.core.plan import LayerRange, Plan, Speculation
from cluster.core.request import Request, SamplingParams
from cluster.core.worker import WorkerInfo
from cluster.model.checkpoint import BUNDLED
from cluster.model.model_shape import read_shape
from cluster.model.tokenizer import load_tokenizer
from cluster.store.store import FoundModel
from cluster.wire.frame_codec import decode, encode


def model_info(folder: Path) -> ModelInfo:
    unused: Any = None
    shape, found = read_shape(folder, folder.name, None), FoundModel(folder)
    return ModelInfo(shape, load_tokenizer(folder), unused, found, unused)


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


def test_a_mac_that_holds_the_draft_already_is_chosen_before_a_larger_one(target: ModelInfo, draft: ModelInfo) -> None:
    whole = {"layers": LayerRange(0, draft.shape.layers), "fingerprint": draft.shape.model.fingerprint}
    bob = replace(worker("bob"), epoch=3, **whole)  # type: ignore[arg-type]
    assert assign_draft(7, target, draft, [worker("ada", 9 * GIB), bob], []).worker.name == "bob"
    for other in (replace(bob, kv_bits=8), replace(bob, weight_bits=4)):
        assert assign_draft(7, target, draft, [worker("ada", 9 * GIB), other], []).worker.name == "ada"


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
    """Stands for the builder of a draft's epoch and for its ring. It computes nothing."""

    def __init__(self, opened: OpenDraft, arguments: tuple[Any, ...]) -> None:
        *_, self.received, self.lost, _take_term, _claim = arguments
        self._opened = opened
        self.sent: list[Frame] = []
        self.lost_at_once = opened.lost_at_once
        self.closed = False

    async def load(self, plan: Plan, workers: tuple[WorkerInfo, ...]) -> None:
        self.worker, self.epoch = workers[0].name, plan.epoch
        await self._opened.loads()

    async def link(self, *_: Any) -> None: ...

    async def connect(self, _epoch: Any) -> Self:
        if self.lost_at_once:
            self.lost(self.epoch, self.worker, "it is gone")
        return self

    def send(self, message: bytes) -> None:
        self.sent.append(decode(message))

    def close(self) -> None:
        self.closed = True


REQUEST = Request("r", (5, 6, 7), SamplingParams(), 40)


@dataclass
class Control:
    """Stands for the client of the worker at ``address``."""

    address: str
    resets: ClassVar[list[str]] = []

    async def reset(self, why: str, epoch: int) -> None:
        self.resets.append(f"{self.address}: {why}")


class OpenDraft:
    """A draft service over rings that compute nothing, with the engine loop's jobs done at once.

    Its target is on ``ada``, the draft on ``bob``; ``cyd`` is a spare. Jobs of the event loop run within ``run``.
    """

    def __init__(self, target: ModelInfo, draft: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(draft_service, "EpochBuilder", self._build)
        monkeypatch.setattr(draft_service, "unload_workers", self._unload)
        monkeypatch.setattr(draft_service, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.members = [RosterEntry(worker(name)) for name in ("ada", "bob", "cyd")]
        self.now, self.lost_at_once = 100.0, False
        self.rings: list[DraftRing] = []
        self.flushes: list[bool] = []
        self.told: list[str] = []
        self.freed: list[str] = []
        self.gone: set[str] = set()
        self.epochs = EpochNumbers(clock=lambda: 0)
        self.loads: Callable[[], Coroutine[Any, Any, None]] = self._loads
        deps: Any = SimpleNamespace(
            dialer=None,
            weights=None,
            epochs=self.epochs,
            roster=SimpleNamespace(pin_draft=lambda pinned: None, claim=None, take_term=None),
            heartbeat=SimpleNamespace(is_gone=self.gone.__contains__),
            members=lambda: tuple(self.members),
        )
        assignment = assign_draft(self.epochs.next(), target, draft, [worker("ada"), worker("bob")], ["ada"])
        control: Any = Control
        self.service = DraftService(target, assignment, deps, control, self.told.append)

    def _build(self, *arguments: Any) -> DraftRing:
        self.rings.append(DraftRing(self, arguments))
        return self.rings[-1]

    async def _loads(self) -> None: ...

    async def _unload(self, roster: object, epoch: int, addresses: list[str]) -> None:
        self.freed += addresses

    @property
    def ring(self) -> DraftRing:
        return self.rings[-1]

    async def opened(self) -> None:
        await self.service.open(lambda _: None, lambda job: self.flushes.append(job()))

    def open(self) -> None:
        asyncio.run(self.opened())

    async def tend(self, *busy: str) -> None:
        """Tend, and wait for what that began."""
        self.service.tend(busy or ("ada",))
        if self.service._task:
            await asyncio.wait((self.service._task,))

    def guess(self) -> tuple[int, ...]:
        guess = self.service.guesser.propose(REQUEST, REQUEST.prompt, 2)
        return guess.tokens if guess else ()

    def answer(self, ring: DraftRing) -> None:
        """Bring the guesses that a ring was asked for."""
        samples = tuple(Sample(1, 3 + i, 20 + i) for i in range(10))
        ring.received(encode(Frame(ring.epoch, 0, 1, samples=samples)))

    def spoil(self, name: str, problem: str = "it is gone", **more: bool) -> None:
        self.members = [
            RosterEntry(replace(m.info, **more), problem) if m.info.name == name else m  # type: ignore[arg-type]
            for m in self.members
        ]


@pytest.fixture
def opened(target: ModelInfo, draft: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> OpenDraft:
    return OpenDraft(target, draft, monkeypatch)


def test_drafts_that_arrive_are_sent_as_guesses(opened: OpenDraft) -> None:
    assert opened.guess() == ()
    assert opened.service.problem == "the draft model faq-draft is not loaded yet"
    opened.open()
    assert (opened.service.problem, opened.service.worker) == ("", "bob")
    assert opened.guess() == ()
    prefill, decode_ = opened.ring.sent
    assert prefill.step
    assert decode_.step
    epoch = opened.ring.epoch
    assert (prefill.step.compute, prefill.step.tokens, prefill.epoch) == (Compute.PREFILL, ((5, 6),), epoch)
    assert (decode_.step.compute, decode_.step.tokens, decode_.step.drafts) == (Compute.DECODE, ((7,),), 10)
    opened.answer(opened.ring)
    assert opened.flushes == [False, True]
    assert opened.guess() == (20, 21)
    asyncio.run(opened.service.close())
    assert opened.ring.closed


def test_a_lost_draft_is_told_and_guesses_no_more(opened: OpenDraft) -> None:
    opened.open()
    opened.guess()
    opened.ring.lost(opened.ring.epoch, "bob", "it is gone")
    assert opened.service.problem == "the draft model faq-draft does not guess: bob: it is gone"
    assert opened.service.worker == ""
    assert opened.ring.closed
    sent = len(opened.ring.sent)
    assert opened.guess() == ()
    opened.service.guesser.forget(REQUEST)
    assert len(opened.ring.sent) == sent


def test_a_draft_that_is_lost_while_it_is_connected_stays_lost(opened: OpenDraft) -> None:
    opened.lost_at_once = True
    opened.open()
    assert opened.service.worker == ""
    assert opened.guess() == ()
    assert not opened.ring.sent
    asyncio.run(opened.service.close())
    assert opened.ring.closed


def test_an_invalid_reply_of_a_draft_ends_it_alone(opened: OpenDraft) -> None:
    opened.open()
    opened.guess()
    opened.ring.received(b"no frame")
    assert "the draft model faq-draft does not guess" in opened.service.problem
    assert opened.guess() == ()


def test_a_lost_draft_comes_back_on_another_mac_and_begins_anew(opened: OpenDraft) -> None:
    async def play() -> None:
        await opened.opened()
        await opened.tend()
        assert len(opened.rings) == 1, "nothing is to be done"
        opened.guess()
        first = opened.ring
        first.lost(first.epoch, "bob", "it is gone")
        opened.spoil("bob")
        await opened.tend()
        assert (opened.service.worker, opened.service.problem, opened.freed) == ("cyd", "", [])
        assert opened.ring.epoch > first.epoch
        opened.answer(first)
        assert opened.guess() == (), "what the lost ring still says is of no use"
        assert [frame.number for frame in opened.ring.sent] == [0, 1]
        opened.answer(opened.ring)
        assert opened.guess() == (20, 21)
        first.lost(first.epoch, "bob", "it is gone")
        assert opened.service.worker == "cyd"

    asyncio.run(play())
    lost, back = opened.told
    assert "does not guess: bob: it is gone" in lost
    assert back == "the draft model faq-draft guesses again on worker cyd"


def test_a_draft_whose_mac_takes_layers_goes_elsewhere_or_waits_for_a_mac(opened: OpenDraft) -> None:
    async def play() -> None:
        await opened.opened()
        await opened.tend("ada", "bob")
        assert (opened.service.worker, opened.freed) == ("cyd", []), "bob holds layers now"
        opened.spoil("ada")
        opened.now += DRAFT_RETRY_S
        await opened.tend("bob", "cyd")
        assert opened.service.worker == ""
        assert "no Mac is left for the draft model faq-draft" in opened.service.problem
        opened.spoil("ada", "")
        await opened.tend("bob", "cyd")
        assert opened.service.worker == "", "it was tried a moment ago"
        opened.now += DRAFT_RETRY_S
        await opened.tend("bob", "cyd")
        assert opened.service.worker == "ada"

    asyncio.run(play())


def test_a_draft_leaves_a_mac_that_drains_and_frees_it(opened: OpenDraft) -> None:
    async def play() -> None:
        await opened.opened()
        opened.spoil("bob", "", draining=True)
        await opened.tend()
        assert (opened.service.worker, opened.freed) == ("cyd", ["bob:1"])
        await opened.service.leave("ada")
        assert opened.service.worker == "cyd"
        opened.spoil("cyd", "", draining=True)
        await opened.service.leave("cyd")
        assert (opened.service.worker, opened.freed) == ("", ["bob:1", "cyd:1"])
        assert opened.service.problem == "the draft model faq-draft does not guess: worker cyd is being drained"
        await opened.tend("ada")
        assert opened.service.worker == ""

    asyncio.run(play())


def test_an_engine_that_hangs_is_reset_and_the_draft_loaded_again(
    opened: OpenDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
        monkeypatch.setattr(Control, "resets", [])
        await opened.opened()
        opened.now += DRAFT_OVERDUE_S + 1
        await opened.tend()
        assert opened.service.worker == "bob", "nothing was asked of it"
        opened.guess()
        opened.now += DRAFT_OVERDUE_S - 1
        opened.ring.received(encode(Frame(opened.ring.epoch, 0, 0)))
        opened.now += DRAFT_OVERDUE_S
        await opened.tend()
        assert opened.service.worker == "bob", "it is slow"
        opened.now += 1
        await opened.tend()
        assert opened.service.worker == ""
        why = f"the engine of worker bob has answered no frame for {DRAFT_OVERDUE_S + 1:.0f} s"
        assert Control.resets == [f"bob:1: {why}"]
        assert why in opened.service.problem
        await opened.tend()
        assert opened.service.worker
        opened.now += 2 * DRAFT_OVERDUE_S
        await opened.tend()
        assert len(Control.resets) == 1

    asyncio.run(play())


def test_a_draft_that_cannot_be_loaded_is_tried_again_less_and_less_often(opened: OpenDraft) -> None:
    async def play() -> None:
        await opened.opened()
        opened.ring.lost(opened.ring.epoch, "bob", "it is gone")

        async def fail() -> None:
            if len(opened.rings) == 2:
                raise StaleEpoch("an old epoch", epoch=str(opened.epochs.last + 50))
            raise WorkerLost("worker bob ended")

        opened.loads = fail
        waits, last = list[float](), opened.now
        while len(opened.rings) < 9:
            before = len(opened.rings)
            await opened.tend()
            if len(opened.rings) > before:
                waits.append(opened.now - last)
                last = opened.now
            opened.now += 1.0
        assert "worker bob ended" in opened.service.problem
        assert waits == [0.0, *(min(DRAFT_RETRY_S * 2**i, MOST_DRAFT_RETRY_S) for i in range(7))]
        assert opened.rings[2].epoch > opened.rings[1].epoch + 50, "what the refusal named was learnt"

    asyncio.run(play())


def test_a_draft_without_a_mac_is_logged_once_and_looks_for_one_less_and_less_often(
    opened: OpenDraft, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looked: list[float] = []

    def assign(*given: Any) -> Any:
        looked.append(opened.now)
        return assign_draft(*given)

    async def play() -> None:
        await opened.opened()
        monkeypatch.setattr(draft_service, "assign_draft", assign)
        opened.ring.lost(opened.ring.epoch, "bob", "it is gone")
        while len(looked) < 7:
            await opened.tend("ada", "bob", "cyd")
            opened.now += 1.0
        waits = [after - before for before, after in pairwise(looked)]
        assert waits == [min(DRAFT_RETRY_S * 2**i, MOST_DRAFT_SEARCH_S) for i in range(6)]
        opened.now += MOST_DRAFT_SEARCH_S
        await opened.tend("ada", "bob")
        assert opened.service.worker == "cyd"
        opened.ring.lost(opened.ring.epoch, "cyd", "it is gone")
        opened.now += 2 * DRAFT_RETRY_S
        del looked[:]
        while len(looked) < 2:
            await opened.tend("ada", "bob", "cyd")
            opened.now += 1.0
        assert looked[1] - looked[0] == DRAFT_RETRY_S, "the first check after a loss is not late"

    with caplog.at_level("INFO", draft_service.__name__):
        asyncio.run(play())
    said = [record.getMessage() for record in caplog.records]
    assert len([one for one in said if "no Mac is left for the draft model faq-draft" in one]) == 2, said


@pytest.mark.parametrize("end", ["gone", "layers", "close"])
def test_a_load_of_the_draft_ends_if_its_mac_is_gone_or_layers_come_first(opened: OpenDraft, end: str) -> None:
    async def play() -> None:
        await opened.opened()
        opened.ring.lost(opened.ring.epoch, "bob", "it is gone")
        began, never = asyncio.Event(), asyncio.Event()

        async def hang() -> None:
            began.set()
            await never.wait()

        opened.loads = hang
        opened.service.tend(("ada",))
        task = opened.service._task
        assert task
        await began.wait()
        opened.service.tend(("ada",))
        assert len(opened.rings) == 2, "a load is under way"
        if end == "gone":
            opened.gone.add(opened.ring.worker)
            opened.service.tend(("ada",))
        elif end == "layers":
            opened.service.stop_loading()
        else:
            await opened.service.close()
        await asyncio.wait((task,))
        assert task.cancelled()
        assert opened.service.worker == ""

    asyncio.run(play())
