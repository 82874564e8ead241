"""Starts a cluster on loopback for benchmarks, and writes models of random weights for it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from cluster.cli.process_group import ProcessGroup, reserve_port
from cluster.client import Client
from cluster.core.errors import MacpipeError
from cluster.model.checkpoint import resolve_model
from cluster.model.tokenizer import load_tokenizer

GROUP = 64
"""Number of quantized weights that share a scale."""


def make_llama(
    folder: Path, hidden: int, intermediate: int, layers: int, heads: int, context: int, bits: int = 0
) -> Path:
    """Write a random llama with ``make_model``."""
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
    }
    return make_model(folder, config, bits)


def make_model(folder: Path, config: Mapping[str, Any], bits: int = 0) -> Path:
    """Write a model of random weights: fp32, or quantized to ``bits`` in groups of ``GROUP``.

    The tokenizer is the bundled one, which is enough for token ids. The vocabulary is that tokenizer's unless
    ``config`` has a ``vocab_size``.
    """
    folder.mkdir()
    config = {"vocab_size": load_tokenizer(resolve_model("faq")).vocab_size, **config}
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    if bits:
        nn.quantize(model, GROUP, bits)  # type: ignore[no-untyped-call]
        config["quantization"] = {"group_size": GROUP, "bits": bits}
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((resolve_model("faq") / name).read_bytes())
    return folder


def start_cluster(
    stack: ExitStack,
    model: Path | str,
    *options: str,
    folder: Path | None = None,
    cores: Sequence[int] = (),
    environments: Sequence[Mapping[str, str]] = ({}, {}),
    coordinator: Path | None = None,
    worker_options: Sequence[str] = (),
    spares: Sequence[str] = (),
    replicas: int = 0,
) -> Client:
    """Start a worker for each of ``environments``, and a coordinator. Return a client once the coordinator serves.

    Workers are named a, b, c and so on. Worker i is pinned to the i-th of ``cores``. ``coordinator`` is a script to run
    in place of ``macpipe``. ``spares`` are the names of more workers. Logs and state are in ``folder``; None means the
    model's parent. Workers are found by their addresses, because not every machine has multicast.

    With ``replicas``, the model is served in so many copies, one worker each; 0 makes one ring of all workers.
    """
    folder = folder or Path(model).parent
    fleet = stack.enter_context(ProcessGroup(folder))
    cluster = f"bench-{folder.name}"
    port = stack.enter_context(reserve_port("127.0.0.1"))
    count = len(environments)
    named = zip(ascii_lowercase[:count], environments, cores or [None] * count, strict=True)
    peers: list[str] = []
    for name, environment, core in (*named, *((spare, {}, None) for spare in spares)):
        own = ["--name", name, "--cluster", cluster, "--home", str(folder / name), "--profile", "off"]
        listens = stack.enter_context(reserve_port("127.0.0.1"))
        own += ["--port", str(listens), *worker_options]
        peers += ["--peer", f"127.0.0.1:{listens}"]
        with pinned(core):
            fleet.start(name, ["worker", *own], environment)
    served = ["--models", str(models_file(folder, model, replicas))] if replicas else [str(model)]
    served += ["--workers", "1" if replicas else str(count)]
    own = ["--cluster", cluster, "--port", str(port), "--wait", "90", "--peers-only", *peers, *options]
    fleet.start("serve", ["serve", *served, *own], own_state(folder), program=coordinator)
    client = stack.enter_context(Client(f"127.0.0.1:{port}", timeout_s=300))
    wait_serving(fleet, client, replicas or 1)
    return client


def models_file(folder: Path, model: Path | str, replicas: int) -> Path:
    """Write a models file that has this model in so many copies."""
    file = folder / "models.toml"
    file.write_text(f'[[model]]\nname = "copied"\nsource = {json.dumps(str(model))}\nreplicas = {replicas}\n')
    return file


def own_state(folder: Path) -> Mapping[str, str]:
    """Keep the state of a bench's coordinator apart from the user's."""
    return {"XDG_STATE_HOME": str(folder / "state")}


def wait_serving(fleet: ProcessGroup, client: Client, replicas: int = 1) -> None:
    while True:
        fleet.check()
        try:
            state = client.cluster()
            ready = [r for deployment in state.deployments for r in deployment.replicas if r.state == "serving"]
            if state.state == "serving" and (replicas < 2 or len(ready) >= replicas):
                return
        except MacpipeError:
            pass
        time.sleep(0.1)


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Pin processes that are started in the block, and their children, to ``core``.

    They are pinned from the start, because BLAS makes one thread per core that it finds. Do nothing for None, or if the
    system cannot pin processes.
    """
    if core is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
