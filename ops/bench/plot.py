"""Draws the pictures of README and PERFORMANCE.md from the raw figures in ``ops/bench/results``.

    python -m pip install matplotlib && python ops/bench/plot.py

A result is a bench's output with ``--json``, stored as ``BENCH-WHERE-DATE.json``. The newest result of each bench is
drawn. A bar is the median of the rounds, and each dot is one round, to show the noise. Neither macpipe nor its tests
need this script or matplotlib.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
OURS, PALE, THEIRS, BARE = "#1f5fa8", "#7fa8d6", "#9aa5b1", "#cfd6dd"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "savefig.dpi": 160,
    "savefig.facecolor": "white",
}
Bars = Sequence[tuple[str, str, Sequence[float]]]
"""A label, a colour, and the rounds."""


def newest(bench: str) -> dict[str, Any] | None:
    """Return the newest result of a bench. Names end with dates, which sort as text."""
    found = sorted(RESULTS.glob(f"{bench}-*.json"), key=lambda path: path.stem[-10:])
    return json.loads(found[-1].read_text(encoding="utf-8")) if found else None


def bar(axes: Axes, at: float, width: float, colour: str, rounds: Sequence[float], label: str | None = None) -> None:
    """Draw a median as a bar, and its rounds as dots."""
    top = median(rounds)
    axes.bar(at, top, width, color=colour, label=label, zorder=2)
    spread = [at + width * 0.5 * (i / max(len(rounds) - 1, 1) - 0.5) for i in range(len(rounds))]
    axes.scatter(spread, rounds, s=9, color="#222222", linewidths=0, zorder=3)


def figure(rounds: Sequence[float]) -> str:
    """Format the median of the rounds with about three digits."""
    return f"{median(rounds):.{1 if median(rounds) >= 10 else 2}f}"


def tidy(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, pad=12)
    axes.set_ylabel(unit)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
    axes.yaxis.grid(visible=True, color="#e6e6e6", zorder=0)
    axes.tick_params(axis="x", length=0)


def bars(axes: Axes, what: Bars) -> None:
    for at, (_, colour, rounds) in enumerate(what):
        bar(axes, at, 0.62, colour, rounds)
    axes.set_xticks(range(len(what)), [f"{figure(rounds)}\n{label}" for label, _, rounds in what])


def gpus(four: dict[str, Any]) -> None:
    """Draw tokens/s of 1, 8 and 16 users on one, two and four GPUs, and the time to the first token.

    The first round is left out of the prompts: it prepares attention for their lengths.
    """
    two, prompts = newest("llama70b-2xh200"), newest("llama70b_prompts-2xh200")
    assert two
    assert prompts
    users = (1, 8, 16)
    sides = (
        ("mlx-lm, one GPU", THEIRS, two["rounds"], "single_decode"),
        ("macpipe, two GPUs", PALE, two["rounds"], "decode"),
        ("macpipe, four GPUs", OURS, four["rounds"], "decode"),
    )
    _, (rate, first) = plt.subplots(1, 2, figsize=(9.6, 3.6), width_ratios=(2.6, 1.5), layout="constrained")
    for at, n in enumerate(users):
        for i, (label, colour, rounds, key) in enumerate(sides):
            place = at + 0.27 * (i - 1)
            bar(rate, place, 0.24, colour, rounds[f"{key}{n}"], label if at == 0 else None)
            text = figure(rounds[f"{key}{n}"])
            rate.annotate(text, (place, 0), (0, -12), textcoords="offset points", ha="center")
    rate.set_xticks(range(len(users)), [f"\n{n} user{'s' * (n > 1)}" for n in users])
    rate.legend(loc="upper left")
    tidy(rate, "Llama 3.3 70B's shapes in 4 bits: decoding, all users together", "tokens/s")
    single, pair = two["rounds"]["single_ttft_2048"][1:], prompts["rounds"]["ttft_2048_before"][1:]
    ours = [("mlx-lm,\none GPU", THEIRS, single), ("two GPUs", PALE, pair)]
    bars(first, [*ours, ("four GPUs", OURS, four["rounds"]["ttft_2048"])])
    tidy(first, "Prompt of 2,048 tokens:\nfirst token", "seconds")


def lanes(found: dict[str, Any]) -> None:
    """Draw tokens/s of eight users, the time of a prefill, and how a long prompt delays other users."""
    rounds = found["rounds"]
    _, (rate, prompt, gap) = plt.subplots(1, 3, figsize=(9.6, 3.7), width_ratios=(2.6, 2, 2), layout="constrained")
    bars(
        rate,
        [
            ("two lanes\nof four", OURS, rounds["lanes"]),
            ("one batch\nof eight", BARE, rounds["clump"]),
            ("mlx-lm,\none core", THEIRS, rounds["single"]),
        ],
    )
    tidy(rate, "Eight users together,\ntwo stages on a core each", "tokens/s")
    bars(prompt, [("two stages", OURS, rounds["prefill"]), ("mlx-lm,\none core", THEIRS, rounds["single_prefill"])])
    tidy(prompt, "Prompt of 2,048 tokens:\nfirst token", "seconds")
    bars(gap, [("with the\nprompt", OURS, rounds["disturbed_p99"]), ("without", BARE, rounds["undisturbed_p99"])])
    tidy(gap, "Four streams beside a prompt of\n4,096: time between tokens, p99", "milliseconds")


def hop(found: dict[str, Any]) -> None:
    """Draw the time per token of a model that computes almost nothing."""
    rounds = found["rounds"]
    _, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    bars(
        axes,
        [
            ("raw sockets,\nthree hops", BARE, rounds["sockets"]),
            ("bare gRPC,\nthree hops", BARE, rounds["grpc_ring"]),
            ("mlx-lm,\none process", THEIRS, rounds["mlx_lm"]),
            ("macpipe,\ntwo stages", OURS, rounds["macpipe"]),
        ],
    )
    tidy(axes, "A token of a near-null model on loopback", "milliseconds")


PLOTS: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "gpus": ("llama70b-4xh200", gpus),
    "lanes": ("throughput", lanes),
    "hop": ("hop", hop),
}


def main() -> int:
    parser = ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=PICTURES, help="where the PNG files go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, (bench, draw) in PLOTS.items():
            found = newest(bench)
            if found is None:
                print(f"{name}: there is no result of {bench} in {RESULTS}", file=sys.stderr)
                continue
            draw(found)
            plt.savefig(folder / f"{name}.png")
            plt.close()
            print(folder / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
