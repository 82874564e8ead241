"""Which deployment a model's name means, and when one is forgotten."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.coordinator.deployment_table import DeploymentTable
from cluster.coordinator.journal import Answerer, JournaledRequest
from cluster.coordinator.model_catalog import DEFAULT, ModelCatalog, ModelEntry
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import ModelNotFound, NotServing, RequestNotFound
from cluster.core.request import Request, SamplingParams

BIG, SMALL = ModelEntry("big", LoadOrder("org/Big"), ("large",)), ModelEntry("small", LoadOrder("org/Small"))


class Idle:
    """A deployment that is loaded when a test says so."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_loading = False
        self.order: LoadOrder | None = None
        self.model_info: Any = None
        self.service: Any = None
        self.fingerprint = ""
        self.services: list[Any] = []
        self.replicas: tuple[Any, ...] = (SimpleNamespace(holder=name),)

    def load(self, model: str) -> Any:
        reference = SimpleNamespace(name=model, path=f"/hub/{model.replace('/', '--')}/1")
        self.order, self.model_info = LoadOrder(model), SimpleNamespace(shape=SimpleNamespace(model=reference))
        return self.model_info

    def unload(self) -> None:
        self.order = self.model_info = None

    def serves(self, model_info: Any) -> bool:
        return model_info is self.model_info


class Table(DeploymentTable):
    def __init__(self, *entries: ModelEntry) -> None:
        self.training = False
        super().__init__(Idle, lambda: self.training)  # type: ignore[arg-type]
        self.adopt(ModelCatalog(entries))

    def load(self, name: str, model: str) -> Any:
        deployment: Any = self.begin(name, LoadOrder(model))
        loaded = deployment.load(model)
        self.note_loaded(deployment.name, LoadOrder(model))
        return loaded


def test_names_find_the_deployments_of_a_catalog() -> None:
    table = Table(BIG, SMALL)
    assert [table.resolve(name)[0].name for name in ("", DEFAULT, "large", "org/Big", "Small")] == [
        *("big", "big", "big", "big"),
        "small",
    ]
    assert table.resolve("small:legal") == (table["small"], "legal")
    with pytest.raises(ModelNotFound, match="use big, large, small"):
        table.resolve("medium")
    assert table.unloaded_names() == ["big", "large", "small"]
    loaded = table.load("small", "org/Small")
    assert table.unloaded_names() == ["big", "large"]
    assert table.loaded_models() == [loaded]
    assert table.names_of(loaded) == ("small",)


def test_sentences_name_a_model_only_where_there_are_others() -> None:
    table = Table(BIG, SMALL)
    table.load("small", "org/Small")
    assert table.name_among_others("small") == "small"
    assert table.name_among_others("nobody") == ""
    table["small"].replicas = tuple(SimpleNamespace(holder=name) for name in ("small", "small#3"))  # type: ignore[misc]
    assert [table.name_among_others(name) for name in ("small", "small#3")] == ["small #1", "small #2"]
    alone = Table()
    alone.load(DEFAULT, "org/Big")
    assert alone.name_among_others(DEFAULT) == ""
    alone.load("third", "org/Third")
    assert [alone.name_among_others(name) for name in (DEFAULT, "third")] == ["org/Big", "third"]


def coming(table: DeploymentTable, name: str) -> list[str]:
    return [entry.name for entry in table.find_neighbours(name).coming]


def test_models_that_are_yet_to_come_are_those_without_memory() -> None:
    table = Table(BIG, SMALL)
    assert (coming(table, "big"), coming(table, "other")) == (["small"], ["big", "small"])
    table.load("small", "org/Small")
    assert (coming(table, "big"), coming(table, "small")) == ([], ["big"])
    guest: Any = table.begin("guest", LoadOrder("org/Guest"))
    guest.is_loading = True
    assert coming(table, "big") == ["guest"], "a model that waits for its turn to load"
    guest.is_loading = False
    table.forget_unloaded()
    assert coming(table, "big") == []


def test_neighbours_are_described_by_their_plans_and_drafts() -> None:
    table = Table(BIG, SMALL)
    table.load("small", "org/Small")
    spec = SimpleNamespace(ranks=1)
    stages = [
        SimpleNamespace(worker=name, decode_ms=ms, layers=range(2), spec=spec)
        for name, ms in (("ada", 1.0), ("bob", 3.0))
    ]
    deployment: Any = table["small"]
    shape: Any = SimpleNamespace(stage_bytes=lambda own: 10 * len(own), stage_cache_bytes=len)
    shape.of_rank = lambda ranks: shape
    plan = SimpleNamespace(stages=stages, pipeline=stages)
    service = SimpleNamespace(plan=plan, model_info=SimpleNamespace(placed_shape=shape))
    service.draft_worker = "cyd"
    deployment.services = [service]
    described, draft = table.find_neighbours("big").loaded
    assert (described.name, described.step_shares) == ("small", {"ada": 0.25, "bob": 0.75})
    assert described.stage_bytes == 22, "two layers, and their caches"
    assert (draft.name, draft.step_shares) == ("draft of small", {"cyd": 1.0})
    assert table.find_neighbours("small").loaded == (), "it is planned in place of itself"
    stages[0].decode_ms = 0.0
    assert table.find_neighbours("big").loaded[0].step_shares == {"ada": 0.5, "bob": 0.5}


def test_an_answer_is_resumed_on_the_model_that_began_it() -> None:
    table = Table(BIG, SMALL)

    def kept(*answerer: str) -> JournaledRequest:
        return JournaledRequest(Request("r", (1,), SamplingParams(), 5), 0.0, [[]], Answerer(*answerer))

    with pytest.raises(NotServing, match="request r is not loaded now") as refused:
        table.find_answerer(kept("small", "f2"))
    assert refused.value.retry_after_s
    for name, fingerprint in (("big", "f1"), ("small", "f2")):
        deployment: Any = table.begin(name, LoadOrder(name))
        deployment.service, deployment.fingerprint = object(), fingerprint
    assert table.find_answerer(kept("small", "f2")).name == "small"
    assert table.find_answerer(kept("renamed", "f2")).name == "small"
    assert table.find_answerer(kept()).name == "big", "a record of an older version"
    deployment.fingerprint = "f1"
    assert table.find_answerer(kept("small", "f1")).name == "small"
    for gone in (("small", "f2"), ("renamed", "f3")):
        with pytest.raises(RequestNotFound, match="no longer served; send the request again"):
            table.find_answerer(kept(*gone))


def test_a_single_model_takes_the_name_of_what_is_loaded() -> None:
    table = Table(ModelEntry(DEFAULT, LoadOrder("org/Big"), ("mine",)))
    assert table.resolve("whatever")[0].name == DEFAULT
    assert table.unloaded_names() == []
    assert table.names_of(table.load(DEFAULT, "org/Big")) == ("org/Big", "mine")
    assert table.names_of(table.load(DEFAULT, "org/Other")) == ("org/Other", "mine")
    assert table.resolve("Other")[0].name == table.resolve("mine")[0].name == DEFAULT
    with pytest.raises(ModelNotFound, match="use org/Other, mine"):
        table.resolve("org/Big")


def test_a_coordinator_without_a_catalog_has_guests() -> None:
    table = Table()
    assert table.resolve("")[0].name == DEFAULT
    first = table.load(DEFAULT, "org/Big")
    second = table.load("second", "org/Small")
    assert table.names_of(first) == ("org/Big",)
    assert table.names_of(second) == ("second",)
    assert table.resolve("")[0].model_info is first
    guest: Any = table["second"]
    guest.unload()
    table.forget_unloaded()
    assert [deployment.name for deployment in table.values()] == [DEFAULT]


def test_what_is_loaded_stays_when_it_leaves_the_file() -> None:
    table = Table(BIG, SMALL)
    loaded = table.load("small", "org/Small")
    table.adopt(ModelCatalog([BIG]))
    assert table.resolve("small")[0].model_info is loaded
    small: Any = table["small"]
    small.unload()
    table.training = True
    small.order = LoadOrder("org/Small")
    table.forget_unloaded()
    assert table.resolve("small")[0] is small
    small.order = None
    table.forget_unloaded()
    assert table.get("small") is None
    assert [entry.name for entry in table.catalog] == ["big"]


def test_guests_of_the_leader_before_stay_until_they_were_loaded_again() -> None:
    first = ModelEntry(DEFAULT, LoadOrder("org/Big"))
    table = Table(first)
    table.expect_guests([SMALL])
    table.forget_unloaded()
    assert table.is_expected("small")
    kept = JournaledRequest(Request("r", (1,), SamplingParams(), 5), 0.0, [[]], Answerer("small", "f", 1))
    with pytest.raises(NotServing, match="not loaded now"):
        table.find_answerer(kept)
    loaded = table.load("small", "org/Small")
    table.end_expecting("small")
    assert table.resolve("small")[0].model_info is loaded
    table.expect_guests([SMALL])
    gone: Any = table["small"]
    gone.unload()
    table.end_expecting("small")
    assert [entry.name for entry in table.catalog] == [DEFAULT]


def test_what_to_unload_must_be_named_if_several_models_are_loaded() -> None:
    table = Table(BIG, SMALL)
    assert table.choose("") == []
    table.load("small", "org/Small")
    assert table.choose("") == [table["small"]]
    table.load("big", "org/Big")
    with pytest.raises(ModelNotFound, match="several models are loaded: big, small; name one of them"):
        table.choose("")
    assert table.choose("large") == [table["big"]]
