"""Compares predicted with measured decode times of tiny models' stages, on unequally throttled workers.

Three 4-bit models run on 2 and on 3 workers. Each is loaded and decodes, which corrects its workers' profiles. Then it
is loaded and decodes again. The first round tests the profile alone, the second the corrected profile. All workers
share this machine, so figures are medians, and the sum over the stages matters.

``--group`` has two equal workers share each layer in place of that, over MLX's ring. The time of a sum is measured
before the first load. A group's frames correct no profile, since they say nothing of one worker's speed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import Figure, options, print_figures
from loopback import make_model, own_state, wait_serving

from cluster.cli.process_group import ProcessGroup, reserve_port
from cluster.client import Client, ClusterState

THROTTLES = {"a": 1.0, "b": 2.0, "c": 3.0}
EQUAL = {"a": 1.0, "b": 1.0}
GROUP = ("a", "b")
TOKENS = 100
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
BASE = {"rms_norm_eps": 1e-5, "max_position_embeddings": 512, "num_hidden_layers": 6, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **BASE, **WIDE},
    "qwen3": {"model_type": "qwen3", **BASE, **WIDE, "head_dim": 64, "rope_theta": 1e6},
    "gemma3": {
        "model_type": "gemma3_text", **BASE, **WIDE, "head_dim": 64, "sliding_window": 128,
        "num_key_value_heads": 2, "query_pre_attn_scalar": 64, "sliding_window_pattern": 6,
    },
}  # fmt: skip


def decoded(client: Client) -> ClusterState:
    """Return the cluster's state after one user alone has decoded enough frames."""
    client.generate(list(range(5, 13)), max_tokens=TOKENS, ignore_eos=True)
    return client.cluster()


def errors(state: ClusterState) -> tuple[float, list[str]]:
    """Return the relative error of the stages' sum, and a description of each stage."""
    expected, measured = (sum(getattr(s, f) for s in state.stages) for f in ("expected_ms", "measured_ms"))
    words = [f"{s.worker} {s.layers}: {s.expected_ms:.1f} / {s.measured_ms:.1f} ms" for s in state.stages]
    return (expected - measured) / measured, words


SHARED = ("llama", "qwen3")
"""Those of the models that mlx-lm can share among ranks."""


@dataclass(frozen=True)
class Layout:
    """Workers that are slowed down by these factors; ``grouped``: they share each layer."""

    title: str
    throttles: Mapping[str, float]
    grouped: bool = False

    @classmethod
    def pipeline(cls, workers: int) -> Layout:
        names = list(THROTTLES)[-workers:]
        return cls(f"{workers} workers", {name: THROTTLES[name] for name in names})

    @property
    def models(self) -> Sequence[str]:
        return SHARED if self.grouped else list(MODELS)

    @property
    def load(self) -> dict[str, Any]:
        """Return the options of a load."""
        chosen = {"workers": 1, "groups": [GROUP]} if self.grouped else {"workers": len(self.throttles)}
        return {**chosen, "objective": "throughput", "max_context": 512}


def run(folder: Path, layout: Layout, quiet: bool) -> list[tuple[str, float, float]]:
    """Return (model, first error, error once more or corrected) for this layout."""
    found, place = [], layout.title.replace(" ", "-")
    with ExitStack() as stack:
        fleet = stack.enter_context(ProcessGroup(folder))
        port = stack.enter_context(reserve_port("127.0.0.1"))
        cluster = f"predicted-{folder.name}-{place}"
        for name, throttle in layout.throttles.items():  # one by one: they must not disturb each other's measurement
            own = ["--cluster", cluster, "--home", str(folder / place), "--throttle", str(throttle)]
            fleet.start(name, ["worker", "--name", name, *own])
            wait_said(folder / f"{name}.log", f"worker {name} of cluster", fleet)
        first = folder / layout.models[0]
        options = ["--workers", str(layout.load["workers"]), *(["--group", "+".join(GROUP)] if layout.grouped else [])]
        options += ["--cluster", cluster, "--port", str(port), "--wait", "90"]
        fleet.start("serve", ["serve", str(first), *options, "--objective", "throughput"], own_state(folder))
        client = stack.enter_context(Client(f"127.0.0.1:{port}", timeout_s=300))
        wait_serving(fleet, client)
        for model in layout.models:
            rounds = []
            for again in (False, True):
                client.load(str(folder / model), **layout.load).wait()
                error, words = errors(decoded(client))
                rounds.append(error)
                if not quiet:
                    print(f"{layout.title}, {model}, {'again' if again else 'first'}: {'; '.join(words)}", flush=True)
            if layout.grouped and not quiet:
                print(next(iter(client.plan(str(folder / model), **layout.load).reasons)), flush=True)
            found.append((f"{model} on {layout.title}", rounds[0], rounds[1]))
    return found


def wait_said(log: Path, text: str, fleet: ProcessGroup) -> None:
    while text not in (log.read_text() if log.exists() else ""):
        fleet.check()
        time.sleep(0.1)


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--workers", type=int, nargs="*", default=[2, 3], choices=[2, 3])
    parser.add_argument("--group", action="store_true", help="a group of two equal workers in place of pipelines")
    chosen = parser.parse_args()
    layouts = [Layout("a group of 2", EQUAL, True)] if chosen.group else [Layout.pipeline(n) for n in chosen.workers]
    with tempfile.TemporaryDirectory(prefix="macpipe-") as name:
        folder = Path(name)
        for model in MODELS:
            make_model(folder / model, MODELS[model], bits=4)
        found = [one for layout in layouts for one in run(folder, layout, chosen.json)]
    again = "again" if chosen.group else "corrected"
    figures = [
        Figure(f"{name}, {kind}", "% off", [100 * error])
        for name, first, second in found
        for kind, error in (("profile", first), (again, second))
    ]
    worst = {f"worst_{k}": max(abs(one[i]) for one in found) for i, k in ((1, "profile"), (2, again))}
    print_figures("percent_off", figures, worst, chosen.json)
    sys.exit(0 if chosen.group or worst["worst_corrected"] <= 0.15 else 1)


if __name__ == "__main__":
    main()
