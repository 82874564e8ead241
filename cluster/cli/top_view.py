"""Draws what ``macpipe top`` shows of a cluster's snapshots: a curve of its speed, its stages, requests and events."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.cli.keyboard import Key
from cluster.cli.live_figures import TokenRates, hit_share, time_shares
from cluster.cli.screen import format_bytes, format_duration, format_share, printable, table
from cluster.cli.status import NO_WORKERS, describe_models, describe_move, describe_repair
from cluster.client import ClusterState, EventKind, LiveRequest, RequestState, ServingState, StageState, WorkerState
from cluster.core.limits import OCCUPANCY_S
from cluster.core.text import figure_in_words

WIDE_COLUMNS: Final = 160
"""Narrower screens leave out what ``macpipe status`` shows as well, where a request's time went, its lane, and what was
cached of its prompt: a whole id, which ``macpipe trace`` takes, is of more use."""
BLOCKS: Final = "▁▂▃▄▅▆▇█"
BUSY_S: Final = f"{OCCUPANCY_S:.0f} s"
RIGHT: Final = frozenset({"prompt", "cached", "answer", "tokens/s", "lane", "age", BUSY_S, "step", "power"})
EVENTS: Final = 5
"""The most events that are shown; fewer on a screen that is too low for a few requests."""
LEAST_REQUESTS: Final = 5
REQUEST_HEADING: Final = 2
"""Lines of the requests' table above the first request."""
AGE_COLUMNS: Final = 14
HIGH_LOAD: Final = 0.9
"""From this share on, used memory is shown as scarce."""


class TopView:
    """What ``macpipe top`` shows. ``offset`` is the number of requests that are scrolled out of sight."""

    def __init__(self) -> None:
        self.rates = TokenRates()
        self.offset = 0
        self._page = 1

    def add(self, state: ClusterState) -> None:
        """Show this snapshot from now on."""
        self.state = state
        self.rates.add(state)

    def press(self, key: Key) -> None:
        """Scroll through the requests."""
        steps = {Key.UP: -1, Key.DOWN: 1, Key.PAGE_UP: -self._page, Key.PAGE_DOWN: self._page}
        self.offset = max(0, self.offset + steps.get(key, 0))

    def draw(self, width: int, height: int, lost: str) -> RenderableType:
        """Return a screen of ``height`` lines. 0: as many as it takes, without a word about keys."""
        state, wide = self.state, width >= WIDE_COLUMNS
        parts: list[RenderableType] = [*_head(state, self.rates, width, lost), Text()]
        parts += [_stages(state, wide=wide), Text()] if state.workers else [Text(NO_WORKERS)]
        if not height:
            return Group(*parts, *_requests(_named_requests(state), wide=wide), *_events(state, EVENTS))
        return Group(*parts, *self._rest(height - _count_lines(parts, width), wide=wide))

    def _rest(self, height: int, *, wide: bool) -> list[RenderableType]:
        """Return the requests in sight, the latest events and the keys, in ``height`` lines."""
        requests = _named_requests(self.state)
        events = _events(self.state, min(EVENTS, height - REQUEST_HEADING - LEAST_REQUESTS - 2))
        room = self._page = max(1, height - REQUEST_HEADING - len(events) - 1)
        self.offset = max(0, min(self.offset, len(requests) - room))
        seen = requests[self.offset : self.offset + room]
        blank = height - (REQUEST_HEADING + len(seen) if seen else 1) - len(events) - 1
        keys = "q quit   ↑ ↓ scroll" if len(requests) > room else "q quit"
        return [*_requests(seen, wide=wide), *[Text()] * blank, *events, Text(keys, "dim")]


def _count_lines(parts: Sequence[RenderableType], width: int) -> int:
    """Return the lines that parts take on a screen."""
    return len(Console(width=width, file=StringIO()).render_lines(Group(*parts)))


def _head(state: ClusterState, rates: TokenRates, width: int, lost: str) -> list[Text]:
    """Return the first lines: what is served, how fast, and what is wrong."""
    up = f"up {format_duration(state.uptime_seconds)}"
    name = (
        Text()
        .append(f"{printable(state.cluster)}: ", "bold")
        .append(state.state, _STATE_STYLES.get(state.state, "bold red"))
    )
    name.append(f"{printable(describe_models(state)) or ' '}  {up}")
    counts = Text("-" if rates.now is None else f"{rates.now:.1f}", "bold").append(" tokens/s")
    hits = hit_share(state)
    queued = sum(ring.queued for _, ring in state.rings)
    facts = [
        f"{len(state.all_requests) - queued} answering, {queued} queued",
        f"cache hits {'-' if hits is None else f'{hits:.0%}'}",
        f"recoveries {state.recoveries}",
    ]
    rest = Text("  " + "  ".join(facts), "not bold")
    room = min(width - counts.cell_len - rest.cell_len - 2, width // 3)
    if room >= len(BLOCKS):
        counts.append("  ").append(curve(tuple(rates.curve)[-room:]), "cyan not bold")
    counts.append(rest)
    lines = [name, counts]
    if lost:
        lines.append(Text(printable(lost), "bold red"))
    if state.repair:
        lines.append(Text(printable(describe_repair(state.repair)), "yellow"))
    elif state.problem:
        lines.append(Text(printable(f"problem: {state.problem}"), "yellow"))
    if state.activity:
        lines.append(Text(printable(state.activity), "yellow"))
    if state.move:
        lines.append(Text(printable(describe_move(state.move)), "yellow"))
    return lines + [Text(printable(f"warning: {warning}"), "yellow") for warning in state.warnings]


_STATE_STYLES: Final = {
    ServingState.SERVING: "bold green",
    ServingState.IDLE: "bold",
    ServingState.LOADING: "bold yellow",
    ServingState.TRAINING: "bold yellow",
    ServingState.RECOVERING: "bold yellow",
}


def curve(values: Sequence[float]) -> str:
    """Draw values as a row of blocks; the highest one is a whole block, and 0 is the lowest."""
    highest = max(values, default=0.0)
    if not highest:
        return BLOCKS[0] * len(values)
    return "".join(BLOCKS[min(int(value / highest * len(BLOCKS)), len(BLOCKS) - 1)] for value in values)


def bar(share: float, width: int, style: str) -> Text:
    """Draw a share from 0 to 1 as a bar of ``width`` columns."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return Text("█" * filled, style).append("░" * (width - filled), "dim")


def _stages(state: ClusterState, *, wide: bool) -> Table:
    """Return the table of stages, then of workers without one."""
    more = ("machine", "power", "link in", "reserved", "predicted") if wide else ()
    right = RIGHT | {"predicted", "reserved"}
    models = ("model",) if state.deployments else ()
    shown = table("worker", *models, "layers", "memory", "", "busy", BUSY_S, "step", *more, "state", right=right)
    by_name = {worker.name: worker for worker in state.workers}
    staged = [(by_name.get(stage.worker), name, stage) for name, ring in state.rings for stage in ring.stages]
    holding = {stage.worker for _, _, stage in staged}
    others = [(worker, "-", None) for worker in state.workers if worker.name not in holding]
    for worker, name, stage in (*staged, *others):
        first, *rest = _stage_cells(worker, stage, wide=wide)
        shown.add_row(first, *((printable(name),) if models else ()), *rest)
    return shown


def _stage_cells(worker: WorkerState | None, stage: StageState | None, *, wide: bool) -> list[Text | str]:
    columns = 12 if wide else 6
    name = worker.name if worker else stage.worker if stage else ""
    cells: list[Text | str] = [Text(printable(name), overflow="ellipsis", no_wrap=True)]
    cells.append(stage.share if stage else "-")
    cells += _memory_cells(worker, columns)
    idle = stage.bubble_share if stage else None
    cells += [Text(), "-"] if idle is None else [bar(1 - idle, columns, "green"), f"{1 - idle:.0%}"]
    cells.append(f"{figure_in_words(stage.measured_ms)} ms" if stage and stage.measured_ms else "-")
    if wide:
        cells.append(printable(worker.chip or worker.backend) if worker else "")
        cells.append(f"{worker.power_watts:.0f} W" if worker and worker.power_watts else "-")
        cells.append(_describe_link(stage))
        cells.append(format_bytes(stage.reserved_bytes + stage.prefix_bytes) if stage else "-")
        cells.append(f"{figure_in_words(stage.predicted_ms)} ms" if stage and stage.predicted_ms else "-")
    return [*cells, _describe_standing(worker)]


def _memory_cells(worker: WorkerState | None, columns: int) -> list[Text | str]:
    if worker is None or not worker.reachable or not worker.memory_limit:
        return [Text(), "-"]
    share = worker.memory_used / worker.memory_limit
    scarce = share >= HIGH_LOAD or worker.memory_pressure == "critical"
    used = bar(share, columns, "red" if scarce else "blue")
    figures = format_share(worker.memory_used, worker.memory_limit).replace(" of ", "/")
    return [used, Text(figures, no_wrap=True)]


def _describe_link(stage: StageState | None) -> str:
    if stage is None or not stage.link_bandwidth:
        return "-"
    return f"{stage.link_round_trip_ms:.2f} ms, {stage.link_bandwidth * 8 / 1e9:.1f} Gb/s"


def _describe_standing(worker: WorkerState | None) -> Text:
    if worker is None or worker.standing == "gone" or not worker.reachable:
        return Text("gone", "bold red")
    if worker.standing == "suspect":
        return Text(f"silent {format_duration(worker.silent_seconds)}", "yellow")
    if worker.lag_seconds:
        return Text("overloaded", "yellow")
    return Text("drained", "yellow") if worker.draining else Text("up", "green")


def _named_requests(state: ClusterState) -> list[tuple[str, LiveRequest]]:
    """Return all live requests, each with the name of its model if there are several."""
    return [(name, request) for name, ring in state.rings for request in ring.requests]


def _requests(requests: Sequence[tuple[str, LiveRequest]], *, wide: bool) -> list[RenderableType]:
    """Return the table of these requests, or one line if there is none."""
    if not requests:
        return [Text("no live requests", "dim")]
    cached, lane, more = (("cached",), ("lane",), ("where its time went",)) if wide else ((), (), ())
    models = ("model",) if any(name for name, _ in requests) else ()
    shown = table(
        "request", *models, "state", "prompt", *cached, "answer", "tokens/s", *lane, "age", *more, right=RIGHT
    )
    for name, one in requests:
        first, *rest = _request_cells(one, wide=wide)
        shown.add_row(first, *((printable(name),) if models else ()), *rest)
    return [shown]


_PHASE_STYLES: Final = {RequestState.DECODE: "green", RequestState.PREFILL: "cyan", RequestState.QUEUED: "yellow"}


def _request_cells(one: LiveRequest, *, wide: bool) -> list[Text | str]:
    reading = one.state is RequestState.PREFILL and one.prefilled_tokens < one.prompt_tokens
    shares = "  ".join(f"{printable(name)} {share:.0%}" for name, share in time_shares(one)) if wide else ""
    return [
        Text(printable(one.request_id), overflow="ellipsis", no_wrap=True),
        Text(one.state, _PHASE_STYLES.get(one.state, "")),
        f"{one.prefilled_tokens}/{one.prompt_tokens}" if reading else str(one.prompt_tokens),
        *((str(one.cached_tokens),) if wide else ()),
        str(one.completion_tokens),
        f"{one.tokens_per_second:.1f}" if one.tokens_per_second else "-",
        *(("-" if one.lane is None else str(one.lane),) if wide else ()),
        format_duration(one.age_seconds),
        *((Text(shares, overflow="ellipsis", no_wrap=True),) if wide else ()),
    ]


def _events(state: ClusterState, most: int) -> list[Text]:
    """Return the latest events, newest first, one line each below an empty one."""
    if most < 1 or not state.events:
        return []
    lines = []
    for event in reversed(state.events[-most:]):
        timed = event.duration_seconds and event.kind is not EventKind.RETURN
        took = f" ({format_duration(event.duration_seconds)})" if timed else ""
        age = f"{format_duration(event.age_seconds)} ago"
        line = Text(f"{age:<{AGE_COLUMNS}}", "dim", no_wrap=True, overflow="ellipsis")
        lines.append(line.append(f"  {printable(event.sentence)}{took}", "not dim"))
    return [Text(), *lines]
