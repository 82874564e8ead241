"""Tokens through real daemons equal mlx-lm's, at any number of stages, by either route, beside any neighbour."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters import make_adapter
from checkpoints import SLICEABLE, make
from cluster.client import Client
from cluster.conversion.converter import convert_checkpoint
from cluster.core.errors import InvalidOption, InvalidRequest
from cluster.core.plan import Route
from cluster.core.quantization import Quantization
from cluster.model.weight_conversion import Conversion
from effort import chosen
from integration.daemons import serve_model
from integration.reference import greedy
from model.ranks import ANSWER, run_group
from model.ring import PROMPT as SHORT

pytestmark = [pytest.mark.xdist_group("session-cluster"), pytest.mark.timeout(180)]

PROMPT = [(i * 37 + 11) % 250 for i in range(600)]
"""Longer than a prefill chunk."""


@pytest.mark.parametrize("stages", chosen([1, 2, 3, 4], 2, 4))
def test_tokens_are_those_of_one_process(client: Client, llama: Path, stages: int) -> None:
    serve_model(client, llama, stages)
    expected = greedy(llama, PROMPT, 24)
    answer = client.generate(PROMPT, max_tokens=24, ignore_eos=True)
    assert answer.tokens == expected
    assert answer.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (600, 24)
    assert answer.stages[0].layers.start == 0
    assert len(answer.stages) == stages
    assert all(s.compute_ms > 0 for s in answer.stages)


def test_the_relayed_route_gives_the_same_tokens(client: Client, llama: Path) -> None:
    serve_model(client, llama, 3, route=Route.RELAY)
    assert {s.input_route for s in client.cluster().stages} == {Route.RELAY}
    relayed = client.generate(PROMPT, max_tokens=16, ignore_eos=True).tokens
    serve_model(client, llama, 3)
    assert [s.input_route for s in client.cluster().stages] == [Route.RELAY, Route.DIRECT, Route.DIRECT]
    assert client.generate(PROMPT, max_tokens=16, ignore_eos=True).tokens == relayed == greedy(llama, PROMPT, 16)


def test_given_layers_are_kept(client: Client, llama: Path) -> None:
    serve_model(client, llama, 2, layers="0-2,3")
    assert [(s.layers.start, s.layers.end) for s in client.cluster().stages] == [(0, 3), (3, 4)]
    assert client.generate(PROMPT, max_tokens=8, ignore_eos=True).tokens == greedy(llama, PROMPT, 8)


@pytest.mark.parametrize("arch", chosen(SLICEABLE, "llama_sliding", "llama_4bit", "gpt_oss", "qwen3_next"))
def test_every_architecture_over_three_daemons(client: Client, models: Path, arch: str) -> None:
    folder = make(arch, models / arch)
    serve_model(client, folder, 3)
    prompt = PROMPT[:80]
    answer = client.generate(prompt, max_tokens=12, ignore_eos=True)
    assert answer.tokens == greedy(folder, prompt, 12)


def test_a_seed_gives_the_same_text_at_any_number_of_stages(client: Client, llama: Path) -> None:
    texts = set()
    for stages in (1, 2, 4):
        serve_model(client, llama, stages)
        answer = client.generate(PROMPT[:9], max_tokens=24, temperature=1.0, top_p=0.95, seed=7, ignore_eos=True)
        texts.add((answer.text, answer.tokens))
    assert len(texts) == 1
    other = client.generate(PROMPT[:9], max_tokens=24, temperature=1.0, top_p=0.95, seed=8, ignore_eos=True)
    assert other.tokens != texts.pop()[1]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [[(i * 31 + k * 7) % 250 for i in range(3 + 90 * k)] for k in range(8)]


def test_nobody_changes_anothers_tokens(client: Client, llama: Path, prompts: list[list[int]]) -> None:
    serve_model(client, llama, 3)
    expected = [greedy(llama, p, 20) for p in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda p: client.generate(p, max_tokens=20, ignore_eos=True).tokens, prompts))
    assert answers == expected


@pytest.mark.parametrize("bits", chosen([8, 4], 4))
def test_quantised_caches_give_the_tokens_of_one_process(client: Client, models: Path, bits: int) -> None:
    folder = make("llama", models / "llama-wide", hidden_size=128, head_dim=64, num_attention_heads=2)
    serve_model(client, folder, 3, kv_bits=bits)
    answer = client.generate(PROMPT[:80], max_tokens=16, ignore_eos=True)
    assert answer.tokens == greedy(folder, PROMPT[:80], 16, kv_bits=bits)


def test_weights_that_each_worker_quantizes_give_the_tokens_of_the_converted_model(
    client: Client, models: Path
) -> None:
    folder = make("llama", models / "llama-published", hidden_size=64, intermediate_size=128)
    convert_checkpoint(folder, models / "llama-converted", Conversion(Quantization(4, 64)), lambda _: None)
    with pytest.raises(InvalidOption, match="quantize is 7; it must be 1, 2, 3, 4, 5, 6 or 8"):
        serve_model(client, folder, 3, quantize=7)
    tuned = make_adapter(models / "llama-converted", models / "llama-tuned", 1, num_layers=2, rank=1)
    serve_model(client, folder, 3, quantize=4, adapters={"tuned": str(tuned)})
    for name, adapter in (("", None), ("tuned", tuned)):
        answer = client.generate(PROMPT[:80], max_tokens=16, ignore_eos=True, adapter=name)
        assert answer.tokens == greedy(models / "llama-converted", PROMPT[:80], 16, adapter=adapter)
    weights = sum(stage.weight_bytes for stage in client.cluster().stages)
    assert weights < 0.3 * (folder / "model.safetensors").stat().st_size
    assert client.plan(str(folder), workers=3, quantize=4).stages[0].weight_bytes < weights


def test_chunks_of_any_length_give_the_tokens_of_one_process(client: Client, llama: Path) -> None:
    serve_model(client, llama, 2, prefill_chunk=7)
    answer = client.generate(PROMPT, max_tokens=4, ignore_eos=True)
    assert answer.tokens == greedy(llama, PROMPT, 4)
    with pytest.raises(InvalidRequest, match="prefill_chunk is 8193; it must be from 1 to 8192"):
        serve_model(client, llama, 2, prefill_chunk=8193)


def test_a_group_of_two_gives_the_tokens_of_mlx_lm_sharded_alike(client: Client, models: Path, tmp_path: Path) -> None:
    """Over MLX's ring, like two ranks of mlx-lm alone, whose logits agree bit for bit."""
    folder = make("llama", models / "llama-shared", num_key_value_heads=4)
    for _ in client.load(str(folder), workers=1, groups=[("ada", "bob")]):
        pass
    assert [(s.worker, s.rank, s.ranks) for s in client.cluster().stages] == [("ada", 0, 2), ("bob", 1, 2)]
    answer = client.generate(SHORT, max_tokens=ANSWER, ignore_eos=True)
    alone, other = (rank[str(folder)] for rank in run_group(2, tmp_path, "compare", str(folder)))
    assert answer.tokens == tuple(alone["tokens"])
    assert (alone["same"], alone["digest"]) == ([True, True], other["digest"])
