"""What ``macpipe top`` draws, without a terminal: its figures, its size, scrolling, and the keys."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from cluster.cli.keyboard import Key, parse_keys
from cluster.cli.live_figures import TokenRates, hit_share, time_shares
from cluster.cli.status import StatusView
from cluster.cli.top_view import TopView, curve
from cluster.client import (
    ClusterEvent,
    ClusterState,
    EventKind,
    LayerRange,
    LiveRequest,
    RequestState,
    Route,
    ServingState,
    StageFigures,
    StageState,
    WorkerState,
)
from cluster.core.limits import GIB

STAGES = tuple(
    StageState(
        index=i,
        worker=name,
        layers=LayerRange(8 * i, 8 * i + 8),
        weight_bytes=9 * GIB,
        cache_bytes=4 * GIB,
        input_route=Route.DIRECT,
        bubble_share=0.25,
        active_seconds=9.0,
        measured_ms=12.5,
        link_round_trip_ms=0.5 * i,
        link_bandwidth=1.25e9 * i,
    )
    for i, name in enumerate(("ada", "a-mac-with-a-very-long-name"))
)
WORKERS = tuple(
    WorkerState(f"id-{name}", name, "1", "", "", "Apple M4 Max", "metal", "", 64 * GIB, 48 * GIB, memory_used=24 * GIB)
    for name in (*(stage.worker for stage in STAGES), "spare")
)
FIGURES = tuple(StageFigures(stage.worker, stage.layers, 300.0, 100.0, 100.0) for stage in STAGES)
REQUESTS = tuple(
    LiveRequest(f"request-{i:02}", RequestState.DECODE, 512, 512, 64, 0, 3.0, tokens_per_second=21.5, stages=FIGURES)
    for i in range(40)
)
STATE = ClusterState(
    "lab",
    "1",
    ServingState.SERVING,
    model="m",
    workers=WORKERS,
    stages=STAGES,
    requests=REQUESTS,
    uptime_seconds=100.0,
    tokens_generated=1000,
    prompt_tokens=100,
    cached_tokens=25,
    queued=3,
    events=(ClusterEvent(EventKind.RECOVERY, 65.0, 4.0, "ada", "worker ada is gone; serving again: b 0-15"),),
)


def draw(view: TopView | StatusView, width: int, height: int = 30, lost: str = "") -> list[str]:
    """Return the lines of a screen, without their styles and the blanks at their ends."""
    console = Console(width=width, height=height, file=StringIO(), markup=False, emoji=False, highlight=False)
    console.print(view.draw(width, height, lost))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def view_of(*states: ClusterState) -> TopView:
    view = TopView()
    for state in states:
        view.add(state)
    return view


def later(seconds: float, tokens: int) -> ClusterState:
    return replace(STATE, uptime_seconds=100.0 + seconds, tokens_generated=1000 + tokens)


def test_a_rate_is_over_a_second_at_least() -> None:
    rates = TokenRates()
    rates.add(STATE)
    assert rates.now is None
    for seconds, tokens, rate in ((0.5, 10, 20.0), (1.0, 30, 30.0), (1.5, 60, 50.0)):
        rates.add(later(seconds, tokens))
        assert rates.now == pytest.approx(rate)


def test_a_coordinator_that_restarted_does_not_generate_minus_a_thousand_tokens() -> None:
    rates = TokenRates()
    for state in (STATE, later(1, 50), replace(STATE, uptime_seconds=2.0, tokens_generated=0)):
        rates.add(state)
    assert rates.now == 50.0
    rates.add(replace(STATE, uptime_seconds=3.0, tokens_generated=7))
    assert rates.now == 7.0


def test_shares() -> None:
    assert hit_share(STATE) == 0.25
    assert hit_share(replace(STATE, prompt_tokens=0)) is None
    parts = time_shares(REQUESTS[0])
    assert [name for name, _ in parts] == [*(stage.worker for stage in STAGES), "wait", "wire"]
    assert [share for _, share in parts] == pytest.approx([0.3, 0.3, 0.2, 0.2])
    assert time_shares(replace(REQUESTS[0], stages=())) == []
    assert curve([0, 5, 10]) == "▁▅█"
    assert curve([0, 0]) == "▁▁"


@pytest.mark.parametrize("width", [80, 160, 200])
@pytest.mark.parametrize("height", [16, 30, 60])
def test_a_screen_is_filled_and_no_larger(width: int, height: int) -> None:
    lines = draw(view_of(STATE, later(2, 100)), width, height)
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert lines[-1].startswith("q quit")
    assert lines[1].startswith("50.0 tokens/s")
    assert "37 answering, 3 queued  cache hits 25%" in lines[1]
    shown = "\n".join(lines)
    assert all(part in shown for part in ("ada", "0-7", "24/48 GiB", "75%", "12.5 ms", "request-00", "21.5"))
    assert ("0.50 ms, 10.0 Gb/s" in shown, "wait 20%" in shown) == (width >= 160, width >= 160)
    assert ("1 min ago" in shown) == (height > 16)


def test_a_screen_of_80_columns_shows_whole_ids() -> None:
    name = "chatcmpl-" + "0123456789ab" * 2
    shown = draw(view_of(replace(STATE, requests=(replace(REQUESTS[0], request_id=name, prompt_tokens=131_072),))), 80)
    assert any(line.startswith(f"{name} ") for line in shown)


def test_a_stage_without_recent_work_is_neither_busy_nor_idle() -> None:
    stages = (STAGES[0], replace(STAGES[1], bubble_share=None))
    shown = draw(view_of(replace(STATE, stages=stages)), 80)
    (heading,) = (line for line in shown if line.startswith("worker"))
    busy, unknown = (next(line for line in shown if line.startswith(name[:5])) for name in ("ada", "a-mac"))
    assert "busy    30 s" in heading
    end = heading.index("30 s") + len("30 s")
    assert (busy[:end].split()[-1], unknown[:end].split()[-1]) == ("75%", "-")
    assert "%" not in unknown


def test_keys_scroll_through_the_requests_and_stop_at_the_ends() -> None:
    view = view_of(STATE)

    def seen() -> list[str]:
        return [line.split()[0] for line in draw(view, 80) if line.startswith("request-")]

    first = seen()
    assert first[0] == "request-00"
    view.press(Key.UP)
    assert seen() == first
    view.press(Key.DOWN)
    assert seen()[0] == "request-01"
    view.press(Key.PAGE_DOWN)
    assert seen()[0] == f"request-{len(first) + 1:02}"
    for _ in range(9):
        view.press(Key.PAGE_DOWN)
    assert seen()[-1] == "request-39"
    view.press(Key.PAGE_UP)
    assert seen()[-1] == f"request-{39 - len(first):02}"
    view.add(replace(STATE, requests=REQUESTS[:2]))
    assert seen() == ["request-00", "request-01"]


@pytest.mark.parametrize("view", [TopView(), StatusView()])
def test_a_lost_coordinator_and_control_characters_are_shown(view: TopView | StatusView) -> None:
    view.add(replace(STATE, model="\x1b[2J", requests=(), queued=0))
    shown = "\n".join(draw(view, 80, lost="no answer for 3 s"))
    assert "no answer for 3 s" in shown
    assert "\x1b" not in shown
    view.add(ClusterState("lab", "1", ServingState.IDLE))
    assert "start one with `macpipe worker`" in "\n".join(draw(view, 80))


@pytest.mark.parametrize(
    ("typed", "keys"),
    [
        (b"q", [Key.QUIT]),
        (b"\x1b[A\x1b[Bj", [Key.UP, Key.DOWN, Key.DOWN]),
        (b"x\x1b[6~ \x1b[5~", [Key.PAGE_DOWN, Key.PAGE_DOWN, Key.PAGE_UP]),
        (b"\x1b", []),
        (b"\xff\x1b[Z", []),
    ],
)
def test_keys(typed: bytes, keys: list[Key]) -> None:
    assert parse_keys(typed) == keys
