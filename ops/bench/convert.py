"""Measures the memory and the time of ``macpipe convert``, and those of mlx-lm's ``convert`` in the same run.

The checkpoints have a gigabyte or more, made of headers and holes, so they take no disk space and read as zeros. Both
programs quantize them to 4 bits, each in a process of its own, which has imported everything before it is measured:

- grown: the growth of the process at its peak (VmHWM minus the earlier VmRSS, both of /proc/self/status);
- largest: bytes of the largest tensor or layer of the checkpoint, whichever is larger;
- seconds: time of the whole conversion, with its writes; cpu_seconds: processor time. The two programs take turns,
  ``--repeat`` times.

The figures are medians. ``peak_over_largest_layer`` is the worst checkpoint's grown / largest of macpipe, which should
be 2 at most; ``seconds_over_mlx_lm`` is the worst checkpoint's ratio of seconds. ``--json`` prints one JSON object on
one line. Linux only: macOS has no /proc.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from loading import KINDS, apart_from, status  # noqa: E402

MODELS = ("dense bfloat16", "experts unconverted")
PROGRAMS = ("macpipe", "mlx_lm")
FIGURES = ("seconds", "cpu_seconds", "grown")
RATIOS = ("peak_over_largest_layer", "seconds_over_mlx_lm", "cpu_seconds_over_mlx_lm")
LAYER = re.compile(r"\.layers\.\d+\.")


def make(kind: str, folder: Path) -> dict[str, int]:
    """Write a checkpoint. Return its bytes, and those of its largest tensor or layer."""
    import mlx.core as mx

    from checkpoints import EXPERTS, hollow
    from cluster.model.checkpoint import open_checkpoint

    config, layers, dtype, _, unconverted = KINDS[kind]
    names = EXPERTS if unconverted else None
    hollow({**config, "num_hidden_layers": layers}, folder, getattr(mx, dtype), names=names)
    sizes: dict[str, int] = {}
    for tensor in open_checkpoint(folder).tensors.values():
        found = LAYER.search(tensor.name)
        group = found[0] if found else tensor.name
        sizes[group] = sizes.get(group, 0) + tensor.nbytes
    return {"bytes": sum(sizes.values()), "largest": max(sizes.values())}


def convert(program: str, source: Path, target: Path) -> dict[str, float]:
    """Convert with one program in this process, which does nothing else. Return the figures."""
    from mlx_lm import convert as convert_with_mlx_lm

    from cluster.conversion.converter import convert_checkpoint
    from cluster.core.quantization import Quantization
    from cluster.model.skeleton import open_skeleton
    from cluster.model.weight_conversion import Conversion

    open_skeleton(source)  # imports the model's code
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    held, start, used = status("VmRSS"), time.monotonic(), time.process_time()
    if program == "macpipe":
        convert_checkpoint(source, target, Conversion(Quantization(4, 64)), lambda _: None)
    else:
        sys.stdout = sys.stderr  # it prints what it does
        convert_with_mlx_lm(str(source), str(target), quantize=True, q_bits=4, q_group_size=64)
        sys.stdout = sys.__stdout__
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - used
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "grown": status("VmHWM") - held}


def measure(kind: str, repeat: int) -> dict[str, Any]:
    """Return the medians of both programs for one checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        sizes = apart_from(__file__, "--make", kind, source)
        runs: dict[str, list[dict[str, float]]] = {program: [] for program in PROGRAMS}
        for i in range(repeat):
            for program in PROGRAMS[:: 1 if i % 2 else -1]:
                with tempfile.TemporaryDirectory() as made:
                    runs[program].append(apart_from(__file__, "--one", program, source, Path(made) / "out"))
    row: dict[str, Any] = {"kind": kind, **sizes}
    for program, found in runs.items():
        for figure in FIGURES:
            row[f"{program}_{figure}"] = median(run[figure] for run in found)
    row["peak_over_largest_layer"] = round(row["macpipe_grown"] / sizes["largest"], 3)
    row["mlx_lm_peak_over_largest_layer"] = round(row["mlx_lm_grown"] / sizes["largest"], 3)
    row["seconds_over_mlx_lm"] = round(row["macpipe_seconds"] / row["mlx_lm_seconds"], 3)
    row["cpu_seconds_over_mlx_lm"] = round(row["macpipe_cpu_seconds"] / row["mlx_lm_cpu_seconds"], 3)
    return row


def rows(repeat: int, shown: bool) -> Iterator[dict[str, Any]]:
    if shown:
        print(f"{'checkpoint':20} {'size':>9} {'largest':>9} program    seconds    cpu s      grown  grown/largest")
    for kind in MODELS:
        row = measure(kind, repeat)
        for program in PROGRAMS if shown else ():
            seconds, cpu_seconds, grown = (row[f"{program}_{figure}"] for figure in FIGURES)
            print(
                f"{kind:20} {row['bytes'] >> 20:5d} MiB {row['largest'] >> 20:5d} MiB {program:8} {seconds:9.1f}"
                f" {cpu_seconds:8.1f} {grown / 2**20:6.0f} MiB {grown / row['largest']:9.2f}"
            )
        yield row


def main() -> int:
    from figures import machine, options, versions

    parser = options("memory and time of a conversion, beside mlx-lm's")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="conversions by each program (default: 3)")
    parser.add_argument("--make", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=3, metavar=("PROGRAM", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make:
        print(json.dumps(make(asked.make[0], Path(asked.make[1]))))
        return 0
    if asked.one:
        print(json.dumps(convert(asked.one[0], Path(asked.one[1]), Path(asked.one[2]))))
        return 0
    found = list(rows(asked.repeat, not asked.json))
    worst = {key: max(row[key] for row in found) for key in RATIOS}
    facts = {"machine": machine(), "versions": versions()}
    print(json.dumps({"convert": found, **worst, **facts}) if asked.json else f"worst: {worst}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
