"""The file that Perfetto opens: the form of each event, and that no stage computes two steps at once."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from cluster.codec.chrome_trace import COORDINATOR, FLIGHT_TRACKS, REQUEST_TRACK, WAIT_TRACKS, to_chrome_trace
from cluster.core.frames import StageTiming
from cluster.core.plan import LayerRange
from cluster.core.request_trace import RequestTrace, TracedEpoch, TracedFrame, TracedStage

EPOCHS = (
    TracedEpoch(1, (TracedStage("ada", LayerRange(0, 4)), TracedStage("bob", LayerRange(4, 8)))),
    TracedEpoch(2, (TracedStage("ada", LayerRange(0, 8)),)),
)


def frame(number: int, sent_ms: float, back_ms: float, *times: tuple[int, int], **more: Any) -> TracedFrame:
    """A frame of the request that waited and computed ``times`` microseconds on its stages."""
    made = TracedFrame(
        epoch=1,
        lane=0,
        number=number,
        sent_seconds=sent_ms / 1e3,
        returned_seconds=back_ms / 1e3,
        own=True,
        void=False,
        prompt_tokens=0,
        rows=1,
        timings=tuple(StageTiming(i, wait, compute, 5) for i, (wait, compute) in enumerate(times)),
    )
    return replace(made, **more)


FRAMES = (
    frame(0, 1, 11, (500, 4000), (0, 4000), prompt_tokens=512, rows=0),
    frame(1, 2, 16, (3000, 4000), (1000, 4000), prompt_tokens=100, rows=0, tokens=(0,)),
    frame(2, 16, 19, (0, 1000), (0, 1000), tokens=(1,)),
    frame(3, 16.2, 19.5, (500, 1000), (0, 1000), own=False),
    frame(4, 16.4, 19.6, (0, 0), (0, 0), void=True, rows=0, own=False),
    frame(5, 30, 33, (0, 2500), epoch=2, tokens=(2,)),
    frame(6, 33, 33.5, rows=0, own=False),
)
TRACE = RequestTrace("r1", 612, 0.034, True, EPOCHS, FRAMES)


def spans(pid: int | None = None) -> list[dict[str, Any]]:
    events = to_chrome_trace(TRACE)["traceEvents"]
    return [event for event in events if event["ph"] == "X" and pid in (None, event["pid"])]


def test_every_event_has_what_viewers_need() -> None:
    text = json.dumps(to_chrome_trace(TRACE), allow_nan=False)
    events = json.loads(text)["traceEvents"]
    for event in events:
        assert {"ph", "name", "cat", "ts", "dur", "pid", "tid"} <= event.keys()
        assert event["ph"] in "XMistf"
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["ts"] >= 0 <= event["dur"]
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    macs = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert macs == {1: "coordinator", 2: "ada", 3: "bob"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] != "M"} == named.keys()
    assert {"request r1", "layers 0-3", "layers 4-7", "layers 0-7"} <= set(named.values())
    timed = [event["ts"] for event in events if event["ph"] != "M"]
    assert timed == sorted(timed)


def test_frames_from_before_the_request_shift_all_times_and_none_is_negative() -> None:
    """Perfetto drops events with negative times. A frame of others may be in flight when the request is accepted."""
    early = frame(7, -2, 1, (0, 1000), (0, 1000), own=False)
    shifted = to_chrome_trace(replace(TRACE, frames=(early, *FRAMES)))["traceEvents"]
    assert min(event["ts"] for event in shifted) == 0
    tokens = [(e["name"], e["ts"]) for e in shifted if e["ph"] == "i"]
    assert tokens == [("token 0", 18000), ("token 1", 21000), ("token 2", 35000)]


def test_the_requests_phases_and_tokens_are_the_coordinators_times() -> None:
    phases = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in spans(COORDINATOR) if e["tid"] == REQUEST_TRACK]
    assert phases == [("queue", 0, 1000), ("prefill", 1000, 16000), ("decode", 16000, 34000)]
    tokens = [(e["name"], e["ts"]) for e in to_chrome_trace(TRACE)["traceEvents"] if e["ph"] == "i"]
    assert tokens == [("token 0", 16000), ("token 1", 19000), ("token 2", 33000)]
    sent = [(e["args"]["number"], e["ts"], e["dur"]) for e in spans(COORDINATOR) if e["tid"] >= FLIGHT_TRACKS]
    expected = [(f.number, f.sent_seconds * 1e6, (f.returned_seconds - f.sent_seconds) * 1e6) for f in FRAMES]
    assert [n for row in sent for n in row] == pytest.approx([n for row in sorted(expected) for n in row])


def test_no_track_has_two_spans_at_once() -> None:
    tracks = defaultdict(list)
    for event in spans():
        tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(tracks) >= 6
    for shown in tracks.values():
        ordered = sorted(shown)
        assert all(before[1] <= after[0] + 0.01 for before, after in pairwise(ordered))


def test_a_step_lies_within_its_frame_in_the_order_of_the_stages() -> None:
    for number in (0, 2, 5):
        sent = next(e for e in spans(COORDINATOR) if e.get("args", {}).get("number") == number)
        steps = [e for e in spans() if e["pid"] != COORDINATOR and e.get("args", {}).get("number") == number]
        edges = [sent["ts"], *(edge for e in steps for edge in (e["ts"], e["ts"] + e["dur"])), sent["ts"] + sent["dur"]]
        assert edges == sorted(edges)
        assert [step["dur"] for step in steps] == [t.compute_us for t in FRAMES[number].timings]
        gaps = [after - before for before, after in zip(edges[::2], edges[1::2], strict=True)]
        waits = [t.wait_us for t in FRAMES[number].timings]
        hops = [gap - wait for gap, wait in zip(gaps, [*waits, 0], strict=True)]
        assert hops == pytest.approx([hops[0]] * len(hops), abs=0.01)


def test_waits_and_arrows_are_shown_and_other_requests_have_no_arrows() -> None:
    waits = [(e["name"], e["dur"]) for e in spans() if e["tid"] >= WAIT_TRACKS]
    assert waits[0] == ("wait of prefill 512", 500)
    assert len(waits) == 5
    flows = defaultdict(list)
    for event in to_chrome_trace(TRACE)["traceEvents"]:
        if event["ph"] in "stf":
            flows[event["id"]].append(event["ph"])
    assert sorted("".join(phases) for phases in flows.values()) == ["sf", "stf", "stf", "stf"]
    names = [e["name"] for e in spans(COORDINATOR) if e["tid"] >= FLIGHT_TRACKS]
    assert names == ["prefill 512", "prefill 100", "decode 1", "decode 1", "wrong guess", "decode 1", "edits"]


def test_a_trace_without_frames_or_with_unknown_stages_is_still_a_trace() -> None:
    empty = to_chrome_trace(replace(TRACE, frames=(), epochs=()))
    assert {event["ph"] for event in empty["traceEvents"]} == {"M"}
    odd = to_chrome_trace(replace(TRACE, epochs=EPOCHS[1:], complete=False, ended_seconds=None))
    own = [e for e in odd["traceEvents"] if (e["pid"], e["tid"], e["ph"]) == (COORDINATOR, REQUEST_TRACK, "X")]
    assert [event["name"] for event in own] == ["decode"]
