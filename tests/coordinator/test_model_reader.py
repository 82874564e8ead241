"""A model is read ahead for the next load of the same order, unless its files change until then."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.coordinator.model_reader import ModelInfo, ModelReader
from cluster.coordinator.settings import LoadOrder
from cluster.core.errors import ModelNotFound, NotServing
from cluster.model.checkpoint import resolve_model
from cluster.store.store import Store


@pytest.fixture
def order(tmp_path: Path) -> LoadOrder:
    """A load of a copy of the bundled model."""
    folder = tmp_path / "model"
    shutil.copytree(resolve_model("faq"), folder)
    return LoadOrder(str(folder))


@asynccontextmanager
async def reading(home: Path) -> AsyncIterator[ModelReader]:
    reader = ModelReader(Store(home))
    try:
        yield reader
    finally:
        await reader.close()


async def read_ahead(reader: ModelReader, order: LoadOrder) -> ModelInfo:
    """Return what was read ahead, once it is there."""
    await reader.read_ahead(order)
    return await reader._ahead[order]


def is_open(model_info: ModelInfo) -> bool:
    return bool(model_info.text.pids)  # type: ignore[attr-defined]  # of a SandboxedTokenizer


@pytest.mark.anyio
async def test_what_was_read_ahead_is_used_once_and_for_its_own_order_alone(tmp_path: Path, order: LoadOrder) -> None:
    async with reading(tmp_path / "home") as reader:
        ahead, smaller = await read_ahead(reader, order), LoadOrder(order.model, max_context=256)
        await reader.read_ahead(order, smaller)
        other = await reader.read(smaller)
        read = await reader.read(order)
        assert read is ahead
        assert other.shape.max_context == 256
        assert (await read.text.encode("Why?", 100)).count
        again = await reader.read(order)
        assert again is not ahead
        for one in (other, read, again):
            await one.close()


@pytest.mark.anyio
async def test_a_model_whose_files_changed_meanwhile_is_read_again(tmp_path: Path, order: LoadOrder) -> None:
    async with reading(tmp_path / "home") as reader:
        ahead = await read_ahead(reader, order)
        config = Path(order.model) / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 20_000.0}))
        read = await reader.read(order)
        assert read.shape.model.fingerprint != ahead.shape.model.fingerprint
        assert not is_open(ahead)
        await read.close()


@pytest.mark.anyio
async def test_a_model_that_could_not_be_read_ahead_is_read_when_it_is_needed(tmp_path: Path, order: LoadOrder) -> None:
    moved = tmp_path / "moved"
    async with reading(tmp_path / "home") as reader:
        shutil.move(order.model, moved)
        with pytest.raises(ModelNotFound):
            await read_ahead(reader, order)
        with pytest.raises(ModelNotFound):
            await reader.read(order)
        await reader.read_ahead(order)
        shutil.move(moved, order.model)
        read = await reader.read(order)
        assert is_open(read)
        await read.close()


@pytest.mark.anyio
async def test_what_nobody_needs_any_more_is_closed(tmp_path: Path, order: LoadOrder) -> None:
    async with reading(tmp_path / "home") as reader:
        ahead = await read_ahead(reader, order)
        assert is_open(ahead)
        other = await read_ahead(reader, LoadOrder(order.model, max_context=256))
        assert not is_open(ahead)
        assert is_open(other)
    assert not is_open(other)


@pytest.mark.anyio
async def test_nothing_is_read_once_the_coordinator_has_stopped(tmp_path: Path, order: LoadOrder) -> None:
    async with reading(tmp_path / "home") as reader:
        pass
    for work in (reader.read(order), reader.read_shape(order)):
        with pytest.raises(NotServing, match="the coordinator is stopping"):
            await work
