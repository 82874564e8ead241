"""The Grafana dashboard and the alert rules in ops/grafana: each metric that they name exists, with its labels."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.api.metrics import Metrics, standby_exposition
from cluster.coordinator.request_timings import ClusterTotals
from cluster.core.cluster_state import DeploymentState, GuessCounts, ServingState
from cluster.core.leadership import (
    CoordinatorName,
    CoordinatorRole,
    FollowingState,
    LeadershipState,
    StandbyState,
)
from cluster.core.request import FinishEvent, FinishReason, Usage
from cluster.core.worker import WorkerState
from coordinator.test_snapshot import LOOP, PLAN

GRAFANA = Path(__file__).parents[2] / "ops" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "macpipe.json").read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = yaml.safe_load((GRAFANA / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
WORKER = WorkerState(
    *("id", "ada", "1", "", "", "", "", "", 64, 48), power_watts=40.0, energy_joules=900.0, prefix_disk_limit=9
)
LEADER = CoordinatorName("mac-1", "a")
OF_PROMETHEUS = {"instance", "job", "le", "alertname"}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> dict[str, str]:
    """Every query of the panels and the rules, by what shows it."""
    shown = {f"{p['title']} {t['refId']}": t["expr"] for p in panels() for t in p["targets"]}
    return shown | {rule["alert"]: rule["expr"] for rule in RULES}


@cache
def pages() -> dict[CoordinatorRole, bytes]:
    """What a leader that has something to tell of everything answers, and its standby."""
    metrics = Metrics()
    usage = Usage(9, 4)
    metrics.count_finished(FinishEvent(FinishReason.STOP, "", usage, 50.0, 10.0))
    metrics.count_response("/v1/models", 200)
    loop = replace(LOOP, guesses=(GuessCounts("ngram", 9, 5, 2, 4),), wasted_s=(0.5, 0.5))
    journal: Any = type("Journal", (), {"problem": ""})
    models = (DeploymentState("big", "org/Big", ServingState.SERVING),)
    totals = ClusterTotals(5, 4, 3, 1)
    standbys = (StandbyState("mac-2", in_sync=True),)
    leadership = LeadershipState(CoordinatorRole.LEADER, 4, LEADER, standbys=standbys)
    page = metrics.exposition(ServingState.SERVING, PLAN, loop, journal, (WORKER,), totals, models, leadership)
    of_process = metrics.process.exposition()
    return {
        CoordinatorRole.LEADER: page + of_process,
        CoordinatorRole.STANDBY: standby_exposition(FollowingState(4, LEADER)) + of_process,
    }


@cache
def exposed() -> dict[str, set[str]]:
    """The labels of each series of these pages."""
    found: dict[str, set[str]] = defaultdict(set)
    for page in pages().values():
        for family in text_string_to_metric_families(page.decode()):
            for sample in family.samples:
                found[sample.name] |= sample.labels.keys()
    return dict(found)


def test_each_metric_of_a_query_exists() -> None:
    for where, query in queries().items():
        named = set(re.findall(r"\bmacpipe_\w+", query)) - {"macpipe"}
        assert named or "up{" in query, where
        assert named <= exposed().keys(), (where, named - exposed().keys())


def test_each_label_of_a_query_exists() -> None:
    for where, query in queries().items():
        labels = set(re.findall(r"(\w+)\s*(?:=~|!=|=)\s*\"", query))
        labels |= {name for group in re.findall(r"\bby \(([\w, ]+)\)", query) for name in re.split(r",\s*", group)}
        known = set().union(*(exposed()[name] for name in re.findall(r"\bmacpipe_\w+", query))) | OF_PROMETHEUS
        assert labels <= known, (where, labels - known)
    for panel in panels():
        for target in panel["targets"]:
            known = set().union(*(exposed()[n] for n in re.findall(r"\bmacpipe_\w+", target["expr"]))) | OF_PROMETHEUS
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known, panel["title"]


def test_what_people_see_of_a_panel_is_there_and_panels_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not taken & cells, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "instance", "model"]
    of_models = [
        target["expr"] for panel in panels() for target in panel["targets"] if "macpipe_model_" in target["expr"]
    ]
    assert len(of_models) == 5
    assert all('model=~"$model"' in query for query in of_models)


def test_the_counters_of_the_cluster_are_exposed_without_a_model_too() -> None:
    text = Metrics().exposition(ServingState.IDLE, None, None, None, (WORKER,), ClusterTotals(5, 4, 3, 1)).decode()
    lines = text.splitlines()
    for line in (
        "macpipe_generated_tokens_total 5.0",
        "macpipe_prompt_tokens_total 4.0",
        "macpipe_cached_prompt_tokens_total 3.0",
        "macpipe_recoveries_total 1.0",
        'macpipe_worker_up{worker="ada"} 1.0',
        'macpipe_worker_memory_limit_bytes{worker="ada"} 48.0',
        'macpipe_worker_power_watts{worker="ada"} 40.0',
        'macpipe_worker_energy_joules_total{worker="ada"} 900.0',
    ):
        assert line in lines
    silent = replace(WORKER, power_watts=0.0, energy_joules=0.0, reachable=False)
    text = Metrics().exposition(ServingState.IDLE, None, None, None, (silent, silent)).decode()
    assert text.count('macpipe_worker_up{worker="ada"} 0.0') == 1
    assert "macpipe_worker_power_watts{" not in text


@pytest.mark.parametrize("command", ["check rules --lint=all --lint-fatal alerts.yml", "test rules alerts_test.yml"])
def test_promtool_accepts_the_rules_and_each_fires_when_it_should(command: str) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed; it comes with Debian's prometheus")
    arguments = [promtool, *command.split()]
    done = subprocess.run(arguments, cwd=GRAFANA, capture_output=True, text=True, timeout=15, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("role", pages())
def test_promtool_accepts_the_names_and_texts_of_all_metrics(role: CoordinatorRole) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed; it comes with Debian's prometheus")
    command = [promtool, "check", "metrics"]
    done = subprocess.run(command, input=pages()[role], capture_output=True, timeout=15, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_rule_is_among_those_that_are_tested() -> None:
    tests = yaml.safe_load((GRAFANA / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    fired = re.findall(r'alertname="(\w+)"', str(tests[-1]["promql_expr_test"]))
    assert sorted(fired) == sorted(rule["alert"] for rule in RULES)
