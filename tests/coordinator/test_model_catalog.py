"""The names by which clients ask for one of several models."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.coordinator.model_catalog import DEFAULT, MAX_ALIASES, MAX_MODELS, ModelCatalog, public_id
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.errors import InvalidOption, ModelNotFound


def entry(name: str, source: str = "", aliases: tuple[str, ...] = (), fallback: str = "") -> ModelEntry:
    return ModelEntry(name, LoadOrder(source or f"/models/{name}-source"), aliases, fallback=fallback)


BIG = entry("big", "org/Big-70B", ("large", "gpt-4*"))
SMALL = entry("small", "/models/Small-1B", ("claude-haiku-*", "titles"))
CATALOG = ModelCatalog([BIG, SMALL])


@pytest.mark.parametrize(
    ("requested", "found", "adapter"),
    [
        (None, "big", ""),
        ("", "big", ""),
        ("default", "big", ""),
        ("default:legal", "big", "legal"),
        ("small", "small", ""),
        ("small:legal", "small", "legal"),
        ("titles", "small", ""),
        ("titles:legal", "small", "legal"),
        ("large", "big", ""),
        ("org/Big-70B", "big", ""),
        ("org/Big-70B:legal", "big", "legal"),
        ("Big-70B", "big", ""),
        ("/models/Small-1B", "small", ""),
        ("Small-1B", "small", ""),
        ("claude-haiku-4-5-20251001", "small", ""),
        ("claude-haiku-", "small", ""),
        ("gpt-4o:mini", "big", ""),
    ],
)
def test_a_name_means_one_model_and_perhaps_an_adapter(requested: str | None, found: str, adapter: str) -> None:
    chosen, named = CATALOG.resolve(requested)
    assert (chosen.name, named) == (found, adapter)
    if not adapter:
        assert CATALOG.find(requested) is chosen


@pytest.mark.parametrize("requested", ["medium", "Small", "claude-opus-4", ":legal", "gpt"])
def test_an_unknown_name_is_refused_with_those_that_there_are(requested: str) -> None:
    with pytest.raises(ModelNotFound, match="is not served here; use big, large, small, titles") as refusal:
        CATALOG.resolve(requested)
    assert refusal.value.field == "model"
    with pytest.raises(ModelNotFound):
        CATALOG.find(requested)


def test_a_refusal_of_many_models_stays_short() -> None:
    catalog = ModelCatalog([entry(f"m{i:02}") for i in range(MAX_MODELS)])
    with pytest.raises(ModelNotFound, match="m19 and 44 more"):
        catalog.find("other")


def test_an_exact_name_goes_before_an_adapter_and_a_wildcard() -> None:
    catalog = ModelCatalog([entry("llama3", aliases=("llama3:*",)), entry("llama3:8b")])
    assert catalog.resolve("llama3:8b")[0].name == "llama3:8b"
    assert catalog.resolve("llama3:70b") == (catalog.entries[0], "70b")


def test_the_longest_wildcard_decides() -> None:
    catalog = ModelCatalog([entry("a", aliases=("*", "claude-*")), entry("b", aliases=("claude-haiku*",))])
    assert catalog.find("claude-haiku-4").name == "b"
    assert catalog.find("claude-opus").name == "a"
    assert catalog.find("anything").name == "a"


def test_other_characters_of_a_wildcard_mean_themselves() -> None:
    catalog = ModelCatalog([entry("a", aliases=("v1.5[x]?*",))])
    assert catalog.find("v1.5[x]?y").name == "a"
    with pytest.raises(ModelNotFound):
        catalog.find("v1.5xay")


def test_a_last_part_that_two_folders_have_means_neither() -> None:
    catalog = ModelCatalog([entry("a", "one/Model"), entry("b", "two/Model"), entry("c", "two/Model")])
    with pytest.raises(ModelNotFound):
        catalog.find("Model")
    assert catalog.find("two/Model").name == "b"


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([entry("a"), entry("a")], "two models are named a"),
        ([entry("a"), entry("b", aliases=("a",))], "the alias a of the model b already means the model a"),
        ([entry("a", aliases=("x",)), entry("b", aliases=("x",))], "the alias x of the model b already means"),
        ([entry("a", aliases=("b",)), entry("b", aliases=("a",))], "aliases of each other, which is a circle"),
        ([entry("a"), entry("default")], "no model can be named default"),
        ([entry("a"), entry("b", aliases=("default",))], "cannot have the alias default"),
        ([entry("a*")], "only an alias may have a *"),
        ([entry("")], "cannot be a model's name"),
        ([entry(" a")], "cannot be a model's name"),
        ([entry("a\x1b[2J")], "cannot be a model's name"),
        ([entry("a" * 257)], "cannot be a model's name"),
        ([entry("a#2")], "cannot be a model's name: a # marks the copies of a model"),
        ([entry("a", aliases=("",))], "cannot be an alias"),
        ([entry("a", aliases=tuple(f"x{i}" for i in range(MAX_ALIASES + 1)))], "at most 32"),
        ([entry(f"m{i}") for i in range(MAX_MODELS + 1)], "at most 64"),
        ([entry("a", fallback="b")], "the fallback b of the model a is no model's name; the models are a"),
        ([entry("a", fallback="a")], "the fallbacks a -> a are a circle"),
        ([entry("a", fallback="y"), entry("b", aliases=("y",), fallback="a")], "a -> b -> a are a circle"),
    ],
)
def test_models_that_cannot_be_told_apart_are_refused(entries: list[ModelEntry], sentence: str) -> None:
    with pytest.raises(InvalidOption) as refusal:
        ModelCatalog(entries)
    assert sentence in refusal.value.sentence


def test_a_chain_of_fallbacks_is_allowed() -> None:
    catalog = ModelCatalog([entry("a", fallback="b"), entry("b", fallback="c"), entry("c")])
    assert [one.fallback for one in catalog] == ["b", "c", ""]


def test_one_model_without_a_name_is_shown_under_its_id() -> None:
    catalog = ModelCatalog([ModelEntry(DEFAULT, LoadOrder("/private/models/tiny"), ("short", "any-*"))])
    assert catalog.public_names(catalog.default) == ("tiny", "short")
    for requested in ("tiny", "/private/models/tiny", "short", "any-thing", "default", ""):
        assert catalog.find(requested) is catalog.default
    other = catalog.with_order(DEFAULT, LoadOrder("org/other"))
    assert other.public_names(other.default) == ("org/other", "short")
    with pytest.raises(ModelNotFound):
        other.find("tiny")


def test_a_guest_gives_up_the_names_that_others_have() -> None:
    guest = entry("old", "org/old", ("small", "retired"))
    catalog = CATALOG.with_guest(guest)
    assert catalog.find("small") is SMALL
    assert catalog.find("retired") is guest
    assert catalog.public_names(guest) == ("old", "retired")
    assert [one.name for one in catalog] == ["big", "small", "old"]
    with pytest.raises(ModelNotFound):
        catalog.without_guests(["old"]).find("old")
    assert ModelCatalog([BIG, entry("old")], catalog.guests).get("old") is not guest
    assert CATALOG.with_guest(entry("titles")).find("titles") is SMALL


def test_an_empty_catalog_says_how_to_load_a_model() -> None:
    with pytest.raises(ModelNotFound, match="macpipe load MODEL"):
        ModelCatalog([]).find("")


def test_a_public_id_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_id("models/tiny") == public_id("./models/tiny") == public_id(str(tmp_path / "models/tiny")) == "tiny"
    assert public_id("models/other") == "models/other"
    assert public_id("faq") == "faq"


def test_a_model_that_was_found_has_a_public_id_too() -> None:
    hub = "mlx-community/Qwen3-4bit"
    assert public_id(hub, "/cache/models--mlx-community--Qwen3-4bit/snapshots/1") == hub
    assert public_id("models/qwenlike", "/disk/models/qwenlike") == "qwenlike"


def plain(model: str) -> LoadOrder:
    return LoadOrder(model)


@pytest.mark.parametrize(
    ("name", "model", "loaded", "source"),
    [
        ("", "small", "small", SMALL.order.model),
        ("", "titles", "small", SMALL.order.model),
        ("", "default", "big", BIG.order.model),
        ("", "/models/Small-1B", "small", SMALL.order.model),
        ("", "org/Third", "org/Third", "org/Third"),
        ("", "/models/Third", "Third", "/models/Third"),
        ("small", "", "small", SMALL.order.model),
        ("default", "", "big", BIG.order.model),
        ("small", "/models/Small-1B", "small", SMALL.order.model),
        ("third", "org/Third", "third", "org/Third"),
        ("third", "small", "third", "small"),
    ],
)
def test_a_load_means_a_configured_model_or_another_one(name: str, model: str, loaded: str, source: str) -> None:
    chosen, order = CATALOG.choose_load(name, plain(model), plain(model))
    assert (chosen, order.model) == (loaded, source)


@pytest.mark.parametrize("name", ["small", "titles", "default"])
def test_a_load_gives_no_other_model_the_name_of_a_configured_one(name: str) -> None:
    with pytest.raises(
        InvalidOption, match=f"{name} is the name of a configured model.*choose another name"
    ) as refusal:
        CATALOG.choose_load(name, plain("org/Third"), plain("org/Third"))
    assert refusal.value.field == "name"
    guest = ModelEntry("guest", LoadOrder("org/guest"))
    assert CATALOG.with_guest(guest).choose_load("guest", plain("org/Third"), plain(""))[1].model == "org/Third"
    assert ModelCatalog([SMALL]).choose_load("small", plain("org/Third"), plain(""))[1].model == "org/Third"


def test_options_of_a_load_replace_those_that_are_configured() -> None:
    entry = ModelEntry("small", LoadOrder("org/small", max_context=100, kv_bits=8))
    catalog = ModelCatalog([entry, BIG])
    assert catalog.choose_load("", plain("small"), plain("small")) == ("small", entry.order)
    asked = LoadOrder("small", lanes=3)
    assert catalog.choose_load("", asked, plain("small")) == ("small", LoadOrder("org/small", lanes=3))
    with pytest.raises(ModelNotFound, match="the model medium is not served here"):
        catalog.choose_load("medium", plain(""), plain(""))
    with pytest.raises(InvalidOption, match="only an alias may have a"):
        catalog.choose_load("x*", plain("org/x"), plain("org/x"))


def test_a_load_replaces_a_single_model_without_a_name() -> None:
    single = ModelCatalog([ModelEntry(DEFAULT, LoadOrder("faq", max_context=100))])
    assert single.choose_load("", plain("org/other"), plain("org/other")) == (DEFAULT, plain("org/other"))
    assert single.choose_load("", plain("faq"), plain("faq")) == (DEFAULT, plain("faq"))
    assert single.choose_load("second", plain("faq"), plain("faq")) == ("second", plain("faq"))
    assert ModelCatalog([]).choose_load("", plain("faq"), plain("faq")) == (DEFAULT, plain("faq"))
    named = ModelCatalog([SMALL])
    assert named.choose_load("", plain("org/other"), plain("org/other"))[0] == "org/other"
