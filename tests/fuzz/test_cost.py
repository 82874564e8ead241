"""Bounded cost: every entry has a target, stored inputs end as expected, and the measurement sees each kind of cost.

No test bounds a time; ``ops/fuzz --cost`` measures costs.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from cluster.api.http.openapi import BODIES
from cluster.joining.join_messages import JoinRequest
from cluster.v1 import cluster_pb2, inference_pb2, store_pb2, worker_pb2
from fuzz.cost import measure
from fuzz.cost.measure import Cost
from fuzz.cost.recipe import MAX_SHOWN, build, filled, nodes, shown, size, worsened
from fuzz.cost.replay import kept, names
from fuzz.cost.rpc import seeds_of
from fuzz.cost.search import Search
from fuzz.cost.target import TAKEN, CostTarget, Entry
from fuzz.cost.targets import TARGETS

pytestmark = [
    pytest.mark.xdist_group("fuzz"),
    pytest.mark.skipif(sys.platform != "linux", reason="memory and child processes are read from /proc"),
]
ROOT = Path(__file__).parents[2]
QUICK = ("http-completions", "grpc-Chat", "join", "mdns-packet")
"""Targets whose kept inputs every run tries."""


def test_every_route_and_every_method_has_a_target() -> None:
    files = (inference_pb2, cluster_pb2, worker_pb2, store_pb2)
    methods = [m.name for f in files for s in f.DESCRIPTOR.services_by_name.values() for m in s.methods]
    assert {f"grpc-{name}" for name in methods} <= set(TARGETS)
    assert len([name for name in TARGETS if name.startswith("http-")]) == len(BODIES) + 1  # and heads


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_within_their_bounds(name: str) -> None:
    target = TARGETS[name]
    for recipe in target.seeds().values():
        assert size(recipe) <= target.limit
        assert len(shown(recipe)) <= MAX_SHOWN


def test_a_recipe_is_no_larger_than_it_says(rng: Random) -> None:
    pool = [["cat", "[", ["rep", 20, "{},"], ["each", 40, '"', '":0,'], "]"], ["nest", 9, "[", ["hex", "ff00"], "]"]]
    pool += [["msg", 3, ["ints", 300, 1, 2]], ["int", 5, 2**63]]
    for _ in range(300):
        recipe = filled(worsened(rng.choice(pool), rng, pool, ["a", ["rep", 5, "é"]]), 4096)
        assert len(build(recipe)) <= size(recipe) <= 4096
        assert len(shown(recipe)) <= MAX_SHOWN
        pool = [*pool[:8], recipe] if len(list(nodes(recipe))) < 40 else pool


def test_a_field_of_every_kind_gets_a_seed() -> None:
    seeds = seeds_of(inference_pb2.ChatRequest.DESCRIPTOR)
    for name, recipe in seeds.items():
        if name not in ("no message", "unknown groups"):  # of those so many are refused
            inference_pb2.ChatRequest.FromString(build(filled(recipe, 2048)))
    assert {"messages of nothing", "messages.content as text", "sampling.logit_bias with numbers"} <= set(seeds)


def replayed(*more: str) -> list[dict[str, Any]]:
    """Return the output of ``ops/fuzz --cost`` for the stored inputs, run in a child process with all of its memory."""
    command = (sys.executable, "-m", "fuzz", "--cost", *more)
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    told = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert told.stdout, told.stderr[-2000:]
    return list(json.loads(told.stdout))


def require_right(facts: list[dict[str, Any]], names: Iterable[str]) -> None:
    assert {one["target"]: one["wrong"] for one in facts if one["wrong"]} == {}
    assert {one["target"]: one["inputs"] for one in facts if one["inputs"]} == {n: len(kept(n)) for n in names}


def test_kept_inputs_are_refused_or_come_as_far_as_the_sandbox() -> None:
    require_right(replayed("--closed", *(f"--target={name}" for name in QUICK)), QUICK)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_all_kept_inputs_are_refused_or_come_as_far_as_the_sandbox() -> None:
    require_right(replayed("--closed"), names())


@pytest.mark.long
@pytest.mark.timeout(600)
def test_kept_inputs_are_refused_by_the_sandbox_or_taken() -> None:
    require_right(replayed("--replay"), names())


def test_a_valid_request_to_join_is_taken() -> None:
    """A request that is refused for its form never reaches the code behind the form."""
    request = JoinRequest(token="ab" * 4, secret="cd" * 16, csr="", id="ef" * 8, name="mac-2", clock=1e9)
    assert asyncio.run(TARGETS["join"].prepare().take(request.model_dump_json().encode())) == TAKEN


# The measurement


async def burn(copy: int) -> str:
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    return TAKEN


async def hold(copy: int) -> str:
    held = bytearray(os.urandom(1)) * (64 << 20)
    await asyncio.sleep(0)
    return TAKEN if held else ""


async def start(copy: int) -> str:
    code = "import time\nheld = b'x' * (48 << 20)\nwhile time.process_time() < 0.3: pass\nprint(1, flush=True)\ninput()"
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout
    await child.stdout.readline()
    await asyncio.sleep(3 * measure.LOOK_S)
    return TAKEN


async def fail(copy: int) -> str:
    raise KeyError("a fault")


def test_a_measurement_sees_the_loop_the_processor_memory_and_children() -> None:
    burnt, held, started = measure.measure(burn), measure.measure(hold), measure.measure(start)
    assert burnt.loop_ms >= 150
    assert burnt.cpu_s >= 0.2
    assert held.mib >= 60
    assert started.child_cpu_s >= 0.2
    assert started.child_mib >= 40
    assert {one.outcome for one in (burnt, held, started)} == {TAKEN}


def test_a_fault_is_an_outcome_and_what_lasts_too_long_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure.measure(fail).outcome.startswith("!! KeyError")
    monkeypatch.setattr(measure, "KILL_CPU_S", 0.05)
    killed = measure.measure(burn)
    assert killed.killed
    assert killed.outcome.startswith("!! killed")


def test_a_cost_counts_for_as_much_as_its_dearest_figure() -> None:
    assert Cost(50.0, 0.1, 10.0, TAKEN).score() == 1
    assert Cost(1.0, 1.0, 10.0, TAKEN).score() == 2
    assert Cost(1.0, 0.1, 768.0, TAKEN).score() == 3
    assert Cost(1.0, 0.1, 1.0, TAKEN, child_cpu_s=2.1).score(child_cpu_s=1.0) == 2


def test_the_search_finds_a_dearer_input_than_it_was_given(rng: Random) -> None:
    async def take(data: bytes) -> str:
        held = bytearray(b"x") * (len(data.partition(b"!")[2]) << 14)  # an input without the mark costs nothing
        return TAKEN if held is not None else ""

    target = CostTarget("toy", "4 KiB", 4096, 1, lambda: Entry(take), lambda: {"plain": ["rep", 40, "a"]}, ("!", "a"))
    found = Search(target, rng).run([], 16)
    assert found.inputs >= 12
    assert found.dearest[0].cost.mib > 1
