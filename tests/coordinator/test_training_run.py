"""A training takes the place of what is served, and what was served is loaded again, however the training ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.coordinator import training_run
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.training_run import ServedModel, TrainingMode, TrainingRequest
from cluster.core.errors import DoesNotFit, InvalidOption, MacpipeError, NoPlan, NotServing, WorkerLost
from cluster.core.plan import LayerRange, ModelRef, ModelShape
from cluster.core.training import TrainingOptions
from cluster.core.training_events import TrainingNotice

FOLLOWER: Any = object()
SERVED = LoadOrder("faq", worker_count=2)
OTHER = ModelShape(ModelRef("smol", "", "e" * 64), 2, (1,) * 2, (1,) * 2, (), (1,), (), 64)
SHAPE = ModelShape(ModelRef("faq", "", "f" * 64), 2, (1,) * 2, (1,) * 2, (), (1,), (), 64)


async def close() -> None:
    """Nothing is open."""


class Mode(TrainingMode):
    """A mode whose runs end with ``ends``, and whose loads of the served model fail with ``failures``, in turn."""

    def __init__(self, ends: BaseException | None = None, *failures: MacpipeError, begun: bool = True) -> None:
        super().__init__(self.load, lambda sentence: self.problems.append(sentence))
        self.ends, self.failures, self.begun = ends, list(failures), begun
        self.read: object = None
        self.served = [ServedModel("default", SERVED)]
        self.order, self.options = SERVED, TrainingOptions.of({"train": True, "num_layers": 2})
        self.loaded = list[str]()
        self.loads, self.problems, self.told = 0, list[str](), list[str]()

    async def load(self, model: ServedModel, follower: object) -> None:
        assert follower is FOLLOWER, "the coordinator's own reporter hears of each load once"
        self.loads += 1
        self.loaded.append(model.name)
        if self.failures:
            raise self.failures.pop(0)

    async def _train(self, *arguments: object) -> None:
        if self.begun:
            self.job = SimpleNamespace()  # type: ignore[assignment]
        if self.ends:
            raise self.ends

    async def train(self) -> None:
        async def read(order: object) -> object:
            self.read = order
            return SimpleNamespace(close=close, found=SimpleNamespace(folder=None), shape=SHAPE)

        async def read_shape(order: LoadOrder) -> ModelShape:
            return SHAPE if order.model.endswith("faq") else OTHER

        reader = SimpleNamespace(read=read, read_shape=read_shape)
        host: Any = SimpleNamespace(report=None, reader=reader, changed=asyncio.Event())
        request = TrainingRequest(self.order, self.options, Path())
        async with self.report_restored(lambda event: self.told.append(_sentence(event))):
            await self.run(host, request, lambda event: None, FOLLOWER, self.served)


def _sentence(event: object) -> str:
    assert isinstance(event, TrainingNotice)
    return event.sentence


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    async def open_data(*arguments: object) -> object:
        return SimpleNamespace(close=close)

    monkeypatch.setattr(training_run.TrainingData, "open", open_data)


@pytest.mark.anyio
async def test_the_client_is_told_that_the_model_is_served_again() -> None:
    mode = Mode()
    await mode.train()
    assert mode.told == ["faq is served again"]
    lost = WorkerLost("worker ada was lost", worker="ada")
    mode = Mode(None, lost, lost)
    await mode.train()
    assert mode.told == ["faq is served again"]
    assert mode.loads == 3, "a Mac that dies meanwhile is a reason for another try"


@pytest.mark.anyio
async def test_a_model_that_is_not_served_again_is_an_error_of_the_training() -> None:
    mode = Mode(None, DoesNotFit("it needs 1 GiB more"))
    with pytest.raises(NotServing, match="faq is not served again after the training: it needs 1 GiB more"):
        await mode.train()
    assert len(mode.problems) == mode.loads == 1


@pytest.mark.anyio
async def test_all_models_are_served_again_but_those_that_cannot_be() -> None:
    served = [ServedModel("first", SERVED), *(ServedModel(name, LoadOrder(name)) for name in ("smol", "mid"))]
    mode = Mode()
    mode.served = served
    await mode.train()
    assert (mode.told, mode.loaded) == (["faq, smol and mid are served again"], ["first", "smol", "mid"])
    mode = Mode(None, DoesNotFit("it needs 1 GiB more"))
    mode.served = served
    with pytest.raises(NotServing, match=r"^smol and mid are served again; faq is not served again after the training"):
        await mode.train()
    assert mode.loaded == ["first", "smol", "mid"]
    assert mode.problem == mode.problems[0] == "faq is not served again after the training: it needs 1 GiB more"


@pytest.mark.anyio
async def test_the_error_of_a_training_comes_before_that_of_the_served_model() -> None:
    mode = Mode(InvalidOption("the rank is wrong"), DoesNotFit("it needs 1 GiB more"))
    with pytest.raises(InvalidOption, match="the rank is wrong"):
        await mode.train()
    assert mode.told == ["faq is not served again after the training: it needs 1 GiB more"]


@pytest.mark.anyio
async def test_nothing_is_loaded_again_if_the_model_was_served_all_the_time() -> None:
    mode = Mode()
    await mode.train()
    mode.begun, mode.ends = False, InvalidOption("there is no such layer")
    with pytest.raises(InvalidOption):
        await mode.train()
    assert (mode.loads, mode.told) == (1, ["faq is served again"])


@pytest.mark.anyio
async def test_a_client_that_leaves_has_the_model_loaded_again() -> None:
    mode = Mode(asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        await mode.train()
    outcome = await mode.wait_restored()
    assert outcome
    assert outcome.served
    assert mode.told == []


@pytest.mark.anyio
async def test_what_no_workers_can_train_is_refused_before_the_data_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def open_data(*arguments: object) -> object:
        raise AssertionError("the data is tokenized")

    monkeypatch.setattr(training_run.TrainingData, "open", open_data)
    mode = Mode()
    mode.order = LoadOrder("faq", worker_count=3)
    with pytest.raises(NoPlan, match="faq has 2 layers and can be cut into 2 stages at most, not 3"):
        await mode.train()
    mode.order = LoadOrder("faq", layers=(LayerRange(0, 1), LayerRange(1, 3)))
    with pytest.raises(NoPlan, match="faq has layers 0-1, but the ranges end at layer 2"):
        await mode.train()
    mode.order, mode.options = SERVED, TrainingOptions.of({"train": True, "num_layers": 3})
    with pytest.raises(InvalidOption, match="the model has only 2 layers"):
        await mode.train()


@pytest.mark.anyio
async def test_a_model_that_is_served_quantized_is_trained_so() -> None:
    for served, bits in ((LoadOrder("/models/faq", quantize=4), 4), (LoadOrder("smol", quantize=4), 0), (SERVED, 0)):
        mode = Mode()
        mode.served = [ServedModel("other", LoadOrder("smol", quantize=8)), ServedModel("default", served)]
        await mode.train()
        assert mode.read == replace(SERVED, quantize=bits)
