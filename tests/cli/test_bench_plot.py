"""The picture of ``macpipe bench --plot``, and the energy of a token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cluster.cli.bench import bench
from cluster.cli.bench_plot import HEIGHT, WIDTH, ceil_nicely, draw_report
from cluster.cli.error_boundary import WRONG_USAGE, exit_code
from cluster.cli.load_generator import BenchReport, LoadLevel, energy
from cluster.cli.throughput import StageTime, Turn, joules_per_token
from cluster.client import ClusterState, LayerRange, Route, ServingState, StageState, WorkerState
from cluster.core.errors import InvalidOption, Unreachable

TURN = Turn(10.0, 12.0, 5.0, 6.0, 64, 1.0, 64.0, 0.0)
STAGES = tuple(
    StageTime(name, LayerRange(4 * i, 4 * i + 4), 1.0, 0.1, 0.1, share)
    for i, (name, share) in enumerate((("ada & <bob>", 0.25), ("a\x07name", None)))
)
LEVELS = tuple(LoadLevel(users, TURN, replace(TURN, tokens_per_second=100.0 * users), STAGES) for users in (1, 2, 16))
REPORT = BenchReport("m", "1", "direct", 512, 64, 3, 900.0, LEVELS, ())


def test_the_picture_is_svg_with_a_point_a_level_and_a_bar_a_known_share() -> None:
    text = draw_report(REPORT)
    root = ElementTree.fromstring(text)  # noqa: S314 - our own text
    names = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert (names.count("polyline"), names.count("circle")) == (2, 6)
    bars = [e for e in root.iter() if e.tag.endswith("rect") and float(e.get("height") or 0) == 0.25 * 250]
    assert len(bars) == 3
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"tokens/s of all users", "idle share of each stage", "ada & <bob> 0-3", "2000", "16", "100%"} <= set(words)
    assert "\x07" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    for element in root.iter():
        assert 0 <= float(element.get("x") or 0) <= WIDTH
        assert 0 <= float(element.get("y") or 0) <= HEIGHT


def test_a_ring_of_many_stages_is_drawn_without_colors_beyond_the_list() -> None:
    many = tuple(replace(STAGES[0], worker=f"mac-{i}") for i in range(20))
    text = draw_report(replace(REPORT, levels=(replace(LEVELS[0], stages=many),)))
    root = ElementTree.fromstring(text)  # noqa: S314 - our own text
    assert sum(element.tag.endswith("rect") for element in root.iter()) == 1 + 20 + 2 + 8


@pytest.mark.parametrize(("name", "why"), [("missing/x.svg", "No such file or directory"), ("x.png", "is SVG")])
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, name: str, why: str
) -> None:
    with pytest.raises(InvalidOption, match=why) as refused:
        bench(plot=tmp_path / name, coordinator="127.0.0.1:1")
    assert exit_code(refused.value) == WRONG_USAGE
    assert not list(tmp_path.iterdir())


def test_asking_whether_a_picture_can_be_written_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    old, new = tmp_path / "old.svg", tmp_path / "new.svg"
    old.write_text("a picture")
    for picture in (old, new):
        with pytest.raises(Unreachable):
            bench(plot=picture, coordinator="127.0.0.1:1")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old.svg": "a picture"}


@pytest.mark.parametrize(("value", "nice"), [(0, 1), (0.3, 0.5), (1, 1), (1.2, 2), (2.2, 2.5), (99, 100), (260, 500)])
def test_an_axis_ends_at_a_round_number(value: float, nice: float) -> None:
    assert ceil_nicely(value) == pytest.approx(nice)


@pytest.mark.parametrize(
    ("spans", "joules"),
    [
        ([(10.0, 30.0), (40.0, 60.0)], 2.5),
        ([(10.0, 30.0), (None, 60.0)], None),
        ([(10.0, 5.0)], None),  # a worker restarted
        ([(10.0, 10.0)], None),
    ],
)
def test_energy_of_a_token(spans: list[tuple[float | None, float | None]], joules: float | None) -> None:
    assert joules_per_token(spans, 16) == joules


def test_energy_counts_the_macs_of_stages_if_all_report_it() -> None:
    workers = [
        WorkerState(name, name, "1", "", "", "", "", "", 1, 1, power_watts=watts, energy_joules=7.0)
        for name, watts in (("ada", 40.0), ("bob", 30.0), ("spare", 0.0))
    ]
    stages = tuple(StageState(i, n, LayerRange(i, i + 1), 1, 1, Route.DIRECT) for i, n in enumerate(("ada", "bob")))
    state = ClusterState("c", "1", ServingState.SERVING, workers=tuple(workers), stages=stages)
    assert energy(state) == 14.0
    workers[1] = replace(workers[1], power_watts=0.0)
    assert energy(replace(state, workers=tuple(workers))) is None
