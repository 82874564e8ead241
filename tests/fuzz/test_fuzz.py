"""The short fuzz run: every target accepts its seeds, handles earlier findings, and tries some new inputs."""

from __future__ import annotations

import random

import pytest

from fuzz.run import Runner, corpus, run
from fuzz.targets import TARGETS

pytestmark = pytest.mark.xdist_group("fuzz")
INPUTS = 6_000
LONG_INPUTS = 200_000
SHARES = sum(target.share for target in TARGETS.values())


def fails(runner: Runner) -> str:
    return "\n".join(f"{f.error} at {f.where}, by {f.data!r}" for f in runner.ran.findings.values())


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_what_is_whole_and_refuses_what_was_found(name: str) -> None:
    runner = Runner(TARGETS[name])
    for seed in runner.prepared.seeds:
        runner.one(seed)
    assert not runner.ran.findings, fails(runner)
    assert runner.ran.taken, f"no seed is taken, so what is behind it is never reached: {runner.refusal}"
    for data in corpus(name):
        runner.one(data)
    assert not runner.ran.findings, fails(runner)


@pytest.mark.parametrize("inputs", [INPUTS, pytest.param(LONG_INPUTS, marks=pytest.mark.long)])
def test_spoiled_inputs_raise_typed_errors_alone(inputs: int, rng: random.Random) -> None:
    seed = rng.randrange(2**32)
    print(f"again with: ops/fuzz --inputs {inputs} --seed {seed}")
    for target in TARGETS.values():
        ran = run(target, max(1, round(inputs * target.share / SHARES)), seed)
        assert not ran.findings, f"{target.name}: {[(f.error, f.where, f.data) for f in ran.findings.values()]}"
