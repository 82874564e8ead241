"""State as JSON on disk: private, atomic, bounded, and with one kind of error for anything invalid."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cluster.platform.json_file import read_json, write_json


def test_state_comes_back_from_a_file_that_only_its_owner_can_read(tmp_path: Path) -> None:
    path = tmp_path / "made" / "state.json"
    for content in ({"name": "mac-2", "speeds": [1.5, None]}, 60_000):
        write_json(path, content)
        assert read_json(path, 1000) == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["state.json"]  # noqa: PTH208  # hidden ones too


@pytest.mark.parametrize("content", [{"speed": float("nan")}, {"bytes": b"x"}])
def test_what_json_cannot_hold_leaves_the_file_as_it_is(tmp_path: Path, content: object) -> None:
    path = tmp_path / "state.json"
    write_json(path, "before")
    with pytest.raises((ValueError, TypeError)):
        write_json(path, content)
    assert read_json(path, 1000) == "before"


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff", b"[NaN]", b"[" * 100_000, b'"' + b"x" * 1000 + b'"'])
def test_a_file_that_is_invalid_or_too_long_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"."):
        read_json(tmp_path / "state.json", 1000 if content[:1] != b"[" else 200_000)
