"""What ``status``, ``ps``, ``top`` and ``load`` show of several models."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from cluster.cli.adapter import find_adapters
from cluster.cli.chat import describe_partner
from cluster.cli.drain import describe_rings
from cluster.cli.load import describe_loaded
from cluster.cli.ps import requests_as_json, show_requests
from cluster.cli.status import held_stages, show_state
from cluster.cli.top_view import TopView
from cluster.client import (
    AdapterState,
    ClusterState,
    LayerRange,
    LiveRequest,
    RequestState,
    Route,
    ServingState,
    StageState,
    WorkerState,
)
from cluster.core.cluster_state import DeploymentState, ReplicaState
from cluster.core.errors import ModelNotFound
from cluster.core.limits import GIB
from cluster.core.plan import Spare, Speculation


def stage(worker: str, start: int, end: int) -> StageState:
    return StageState(0, worker, LayerRange(start, end), GIB, GIB, Route.DIRECT, measured_ms=5.0)


def replica(*stages: StageState, requests: tuple[str, ...] = ()) -> ReplicaState:
    live = tuple(LiveRequest(name, RequestState.DECODE, 9, 9, 3, 0, 2.0) for name in requests)
    return ReplicaState(ServingState.SERVING, "", 7, stages, live, (len(live),), 0, 2)


BIG = DeploymentState(
    "big", "org/Big", ServingState.SERVING, ("large",), max_context=4096, pinned=True,
    replicas=(replica(stage("ada", 0, 8), stage("bob", 8, 16), requests=("r-1",)),),
)  # fmt: skip
SMALL = DeploymentState(
    "small", "org/Small", ServingState.SERVING, max_context=1024, idle_seconds=75.0,
    replicas=(replica(stage("bob", 0, 4)), replica(stage("cyd", 0, 4), requests=("r-2", "r-3"))),
)  # fmt: skip
LEGAL = AdapterState("legal", "f" * 64, 1000)
OTHER = DeploymentState("other", "org/Other", ServingState.IDLE)
STATE = ClusterState(
    "lab", "1", ServingState.SERVING, model="org/Big", layers=16, max_context=4096, max_sequences=4, epoch=7,
    stages=BIG.stages, requests=BIG.requests, lane_sizes=(1,), prefixes=2, uptime_seconds=100.0,
    workers=tuple(
        WorkerState(f"id-{name}", name, "1", "", "", "M4", "metal", "", 64 * GIB, 48 * GIB, memory_used=24 * GIB)
        for name in ("ada", "bob", "cyd", "dan")
    ),
    spares=(Spare("cyd", "not needed"), Spare("dan", "not needed")),
    deployments=(BIG, SMALL, OTHER),
)  # fmt: skip


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


def test_status_lists_all_models_and_what_each_mac_holds(capsys: pytest.CaptureFixture[str]) -> None:
    show_state(STATE)
    lines = words(capsys.readouterr().out)
    assert ["cluster", "lab:", "serving", "2", "of", "3", "models,", "up", "1", "min"] in lines
    assert ["big", "(pinned)", "serving", "4096", "1", "-", "ada", "0-7,", "bob", "8-15"] in lines
    assert ["small", "serving", "1024", "2", "1", "min", "bob", "0-3;", "cyd", "0-3"] in lines
    assert ["other", "not", "loaded", "-", "-", "-", "-"] in lines
    assert ["3", "live", "requests,", "0", "finished,", "0", "tokens", "generated"] in lines
    (bob,) = (line for line in lines if line[0] == "bob")
    assert bob[:7] == ["bob", "M4", "big", "8-15,", "small", "#1", "0-3"]
    assert ["spare:", "dan:", "not", "needed"] in lines
    assert not any(line[:2] == ["spare:", "cyd:"] for line in lines)
    assert held_stages(STATE, "bob") == []
    assert held_stages(STATE, "cyd") == [stage("cyd", 0, 4)]


def test_status_tells_the_adapters_and_the_guesses_of_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    big = replace(BIG, speculation=Speculation.NGRAM)
    small = replace(SMALL, adapters=(LEGAL,), speculation=Speculation.DRAFT, draft_worker="dan")
    show_state(replace(STATE, speculation=Speculation.NGRAM, deployments=(big, small, OTHER)))
    lines = capsys.readouterr().out.splitlines()
    assert "big: speculation (ngram): no guesses yet" in lines
    assert "small: adapters: legal" in lines
    assert "small: speculation (draft, draft model on dan)" in lines
    show_state(replace(STATE, adapters=(LEGAL,), deployments=()))
    assert "adapters: legal" in capsys.readouterr().out.splitlines()


def test_adapters_are_those_of_the_model_that_is_named() -> None:
    state = replace(STATE, deployments=(BIG, replace(SMALL, aliases=("tiny",), adapters=(LEGAL,)), OTHER))
    assert find_adapters(state, "") == ("org/Big", ())
    assert find_adapters(state, "tiny") == find_adapters(state, "org/Small") == ("small", (LEGAL,))
    with pytest.raises(ModelNotFound, match="no model is named x; the models are big, small and other"):
        find_adapters(state, "x")


def test_ps_names_the_model_of_each_request(capsys: pytest.CaptureFixture[str]) -> None:
    show_requests(STATE)
    lines = words(capsys.readouterr().out)
    assert [line[:3] for line in lines if line[0].startswith("r-")] == [
        ["r-1", "big", "decode"],
        ["r-2", "small", "#2"],
        ["r-3", "small", "#2"],
    ]
    assert ["big:", "answers", "per", "lane:", "1;", "0", "queued;", "2", "cached", "prefixes"] in lines
    assert ["small", "#2:", "answers", "per", "lane:", "2;", "0", "queued;", "2", "cached", "prefixes"] in lines


def test_ps_in_json_has_the_requests_and_stages_of_all_models() -> None:
    shown = requests_as_json(STATE)
    names = ["big", "small #1", "small #2"]
    assert [(one["request_id"], one["model"]) for one in shown["requests"]] == [
        ("r-1", "big"),
        ("r-2", "small #2"),
        ("r-3", "small #2"),
    ]
    assert [(one["model"], one["worker"]) for one in shown["stages"]] == [
        *(("big", "ada"), ("big", "bob")),
        *(("small #1", "bob"), ("small #2", "cyd")),
    ]
    assert [(one["name"], one["lanes"]) for one in shown["models"]] == list(zip(names, [(1,), (0,), (2,)], strict=True))
    assert (shown["lanes"], shown["queued"], shown["prefixes"]) == ([1, 0, 2], 0, 6)


@pytest.mark.parametrize("width", [80, 200])
def test_top_shows_the_stages_and_requests_of_all_models(width: int) -> None:
    view = TopView()
    view.add(STATE)
    console = Console(width=width, height=40, file=StringIO(), markup=False, emoji=False, highlight=False)
    console.print(view.draw(width, 40, ""))
    lines = words(console.file.getvalue())  # type: ignore[attr-defined]
    assert lines[0][:6] == ["lab:", "serving", "2", "of", "3", "models"]
    assert ["bob", "small", "#1", "0-3"] in [line[:4] for line in lines]
    assert ["r-2", "small", "#2", "decode"] in [line[:4] for line in lines]
    assert ["dan", "-", "-"] in [line[:3] for line in lines]
    assert any("3 answering" in " ".join(line) for line in lines)


@pytest.mark.parametrize("name", ["small", "org/Small"])
def test_a_load_tells_where_its_model_is(name: str) -> None:
    assert list(describe_loaded(STATE, name)) == [
        "serving small on 2 workers: bob 0-3, cyd 0-3",
        "spare: dan (not needed)",
    ]


def test_a_chat_begins_with_the_model_that_it_is_with() -> None:
    named = {name: describe_partner(STATE, name) for name in ("", "large", "org/Small", "other", "small-*")}
    assert list(named.values()) == [
        "big on ada 0-7, bob 8-15",
        "big on ada 0-7, bob 8-15",
        "small on bob 0-3, cyd 0-3",
        "other, which the first message loads",
        "small-*",
    ]
    assert describe_partner(replace(STATE, deployments=()), "") == "org/Big on ada 0-7, bob 8-15"


def test_a_drain_tells_who_holds_each_model_now() -> None:
    assert list(describe_rings(STATE)) == ["big: ada 0-7, bob 8-15", "small #1: bob 0-3", "small #2: cyd 0-3"]


def test_one_model_is_shown_as_before() -> None:
    alone = replace(STATE, deployments=())
    assert list(describe_rings(alone)) == ["ada 0-7, bob 8-15"]
    assert alone.rings == (("", BIG.replicas[0]),)
    assert (alone.all_requests, alone.all_stages) == (BIG.requests, BIG.stages)
    assert next(iter(describe_loaded(alone, "big"))) == "serving org/Big on 2 workers: ada 0-7, bob 8-15"
