"""How a checkpoint's files say that states become embeddings: what is taken, and why something is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.model.sentence_embedding import NO_EMBEDDINGS, read_sentence_embedding

LAST = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}


def write(folder: Path, pooling: Any, *kinds: str, path: str = "1_Pooling") -> Path:
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": path if kind == "Pooling" else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(("Transformer", "Pooling", *kinds))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize("pooling", [LAST, {"embedding_dimension": 8, "pooling_mode": "lasttoken"}])
@pytest.mark.parametrize("kinds", [(), ("Normalize",)])
def test_the_last_token_s_state_is_taken(tmp_path: Path, pooling: Any, kinds: tuple[str, ...]) -> None:
    found = read_sentence_embedding(write(tmp_path, pooling, *kinds))
    assert (found.normalized, found.problem) == (bool(kinds), "")


@pytest.mark.parametrize(
    ("pooling", "word"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean_tokens"),
        ({"pooling_mode_cls_token": True, "pooling_mode_lasttoken": False}, "cls_token"),
        ({**LAST, "pooling_mode_mean_tokens": True}, "mean_tokens+lasttoken"),
        ({"pooling_mode": ["lasttoken", "mean"]}, "lasttoken+mean"),
        ({"pooling_mode": 5}, "no embeddings"),
        ([], "JSON object"),
    ],
)
def test_other_pooling_is_refused_by_name(tmp_path: Path, pooling: Any, word: str) -> None:
    assert word in read_sentence_embedding(write(tmp_path, pooling)).problem


def test_steps_that_are_not_known_are_refused(tmp_path: Path) -> None:
    assert "Dense" in read_sentence_embedding(write(tmp_path, LAST, "Dense")).problem


@pytest.mark.parametrize("path", ["../1_Pooling", "/etc", "", "a" * 65])
def test_no_file_outside_the_folder_is_read(tmp_path: Path, path: str) -> None:
    assert "invalid path" in read_sentence_embedding(write(tmp_path, LAST, path=path)).problem


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert read_sentence_embedding(tmp_path) == NO_EMBEDDINGS
    write(tmp_path, LAST)
    (tmp_path / "1_Pooling" / "config.json").unlink()
    assert "hf download" in read_sentence_embedding(tmp_path).problem


@pytest.mark.parametrize("text", ["", "{", "5", "[5]", '[{"type": 1}]', "[" * 100_000, '{"a": 1}', "null"])
def test_damaged_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    assert read_sentence_embedding(tmp_path).problem.startswith("the model makes no embeddings")
