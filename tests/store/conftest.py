"""A hub that huggingface_hub accepts as the real one, within this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from checkpoints import make, split, tune
from fake_hub import FakeHub


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as on the hub: three files of weights."""
    folder = make("llama", tmp_path_factory.mktemp("published") / "tiny")
    split(folder, 3)
    return folder


@pytest.fixture(scope="session")
def tuned(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model than ``published`` with the same config, tokenizer and headers."""
    return tune(published, tmp_path_factory.mktemp("tuned") / "tiny")


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A running hub with one model, ``owner/tiny``; the Hugging Face cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with FakeHub({"owner/tiny": published}).running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        template = running.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running
    close_session()
