"""Groups of workers as stages, with real daemons: the right tokens, also when a rank dies, hangs or stays away."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoints import make
from cluster.client import Client
from cluster.core.errors import InvalidOption, ModelUnsupported, NoPlan
from integration.daemons import Cluster, Daemon, children, until
from integration.reference import greedy

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
"""Ranks that wait for each other keep their cores busy, so these need minutes beside other work."""
PROMPT = [(i * 37 + 11) % 250 for i in range(40)]
TOKENS = 24
ANSWER_S = 600.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("llama"), num_key_value_heads=4)


@pytest.fixture(scope="module")
def want(model: Path) -> tuple[int, ...]:
    return greedy(model, PROMPT, TOKENS)


@pytest.fixture
def pair(cluster: Cluster) -> dict[str, Daemon]:
    return {name: cluster.worker(name, "--standby") for name in ("ada", "bob")}


@pytest.fixture
def client(cluster: Cluster, model: Path, pair: dict[str, Daemon]) -> Iterator[Client]:
    _, address = cluster.serving(model, 1, "--group", "ada+bob", wait_s=300)
    with Client(address, timeout_s=ANSWER_S) as client:
        yield client


def seats(client: Client) -> list[tuple[str, str, int, int]]:
    return [(s.worker, str(s.layers), s.rank, s.ranks) for s in client.cluster().stages]


def rank_processes(worker: Daemon) -> list[int]:
    """Return the engines of a worker but the first, which holds nothing here: the rank, and perhaps a standby."""
    return children(worker.process.pid)[1:]


def answer(client: Client) -> tuple[int, ...]:
    return client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True).tokens


def answer_through(client: Client, harm: Callable[[], None]) -> tuple[int, ...]:
    """Return an answer during which something is done at its third token."""
    stream = client.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True)
    tokens = []
    for token in stream:
        tokens.append(token.token)
        if len(tokens) == 3:
            harm()
    return tuple(tokens)


def signal_all(worker: Daemon, number: int) -> None:
    for pid in rank_processes(worker):
        os.kill(pid, number)


def test_answers_survive_a_rank_that_dies_and_one_that_hangs(
    client: Client, pair: dict[str, Daemon], want: tuple[int, ...]
) -> None:
    """All ranks are then replaced: MLX cannot take a new one into a group, nor leave one."""
    whole = [("ada", "0-3", 0, 2), ("bob", "0-3", 1, 2)]
    assert seats(client) == whole
    assert answer(client) == want
    assert answer(client) == want, "from a kept prefix"
    before = rank_processes(pair["ada"])[0]
    assert answer_through(client, lambda: signal_all(pair["bob"], signal.SIGKILL)) == want
    assert seats(client) == whole
    assert before not in rank_processes(pair["ada"])
    assert answer_through(client, lambda: signal_all(pair["ada"], signal.SIGSTOP)) == want
    assert seats(client) == whole
    assert client.cluster().recoveries == 2


def test_what_is_left_of_a_group_serves_alone(client: Client, pair: dict[str, Daemon], want: tuple[int, ...]) -> None:
    assert answer_through(client, lambda: os.kill(pair["bob"].process.pid, signal.SIGKILL)) == want
    until(lambda: client.cluster().state == "serving", ANSWER_S)
    assert seats(client) == [("ada", "0-3", 0, 1)]
    assert answer(client) == want


def test_two_groups_as_two_stages(cluster: Cluster, model: Path, want: tuple[int, ...], tmp_path: Path) -> None:
    """Then what groups cannot do is refused by name, and another load dissolves them."""
    for name in ("ada", "bob", "cyd", "dee"):
        cluster.worker(name)
    _, address = cluster.serving(model, 2, "--group", "ada+bob", "--group", "cyd+dee", wait_s=600)
    with Client(address, timeout_s=ANSWER_S) as client:
        ranks = [(worker, rank) for worker, _, rank, _ in seats(client)]
        assert ranks == [("ada", 0), ("bob", 1), ("cyd", 0), ("dee", 1)]
        streams = [client.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True) for _ in range(4)]
        assert [tuple(token.token for token in stream) for stream in streams] == [want] * 4
        with pytest.raises(ModelUnsupported, match="cannot share the layers of mamba2 models"):
            client.load(str(make("mamba2", tmp_path / "mamba2")), groups=[("ada", "bob")]).wait()
        with pytest.raises(NoPlan, match="n_kv_heads is 2"):
            client.load(str(make("llama", tmp_path / "few")), groups=[("ada", "bob", "cyd", "dee")]).wait()
        with pytest.raises(InvalidOption, match="must not guess"):
            client.load(str(model), groups=[("ada", "bob")], speculate="auto").wait()
        wide = make("llama", tmp_path / "wide", num_key_value_heads=4, head_dim=64)  # narrower heads are not quantized
        client.load(str(wide), workers=1, kv_bits=8, groups=[("dee", "ada")]).wait()
        assert [(worker, ranks) for worker, _, _, ranks in seats(client)] == [("dee", 2), ("ada", 2)]
        assert answer(client) == greedy(wide, PROMPT, TOKENS, kv_bits=8)
