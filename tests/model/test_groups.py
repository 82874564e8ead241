"""Ranks of a group, as processes, compute what mlx-lm computes sharded alike: bit for bit, and alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from architectures import architectures, divisible
from checkpoints import mixed_quantization, write
from cluster.core.adapter import AdapterRef
from cluster.core.errors import BadFrame, InvalidOption
from cluster.core.frames import Compute, Drop, Join, Leave, Restore, Save, Step, Trim
from cluster.core.plan import ModelShape
from cluster.core.process_groups import GroupAddresses
from cluster.core.request import SamplingParams
from cluster.model.model_shape import read_shape
from cluster.model.process_group import group_environment, settle_sums, tabulate_peers
from effort import chosen
from model.proof import GREEDY, require_lanes
from model.ranks import ANSWER, group_ring, run_group
from model.ring import CHUNKS, PROMPT, Ring, cuts, open_stage, reference, tokens
from model.test_shard_map import SHARDED

FEW = SamplingParams(logprobs=True, top_logprobs=5)
"""Greedy; answers have so many log-probabilities that ranks which differ are noticed."""
ROUNDING = {"deepseek_v41": 0.05}
"""The largest difference of a logit from one process's, where it is not 1e-3: this one rounds its keys to 8 bits."""


def require_same(names: Sequence[str], size: int, bits: str, folder: Path, **more: Any) -> None:
    """Compare these in one group, since a process takes longer to start than to compare one."""
    how = {} if bits == "float32" else {"quantize": mixed_quantization}
    configs = {name: {**divisible(architectures()[name].config, size), **more} for name in names}
    paths = [str(write(config, folder / name, **how)) for name, config in configs.items()]
    ranks = run_group(size, folder / "group", "compare", *paths)
    for name, path in zip(names, paths, strict=True):
        found = [rank[path] for rank in ranks]
        assert all(rank["finite"] for rank in found), name
        assert [rank["same"] for rank in found] == [[True, True]] * size, name
        assert len({rank["digest"] for rank in found}) == 1, name
        assert found[0]["difference"] < ROUNDING.get(name, 1e-3), name
        assert found[0]["tokens"] == found[0]["whole"], name


@pytest.fixture
def ring(checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape]) -> Ring:
    """Two stages, each a group of one rank, which needs no other process."""
    found = Ring(shape("llama"), checkpoint("llama"), 1)
    group = mx.distributed.init()
    layers = cuts(shape("llama"), 2)
    found.stages = [
        open_stage(shape("llama"), checkpoint("llama"), own, i, 2, group=group) for i, own in enumerate(layers)
    ]
    return found


def test_a_guess_is_computed_whatever_was_sampled(ring: Ring, checkpoint: Callable[[str], Path]) -> None:
    """Its sample may be known on one rank before it is on another. The answer is the same after the trim."""
    want = reference(checkpoint("llama"), 3)[0]
    ring.send(Join(1, len(PROMPT), GREEDY))
    ring.prefill(1, PROMPT[:-1])
    assert ring.decode(1, PROMPT[-1]).token == want[0]
    wrong = Step(Compute.DECODE, (1,), ((want[0] + 1,),), guesses=1, start=len(PROMPT))
    reply = ring.send(step=wrong)
    assert (reply.void, len(reply.samples)) == (False, 1)
    behind_void = Step(Compute.DECODE, (1,), ((0,),), guesses=3, start=len(PROMPT) + 2)
    assert ring.send_alone(step=behind_void).void
    right = Step(Compute.DECODE, (1,), ((want[0],),), start=len(PROMPT))
    assert tokens(ring.send(Trim(1, len(PROMPT)), step=right).samples) == want[1:2]
    assert tokens(ring.go_on(1, want[1], 1)) == want[2:]


def test_what_a_group_cannot_do_is_refused(ring: Ring) -> None:
    ring.send(Join(1, len(PROMPT), GREEDY))
    with pytest.raises(BadFrame, match="holds the whole model"):
        ring.send(step=Step(Compute.DECODE, (1,), ((1,),), drafts=2))
    adapter = AdapterRef("style", "nowhere", "0" * 64)
    with pytest.raises(InvalidOption, match="several Macs share layers"):
        ring.stages[0].set_adapters({adapter.key: adapter})
    ring.stages[0].set_adapters({})


def test_ranks_that_computed_different_numbers_stop(tmp_path: Path) -> None:
    why = "rank 2 of 3 computed other numbers than rank 0 in the last step"
    assert run_group(3, tmp_path, "agree") == [["", "", why, ""]] * 3


def test_each_backend_is_told_where_the_ranks_are() -> None:
    """In the files and variables that ``mlx.launch`` gives its processes."""
    hosts = ("10.0.0.1:7001", "10.0.0.2:7002", "10.0.0.3:7003")
    ring = GroupAddresses(hosts, "ring")
    assert tabulate_peers(ring) == [[host] for host in hosts]
    assert group_environment(ring, "F") == {"MLX_HOSTFILE": "F"}
    mesh = GroupAddresses(hosts, "jaccl", (("", "a", "b"), ("c", "", "d"), ("e", "f", "")))
    assert tabulate_peers(mesh) == [[None, "a", "b"], ["c", None, "d"], ["e", "f", None]]
    assert group_environment(mesh, "F") == {"MLX_IBV_DEVICES": "F", "MLX_JACCL_COORDINATOR": hosts[0]}
    gap = replace(mesh, devices=(("", "a", ""), ("c", "", "d"), ("", "f", "")))
    assert group_environment(gap, "F")["MLX_JACCL_RING"] == "1"
    assert group_environment(GroupAddresses(hosts, "nccl"), "F")["MLX_WORLD_SIZE"] == "3"


def test_what_ranks_exchange_in_a_prompt_is_evaluated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the exchange and after it, so that no GPU waits for a rank. A compiled function is left alone."""
    evaluated: list[Any] = []
    evaluate = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: (evaluated.append(arrays), evaluate(*arrays)))
    group = mx.distributed.init()
    compiled = mx.compile(lambda array: mx.distributed.all_sum(array, group=group))
    with settle_sums():
        result = mx.distributed.all_sum(mx.ones(3) * 2, group=group)
        assert len(evaluated) == 2
        assert mx.array_equal(compiled(result), mx.full(3, 2.0))
    before = len(evaluated)
    mx.distributed.all_sum(mx.ones(3), group=group)
    assert len(evaluated) == before, "only inside the block"


def test_only_prompts_are_evaluated_sum_by_sum(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's sums stay in one chain, which is faster."""
    sums: list[bool] = []
    monkeypatch.setattr(mx.distributed, "all_sum", lambda array, **_: (sums.append(settled()), array)[1])
    original = mx.distributed.all_sum

    def settled() -> bool:
        return mx.distributed.all_sum is not original

    ring.send(Join(1, len(PROMPT), GREEDY))
    ring.prefill(1, PROMPT[:-1])
    assert sums
    assert all(sums)
    sums.clear()
    ring.decode(1, PROMPT[-1])
    assert sums
    assert not any(sums)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", chosen(SHARDED, "qwen3_5"))
def test_a_stage_of_ranks_says_what_a_stage_alone_says(name: str, tmp_path: Path) -> None:
    """Whatever its architecture compiles, and wherever its hidden states come from."""
    path = write(architectures()[name].config, tmp_path / name)
    shape = read_shape(path, "m", None)
    alone = Ring(shape, path, 1)
    ranked = Ring(shape, path, 1)
    ranked.stages = [open_stage(shape, path, own, 0, 1, group=mx.distributed.init()) for own in cuts(shape, 1)]
    assert tokens(ranked.answer(FEW, ANSWER)) == tokens(alone.answer(FEW, ANSWER))


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_two_ranks_say_what_mlx_lm_says(tmp_path: Path) -> None:
    """The limit is for a busy machine: a rank that waits keeps a core busy, maybe the one that the other needs."""
    require_same(["llama"], 2, "4+8 bit", tmp_path, num_hidden_layers=2)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("bits", ["float32", "4+8 bit"])
@pytest.mark.parametrize("size", [2, 3])
def test_every_architecture_that_divides(size: int, bits: str, tmp_path: Path) -> None:
    """In 2 ranks all do. Packs in groups of 128 are too coarse for 3."""
    packed = [name for name in SHARDED if "quantization" in architectures()[name].config]
    names = [name for name in SHARDED if name not in packed or (size == 2 and bits == "float32")]
    require_same(names, size, bits, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_groups_of_two_as_two_stages(tmp_path: Path) -> None:
    """Four processes: answers, lanes of several sequences, and prefixes, with frames as bytes between the stages."""
    path = write(divisible(architectures()["qwen3_5"].config, 2), tmp_path / "m", quantize=mixed_quantization)
    with group_ring(path, tmp_path, (2, 2)) as ring:
        assert tokens(ring.answer(FEW, ANSWER)) == ring.own
        require_lanes(ring, batchable=True)
        border = CHUNKS[0]
        ring.send(Join(1, len(PROMPT), GREEDY))
        ring.send(step=Step(Compute.PREFILL, (1,), (PROMPT[:border],)))
        ring.send(Save(1, prefix=2))
        ring.send(Leave(1))
        ring.send(Join(2, len(PROMPT), FEW), Restore(2, 2, border))
        ring.prefill(2, PROMPT[border:-1], CHUNKS[1:])
        assert tokens(ring.go_on(2, PROMPT[-1], ANSWER)) == ring.own
        ring.send(Leave(2), Drop(2))
