"""Loads whose weights are quantized: the store keeps the result, other Macs take it, and nothing wrong is ever read."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import pytest

from checkpoints import make, split_experts
from cluster.conversion.converter import convert_checkpoint
from cluster.core.errors import BadCheckpoint, FetchFailed
from cluster.core.plan import LayerRange
from cluster.core.quantization import Quantization
from cluster.model.checkpoint import open_checkpoint
from cluster.model.model_shape import read_shape
from cluster.model.tensor_map import tensor_map
from cluster.model.weight_conversion import Conversion
from cluster.security.credentials import LocalTrust
from cluster.store.digest_manifest import DigestManifest
from cluster.store.folder_digests import hash_tensors
from cluster.store.partial_checkpoint import PartialCheckpoint
from cluster.store.quantized_copy import CopyKey
from cluster.store.store import Store
from cluster.store.stored_models import find_models, list_models
from cluster.transport.grpc_setup import bind, control_server
from cluster.v1 import worker_pb2 as pb
from cluster.v1.store_pb2_grpc import add_StoreServiceServicer_to_server
from cluster.worker import copy_job
from cluster.worker.pipe_messages import Progress
from cluster.worker.stage_loader import StageLoader, StageWeights
from cluster.worker.weight_quantizer import lay_out_copy, quantize_layers

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("quantized_copies")]
WIDE = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64}
LAYERS = LayerRange(1, 3)


class KilledEngine(Exception):
    """The engine died."""


@dataclass
class InProcessEngine:
    """An engine that quantizes in this process, and notes what it was asked."""

    request: pb.LoadStageRequest
    device: str = "chip cpu"
    dies_after: int = 1_000_000
    """Tensors that it computes before it dies."""
    laid_out: int = 0
    computed_bytes: int = 0
    weights: list[StageWeights] = field(default_factory=list)

    def copy_key(self) -> CopyKey:
        return CopyKey(self.request.fingerprint, Quantization(self.request.weight_bits, 64), "mlx 1", self.device)

    async def lay_out_copy(self, models: Path, source: Path) -> AsyncIterator[Progress]:
        self.laid_out += 1
        lay_out_copy(models, self.copy_key().digest, source, self.request.weight_bits, self.request.model)
        yield Progress(1, 0, 0)

    async def quantize(self, models: Path, source: Path) -> AsyncIterator[Progress]:
        told: list[tuple[int, int]] = []

        def progress(done: int, total: int) -> None:
            told.append((done, total))
            if len(told) > self.dies_after:
                raise KilledEngine

        layers = LayerRange(self.request.start_layer, self.request.end_layer)
        quantize_layers(models, self.copy_key().digest, source, self.request.weight_bits, layers, progress)
        self.computed_bytes += told[-1][1]
        yield Progress(1, *told[-1])

    async def read(self, weights: StageWeights) -> AsyncIterator[Progress]:
        self.weights.append(weights)
        yield Progress(1, 1, 1)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as its makers publish it: each expert is a tensor."""
    folder = make("qwen3_moe", tmp_path_factory.mktemp("published") / "moe", **WIDE)
    split_experts(folder)
    return folder


@pytest.fixture(scope="module")
def names(published: Path) -> tuple[str, ...]:
    """The published tensors of the layers."""
    return tuple(sorted(tensor_map(published, read_shape(published, "moe", None).shared).of(LAYERS)))


@pytest.fixture(scope="module")
def converted(published: Path) -> Path:
    convert_checkpoint(published, published.parent / "converted", Conversion(Quantization(4, 64)), lambda _: None)
    return published.parent / "converted"


@pytest.fixture
def source(published: Path, tmp_path: Path) -> Path:
    """The published model in a folder that a test may change."""
    folder = tmp_path / "source"
    folder.mkdir()
    for file in published.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def order(folder: Path, names: tuple[str, ...], *peers: pb.StorePeer) -> pb.LoadStageRequest:
    return pb.LoadStageRequest(
        model=str(folder),
        path=str(folder),
        fingerprint=open_checkpoint(folder).fingerprint,
        start_layer=LAYERS.start,
        end_layer=LAYERS.end,
        weight_bits=4,
        tensors=names,
        peers=peers,
    )


async def load(loader: StageLoader, engine: InProcessEngine) -> dict[str, str]:
    """Load, and return the digests that the stage reports."""
    reported: dict[str, str] = {}
    async for message in loader.stage(engine.request, engine):
        reported |= {digest.name: digest.sha256.hex() for digest in message.digests}
    return reported


def require_converted(copy: PartialCheckpoint, converted: Path) -> None:
    """Require the copy to have tensors, all equal to the converted model's bit for bit, and the same config."""
    theirs = mx.load(str(converted / "model.safetensors"))
    assert copy.verified
    for name in copy.verified:
        tensor = copy.tensors[name]
        own = (copy.folder / tensor.file).read_bytes()[tensor.offset : tensor.end]
        assert own == bytes(memoryview(theirs[name].view(mx.uint8).reshape(-1))), name
    assert open_checkpoint(copy.folder).config == open_checkpoint(converted).config


def kept(home: Path, engine: InProcessEngine) -> PartialCheckpoint:
    copy = Store(home).find_copy(engine.copy_key())
    assert copy
    return copy.partial


async def test_a_second_start_reads_nothing_of_the_source(
    source: Path, converted: Path, names: tuple[str, ...], tmp_path: Path
) -> None:
    request = order(source, names)
    first = InProcessEngine(request)
    reported = await load(StageLoader(tmp_path / "home", LocalTrust()), first)
    copy = kept(tmp_path / "home", first)
    require_converted(copy, converted)
    (listed,) = list_models(tmp_path / "home")
    assert (listed.names, listed.weight_bits, listed.label) == (("source",), 4, "source, 4 bits")
    assert find_models([listed], "source") == find_models([listed], "source, 4 bits") == (listed,)
    assert not any(name.startswith("model.layers.0.") for name in copy.verified), "only the stage's own layers"
    assert reported.keys() == set(names)
    os.rename(source, tmp_path / "gone")  # noqa: PTH104
    second = InProcessEngine(request)
    assert await load(StageLoader(tmp_path / "home", LocalTrust()), second) == reported
    assert (second.laid_out, second.computed_bytes) == (0, 0)
    assert second.weights == first.weights == [StageWeights(copy.folder, copy.fingerprint, 0)]
    with pytest.raises(FetchFailed):  # another chip may round differently
        await load(StageLoader(tmp_path / "home", LocalTrust()), InProcessEngine(request, device="another cpu"))


@asynccontextmanager
async def serving(loader: StageLoader) -> AsyncIterator[pb.StorePeer]:
    server = control_server(LocalTrust())
    add_StoreServiceServicer_to_server(loader.store_server, server)
    port = bind(server, LocalTrust(), "127.0.0.1", 0)
    await server.start()
    try:
        yield pb.StorePeer(name="worker ada", address=f"127.0.0.1:{port}", party="worker")
    finally:
        await server.stop(None)


async def test_a_second_mac_takes_the_quantized_tensors(
    source: Path, converted: Path, names: tuple[str, ...], tmp_path: Path
) -> None:
    loader = StageLoader(tmp_path / "ada", LocalTrust())
    first = InProcessEngine(order(source, names))
    reported = await load(loader, first)
    loader.store_server.share(source, None)
    async with serving(loader) as ada:
        request = order(source, names, ada)
        request.model = request.path = "/nowhere/at/all"
        second = InProcessEngine(request)
        assert await load(StageLoader(tmp_path / "bob", LocalTrust()), second) == reported
        copy = kept(tmp_path / "bob", second)
        require_converted(copy, converted)
        assert copy.fingerprint == kept(tmp_path / "ada", first).fingerprint
        assert (second.laid_out, second.computed_bytes) == (1, 0)
        model = Store(tmp_path / "bob").find_kept(request.fingerprint)
        assert model
        assert model.partial
        assert not model.partial.verified, "no tensor of the model itself was fetched"
        third = InProcessEngine(request)
        wrong = DigestManifest(tmp_path / "cyd", request.fingerprint)
        wrong.learn([(names[0], "0" * 64)], "a test")
        with pytest.raises(FetchFailed, match="damaged bytes"):
            await load(StageLoader(tmp_path / "cyd", LocalTrust()), third)
        assert not kept(tmp_path / "cyd", third).verified, "ada's copy was made from other tensors"


async def test_a_model_that_changed_in_place_is_quantized_again(
    source: Path, names: tuple[str, ...], tmp_path: Path
) -> None:
    """Config, headers and samples are the same, so only the digests tell."""
    home, request = tmp_path / "home", order(source, names)
    await load(StageLoader(home, LocalTrust()), InProcessEngine(request))
    name = next(name for name in names if name.endswith("q_proj.weight"))
    tensor = open_checkpoint(source).tensors[name]
    content = bytearray((source / tensor.file).read_bytes())
    content[tensor.offset : tensor.offset + 64] = bytes(64)
    (source / tensor.file).write_bytes(content)
    again = InProcessEngine(request)
    reported = await load(StageLoader(home, LocalTrust()), again)
    assert again.computed_bytes > 0
    assert reported == hash_tensors(tmp_path / "other", source, names, copy_job.Event())
    convert_checkpoint(source, tmp_path / "changed", Conversion(Quantization(4, 64)), lambda _: None)
    require_converted(kept(home, again), tmp_path / "changed")


async def test_an_interruption_loses_a_layer_at_most(
    source: Path, converted: Path, names: tuple[str, ...], tmp_path: Path
) -> None:
    home, request = tmp_path / "home", order(source, names)
    killed = InProcessEngine(request, dies_after=40)
    with pytest.raises(KilledEngine):
        await load(StageLoader(home, LocalTrust()), killed)
    assert killed.weights == []
    written = sum(kept(home, killed).tensors[name].nbytes for name in kept(home, killed).verified)
    assert written > 0
    again = InProcessEngine(request)
    await load(StageLoader(home, LocalTrust()), again)
    copy = kept(home, again)
    require_converted(copy, converted)
    assert again.computed_bytes + written == sum(copy.tensors[name].nbytes for name in copy.verified)


async def test_without_room_the_weights_are_quantized_in_memory(
    source: Path,
    names: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(copy_job, "free_bytes", lambda folder: 1000)
    request = order(source, names)
    engine = InProcessEngine(request)
    with caplog.at_level(logging.WARNING):
        reported = await load(StageLoader(tmp_path / "home", LocalTrust()), engine)
    assert engine.weights == [StageWeights(source, request.fingerprint, 4)]
    assert reported == hash_tensors(tmp_path / "other", source, names, copy_job.Event())
    assert "copy: quantized weights are not kept reason=" in caplog.text
    assert engine.computed_bytes == 0


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text("{}")])
async def test_a_copy_whose_records_are_lost_is_laid_out_again(
    source: Path, names: tuple[str, ...], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    home, request = tmp_path / "home", order(source, names)
    first = InProcessEngine(request)
    await load(StageLoader(home, LocalTrust()), first)
    copy = kept(home, first)
    damage(copy.folder / ".macpipe" / "tensor_map.json")
    again = InProcessEngine(request)
    await load(StageLoader(home, LocalTrust()), again)
    assert (again.laid_out, again.computed_bytes) == (1, 0)
    (copy.folder / "config.json").write_text("{")
    with pytest.raises(BadCheckpoint, match=r"config\.json is damaged"):
        await load(StageLoader(home, LocalTrust()), InProcessEngine(request))
