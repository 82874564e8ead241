"""A worker's id: stable, held by one daemon at a time, in a file of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.core.errors import DuplicateName, InvalidOption
from cluster.worker.identity import hold_identity


def test_an_id_outlives_its_daemon_and_differs_by_name(tmp_path: Path) -> None:
    with hold_identity(tmp_path, "a") as first, hold_identity(tmp_path, "b") as other:
        assert len(first) == 16
        assert first != other
    with hold_identity(tmp_path, "a") as again:
        assert again == first
    assert (tmp_path / "workers" / "a" / "id").stat().st_mode & 0o077 == 0


def test_a_second_daemon_of_the_name_is_refused(tmp_path: Path) -> None:
    with hold_identity(tmp_path, "a"):  # noqa: SIM117  # the second must fail while the first is held
        with pytest.raises(DuplicateName, match="already runs on this machine"), hold_identity(tmp_path, "a"):
            pass


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".hidden", "x" * 64, "a b"])
def test_a_name_that_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidOption, match="cannot be a worker's name"), hold_identity(tmp_path, name):
        pass


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidOption, match="MACPIPE_HOME"), hold_identity(tmp_path / "file", "a"):
        pass
