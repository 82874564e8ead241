"""Prints a bench report: four tables on stdout, each below a sentence that describes it. It computes nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from cluster.cli.screen import console, printable, table

if TYPE_CHECKING:
    from rich.table import Table

    from cluster.cli.load_generator import BenchReport, LoadLevel
    from cluster.cli.throughput import Roofline

STAGES: Final = "Time per token of decoding, by stage. Idle: share of the time with a frame in flight."
NOTICEABLE: Final = 1.1
"""Ratio of predicted to measured time below which a prediction is not called wrong."""
WORDS: Final = frozenset({"worker", "layers"})


def show_report(report: BenchReport) -> None:
    """Print the report. Times are in milliseconds unless a column says otherwise."""
    screen = console(sys.stdout)
    rate = report.prefill_tokens_per_second
    parts = (
        (f"One prompt of {report.prompt_tokens} random tokens alone: {rate:.0f} tokens/s of prefill.", None),
        (
            "Prefill and decoding. All users send a request at once; no prompt is in the prefix cache.",
            _prompts(report.levels),
        ),
        (
            "Decoding alone. The same users send a second turn; the first one is in the prefix cache.",
            _answers(report.levels),
        ),
        (STAGES, _stages(report.levels)),
        (_describe_roofline(report), _roofline(report.roofline)),
    )
    for sentence, shown in parts:
        screen.print(sentence, soft_wrap=True)
        if shown is not None:
            screen.print(shown)
        screen.print()
    for stage in report.roofline:
        if doubt := describe_doubt(stage):
            screen.print(doubt, soft_wrap=True)
    screen.print(
        "Times are in ms unless noted. tokens/s: tokens of all users over the wall time of all.", soft_wrap=True
    )


def _describe_roofline(report: BenchReport) -> str:
    users = report.levels[0].users
    who = "one user" if users == 1 else f"{users} users"
    return f"Compute time per token for {who}. Floor: the time to read the stage's weights once."


def describe_doubt(stage: Roofline) -> str:
    """Return a warning that the stage is faster than its worker's profile allows, with the remedy; empty if it is not.

    A step reads only some experts of a mixture, so that its floor alone proves nothing: the prediction counts those.
    """
    if stage.share is None or stage.measured_ms is None or stage.share <= 1:
        return ""
    if stage.predicted_ms is not None and stage.measured_ms * NOTICEABLE >= stage.predicted_ms:
        return ""
    return (
        f"{printable(stage.worker)}: with a roofline of {share(stage.share)}, its steps are faster than its profile"
        " allows: the Mac was busy when its speed was measured; measure again there with `macpipe worker --profile new`"
    )


def _prompts(levels: tuple[LoadLevel, ...]) -> Table:
    shown = _numbers("users", "TTFT p50", "TTFT max", "TPOT p50", "TPOT p99", "tokens/s")
    for level in levels:
        t = level.prompts
        times = (t.ttft_p50_ms, t.ttft_max_ms, t.tpot_p50_ms, t.tpot_p99_ms)
        shown.add_row(str(level.users), *map(ms, times), f"{t.tokens_per_second:.1f}")
    return shown


def _answers(levels: tuple[LoadLevel, ...]) -> Table:
    powered = any(level.joules_per_token for level in levels)
    shown = _numbers("users", "TPOT p50", "TPOT p99", "tokens/s", "kept", *(("joules/token",) if powered else ()))
    for level in levels:
        t = level.answers
        rate = f"{t.tokens_per_second:.1f}"
        energy = (f"{level.joules_per_token:.2f}" if level.joules_per_token else "-",) if powered else ()
        shown.add_row(str(level.users), ms(t.tpot_p50_ms), ms(t.tpot_p99_ms), rate, share(t.kept_share), *energy)
    return shown


def _stages(levels: tuple[LoadLevel, ...]) -> Table:
    shown = _numbers("users", "stage", "worker", "layers", "compute", "wire", "wait", "idle")
    for level in levels:
        for i, stage in enumerate(level.stages):
            times = map(ms, (stage.compute_ms, stage.wire_ms, stage.wait_ms))
            who = (str(level.users) if i == 0 else "", str(i), printable(stage.worker), str(stage.layers))
            shown.add_row(*who, *times, share(stage.bubble_share))
    return shown


def _roofline(stages: tuple[Roofline, ...]) -> Table:
    from cluster.cli.screen import format_bytes

    shown = _numbers("worker", "layers", "weights", "GB/s", "floor", "predicted", "measured", "roofline")
    for s in stages:
        rate = f"{s.bandwidth / 1e9:.1f}" if s.bandwidth else "-"
        times = map(ms, (s.floor_ms, s.predicted_ms, s.measured_ms))
        who = (printable(s.worker), str(s.layers), format_bytes(s.weight_bytes))
        shown.add_row(*who, rate, *times, share(s.share))
    return shown


def _numbers(*columns: str) -> Table:
    return table(*columns, right=frozenset(columns) - WORDS)


def ms(value: float | None) -> str:
    """Format milliseconds with two decimals (a hop takes some hundredths), or a dash if unknown."""
    return "-" if value is None else f"{value:.2f}"


def share(value: float | None) -> str:
    """Format a share in percent, or a dash if unknown."""
    return "-" if value is None else f"{value:.0%}"
