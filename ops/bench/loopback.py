"""A cluster on loopback for benchmarks: two workers, one core each, and a coordinator that serves a random llama."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

from cluster.cli.fleet import Fleet, free_port
from cluster.client import Client
from cluster.errors import MacpipeError
from cluster.model.checkpoint import resolve_model
from cluster.model.tokenizer import load_tokenizer

WORKERS = ("a", "b")


def make_llama(folder: Path, hidden: int, intermediate: int, layers: int, heads: int, context: int) -> Path:
    """Random fp32 weights; the tokenizer is the one that comes along, which is enough for token ids."""
    folder.mkdir()
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": load_tokenizer(resolve_model("faq")).vocab_size,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
    }
    mx.random.seed(0)
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((resolve_model("faq") / name).read_bytes())
    return folder


def start_cluster(
    stack: ExitStack,
    model: Path,
    *options: str,
    cores: Sequence[int] = (),
    environments: Sequence[Mapping[str, str]] = ({}, {}),
) -> Client:
    """Two workers, each with its environment, and a coordinator as processes; a client of it once it serves.

    ``cores``: worker i is pinned to the i-th of them.
    """
    fleet = stack.enter_context(Fleet(model.parent))
    cluster, port = f"bench-{model.parent.name}", free_port("127.0.0.1")
    for name, environment in zip(WORKERS, environments, strict=True):
        own = ["--name", name, "--cluster", cluster, "--home", str(model.parent / name), "--profile", "off"]
        fleet.start(name, ["worker", *own], environment)
    own = ["--workers", str(len(WORKERS)), "--cluster", cluster, "--port", str(port), "--wait", "90", *options]
    fleet.start("serve", ["serve", str(model), *own], own_state(model.parent))
    client = stack.enter_context(Client(f"127.0.0.1:{port}", timeout_s=300))
    wait_serving(fleet, client)
    if shutil.which("taskset"):
        for core, name in zip(cores, WORKERS, strict=False):
            pin(name, cluster, core)
    return client


def own_state(folder: Path) -> Mapping[str, str]:
    """What a bench's coordinator remembers is of no use to anybody's real one."""
    return {"XDG_STATE_HOME": str(folder / "state")}


def wait_serving(fleet: Fleet, client: Client) -> None:
    while True:
        fleet.check()
        try:
            if client.cluster().state == "serving":
                return
        except MacpipeError:
            pass
        time.sleep(0.1)


def pin(name: str, cluster: str, core: int) -> None:
    """Pin a worker, its engine, and all their threads."""
    daemons = subprocess.run(["pgrep", "-f", f"--name {name} --cluster {cluster}"], capture_output=True, text=True)
    for pid in daemons.stdout.split():
        children = subprocess.run(["pgrep", "-P", pid], capture_output=True, text=True).stdout.split()
        for each in (pid, *children):
            subprocess.run(["taskset", "-a", "-cp", str(core), each], capture_output=True)
