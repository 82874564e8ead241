"""Bytes from another Mac over a real gRPC port: whole folders, parts, damaged ones, and invalid names."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import cast

import grpc
import pytest

from cluster.core.errors import BadCheckpoint, FetchFailed, InvalidRequest, MacpipeError, ModelDiffers, ModelNotFound
from cluster.core.plan import ModelRef
from cluster.model.checkpoint import TensorInfo, open_checkpoint
from cluster.security.credentials import LocalTrust
from cluster.store.digest_manifest import DigestManifest
from cluster.store.folder_digests import hash_tensors
from cluster.store.hub import Hub
from cluster.store.limits import MAX_MODEL_FILES, MAX_STORE_ANSWER_BYTES, MAX_TENSORS_NAMED
from cluster.store.model_files import StoredFile
from cluster.store.partial_checkpoint import PartialCheckpoint, is_partial
from cluster.store.peer_client import Peer
from cluster.store.store import Store
from cluster.store.store_server import StoreServer
from cluster.store.tensor_fetch import Fetch, Wanted, _group_runs
from cluster.transport.grpc_setup import bind, control_server
from cluster.v1 import store_pb2 as pb
from cluster.v1.store_pb2_grpc import StoreServiceServicer, add_StoreServiceServicer_to_server
from fake_hub import FakeHub

NAME = "model.layers.1.mlp.up_proj.weight"
Giving = Callable[..., Peer]


@pytest.fixture
def giving(tmp_path: Path) -> Iterator[Giving]:
    """``giving(name, folder)`` starts a Mac with the model of a folder (None: a hostile Mac), and returns the peer."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    servers: list[grpc.aio.Server] = []

    async def start(home: Path, folder: Path | None) -> tuple[int, str]:
        servicer: StoreServiceServicer = Flooding()
        fingerprint = "f"
        if folder:
            servicer = own = StoreServer(Store(home))
            fingerprint = own.share(
                folder, PartialCheckpoint(folder) if is_partial(folder) else None
            ).checkpoint.fingerprint
        server = control_server(LocalTrust())
        servers.append(server)
        add_StoreServiceServicer_to_server(servicer, server)
        port = bind(server, LocalTrust(), "127.0.0.1", 0)
        await server.start()
        return port, fingerprint

    with ExitStack() as stack:

        def give(name: str, folder: Path | None) -> Peer:
            begun = asyncio.run_coroutine_threadsafe(start(tmp_path / f"home-{name}", folder), loop)
            port, fingerprint = begun.result(10)
            return stack.enter_context(Peer(LocalTrust(), f"worker {name}", f"127.0.0.1:{port}", fingerprint))

        yield give
    for server in servers:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def copied(published: Path, to: Path, *flipped: str) -> Path:
    """The model, with the first byte of some tensors wrong."""
    shutil.copytree(published, to)
    for name in flipped:
        tensor = open_checkpoint(to).tensors[name]
        content = bytearray((to / tensor.file).read_bytes())
        content[tensor.offset] ^= 1
        (to / tensor.file).write_bytes(content)
    return to


def mine(home: Path, peers: list[Peer], fingerprint: str) -> PartialCheckpoint:
    partial = Store(home).find_for_worker(ModelRef("elsewhere", "/nowhere/at/all", fingerprint), peers).partial
    assert partial
    return partial


def take(home: Path, partial: PartialCheckpoint, peers: list[Peer], names: list[str], hub: Hub | None = None) -> Fetch:
    manifest = DigestManifest(home, partial.fingerprint)
    made = Fetch(partial, manifest, Wanted(tuple(names)), peers=peers, hub=hub, stop=Event())
    made.run()
    return made


def test_a_whole_folder_is_had_tensor_by_tensor(giving: Giving, published: Path, tmp_path: Path) -> None:
    whole, home = open_checkpoint(published), tmp_path / "mine"
    peer = giving("bob", published)
    partial = mine(home, [peer], whole.fingerprint)
    told = take(home, partial, [peer], [NAME]).progress
    assert (told.done, told.hub, told.peers) == (told.total, 0, whole.tensors[NAME].nbytes)
    take(home, partial, [peer], list(whole.tensors))
    for file in {t.file for t in whole.tensors.values()}:
        assert (partial.folder / file).read_bytes() == (published / file).read_bytes()
    assert partial.verified == hash_tensors(home, published, whole.tensors, Event())


def test_a_part_gives_what_it_has_and_says_what_it_knows(
    hub: FakeHub, giving: Giving, published: Path, tmp_path: Path
) -> None:
    partial = Store(tmp_path / "home-bob").find_by_name("owner/tiny").partial
    assert partial
    origin = Hub("owner/tiny", hub.commit)
    take(tmp_path / "home-bob", partial, [], [NAME], origin)
    peer = giving("bob", partial.folder)
    held = peer.holdings([])
    assert held.here == {NAME}
    assert held.digests == {NAME: partial.digest(partial.tensors[NAME])}
    other = next(name for name in partial.tensors if name != NAME)
    asked = hub.weight_bytes
    ours = mine(tmp_path / "mine", [peer], partial.fingerprint)
    told = take(tmp_path / "mine", ours, [peer], [NAME, other], origin).progress
    assert told.peers == ours.tensors[NAME].nbytes
    assert told.hub == ours.tensors[other].nbytes == hub.weight_bytes - asked
    with pytest.raises(FetchFailed, match="no source has the tensor"):
        take(tmp_path / "mine", ours, [peer], list(ours.tensors))


def test_a_file_with_a_new_time_is_looked_at_again_before_the_internet_is_asked(
    hub: FakeHub, giving: Giving, tmp_path: Path
) -> None:
    """Bob's files have new times, and one tensor has other bytes: only that one is fetched again."""
    partial = Store(tmp_path / "home-bob").find_by_name("owner/tiny").partial
    assert partial
    origin = Hub("owner/tiny", hub.commit)
    names = [name for name in partial.tensors if name.startswith(("model.layers.1.", "model.layers.2."))]
    take(tmp_path / "home-bob", partial, [], names, origin)
    content = bytearray((partial.folder / partial.tensors[NAME].file).read_bytes())
    content[partial.tensors[NAME].offset] ^= 1
    (partial.folder / partial.tensors[NAME].file).write_bytes(content)
    for file in {partial.tensors[name].file for name in names}:
        os.utime(partial.folder / file, ns=(1, 1))
    doubted = PartialCheckpoint(partial.folder)
    assert not doubted.verified
    assert doubted.awaiting_recheck(partial.tensors) == set(names)
    peer = giving("bob", partial.folder)
    asked, ours = hub.weight_bytes, mine(tmp_path / "mine", [peer], partial.fingerprint)
    told = take(tmp_path / "mine", ours, [peer], names, origin).progress
    assert told.hub == hub.weight_bytes - asked == partial.tensors[NAME].nbytes, "the rest came from bob"
    assert told.notices == (f"worker bob reports that its copy of the tensor {NAME} is damaged",)
    held = peer.holdings(names)
    assert (held.here, held.damaged) == (frozenset(names) - {NAME}, {NAME})


def test_the_next_load_still_tells_which_tensor_was_found_damaged(hub: FakeHub, tmp_path: Path) -> None:
    """A load opens the folder anew, perhaps just after another Mac's question led to the find."""
    partial = Store(tmp_path / "home-bob").find_by_name("owner/tiny").partial
    assert partial
    origin, server = Hub("owner/tiny", hub.commit), StoreServer(Store(tmp_path / "home-bob"))
    take(tmp_path / "home-bob", partial, [], [NAME], origin)
    file, tensor = partial.folder / partial.tensors[NAME].file, partial.tensors[NAME]
    content = bytearray(file.read_bytes())
    content[tensor.offset] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    asked = PartialCheckpoint(partial.folder)
    server.share(partial.folder, asked)
    assert not asked.recheck(tensor)
    loading = PartialCheckpoint(partial.folder)
    server.share(partial.folder, loading)
    assert loading.damaged == {NAME}
    take(tmp_path / "home-bob", loading, [], [NAME], origin)
    assert not loading.damaged
    assert not server.share(partial.folder, PartialCheckpoint(partial.folder)).partial.damaged  # type: ignore[union-attr]


def test_damaged_bytes_are_taken_from_somebody_else(
    giving: Giving, published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home, whole = tmp_path / "mine", open_checkpoint(published)
    bad, good = giving("bob", copied(published, tmp_path / "bad", NAME)), giving("cyd", published)
    DigestManifest(home, whole.fingerprint).learn(hash_tensors(home, published, [NAME], Event()).items(), "a test")
    partial = mine(home, [bad], whole.fingerprint)
    with pytest.raises(FetchFailed, match=f"worker bob has damaged bytes of the tensor {NAME}"):
        take(home, partial, [bad], [NAME])
    assert f"worker bob has damaged bytes of the tensor {NAME}" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING
    take(home, partial, [bad, good], [NAME])
    assert partial.digest(partial.tensors[NAME]) == hash_tensors(home, published, [NAME], Event())[NAME]


def test_peers_that_know_different_digests_are_both_named(giving: Giving, published: Path, tmp_path: Path) -> None:
    fingerprint = open_checkpoint(published).fingerprint
    peers = []
    for name, flipped in (("bob", ()), ("cyd", (NAME,))):
        folder = copied(published, tmp_path / name, *flipped)
        home = tmp_path / f"home-{name}"
        DigestManifest(home, fingerprint).learn(hash_tensors(home, folder, [NAME], Event()).items(), name)
        peers.append(giving(name, folder))
    partial = mine(tmp_path / "mine", peers, fingerprint)
    with pytest.raises(ModelDiffers, match=f"worker bob and worker cyd have different bytes of the tensor {NAME}"):
        take(tmp_path / "mine", partial, peers, [NAME])


def test_nothing_but_the_models_files_can_be_asked_for(giving: Giving, published: Path, tmp_path: Path) -> None:
    peer = giving("bob", published)
    (published.parent / "secret.json").write_text("{}")
    for name in ("../secret.json", str(published.parent / "secret.json"), "secret.json", ""):
        with pytest.raises(MacpipeError, match="no such file"):
            peer.small(StoredFile(name, 2))
    with pytest.raises(ModelNotFound, match="no part of that model"):
        Peer(LocalTrust(), "bob", peer.address, "../../" + "0" * 58).describe()
    stranger = open_checkpoint(copied(published, tmp_path / "copy")).tensors[NAME]
    with pytest.raises(ModelNotFound, match="does not have the tensor"):
        list(peer.read((type(stranger)("no.such.tensor", "F32", (1,), "x", 4, 0),), 0, 4))


class Flooding(StoreServiceServicer):
    """Answers with far more than there is."""

    async def DescribeModel(self, request: object, context: object) -> pb.DescribeModelResponse:
        return pb.DescribeModelResponse(files=[pb.StoredFile()] * (MAX_MODEL_FILES + 1))

    async def ListTensors(
        self, request: pb.ListTensorsRequest, context: object
    ) -> AsyncIterator[pb.ListTensorsResponse]:
        too_many = MAX_STORE_ANSWER_BYTES if request.tensors else MAX_TENSORS_NAMED + 1
        yield pb.ListTensorsResponse(tensors=[pb.TensorState()] * too_many)


def test_a_store_that_says_too_much_at_once_is_refused(giving: Giving) -> None:
    """A message of 256 MiB was taken from it, and eight million names walked through."""
    peer = giving("mac-a", None)
    with pytest.raises(BadCheckpoint, match="names 4097 files of one model"):
        peer.describe()
    with pytest.raises(FetchFailed, match="more tensors at once"):
        peer.holdings(())
    with pytest.raises(InvalidRequest, match="is too large"):
        peer.holdings(("a",))


def test_a_run_names_no_more_tensors_than_one_request_may() -> None:
    count = 2 * MAX_TENSORS_NAMED + 1
    tensors = [TensorInfo(f"t{i}", "BF16", (1,), "model.safetensors", 2, 2 * i) for i in range(count)]
    runs = _group_runs(cast(Peer, None), tensors)
    assert [len(run.tensors) for run in runs] == [MAX_TENSORS_NAMED, MAX_TENSORS_NAMED, 1]


def test_a_tensor_that_is_asked_for_from_the_middle_on(giving: Giving, published: Path) -> None:
    peer, whole = giving("bob", published), open_checkpoint(published)
    file = whole.tensors[NAME].file
    two = sorted((t for t in whole.tensors.values() if t.file == file), key=lambda t: t.offset)[:2]
    start, end = two[0].offset + 100, two[1].end - 50
    got = b"".join(peer.read(tuple(two), 100, end - start))
    assert got == (published / file).read_bytes()[start:end]
