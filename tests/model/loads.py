"""Load every stage of a checkpoint at each number of stages, and print as JSON what each load read and held.

It runs as its own process: ``python loads.py CHECKPOINT BITS STAGES... [--ranks RANKS]``. The weights are quantized to
BITS unless that is 0. With --ranks, each stage is a group, whose ranks load one after the other. It reads the counters
in /proc.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from cluster.model.model_shape import read_shape
from cluster.model.sharding import Seat
from model.ring import cuts, open_stage


def bytes_read() -> int:
    """Return the bytes that this process has requested from the kernel so far."""
    return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].split()[0])


def loads(path: Path, stages: int, weight_bits: int = 0, ranks: int = 1) -> Iterator[dict[str, int]]:
    """Bytes of the slice, in memory and on disk, bytes read, MLX's peak above what was there, and whether the folder is
    mapped after it.
    """
    shape = read_shape(path, path.name, None, weight_bits=weight_bits)
    stored = read_shape(path, path.name, None)
    for i, layers, rank in ((i, own, rank) for i, own in enumerate(cuts(shape, stages)) for rank in range(ranks)):
        gc.collect()
        mx.clear_cache()
        live, read = mx.get_active_memory(), bytes_read()
        mx.reset_peak_memory()
        stage = open_stage(shape, path, layers, i, stages, 0, weight_bits, Seat(rank, ranks) if ranks > 1 else None)
        yield {
            "stages": stages,
            "stage": i,
            "rank": rank,
            "weights": stage.weight_bytes,
            "stored": stored.stage_bytes(layers),
            "read": bytes_read() - read,
            "peak": mx.get_peak_memory() - live,
            "mapped": str(path) in Path("/proc/self/smaps").read_text(),
        }
        stage.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bits", type=int)
    parser.add_argument("stages", type=int, nargs="+")
    parser.add_argument("--ranks", type=int, default=1)
    chosen = parser.parse_args()
    list(loads(chosen.checkpoint, 1))  # modules that are imported at a first load are no bytes of the model
    print(json.dumps([load for n in chosen.stages for load in loads(chosen.checkpoint, n, chosen.bits, chosen.ranks)]))


if __name__ == "__main__":
    main()
