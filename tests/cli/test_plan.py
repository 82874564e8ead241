"""``macpipe plan`` from the outside: for named Macs, for a coordinator's, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints import make
from client.scripted import Coordinator
from cluster.v1 import cluster_pb2

Macpipe = Any


def test_macs_that_are_not_here(macpipe: Macpipe, tmp_path: Path) -> None:
    """The folder has neither a tokenizer nor weights behind its headers; a plan needs neither."""
    folder = make("qwen3_moe", tmp_path / "moe")
    (folder / "tokenizer.json").unlink()
    done = macpipe("plan", str(folder), "--assume", "m4-pro-24x2,10gbe", "--context", "128")
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 layers in 1 stage, planned for latency; room for" in done.stdout
    assert "m4-pro-24#1" in done.stdout
    assert "tokens/s for one user" in done.stdout
    assert "spare: m4-pro-24#2: m4-pro-24#1 is enough" in done.stdout
    assert "; 128 tokens of prompt take " in done.stdout
    assert "assumed: published figures of the chips; links of 10gbe" in done.stdout
    assert "e+0" not in done.stdout
    facts = json.loads(macpipe("plan", str(folder), "--assume", "m4-pro-24x2", "--workers", "2", "--json").stdout)
    assert [stage["worker"] for stage in facts["stages"]] == ["m4-pro-24#1", "m4-pro-24#2"]
    assert facts["forecast"]["one_user"] > 0
    assert facts["forecast"]["prompt_tokens"] == 2048
    assert facts["reasons"][0] == "assumed: published figures of the chips; links of 1gbe"
    assert [stage["layers"][1] for stage in facts["stages"]][-1] == 4


def test_several_models_on_macs_that_are_not_here(macpipe: Macpipe, tmp_path: Path) -> None:
    folders = [str(make("qwen3_moe", tmp_path / name)) for name in ("large", "small")]
    done = macpipe("plan", *folders, "--assume", "m4-pro-24,m2-16")
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert said[0] == "2 models fit at once"
    assert "small is on m2-16, which large leaves free" in said
    assert any(line.startswith("m2-16") and line.endswith("small") for line in (line.rstrip() for line in said))
    assert any(line.startswith("large: planned for latency; room for ") for line in said)
    facts = json.loads(macpipe("plan", *folders, "--assume", "m4-pro-24", "--workers", "1", "--json").stdout)
    assert [(m["name"], m["plan"]["stages"][0]["worker"]) for m in facts["models"]] == [
        ("large", "m4-pro-24"),
        ("small", "m4-pro-24"),
    ]
    (mac,) = facts["memory"]
    taken = [m["weight_bytes"] + m["cache_bytes"] for m in mac["models"]]
    assert sum(taken) == mac["usable_bytes"]
    assert taken[0] == taken[1], "both have room for equally many contexts"
    assert facts["left_out"] == []
    assert "small is on m4-pro-24 and shares it with large" in facts["reasons"][1]

    file = tmp_path / "models.toml"
    file.write_text(
        '[[model]]\nname = "coder"\nsource = "./large"\nmax-context = 64\n'
        '[[model]]\nname = "titles"\nsource = "./small"\nworkers = 2\npriority = 1\n'
    )
    made = json.loads(macpipe("plan", "--models", str(file), "--assume", "m4-pro-24x2", "--json").stdout)
    assert [(m["name"], len(m["plan"]["stages"])) for m in made["models"]] == [("titles", 2), ("coder", 1)]
    assert [m["plan"]["max_context"] for m in made["models"]] == [2048, 64]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["faq", "--assume", "macbook"], 2, ["macbook", "m4-pro-48x2,10gbe"]),
        (["faq", "--assume", "m4-pro-48x2", "--workers", "3"], 1, ["3 workers were asked for, but --assume names 2"]),
        (["faq", "--assume", "m4-pro-48x2", "--workers", "3", "--layers", "0-3,4-7"], 1, ["--assume names 2"]),
        (
            ["faq", "--assume", "m4-pro-48", "--coordinator", "127.0.0.1:1"],
            2,
            ["--assume", "--coordinator", "cannot be combined"],
        ),
        (["no-such-model", "--assume", "m4-pro-48"], 1, ["no-such-model"]),
        (["faq", "faq", "--assume", "m4-pro-48"], 2, ["two models are named faq"]),
        (["faq", "--models", "models.toml"], 2, ["on the command line and by --models"]),
        (["faq", "--objective", "beauty"], 2, ["beauty", "latency", "throughput"]),
        (["faq", "--wait", "0", "--cluster", "nobody-is-in-this-one"], 1, ["found no worker"]),
    ],
)
def test_what_cannot_be_planned_is_said(
    macpipe_here: Macpipe, arguments: list[str], code: int, words: list[str]
) -> None:
    done = macpipe_here("plan", *arguments)
    assert (done.returncode, done.stdout) == (code, ""), done
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["faq", "--assume", "m4-pro-48", "--layers", "0-3,4-7"], 1, ["2 layer ranges", "there is 1 worker"]),
        (["faq", "--assume", "m4-pro-48x2", "--acceptance", "1.5"], 2, ["--acceptance is 1.5", "from 0 to 1"]),
        (
            ["faq", "--assume", "m4-pro-48x2", "--acceptance", "0.5", "--objective", "throughput"],
            2,
            ["--acceptance is for one user", "--objective latency"],
        ),
        (["faq", "--coordinator", "127.0.0.1:1"], 1, ["no coordinator answers"]),
    ],
)
def test_what_a_model_or_a_coordinator_does_not_allow_is_said(
    macpipe: Macpipe, arguments: list[str], code: int, words: list[str]
) -> None:
    done = macpipe("plan", *arguments)
    assert (done.returncode, done.stdout) == (code, ""), done
    assert all(word in done.stderr for word in words), done.stderr


def test_a_running_coordinator_is_asked(macpipe: Macpipe, coordinator: Coordinator) -> None:
    stage = cluster_pb2.Stage(worker="mac-a", end_layer=8, weight_bytes=9 << 30, cache_bytes=1 << 30, predicted_ms=12.5)
    coordinator.script.plan = cluster_pb2.PlanResponse(
        model="faq",
        layers=8,
        max_context=512,
        max_sequences=4,
        objective=cluster_pb2.OBJECTIVE_THROUGHPUT,
        stages=[stage],
        spares=[cluster_pb2.SpareWorker(worker="mac-b", why="it would only slow the others down")],
        reasons=["bound by memory bandwidth"],
        forecast=cluster_pb2.Forecast(one_user=12.5, eight_users=70, first_token_seconds=3, prompt_tokens=512),
    )

    options = ("--objective", "throughput", "--context", "512", "--kv-bits", "8", "--prefill-chunk", "96")
    done = macpipe("plan", "faq", *options, "--quantize", "4", to=coordinator)
    assert (done.returncode, done.stderr) == (0, "")
    assert "planned for throughput" in done.stdout
    assert "12.5" in done.stdout
    assert "70 for eight together; 512 tokens of prompt take 3.0 s to the first token" in done.stdout
    assert "spare: mac-b: it would only slow the others down" in done.stdout
    (request,) = coordinator.script.seen
    assert (request.model, request.max_context, request.kv_bits, request.prefill_chunk) == ("faq", 512, 8, 96)
    assert request.quantize == 4
    assert request.objective == cluster_pb2.OBJECTIVE_THROUGHPUT
    macpipe("plan", "faq", "--acceptance", "0.7", to=coordinator)
    assert coordinator.script.seen[-1].acceptance == 0.7

    coordinator.script.joint_plan = cluster_pb2.PlanModelsResponse(
        models=[cluster_pb2.PlannedModel(name="faq", plan=coordinator.script.plan)],
        left_out=[cluster_pb2.UnplacedModel(name="org/b", why="org/b fits only when faq is unloaded", unload=["faq"])],
        memory=[
            cluster_pb2.MacMemory(
                worker="mac-a",
                usable_bytes=11 << 30,
                models=[cluster_pb2.ModelMemory(name="faq", weight_bytes=9 << 30, cache_bytes=1 << 30)],
            )
        ],
        reasons=["org/b fits only when faq is unloaded"],
    )
    done = macpipe("plan", "faq", "org/b", "--quantize", "4", to=coordinator)
    assert done.stdout.startswith("1 of 2 models fit at once\n")
    assert "mac-a   11.0 GiB  9.0 GiB     1.0 GiB  1.0 GiB  faq" in done.stdout
    assert "\norg/b fits only when faq is unloaded\n" in done.stdout
    first, second = coordinator.script.seen[-1].models
    assert [(one.name, one.order.model, one.order.quantize, one.replicas) for one in (first, second)] == [
        ("faq", "faq", 4, 1),
        ("org/b", "org/b", 4, 1),
    ]


def test_a_plan_of_a_file_has_the_replicas_that_it_asks_for(macpipe_here: Macpipe, tmp_path: Path) -> None:
    """They are on Macs that hold no layers, as serve loads them."""
    tables = [
        f'[[model]]\nname = "{name}"\nsource = "{make("llama", tmp_path / name)}"\nworkers = 1\nreplicas = {count}\n'
        for name, count in (("large", 1), ("small", 2), ("many", 9), ("some", '"auto"'))
    ]
    file = tmp_path / "models.toml"
    file.write_text("\n".join(tables))
    planned = macpipe_here("plan", "--models", str(file), "--assume", "m4-pro-24x7")
    assert (planned.returncode, planned.stderr) == (0, "")
    assert planned.stdout.startswith("4 models fit at once\n")
    assert any(line.startswith("many #3") for line in planned.stdout.splitlines())
    facts = json.loads(macpipe_here("plan", "--models", str(file), "--assume", "m4-pro-24x7", "--json").stdout)
    places = {(m["name"], m["replica"]): m["plan"]["stages"][0]["worker"] for m in facts["models"]}
    assert list(places) == [
        ("large", 1),
        ("small", 1),
        ("small", 2),
        ("many", 1),
        ("many", 2),
        ("many", 3),
        ("some", 1),
    ]
    assert len(set(places.values())) == len(places), "each on a Mac of its own"
    assert [len(mac["models"]) for mac in facts["memory"]] == [1] * 7
    assert [reason for reason in facts["reasons"] if "copy" in reason or "replica" in reason] == [
        f"small has 2 replicas, copies of it on {places['small', 2]}",
        f"many has 3 replicas, copies of it on {places['many', 2]}; {places['many', 3]}",
        "many has 3 of 9 replicas: no Mac without layers is free for it",
        "some has no copy: no Mac without layers is free for it",
    ]
