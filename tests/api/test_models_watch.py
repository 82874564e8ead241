"""Pinned models that cannot be loaded at first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.api.models_watch import ModelsWatch
from cluster.coordinator.model_catalog import ModelCatalog
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.errors import BadCheckpoint, DoesNotFit, LoadEnded, MacpipeError
from cluster.core.load_limits import FAILED_RETRY_S

pytestmark = pytest.mark.anyio


class PinnedModel:
    """A coordinator with one model, pinned or expected, which is not loaded while there is an error."""

    def __init__(self, *, pin: bool = True) -> None:
        self.expected = set() if pin else {"big"}
        self.now, self.tries, self.loaded = 100.0, 0, False
        self.error: MacpipeError | None = None
        self.told = list[str]()
        coordinator: Any = SimpleNamespace(
            catalog=ModelCatalog([ModelEntry("big", LoadOrder("org/big"), pin=pin)]),
            deployments=self,
            inherited=SimpleNamespace(heirs=()),
        )
        report: Any = SimpleNamespace(problem=self.told.append)
        self.watch = ModelsWatch(coordinator, None, report, self, lambda: self.now)  # type: ignore[arg-type]

    def is_expected(self, name: str) -> bool:
        return name in self.expected

    def end_expecting(self, name: str) -> None:
        self.expected.discard(name)

    def get(self, name: str) -> Any:
        return SimpleNamespace(model_info="big" if self.loaded else None)

    async def load(self, order: LoadOrder, *, name: str) -> None:
        self.tries += 1
        if self.error:
            raise self.error
        self.loaded = True


async def test_a_pinned_model_that_failed_is_loaded_later_and_people_hear_of_each_kind_of_error_once() -> None:
    model = PinnedModel()
    model.error = DoesNotFit("it lacks 9 bytes")
    await model.watch.load_pinned()
    await model.watch._load_noted()
    assert model.tries == 1, "not so soon"
    model.now += FAILED_RETRY_S
    await model.watch._load_noted()
    model.now += FAILED_RETRY_S
    await model.watch._load_noted()
    assert model.tries == 2, "later and later"
    model.error = BadCheckpoint("the files are damaged")
    model.now += FAILED_RETRY_S
    await model.watch._load_noted()
    assert model.told == [
        f"the model big is not loaded: {why}" for why in ("it lacks 9 bytes", "the files are damaged")
    ]
    model.error = None
    model.now += 4 * FAILED_RETRY_S
    await model.watch._load_noted()
    assert (model.loaded, model.tries) == (True, 4)


async def test_a_pinned_model_whose_load_somebody_ended_is_not_loaded_again() -> None:
    model = PinnedModel()
    model.error = LoadEnded("the model was unloaded")
    await model.watch.load_pinned()
    model.error = None
    model.now += FAILED_RETRY_S
    await model.watch._load_noted()
    assert (model.loaded, model.tries, model.told) == (False, 1, [])


@pytest.mark.parametrize("error", [None, DoesNotFit("it lacks 9 bytes")])
async def test_what_the_leader_before_had_loaded_is_tried_once(error: MacpipeError | None) -> None:
    model = PinnedModel(pin=False)
    model.error = error
    await model.watch.load_pinned()
    model.now += 4 * FAILED_RETRY_S
    await model.watch._load_noted()
    assert (model.loaded, model.tries, model.expected) == (error is None, 1, set())
    assert len(model.told) == (error is not None)
