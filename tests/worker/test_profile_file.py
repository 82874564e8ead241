"""A worker's stored measurements: by version and chip, bounded, and ignored if damaged."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cluster.core.all_reduce import AllReduce
from cluster.core.group_limits import KEPT_SUMS, SUMS_KEPT_S
from cluster.core.limits import CORRECTION_BOUND, KEPT_CORRECTIONS
from cluster.core.link_limits import KEPT_LINKS, LINK_KEPT_S
from cluster.core.plan import Link, Profile
from cluster.worker.profile_file import ProfileFile
from cluster.worker.stage_host import Throttle

PROFILE = Profile(4e11, 5e-5, 3e-4, 1e13, 0.2, verify_costs=((2, 1.05), (3, 1.11), (8, 2.2)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profile.json"


def test_a_profile_is_kept_for_its_versions_and_chip_alone(path: Path) -> None:
    ProfileFile(path, "mlx 1").put(PROFILE)
    assert ProfileFile(path, "mlx 1").kept.profile == PROFILE
    assert not ProfileFile(path, "mlx 2").kept.profile.known


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "nonsense",
        "[]",
        '{"key": "k"}',
        '{"key": "k", "profile": {"bandwidth": -1, "corrections": []}, "links": []}',
        '{"key": "k", "profile": {"bandwidth": NaN, "corrections": []}, "links": []}',
        '{"key": "k", "profile": {"corrections": []}, "links": [["w h", {"round_trip_s": 1, "bandwidth": 0}, 1]]}',
        '{"key": "k", "profile": {"speed": 1, "corrections": []}, "links": []}',
        '{"key": "k", "profile": {"bandwidth": 1' + "0" * 400 + ', "corrections": []}, "links": []}',
        '{"key": "k", "profile": {"corrections": [], "verify_costs": [[3, 1.1], [2, 1.2]]}, "links": []}',
        '{"key": "k", "profile": {"corrections": [], "verify_costs": [[2.5, 1.1]]}, "links": []}',
        '{"key": "k", "profile": {"corrections": [], "verify_costs": [[2, 0]]}, "links": []}',
        '{"key": "k", "profile": {"corrections": [], "verify_costs": [[9, 1.1]]}, "links": []}',
        '{"key": "k", "profile": {"corrections": []}, "links": [], "sums": [["g", {"seconds": 0, "bandwidth": 1}, 1]]}',
    ],
)
def test_a_damaged_file_means_measuring_again(path: Path, damage: str) -> None:
    path.write_text(damage)
    file = ProfileFile(path, "k")
    assert not file.kept.profile.known
    file.put(PROFILE)
    assert ProfileFile(path, "k").kept.profile == PROFILE


def test_the_file_of_an_earlier_version_is_read(path: Path) -> None:
    """It had a line for each value, links were pairs of worker and host, and steps of several tokens had no cost."""
    way = ["w h", {"round_trip_s": 0.001, "bandwidth": 1e9}, time.time()]
    figures = {**asdict(PROFILE), "corrections": [["m", 1.5]]}
    del figures["verify_costs"]
    path.write_text(json.dumps({"key": "k", "profile": figures, "links": [way]}, indent=1))
    file = ProfileFile(path, "k")
    assert file.kept.profile == replace(PROFILE, corrections=(("m", 1.5),), verify_costs=())
    assert file.link("w", "h:1") == Link(0.001, 1e9)


def test_ratios_are_learned_by_model_bounded_and_forgotten_with_a_new_measurement(path: Path) -> None:
    file = ProfileFile(path, "k")
    file.store_correction("early", 2.0)
    assert file.kept.profile.corrections == (), "there is no profile yet that it could correct"
    file.put(PROFILE)
    for i in range(KEPT_CORRECTIONS + 3):
        learn_often(file, f"m{i}", 1.5)
    learn_often(file, "m9", 1000.0)
    file.store_correction("bad", float("nan"))
    profile = ProfileFile(path, "k").kept.profile
    assert len(profile.corrections) == KEPT_CORRECTIONS
    assert profile.corrections[-1] == ("m9", pytest.approx(CORRECTION_BOUND, rel=0.05))
    about = pytest.approx(1.5, rel=0.05)
    assert (profile.correction("m10"), profile.correction("m0")) == (about, about), "unknown models get the median"
    file.put(PROFILE)
    assert ProfileFile(path, "k").kept.profile.correction("m10") == 1.0


def learn_often(file: ProfileFile, model: str, ratio: float) -> None:
    """Report the same ratio until the correction has settled."""
    for _ in range(30):
        file.store_correction(model, ratio)


def test_a_busy_minute_moves_a_correction_a_little_and_is_forgotten(path: Path) -> None:
    file = ProfileFile(path, "k")
    file.put(PROFILE)
    learn_often(file, "m", 1.02)
    file.store_correction("m", 8.0)
    assert file.kept.profile.correction("m") < 1.5
    file.store_correction("m", 0.12)
    assert 1 / 1.5 < file.kept.profile.correction("m") < 1.5
    learn_often(file, "m", 1.02)
    assert file.kept.profile.correction("m") == pytest.approx(1.02, rel=0.03)


def test_frames_correct_a_disturbed_measurement_at_once(path: Path) -> None:
    file = ProfileFile(path, "k")
    file.put(PROFILE, "other programs left 50% of a processor")
    file.store_correction("m", 0.5)
    assert file.kept.profile.correction("m") == 0.5
    file.store_correction("m", 1.0)
    assert file.kept.profile.correction("m") < 0.7, "a busy minute still counts for little"
    file.store_correction("m", 0.12)
    assert file.kept.profile.correction("m") == 1 / CORRECTION_BOUND


def test_links_are_kept_for_a_day_by_worker_and_host(path: Path) -> None:
    now = 1e9
    file = ProfileFile(path, "k", lambda: now)
    link = Link(0.001, 1e9)
    file.put_link("w", "10.0.0.1:5000", link)
    assert ProfileFile(path, "k", lambda: now).link("w", "10.0.0.1:6000") == link, "a restart takes another port"
    assert file.link("w", "10.0.0.2:5000") is None
    assert ProfileFile(path, "k", lambda: now + LINK_KEPT_S + 1).link("w", "10.0.0.1:5000") is None
    for i in range(KEPT_LINKS + 1):
        file.put_link(f"w{i}", "h:1", link)
    assert len(json.loads(path.read_text())["links"]) == KEPT_LINKS


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    file = ProfileFile(tmp_path / "file" / "profile.json", "k")
    file.put(PROFILE)
    assert file.kept.profile == PROFILE
    assert "profile: not stored" in caplog.text


def test_a_throttle_sleeps_in_proportion() -> None:
    began = time.perf_counter()
    Throttle().stretch(10.0)
    assert time.perf_counter() - began < 5
    Throttle(3.0).stretch(0.05)
    assert time.perf_counter() - began >= 0.1


def test_sums_of_a_group_are_kept_for_a_day(path: Path) -> None:
    now = 1000.0
    found = AllReduce.measured(50e-6, 1e9)
    file = ProfileFile(path, "k", lambda: now)
    assert file.sums("ring a b") is None
    file.put_sums("ring a b", AllReduce.measured(70e-6, 1e9))
    file.put_sums("ring a b", found)
    assert ProfileFile(path, "k", lambda: now).sums("ring a b") == found
    assert file.sums("nccl a b") is None
    slower, faster = (AllReduce.measured(seconds, 1e9, disturbed=True) for seconds in (60e-6, 40e-6))
    assert file.put_sums("ring a b", slower) == found, "what disturbs only makes sums look slower"
    assert file.put_sums("ring a b", faster) == ProfileFile(path, "k", lambda: now).sums("ring a b") == faster
    now += SUMS_KEPT_S
    assert file.sums("ring a b") is None
    for i in range(KEPT_SUMS + 1):
        file.put_sums(f"g{i}", found)
    assert len(ProfileFile(path, "k").kept.sums) == KEPT_SUMS
