"""Load every stage of a checkpoint at each number of stages, and print as JSON what each load read and held.

It runs as its own process: ``python loads.py CHECKPOINT STAGES...``. It reads the counters in /proc.
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


def loads(path: Path, stages: int) -> Iterator[dict[str, int]]:
    """Bytes of the slice, bytes read, MLX's peak above what was there, and whether the folder is mapped after it."""
    shape = read_shape(path, path.name, None)
    for i, layers in enumerate(cuts(shape, stages)):
        gc.collect()
        mx.clear_cache()
        live, read = mx.get_active_memory(), bytes_read()
        mx.reset_peak_memory()
        stage = open_stage(shape, path, layers, i, stages)
        yield {
            "stages": stages,
            "stage": i,
            "weights": stage.weight_bytes,
            "read": bytes_read() - read,
            "peak": mx.get_peak_memory() - live,
            "mapped": str(path) in Path("/proc/self/smaps").read_text(),
        }
        stage.close()


def main(checkpoint: str, *stages: str) -> None:
    path = Path(checkpoint)
    list(loads(path, 1))  # modules that are imported at a first load are no bytes of the model
    print(json.dumps([load for count in stages for load in loads(path, int(count))]))


if __name__ == "__main__":
    main(*sys.argv[1:])
