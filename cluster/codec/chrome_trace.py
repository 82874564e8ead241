"""Convert a request's trace to Chrome's trace events, which Perfetto (ui.perfetto.dev) shows.

Each Mac is a process, and the coordinator another. The coordinator's track shows the request's phases, its tokens, and
its frames from their sending to their return. A stage's track shows its steps, and those of other requests meanwhile.
Arrows follow each frame of the request.

Send and return are times of the coordinator's clock. Waits and steps are durations that the stages measured. The rest
of a frame's time is divided equally among its hops, and a stage computes one step after the other. So no clocks of Macs
are compared, and a step's position is as exact as that division.

Times count from the request's acceptance, or from the first frame if that was sent before: Perfetto drops events with
negative times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cluster.core.frames import StageTiming
from cluster.core.request_trace import RequestTrace, TracedFrame, TracedStage

Event = dict[str, Any]
COORDINATOR: Final = 1
"""Its process id; those of Macs follow."""
REQUEST_TRACK: Final = 1
FLIGHT_TRACKS: Final = 2
"""The first track of frames in flight; frames that overlap have tracks of their own."""
WAIT_TRACKS: Final = 1000
"""The first track of frames that wait for a stage; those of computing stages come before."""


def to_chrome_trace(trace: RequestTrace) -> dict[str, Any]:
    """Return the JSON object: ``traceEvents`` with times in microseconds, ordered by time, and what it shows."""
    builder = _Builder(trace)
    events = sorted(builder.events(), key=lambda event: event["ts"])
    if events and (early := events[0]["ts"]) < 0:
        events = [event | {"ts": round(event["ts"] - early, 3)} for event in events]
    return {
        "traceEvents": [*builder.names(), *events],
        "displayTimeUnit": "ms",
        "otherData": {
            "request": trace.request_id,
            "complete": trace.complete,
            "clock": "the coordinator's; hops of a frame are assumed to take equal times",
        },
    }


@dataclass(frozen=True, slots=True)
class _Placed:
    """A step of a stage on the coordinator's clock, in microseconds: it arrives, begins after a wait, and ends.

    ``stage`` is None if the trace does not know it.
    """

    timing: StageTiming
    stage: TracedStage | None
    arrives: float
    begins: float

    @property
    def ends(self) -> float:
        return self.begins + self.timing.compute_us


class _Tracks:
    """Gives spans that overlap different tracks. Spans must come in the order of their beginnings."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._ends: list[float] = []

    def place(self, begins: float, ends: float) -> int:
        """Return the first track that is free."""
        for i, free_at in enumerate(self._ends):
            if free_at <= begins:
                self._ends[i] = ends
                return self._first + i
        self._ends.append(ends)
        return self._first + len(self._ends) - 1

    @property
    def ids(self) -> range:
        return range(self._first, self._first + len(self._ends))


class _Builder:
    """Builds the events of one trace."""

    def __init__(self, trace: RequestTrace) -> None:
        self._trace = trace
        self._stages = {epoch.epoch: epoch.stages for epoch in trace.epochs}
        self._macs: dict[str, int] = {}
        self._slices: dict[TracedStage, int] = {}
        """The track of each stage."""
        for epoch in trace.epochs:
            for stage in epoch.stages:
                self._macs.setdefault(stage.worker, COORDINATOR + 1 + len(self._macs))
                self._slices.setdefault(stage, 1 + len(self._slices))
        self._flights = _Tracks(FLIGHT_TRACKS)
        self._waits = {mac: _Tracks(WAIT_TRACKS) for mac in self._macs.values()}

    def names(self) -> Iterator[Event]:
        """Yield the names of processes and tracks. Call it after ``events``."""
        yield from _name_process(COORDINATOR, "coordinator")
        yield _name_track(COORDINATOR, REQUEST_TRACK, f"request {self._trace.request_id}")
        for track in self._flights.ids:
            yield _name_track(COORDINATOR, track, f"frames in flight {track - FLIGHT_TRACKS + 1}")
        for worker, pid in self._macs.items():
            yield from _name_process(pid, worker)
            for stage, track in self._slices.items():
                if stage.worker == worker:
                    yield _name_track(pid, track, f"layers {stage.layers}")
            for track in self._waits[pid].ids:
                yield _name_track(pid, track, f"waiting {track - WAIT_TRACKS + 1}")

    def events(self) -> Iterator[Event]:
        """Yield the request's phases and tokens, then each frame's events."""
        yield from self._phases()
        frames = sorted(self._trace.frames, key=lambda frame: frame.sent_seconds)
        waits: list[tuple[float, float, int, TracedFrame]] = []
        for flow, (frame, placed) in enumerate(zip(frames, self._place(frames), strict=True), 1):
            yield from self._frame(frame, placed, flow)
            for step in placed:
                if step.stage and step.begins > step.arrives and step.timing.compute_us:
                    waits.append((step.arrives, step.begins, self._macs[step.stage.worker], frame))
        for arrives, begins, pid, frame in sorted(waits, key=lambda wait: wait[0]):
            track = self._waits[pid].place(arrives, begins)
            yield _span(f"wait of {_describe(frame)}", _category(frame), pid, track, arrives, begins, {})

    def _phases(self) -> Iterator[Event]:
        own = [frame for frame in self._trace.frames if frame.own]
        if not own:
            return
        end_s = self._trace.ended_seconds
        last = own[-1].returned_seconds if end_s is None else end_s
        sent = min(frame.sent_seconds for frame in own)
        first = next((frame.returned_seconds for frame in own if frame.tokens), last)
        for name, begins, ends in (("queue", 0.0, sent), ("prefill", sent, first), ("decode", first, last)):
            if ends > begins and (self._trace.complete or name == "decode"):
                yield _span(name, "request", COORDINATOR, REQUEST_TRACK, begins * 1e6, ends * 1e6, {})
        for frame in own:
            for index in frame.tokens:
                yield {
                    **_event("i", f"token {index}", "token", COORDINATOR, REQUEST_TRACK, frame.returned_seconds * 1e6),
                    "s": "t",
                }

    def _place(self, frames: Sequence[TracedFrame]) -> list[list[_Placed]]:
        """Return the steps of each frame. Steps of one stage never overlap."""
        free_at: dict[str, float] = {}
        placed = []
        for frame in frames:
            timings = frame.timings
            inside = sum(t.wait_us + t.compute_us for t in timings)
            whole = (frame.returned_seconds - frame.sent_seconds) * 1e6
            hop = max(0.0, whole - inside) / (len(timings) + 1)
            at = frame.sent_seconds * 1e6
            stages = self._stages.get(frame.epoch, ())
            steps = []
            for timing in timings:
                stage = stages[timing.stage] if timing.stage < len(stages) else None
                worker = stage.worker if stage else ""
                arrives = at + hop
                begins = max(arrives + timing.wait_us, free_at.get(worker, 0.0) if timing.compute_us else 0.0)
                steps.append(_Placed(timing, stage, arrives, begins))
                at = steps[-1].ends
                if timing.compute_us:
                    free_at[worker] = at
            placed.append(steps)
        return placed

    def _frame(self, frame: TracedFrame, placed: Sequence[_Placed], flow: int) -> Iterator[Event]:
        sent, returned = frame.sent_seconds * 1e6, frame.returned_seconds * 1e6
        name, category = _describe(frame), _category(frame)
        facts = {"number": frame.number, "lane": frame.lane, "epoch": frame.epoch, "tokens": list(frame.tokens)}
        track = self._flights.place(sent, returned)
        yield _span(name, category, COORDINATOR, track, sent, returned, facts)
        if frame.own:
            yield _flow("s", flow, COORDINATOR, track, sent)
        steps = [(step, step.stage) for step in placed if step.stage and step.timing.compute_us]
        for i, (step, stage) in enumerate(steps):
            pid, tid = self._macs[stage.worker], self._slices[stage]
            measured = {"wait_us": step.timing.wait_us, "pack_us": step.timing.pack_us}
            yield _span(name, category, pid, tid, step.begins, step.ends, facts | measured)
            if frame.own:
                yield _flow("f" if i == len(steps) - 1 else "t", flow, pid, tid, step.begins)


def _describe(frame: TracedFrame) -> str:
    if frame.void:
        return "wrong guess"
    if frame.prompt_tokens:
        return f"prefill {frame.prompt_tokens}"
    if frame.rows:
        return f"decode {frame.rows}"
    return "verify" if frame.timings and any(t.compute_us for t in frame.timings) else "edits"


def _category(frame: TracedFrame) -> str:
    return "request" if frame.own else "others"


def _event(phase: str, name: str, category: str, pid: int, tid: int, ts: float) -> Event:
    return {"ph": phase, "name": name, "cat": category, "pid": pid, "tid": tid, "ts": round(ts, 3), "dur": 0}


def _span(name: str, category: str, pid: int, tid: int, begins: float, ends: float, args: dict[str, Any]) -> Event:
    event = _event("X", name, category, pid, tid, begins)
    return event | {"dur": round(ends - begins, 3), "args": args}


def _flow(phase: str, flow: int, pid: int, tid: int, ts: float) -> Event:
    event = _event(phase, "frame", "flow", pid, tid, ts) | {"id": flow}
    return event | {"bp": "e"} if phase == "f" else event


def _name_process(pid: int, name: str) -> Iterator[Event]:
    yield _event("M", "process_name", "", pid, 0, 0) | {"args": {"name": name}}
    yield _event("M", "process_sort_index", "", pid, 0, 0) | {"args": {"sort_index": pid}}


def _name_track(pid: int, tid: int, name: str) -> Event:
    return _event("M", "thread_name", "", pid, tid, 0) | {"args": {"name": name}}
