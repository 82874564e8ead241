"""Parsing of sizes and layers, and the folders in which state is kept."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from client.scripted import cluster_reply
from cluster.cli.bench_tables import describe_doubt
from cluster.cli.command_name import command_name
from cluster.cli.convert_progress import ConversionBar
from cluster.cli.load_generator import activities
from cluster.cli.load_progress import TerminalReport
from cluster.cli.ps import show_requests
from cluster.cli.screen import (
    console,
    format_bytes,
    format_duration,
    format_share,
    print_lines,
    printable,
    wrap_words,
)
from cluster.cli.status import describe_deviation, describe_links, describe_overload, headline, show_state
from cluster.cli.throughput import Roofline
from cluster.codec.cluster_state import decode_cluster_state
from cluster.conversion.converter import ConversionProgress
from cluster.core.cluster_state import (
    ClusterState,
    GuessCounts,
    LiveRequest,
    Repair,
    RequestState,
    ServingState,
    StageState,
    TrainingProgress,
    count_stages,
    holders_in_words,
)
from cluster.core.errors import InvalidOption
from cluster.core.json_types import to_json_types
from cluster.core.leadership import CoordinatorName, CoordinatorRole, LeadershipState, Replicate, StandbyState
from cluster.core.plan import (
    LayerRange,
    LoadProgress,
    ModelRef,
    Plan,
    PlannedStage,
    Route,
    Spare,
    Speculation,
    StageSpec,
)
from cluster.core.text import count_in_words, figure_in_words, gib_in_words, parse_layers, parse_size
from cluster.core.worker import WorkerInfo, WorkerState
from cluster.platform.paths import state_home


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("24GiB", 24 << 30),
        ("24GB", 24 * 10**9),
        ("24g", 24 * 10**9),
        ("24000MiB", 24000 << 20),
        ("1.5 TiB", 3 << 39),
        ("67108864", 64 << 20),
        ("512KiB", 512 << 10),
        ("7kb", 7000),
    ],
)
def test_sizes(written: str, size: int) -> None:
    assert parse_size(written, "--memory-limit") == size


@pytest.mark.parametrize("wrong", ["", "GiB", "-1GiB", "0", "24XB", "24 GiB of it", "1e9", "nan"])
def test_no_sizes(wrong: str) -> None:
    with pytest.raises(InvalidOption, match="24GiB"):
        parse_size(wrong, "--memory-limit")


@pytest.mark.parametrize("small", ["10", "24.5", "64B", "67108863"])
def test_a_small_size_needs_a_unit(small: str) -> None:
    with pytest.raises(InvalidOption, match=rf"--memory-limit '{small}' means \d+ bytes; add a unit, like 24GiB"):
        parse_size(small, "--memory-limit")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=64))
def test_layers_come_back_as_they_are_shown(counts: list[int]) -> None:
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    ranges = tuple(LayerRange(end - count, end) for count, end in zip(counts, ends, strict=True))
    assert parse_layers(",".join(str(one) for one in ranges)) == ranges


def test_a_single_layer_needs_no_dash() -> None:
    assert parse_layers(" 0, 1 - 3 ,4") == (LayerRange(0, 1), LayerRange(1, 4), LayerRange(4, 5))


@pytest.mark.parametrize(
    ("written", "part", "why"),
    [
        ("", "''", "not a range"),
        ("0-3,", "''", "not a range"),
        ("0-3;4-7", "'0-3;4-7'", "not a range"),
        ("1-3", "'1-3'", "layer 0"),
        ("0-3,5-7", "'5-7'", "layer 4"),
        ("0-3,3-7", "'3-7'", "layer 4"),
        ("0-3,7-4", "'7-4'", "before"),
        ("0-9999999", "'0-9999999'", "not a range"),
    ],
)
def test_wrong_layers_name_the_bad_part(written: str, part: str, why: str) -> None:
    with pytest.raises(InvalidOption) as wrong:
        parse_layers(written)
    assert part in wrong.value.sentence
    assert why in wrong.value.sentence


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MACPIPE_HOME", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert state_home() == tmp_path / ".local/state/macpipe"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert state_home() == tmp_path / "state/macpipe"
    monkeypatch.setattr("sys.platform", "darwin")
    assert state_home() == tmp_path / "Library/Application Support/macpipe"
    monkeypatch.setenv("MACPIPE_HOME", "~/elsewhere")
    assert state_home() == tmp_path / "elsewhere"
    assert state_home(Path("/given")) == Path("/given")


def test_a_model_cannot_write_elsewhere_on_the_screen() -> None:
    assert printable("a\x1b[2J\x07\x9b1m\tb\nü👩‍💻") == "a�[2J��1m\tb\nü👩‍💻"


def test_sizes_in_words() -> None:
    assert [format_bytes(n) for n in (0, 2048, 3 << 20, 3 << 29)] == ["0 B", "2.0 KiB", "3.0 MiB", "1.5 GiB"]


def test_figures_have_no_exponent() -> None:
    assert [figure_in_words(n) for n in (0.5, 12.34, 120.0, 1234.6)] == ["0.5", "12.3", "120", "1235"]
    assert [gib_in_words(n) for n in (1300 << 30, 3 << 29, 3 << 20, 100)] == [
        "1300 GiB",
        "1.5 GiB",
        "3 MiB",
        "0.0977 KiB",
    ]
    assert [format_share(n, 17 << 30) for n in (8, 3 << 29, 17 << 30)] == [
        "0 of 17 GiB",
        "1.5 of 17 GiB",
        "17 of 17 GiB",
    ]


def test_counts_and_durations_in_words() -> None:
    assert [count_in_words(n, "stage") for n in (0, 1, 2)] == ["0 stages", "1 stage", "2 stages"]
    assert [format_duration(s) for s in (3.21, 59, 7500, 276_480)] == ["3.2 s", "59 s", "2 h 5 min", "3 d 4 h"]


def test_status_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cell of its table is cut into two lines, and sentences wrap at words."""
    reply = cluster_reply()
    for worker, stage in zip(reply.workers, reply.stages, strict=True):
        worker.name = stage.worker = f"{worker.name}s-macbook-pro"
        worker.memory_limit, worker.memory_used = (17 << 30) + (700 << 20), 8
        stage.measured_ms, stage.expected_ms = 120.0, 3.0
    screen = io.StringIO()
    monkeypatch.setattr("cluster.cli.screen.console", lambda _: Console(file=screen, width=80, force_terminal=True))
    show_state(decode_cluster_state(reply))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("worker "))
    assert [line.split()[0] for line in lines[head + 2 : head + 4]] == [worker.name for worker in reply.workers]
    assert "0 of 17.7 GiB" in lines[head + 2]
    assert "120 (3) ms" in lines[head + 2]
    assert max(map(len, lines)) <= 80
    assert f"{reply.workers[0].name}: Apple M4 Max" in lines


def test_a_recovery_is_told_in_one_line() -> None:
    doing = "loading layers 0-3 on ada, layers 4-7 on bob"
    repair = Repair("cyd", "worker cyd does not answer", 4.2, doing, 12.0, 1)
    state = ClusterState("c", "1", ServingState.RECOVERING, problem=repair.cause, repair=repair)
    told = [line for line in headline(state) if "cyd" in line]
    assert told == [f"recovering: worker cyd does not answer; {doing} (for 4.2 s, 12 s expected)"]
    again = headline(replace(state, repair=replace(repair, attempts=3)))
    assert any(line.endswith("(for 4.2 s, 12 s expected, attempt 3)") for line in again)


def test_plain_facts() -> None:
    assert to_json_types({"a": (LayerRange(1, 3), float("nan"), Route.RELAY)}) == {"a": [[1, 3], None, "relay"]}


def a_worker(name: str) -> WorkerInfo:
    return WorkerInfo(name, name, "0.1.0", "h:1", "h:2", "Apple M4", "metal", "0.32.4", 1 << 36, 1 << 35)


def a_plan() -> Plan:
    model = ModelRef("big[bold]model", "/models/big", "ff")
    specs = [StageSpec(1, i, 2, model, LayerRange(4 * i, 4 * i + 4), 4096) for i in range(2)]
    stages = tuple(PlannedStage(spec, f"mac-{spec.index}", 9 << 30, 1 << 28) for spec in specs)
    return Plan(1, model, stages, Route.RELAY, 4096, 8, 2, 32)


def test_a_step_that_takes_something_else_than_was_predicted_is_told() -> None:
    held = StageState(0, "a", LayerRange(0, 4), 1, 1, Route.DIRECT, predicted_ms=51.51)
    assert describe_deviation("a", [held]) == "", "nothing was measured yet"
    assert describe_deviation("a", [replace(held, measured_ms=40.0, expected_ms=51.51)]) == ""
    for took, shown in ((10.67, "10.7 ms, faster"), (200.0, "200 ms, slower")):
        said = describe_deviation("a", [replace(held, measured_ms=took, expected_ms=51.51)])
        assert said.startswith(f"a: a step takes {shown} than the predicted 51.5 ms: the Mac ")
        assert "`macpipe worker --profile new`" in said


def test_the_links_between_stages_are_named_with_their_speed() -> None:
    first = StageState(0, "mac-1", LayerRange(0, 4), 1, 1, Route.RELAY)
    cable = {"link_round_trip_ms": 0.3, "link_bandwidth": 3.2e9, "link_interface": "Thunderbolt Bridge (bridge0)"}
    rest = [StageState(i, f"mac-{i + 1}", LayerRange(4 * i, 4 * i + 4), 1, 1, Route.DIRECT) for i in (1, 2)]
    assert describe_links([first, replace(rest[0], **cable), rest[1]]) == [
        "link: mac-1 to mac-2 over Thunderbolt Bridge (bridge0): 3.2 GB/s, round trip 0.3 ms"
    ]
    pair = [replace(first, rank=rank, ranks=2, worker=f"mac-{rank + 5}") for rank in range(2)]
    ranks = [replace(rest[0], **cable, rank=rank, ranks=2, worker=f"mac-{rank + 7}") for rank in range(2)]
    said = [line.partition(" over ")[0] for line in describe_links([*pair, *ranks])]
    assert said == ["link: mac-5 to mac-7", "link: mac-5 to mac-8"], "rank 0 sends to all"


def test_a_group_is_named_as_one_holder() -> None:
    whole = StageState(0, "ada", LayerRange(0, 4), 1, 1, Route.RELAY)
    pair = [replace(whole, index=1, worker=name, rank=rank, ranks=2) for rank, name in enumerate(("bob", "cyd"))]
    assert holders_in_words([whole, *pair]) == "ada 0-3, bob+cyd 0-3"
    assert holders_in_words([whole, replace(whole, worker="dee")], " layers ") == "ada layers 0-3, dee layers 0-3"
    assert [one.share for one in (whole, *pair)] == ["0-3", "0-3 (rank 0 of 2)", "0-3 (rank 1 of 2)"]
    state = ClusterState("lab", "1", ServingState.SERVING, stages=(whole, *pair))
    assert len(activities(state)) == 2, "of each stage that an answer names"
    assert count_stages(state.stages) == "2 stages"


def test_a_group_whose_links_leave_the_machine_is_warned_of() -> None:
    stage = StageState(0, "ada", LayerRange(0, 4), 1, 1, Route.RELAY)
    pair = tuple(replace(stage, worker=name, rank=rank, ranks=2) for rank, name in enumerate(("ada", "bob")))

    def warnings(host: str, *stages: StageState) -> list[str]:
        macs = tuple(WorkerState(name, name, "1", "", f"{host}:7801", "", "", "", 1, 1) for name in ("ada", "bob"))
        state = ClusterState("lab", "1", ServingState.SERVING, workers=macs, stages=stages)
        return [line for line in headline(state) if line.startswith("warning")]

    assert warnings("10.0.0.5", *pair) == [
        "warning: the links between ada and bob, which share layers, are neither authenticated nor encrypted"
    ]
    assert warnings("127.0.0.1", *pair) == warnings("10.0.0.5", stage) == []


def test_a_roofline_above_100_percent_is_told_where_it_shows_a_wrong_profile() -> None:
    honest = Roofline("a", LayerRange(0, 4), 1, 1.0, 10.0, 12.0, 12.5, 0.8)
    fast = replace(honest, measured_ms=5.0, share=2.0)
    assert describe_doubt(fast).startswith("a: with a roofline of 200%, its steps are faster than its profile allows")
    assert describe_doubt(replace(fast, predicted_ms=None)) == describe_doubt(fast)
    mixture = replace(honest, floor_ms=40.0, share=3.2)
    nothing = replace(honest, floor_ms=None, predicted_ms=None, measured_ms=None, share=None)
    assert [describe_doubt(stage) for stage in (honest, mixture, nothing)] == [""] * 3


def test_an_overloaded_machine_is_named_with_the_way_out() -> None:
    said = describe_overload("ada", 1.26)
    assert said.startswith("ada: the machine is overloaded and responds up to 1.3 s late")
    assert "`macpipe drain ada`" in said
    state = ClusterState("c", "1", ServingState.IDLE, uptime_seconds=1.0)
    assert not [line for line in headline(state) if "overloaded" in line]
    (own,) = [line for line in headline(replace(state, lag_seconds=0.5)) if "overloaded" in line]
    assert own.startswith("problem: the coordinator's machine is overloaded")


def test_guesses_are_shown_with_their_window_and_with_what_they_lack() -> None:
    state = ClusterState("c", "1", ServingState.SERVING, uptime_seconds=1.0)
    assert not [line for line in headline(state) if "speculation" in line]
    state = replace(state, speculation=Speculation.AUTO)
    assert "speculation (auto): no guesses yet" in headline(state)
    live = LiveRequest("r", RequestState.DECODE, 3, 3, 9, 0, 1.0, guessed_tokens=4, window=2)
    counts = (GuessCounts("ngram", 8, 6, 2), GuessCounts("draft", 0, 0, 0))
    state = replace(state, guesses=counts, requests=(live, replace(live, window=1)), guesses_without_room=3)
    assert (
        "speculation (auto): ngram 6 of 8 guesses right (75%); up to 2 frames of a request in flight; "
        "up to 1.8 tokens for each pass through the stages; no memory for the marks of guesses 3 times"
    ) in headline(state)
    rows = replace(state, guesses=(replace(counts[0], rows=4),), requests=(), guesses_without_room=0)
    assert "speculation (auto): ngram 6 of 8 guesses right (75%), 4 in rows" in headline(rows)
    drafted = replace(state, guesses=(), requests=(), guesses_without_room=0, draft_worker="cyd")
    assert "speculation (auto, draft model on cyd): no guesses yet" in headline(drafted)


def test_a_worker_is_shown_with_its_chip_and_what_its_mac_runs(capsys: pytest.CaptureFixture[str]) -> None:
    mac = WorkerState("1", "ada", "1", "h:1", "h:2", "Apple M4 Max", "metal", "0", 1, 1, macos_version="15.1")
    box = replace(mac, name="bob", chip="", backend="cpu", macos_version="")
    spares = (Spare("bob", "1 worker was asked for"),)
    state = ClusterState("c", "1", ServingState.IDLE, workers=(mac, box), spares=spares)
    show_state(replace(state, draft_worker="bob"))
    drafted = capsys.readouterr().out
    assert any(line.split()[:4] == ["bob", "cpu", "draft", "model"] for line in drafted.splitlines())
    assert "spare: bob" not in drafted
    show_state(state)
    said = capsys.readouterr().out
    assert "spare: bob: 1 worker was asked for" in said
    lines = [line.split() for line in said.splitlines()]
    assert any(line[:6] == ["ada", "Apple", "M4", "Max,", "macOS", "15.1"] for line in lines)
    assert any(line[:3] == ["bob", "cpu", "-"] for line in lines)


def test_every_address_and_the_line_for_other_macs_are_printed() -> None:
    stream = io.StringIO()
    with TerminalReport(stream) as report:
        report.serving(["127.0.0.1:7700", "10.0.0.5:7700"], a_plan(), "http://127.0.0.1:8080")
    said = stream.getvalue().splitlines()
    assert said[0].endswith(" on 127.0.0.1:7700 and 10.0.0.5:7700, and on http://127.0.0.1:8080")
    assert said[1].endswith("macpipe generate -p 'Hello'")
    assert said[2] == "on another Mac of the cluster: macpipe chat --coordinator 10.0.0.5:7700"
    assert said[3] == "HTTP is for this Mac alone; --http 10.0.0.5:8080 serves other Macs too"


def test_the_other_models_that_requests_may_name_are_printed() -> None:
    stream = io.StringIO()
    with TerminalReport(stream) as report:
        report.serving(["127.0.0.1:7700"], a_plan(), "", ["big", "small", "title"])
    said = stream.getvalue().splitlines()
    assert said[0] == "serving big on 127.0.0.1:7700"
    assert said[1] == "requests may also name small and title: a model is loaded when it is needed"


def test_a_hint_names_the_script_that_is_not_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "a venv" / "python"))
    assert command_name() == "macpipe", "there is no script either"
    script = tmp_path / "a venv" / "macpipe"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    assert command_name() == f"'{script}'"
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    assert command_name() == "macpipe"


def test_a_served_model_is_reported_in_plain_lines() -> None:
    stream = io.StringIO()
    with TerminalReport(stream) as report:
        report.waiting([], 2)
        report.waiting([], 2)
        report.waiting([a_worker("mac-0")], 2)
        report.waiting([a_worker("mac-0"), replace(a_worker("mac-2"), draining=True)], 2)
        report.waiting([a_worker("mac-0"), a_worker("mac-1")], 2)
        report.waiting([a_worker("mac-0"), a_worker("mac-1")], 3)
        report.planned(a_plan())
        for percent in range(101):
            report.progress(LoadProgress("mac-0", LayerRange(0, 4), percent, 100, "reading", notices=("a is damaged",)))
        report.progress(LoadProgress("mac-2", LayerRange(0, 2), 100, 100, "ready", draft="faq-draft"))
        report.progress(LoadProgress("mac-2", LayerRange(0, 2), 100, 100, "ready", model="small"))
        report.serving(["127.0.0.1:7701"], a_plan(), "http://127.0.0.1:8081")
        report.problem("mac-1 stopped answering")
    said = stream.getvalue()
    assert "mac-2 draft model faq-draft, layers 0-1: ready" in said
    assert "small: mac-2 layers 0-1: ready" in said
    assert said.count("waiting for 2 workers") == 1
    assert (
        "1 of 2 workers: mac-0 (Apple M4)\n"
        "1 of 2 workers: mac-0 (Apple M4); mac-2 is drained: `macpipe drain mac-2 --undo`\n"
        "2 of 2 workers: mac-0 (Apple M4), mac-1 (Apple M4)\n"
    ) in said
    assert "2 of 3 workers: mac-0 (Apple M4), mac-1 (Apple M4)\n" in said
    assert "big[bold]model" in said
    assert "9.0 GiB" in said
    assert "256.0 MiB" in said
    assert said.count("mac-0 layers 0-3: reading") == 11
    assert said.count("mac-0: a is damaged\n") == 1
    assert "serving big[bold]model on 127.0.0.1:7701, and on http://127.0.0.1:8081" in said
    assert "--coordinator 127.0.0.1:7701" in said
    assert said.endswith("macpipe: mac-1 stopped answering\n")


def test_a_training_is_shown_as_far_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    doing = "training adapters of big, step 3 of 12, 9 s left"
    stage = StageState(0, "ada", LayerRange(0, 4), 2**20, 0, Route.RELAY)
    state = ClusterState(
        "c", "1", ServingState.TRAINING, activity=doing, training=TrainingProgress(3, 12, 9.0), model="big", layers=4,
        stages=(stage,), route=Route.RELAY,
    )  # fmt: skip
    lines = headline(state)
    assert lines[0].startswith("cluster c: training big, up")
    assert lines[1:3] == [doing, "4 layers in 1 stage (relay)"]
    show_requests(state)
    assert capsys.readouterr().out.splitlines() == [doing, "no live requests"]


def test_a_conversion_tells_bytes_and_the_time_left() -> None:
    stream = io.StringIO()
    with ConversionBar(stream, "m.gguf") as bar:
        for mib in range(0, 201, 10):
            bar.show(ConversionProgress(mib << 20, 200 << 20, 0))
    first, *some, last = stream.getvalue().splitlines()
    assert first == "m.gguf: 0%, 0 of 200 MiB"
    assert some[4].startswith("m.gguf: 50%, 100 of 200 MiB, ")
    assert some[4].endswith(" left")
    assert last == "m.gguf: 100%, 200 of 200 MiB"


def test_columns_count_in_a_pipe_and_words_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "the first words of a long line, and the last"
    monkeypatch.delenv("COLUMNS", raising=False)
    for columns, expected in (("", [line]), ("34", ["the first words of a long line,", "and the last"])):
        monkeypatch.setenv("COLUMNS", columns)
        stream = io.StringIO()
        print_lines(console(stream), line)
        assert [one.rstrip() for one in stream.getvalue().splitlines()] == expected
        assert console(stream).width == int(columns or 200)
    assert wrap_words("a note\nof more than ten", 10) == "a note\nof more\nthan ten"
    assert wrap_words(line, 0) == line


def test_status_says_who_leads_and_who_stands_by() -> None:
    state = ClusterState("c", "1", ServingState.SERVING)
    assert not [line for line in headline(state) if "leader" in line]
    standbys = (
        StandbyState("mac-2", ("10.0.0.2:7700",), in_sync=True),
        StandbyState("mac-3", behind=7),
        StandbyState("mac-4", problem="its copy is not complete yet"),
        StandbyState("mac-5", ("10.0.0.5:7700",), problem="cannot follow mac-1: the disk is full", away=True),
        StandbyState("mac-6", ("10.0.0.6:7700",), problem="it does not answer", away=True, silent_seconds=720.0),
    )
    leader = CoordinatorName("mac-1", "i", ("10.0.0.1:7700",))
    other = replace(leader, name="x")
    led = LeadershipState(CoordinatorRole.LEADER, 4, leader, 90.0, Replicate.SYNC, standbys, (other,))
    assert headline(replace(state, leadership=led))[1:8] == [
        "leader: mac-1 for 1 min by term 4",
        "standby: mac-2 at 10.0.0.2:7700, in sync: answers go on there if the leader is lost",
        "standby: mac-3, 7 updates behind",
        "standby: mac-4, its copy is not complete yet",
        "standby: mac-5 at 10.0.0.5:7700, does not follow: cannot follow mac-1: the disk is full",
        "standby: mac-6 at 10.0.0.6:7700, lost: it has not answered for 12 min",
        "problem: x leads too, at 10.0.0.1:7700; the lower term ends once the two reach each other",
    ]
    nobody = replace(led, leader=None, role=CoordinatorRole.STANDBY)
    assert headline(replace(state, leadership=nobody))[1].startswith("leader: none; a standby takes over")
