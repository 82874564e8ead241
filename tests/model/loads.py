"""Load every stage of a checkpoint at each number of stages, and print as JSON what each load read and held.

It runs as its own process: ``python loads.py CHECKPOINT BITS STAGES...``. The weights are quantized to BITS unless that
is 0. It reads the counters in /proc.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from cluster.model.model_shape import read_shape
from model.ring import cuts, open_stage


def bytes_read() -> int:
    """Return the bytes that this process has requested from the kernel so far."""
    return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].split()[0])


def loads(path: Path, stages: int, weight_bits: int = 0) -> Iterator[dict[str, int]]:
    """Bytes of the slice, in memory and on disk, bytes read, MLX's peak above what was there, and whether the folder is
    mapped after it.
    """
    shape = read_shape(path, path.name, None, weight_bits=weight_bits)
    stored = read_shape(path, path.name, None)
    for i, layers in enumerate(cuts(shape, stages)):
        gc.collect()
        mx.clear_cache()
        live, read = mx.get_active_memory(), bytes_read()
        mx.reset_peak_memory()
        stage = open_stage(shape, path, layers, i, stages, 0, weight_bits)
        yield {
            "stages": stages,
            "stage": i,
            "weights": stage.weight_bytes,
            "stored": stored.stage_bytes(layers),
            "read": bytes_read() - read,
            "peak": mx.get_peak_memory() - live,
            "mapped": str(path) in Path("/proc/self/smaps").read_text(),
        }
        stage.close()


def main(checkpoint: str, weight_bits: str, *stages: str) -> None:
    path, bits = Path(checkpoint), int(weight_bits)
    list(loads(path, 1))  # modules that are imported at a first load are no bytes of the model
    print(json.dumps([load for count in stages for load in loads(path, int(count), bits)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
