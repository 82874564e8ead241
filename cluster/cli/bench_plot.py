"""Draws a bench report as an SVG picture: tokens per second by number of users, and how long each stage was idle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor, log10
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

from cluster.cli.screen import printable

if TYPE_CHECKING:
    from cluster.cli.load_generator import BenchReport

WIDTH: Final = 960
HEIGHT: Final = 450
PLOT: Final = (70, 80, 360, 250)
"""Left, top, width and height of the first plot; the second one is ``SECOND`` to the right."""
SECOND: Final = 480
INK: Final = "#24292f"
LINES: Final = "#d8dee4"
COLORS: Final = ("#0969da", "#bf3989", "#1a7f37", "#9a6700", "#8250df", "#cf222e", "#0a7ea4", "#57606a")
"""Of lines and stages in order; a ring of more stages begins again."""
TICKS: Final = 5


def draw_report(report: BenchReport) -> str:
    """Return the picture as SVG text. It names no font file and no other host."""
    users = [level.users for level in report.levels]
    rates = [
        ("prefill and decoding", [level.prompts.tokens_per_second for level in report.levels]),
        ("decoding alone", [level.answers.tokens_per_second for level in report.levels]),
    ]
    stages = report.levels[0].stages
    idle = [
        (f"{stage.worker} {stage.layers}", [_bubble(report, level, i) for level in range(len(users))])
        for i, stage in enumerate(stages)
    ]
    title = f"{report.model}: prompts of {report.prompt_tokens} tokens, answers of {report.answer_tokens}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        f' font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(PLOT[0], 28, title, size=15),
        *_draw_lines(users, rates),
        *_draw_bars(users, idle),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _bubble(report: BenchReport, level: int, stage: int) -> float | None:
    stages = report.levels[level].stages
    return stages[stage].bubble_share if stage < len(stages) else None


def _draw_lines(users: Sequence[int], lines: Sequence[tuple[str, Sequence[float]]]) -> list[str]:
    """Return the first plot: a line for each kind of turn, with the numbers of users at equal distances."""
    left, top, width, height = PLOT
    most = ceil_nicely(max((value for _, values in lines for value in values), default=0.0))
    parts = _frame(left, "tokens/s of all users", users, most, lambda value: f"{value:g}")
    for (name, values), color, row in zip(lines, COLORS, range(len(lines)), strict=False):
        points = [
            (left + width * (i + 0.5) / len(users), top + height * (1 - value / most)) for i, value in enumerate(values)
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in points]
        parts += [
            _text(x, y + (18 if row == 0 else -9), f"{value:.1f}", anchor="middle", size=11)
            for (x, y), value in zip(points, values, strict=True)
        ]
        parts += _key(left, row, name, color)
    return parts


def _draw_bars(users: Sequence[int], stages: Sequence[tuple[str, Sequence[float | None]]]) -> list[str]:
    """Return the second plot: for each number of users, a bar for each stage; none where its idle time is unknown."""
    left, top, width, height = PLOT[0] + SECOND, *PLOT[1:]
    parts = _frame(left, "idle share of each stage", users, 1.0, lambda value: f"{value:.0%}")
    slot = width / len(users)
    bar = slot * 0.8 / max(len(stages), 1)
    for row, (name, values) in enumerate(stages):
        color = COLORS[row % len(COLORS)]
        for i, value in enumerate(values):
            if value is not None:
                x = left + slot * (i + 0.1) + bar * row
                size = f'width="{bar:.1f}" height="{height * value:.1f}"'
                parts.append(f'<rect x="{x:.1f}" y="{top + height * (1 - value):.1f}" {size} fill="{color}"/>')
        if row < len(COLORS):
            parts += _key(left, row, name, color)
    return parts


def _frame(left: float, title: str, users: Sequence[int], most: float, describe: Callable[[float], str]) -> list[str]:
    """Return a plot's title, its horizontal lines with their values, and the numbers of users below it."""
    _, top, width, height = PLOT
    parts = [_text(left, top - 24, title, size=13)]
    for i in range(TICKS + 1):
        y = top + height * (1 - i / TICKS)
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="{LINES}"/>')
        parts.append(_text(left - 8, y + 4, describe(most * i / TICKS), anchor="end", size=11))
    for i, count in enumerate(users):
        x = left + width * (i + 0.5) / len(users)
        parts.append(_text(x, top + height + 18, str(count), anchor="middle"))
    return [*parts, _text(left + width / 2, top + height + 36, "users", anchor="middle")]


def _key(left: float, row: int, name: str, color: str) -> list[str]:
    """Return the entry of a line or a stage below a plot; two fit side by side."""
    x, y = left + (row % 2) * PLOT[2] / 2, PLOT[1] + PLOT[3] + 58 + (row // 2) * 16
    shown = name if len(name) <= 24 else f"{name[:23]}…"
    return [f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{color}"/>', _text(x + 14, y, shown, size=10)]


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(printable(text))}</text>'


def ceil_nicely(value: float) -> float:
    """Return the least of 1, 2, 2.5, 5 and 10 times a power of ten that is not below ``value``; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** floor(log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value)
