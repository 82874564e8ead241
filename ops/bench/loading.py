"""Measures what a worker reads and holds of a model, compared with the bytes of its slice.

The checkpoint has a gigabyte or more, made of headers and holes, so it takes no disk space and reads as zeros. Each
stage is loaded in a separate process, as a worker's engine does it. The figures of that process:

- read: bytes requested from the kernel while loading (rchar of /proc/self/io, with headers and JSON; cached pages count
  too), over the bytes of the slice;
- arrays: the peak of MLX's live arrays, over the bytes of the slice;
- grown: the growth of the process at its peak (VmHWM minus the earlier VmRSS, both of /proc/self/status), over the
  bytes of the slice, with MLX's spare buffers, the model's code and its trace;
- mapped: bytes of the model's files that are still mapped into memory at the end (/proc/self/smaps): should be 0.

Each figure is of one whole load. ``--json`` prints one JSON object on one line. Linux only: macOS has no /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

DENSE = {
    "model_type": "llama", "hidden_size": 2560, "intermediate_size": 6912, "num_attention_heads": 20,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": 32000, "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {
    **DENSE, "model_type": "qwen3_moe", "hidden_size": 1536, "head_dim": 64, "num_experts": 32,
    "num_experts_per_tok": 4, "moe_intermediate_size": 640, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "norm_topk_prob": True,
    "rope_theta": 10000.0,
}  # fmt: skip
KINDS: dict[str, tuple[dict[str, Any], int, str, bool, bool]] = {
    "dense float32": (DENSE, 6, "float32", False, False),
    "dense bfloat16": (DENSE, 12, "bfloat16", False, False),
    "dense 4+8 bit": (DENSE, 36, "bfloat16", True, False),
    "experts bfloat16": (EXPERTS, 15, "bfloat16", False, False),
    "experts 4+8 bit": (EXPERTS, 30, "bfloat16", True, False),
    "experts unconverted": (EXPERTS, 15, "bfloat16", False, True),
}
"""Config, layers, type of the weights, whether quantized, whether each expert is a separate tensor."""


def status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{field}:")[2].split()[0]) * 1024


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].split()[0])


def mapped(folder: Path) -> int:
    """Return how many bytes of this folder's files are mapped into this process."""
    lines = [line.split() for line in Path("/proc/self/smaps").read_text().splitlines() if str(folder) in line]
    bounds = [line[0].partition("-") for line in lines]
    return sum(int(end, 16) - int(start, 16) for start, _, end in bounds)


def load(folder: Path, stages: int, index: int, layers: tuple[int, int], fingerprint: str) -> dict[str, float]:
    """Load one stage in this process, which does nothing else. Return the bytes of the slice, and the figures."""
    import mlx.core as mx

    from cluster.core.plan import LayerRange, ModelRef, StageSpec
    from cluster.model.stage import load_stage

    spec = StageSpec(1, index, stages, ModelRef("bench", str(folder), fingerprint), LayerRange(*layers), 256)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    held, live, read = status("VmRSS"), mx.get_active_memory(), bytes_read()
    stage = load_stage(spec, folder, lambda _done, _total: None)
    return {
        "slice": stage.weight_bytes,
        "read": bytes_read() - read,
        "arrays": mx.get_peak_memory() - live,
        "grown": status("VmHWM") - held,
        "mapped": mapped(folder),
    }


def make(kind: str, folder: Path) -> list[tuple[int, int, tuple[int, int], str]]:
    """Write a checkpoint. Return the stages, index, layers and fingerprint of each load to measure."""
    import mlx.core as mx

    from checkpoints import EXPERTS as SPLIT
    from checkpoints import hollow, mixed_quantization
    from cluster.model.model_shape import read_shape
    from model.ring import cuts

    config, layers, dtype, quantized, unconverted = KINDS[kind]
    quantize = mixed_quantization if quantized else None
    names = SPLIT if unconverted else None
    hollow({**config, "num_hidden_layers": layers}, folder, getattr(mx, dtype), quantize, names)
    shape = read_shape(folder, "bench", 256)
    return [
        (stages, index, (own.start, own.end), shape.model.fingerprint)
        for stages in (2, 3)
        for index, own in enumerate(cuts(shape, stages))
    ]


def apart_from(script: str, *arguments: object) -> Any:
    """Return the answer of a script in a new process, so that no run affects the figures of another."""
    command = [sys.executable, script, *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(kind: str, folder: Path) -> Iterator[dict[str, Any]]:
    for stages, index, layers, fingerprint in apart_from(__file__, "--make", kind, folder):
        found = apart_from(__file__, "--one", folder, json.dumps([stages, index, layers, fingerprint]))
        ratios = {key: round(found[key] / found["slice"], 4) for key in ("read", "arrays", "grown")}
        yield {"kind": kind, "stages": stages, "stage": index, **found, **ratios}


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['kind']:20} {row['stage'] + 1} of {row['stages']} {row['slice'] / 2**20:9.0f} MiB"
        f" {row['read']:8.4f} {row['arrays']:8.4f} {row['grown']:8.4f} {row['mapped']:8d}"
    )


def main() -> int:
    from figures import machine, options, versions

    parser = options("what a worker reads and holds of a model, beside the bytes of its slice")
    parser.add_argument("--make", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "LOAD"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make:
        print(json.dumps(make(asked.make[0], Path(asked.make[1]))))
        return 0
    if asked.one:
        print(json.dumps(load(Path(asked.one[0]), *json.loads(asked.one[1]))))
        return 0
    rows = []
    if not asked.json:
        print(f"{'checkpoint':20} stage        slice       read   arrays    grown   mapped")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(kind, Path(folder)):
                rows.append(row)
                if not asked.json:
                    show(row)
    worst = {key: max(row[key] for row in rows) for key in ("read", "arrays", "grown", "mapped")}
    facts = {"machine": machine(), "versions": versions()}
    print(json.dumps({"loading": rows, "worst": worst, **facts}) if asked.json else f"worst: {worst}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
