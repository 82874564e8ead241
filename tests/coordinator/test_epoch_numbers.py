"""Epoch numbers grow, whatever the clock does, the file holds, or workers claim."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.coordinator.epoch_numbers import LONGEST_AHEAD, EpochNumbers
from cluster.core.errors import StaleEpoch

MS = 1_000_000
NOW = 1_800_000_000_000
DAY = 86_400_000


class Clock:
    """Nanoseconds, at ``ms``."""

    def __init__(self, ms: int = NOW) -> None:
        self.ms = ms

    def __call__(self) -> int:
        return self.ms * MS


@given(st.lists(st.integers(-200 * DAY, 200 * DAY), min_size=1, max_size=20))
def test_a_clock_that_jumps_gives_no_number_twice(jumps: list[int]) -> None:
    clock = Clock()
    numbers = EpochNumbers(clock=clock)
    given_out = []
    for jump in jumps:
        clock.ms += jump
        given_out += [numbers.next(), numbers.next()]
    assert given_out == sorted(set(given_out))


def test_a_number_is_larger_than_those_that_were_kept_over_a_restart(tmp_path: Path) -> None:
    file, clock = tmp_path / "coordinator" / "epoch", Clock()
    numbers = EpochNumbers(file, clock)
    last = max(numbers.next() for _ in range(3))
    clock.ms -= DAY
    assert EpochNumbers(file, clock).next() > last


@pytest.mark.parametrize("kept", [b"", b"-5", b"1e9", b"9" * 50, b"\xff\x00", b"12 34"])
def test_a_file_that_holds_no_number_is_replaced(tmp_path: Path, kept: bytes) -> None:
    file = tmp_path / "epoch"
    file.write_bytes(kept)
    assert EpochNumbers(file, Clock()).next() == NOW
    assert EpochNumbers(file, Clock(0)).next() > NOW


def test_the_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "epoch").write_bytes(b"%d\n" % (NOW + DAY))
    assert EpochNumbers(tmp_path / "epoch", Clock()).next() == NOW + DAY + 1


def test_a_folder_that_takes_no_file_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "not a folder").write_text("")
    numbers = EpochNumbers(tmp_path / "not a folder" / "epoch", Clock())
    assert (numbers.next(), numbers.next()) == (NOW, NOW + 1)
    assert "epoch numbers: not stored" in caplog.text


def test_a_number_is_larger_than_those_that_workers_hold() -> None:
    assert EpochNumbers(clock=Clock()).next((NOW + DAY, 5)) == NOW + DAY + 1


def test_a_worker_that_claims_an_impossible_number_uses_nothing_up() -> None:
    numbers = EpochNumbers(clock=Clock())
    assert numbers.next((2**64 - 1, NOW + LONGEST_AHEAD + 1)) == NOW


@pytest.mark.parametrize("said", ["", "x", "²", "-1", "9" * 5000, str(2**64), str(NOW - DAY)])
def test_a_refusal_that_names_no_newer_number_teaches_nothing(said: str) -> None:
    numbers = EpochNumbers(clock=Clock())
    numbers.next()
    assert not numbers.learn_refusal(StaleEpoch("no", epoch=said))


def test_a_refusal_leads_to_a_larger_number() -> None:
    numbers = EpochNumbers(clock=Clock())
    numbers.next()
    assert numbers.learn_refusal(StaleEpoch("no", epoch=str(NOW + DAY)))
    assert numbers.next() == NOW + DAY + 1
