"""A bench's report for people: four tables on stdout, each with a line that says what it shows. It computes nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from cluster.cli.screen import console, printable, table

if TYPE_CHECKING:
    from rich.table import Table

    from cluster.cli.load_generator import BenchReport, LoadLevel
    from cluster.cli.throughput import Roofline

STAGES: Final = "Where a token's time goes, of answers alone. Idle: of the time in which the ring was in use."
WORDS: Final = frozenset({"worker", "layers"})


def show_report(report: BenchReport) -> None:
    """Print it. Milliseconds, unless it says otherwise."""
    screen = console(sys.stdout)
    rate = report.prefill_tokens_per_second
    parts = (
        (f"One prompt of {report.prompt_tokens} random tokens alone: {rate:.0f} tokens/s of prefill.", None),
        ("Prompts and answers. All users ask at once; nothing is kept of their prompts.", _prompts(report.levels)),
        ("Answers alone. The same users go on; the stages kept what was said.", _answers(report.levels)),
        (STAGES, _stages(report.levels)),
        (_roofline_words(report), _roofline(report.roofline)),
    )
    for sentence, shown in parts:
        screen.print(sentence, soft_wrap=True)
        if shown is not None:
            screen.print(shown)
        screen.print()
    screen.print(
        "ms, but where it says otherwise; tokens/s: tokens of all users over the wall time of all", soft_wrap=True
    )


def _roofline_words(report: BenchReport) -> str:
    users = report.levels[0].users
    who = "one user" if users == 1 else f"{users} users"
    return f"Compute of a token for {who}, beside the time to read the slice's weights once (floor) and the plan's own."


def _prompts(levels: tuple[LoadLevel, ...]) -> Table:
    shown = _numbers("users", "TTFT p50", "TTFT max", "TPOT p50", "TPOT p99", "tokens/s")
    for level in levels:
        t = level.prompts
        times = (t.ttft_p50_ms, t.ttft_max_ms, t.tpot_p50_ms, t.tpot_p99_ms)
        shown.add_row(str(level.users), *map(ms, times), f"{t.tokens_per_second:.1f}")
    return shown


def _answers(levels: tuple[LoadLevel, ...]) -> Table:
    shown = _numbers("users", "TPOT p50", "TPOT p99", "tokens/s", "kept")
    for level in levels:
        t = level.answers
        rate = f"{t.tokens_per_second:.1f}"
        shown.add_row(str(level.users), ms(t.tpot_p50_ms), ms(t.tpot_p99_ms), rate, share(t.kept_share))
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
    from cluster.cli.screen import bytes_in_words

    shown = _numbers("worker", "layers", "weights", "GB/s", "floor", "predicted", "measured", "roofline")
    for s in stages:
        rate = f"{s.bandwidth / 1e9:.1f}" if s.bandwidth else "-"
        times = map(ms, (s.floor_ms, s.predicted_ms, s.measured_ms))
        who = (printable(s.worker), str(s.layers), bytes_in_words(s.weight_bytes))
        shown.add_row(*who, rate, *times, share(s.share))
    return shown


def _numbers(*columns: str) -> Table:
    return table(*columns, right=frozenset(columns) - WORDS)


def ms(value: float | None) -> str:
    """Milliseconds with two decimals: a hop is some hundredths; a dash for what is not known."""
    return "-" if value is None else f"{value:.2f}"


def share(value: float | None) -> str:
    """In percent; a dash for what is not known."""
    return "-" if value is None else f"{value:.0%}"
