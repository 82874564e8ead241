"""A model of the hub on real workers: each fetches its slice, the hub is asked once, and wrong bytes are detected.

Each worker has its own state folder, as if it were on its own Mac.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from checkpoints import make, split, tune
from cluster.client import Client
from cluster.conversion.converter import convert_checkpoint
from cluster.core.errors import DiskFull, ModelDiffers
from cluster.core.quantization import Quantization
from cluster.model.checkpoint import open_checkpoint
from cluster.model.weight_conversion import Conversion
from fake_hub import FakeHub
from integration.daemons import Cluster, Daemon, Launch, bound, free_port, wait_serving, watchdog_pipe
from integration.reference import greedy
from netns import missing as no_root

pytestmark = pytest.mark.timeout(240)

PROMPT = (5, 6, 7, 8)
NAME = "owner/tiny"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make("llama", tmp_path_factory.mktemp("published") / "tiny")
    split(folder, 3)
    return folder


@pytest.fixture
def hub(published: Path) -> Iterator[FakeHub]:
    with FakeHub({NAME: published}).running() as running:
        yield running


@pytest.fixture
def started(cluster: Cluster, hub: FakeHub) -> Callable[..., Daemon]:
    """Start a worker that knows the hub, with its own state folder."""

    def start(name: str, *, before: Sequence[str] = (), **env: str) -> Daemon:
        launch = knowing(hub, cluster.folder / f"hf-{name}", before, **env)
        worker = cluster.worker(name, "--home", str(cluster.folder / f"home-{name}"), launch=launch)
        worker.wait_for(f"worker {name} of cluster")
        return worker

    return start


def knowing(hub: FakeHub, hf_home: Path, before: Sequence[str] = (), **more: str) -> Launch:
    env = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(hf_home), "HF_HUB_OFFLINE": "0", **more}

    def launch(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            return subprocess.Popen(
                [*before, *bound(*arguments)],
                stdin=watchdog_pipe(),
                stdout=out,
                stderr=out,
                env=env,
                start_new_session=True,
            )

    return launch


def serve(cluster: Cluster, hub: FakeHub, model: str, workers: int, *options: str, **env: str) -> tuple[Daemon, str]:
    port = free_port()
    launch = knowing(hub, cluster.folder / "hf-serve", **env)
    daemon = cluster.serve(model, "--workers", str(workers), "--port", str(port), *options, launch=launch)
    return daemon, f"127.0.0.1:{port}"


def stored(cluster: Cluster, worker: str, tensor: str, published: Path) -> tuple[Path, int]:
    """Return the file and the offset at which a worker's store has a tensor."""
    info = open_checkpoint(published).tensors[tensor]
    (folder,) = (cluster.folder / f"home-{worker}" / "models").glob("[0-9a-f]*")
    return folder / info.file, info.offset


def flip(file: Path, offset: int) -> None:
    """Damage a byte as a failing disk does: size and time stay the same."""
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(offset)
        old = opened.read(1)
        opened.seek(offset)
        opened.write(bytes([old[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def answer(client: Client) -> tuple[int, ...]:
    return client.generate(PROMPT, max_tokens=6, ignore_eos=True).tokens


def file_bytes(folder: Path) -> int:
    """Return the bytes of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def publish_wide(hub: FakeHub, folder: Path) -> tuple[Path, tuple[int, ...]]:
    """Publish ``owner/wide``, which can be quantized. Return its folder, and the answer in 4 bits."""
    source = make("llama_untied", folder / "wide", hidden_size=64, intermediate_size=128)
    hub.folders["owner/wide"] = source
    convert_checkpoint(source, folder / "converted", Conversion(Quantization(4, 64)), lambda _: None)
    return source, greedy(folder / "converted", PROMPT, 6)


def forget(cluster: Cluster, worker: str, model: Path) -> None:
    """Remove a worker's tensors of a model, as ``macpipe store rm`` does. Its quantized copy stays."""
    config = (model / "config.json").read_bytes()
    folders = (cluster.folder / f"home-{worker}" / "models").glob("[0-9a-f]*")
    (found,) = (folder for folder in folders if (folder / "config.json").read_bytes() == config)
    shutil.rmtree(found)


def quantize_while_loading(client: Client, hub: FakeHub, cluster: Cluster, folder: Path) -> None:
    """Load another model of the hub so: each worker fetches its slice as published, and nothing else.

    What was quantized is kept: without the published tensors, a worker reads its own, and takes another's.
    """
    source, expected = publish_wide(hub, folder)
    before = hub.weight_bytes
    client.load("owner/wide", workers=2, layers="0-1,2-3", quantize=4).wait()
    assert hub.weight_bytes - before == file_bytes(source)
    assert answer(client) == expected
    for worker in ("ada", "bob"):
        forget(cluster, worker, source)
    client.load("owner/wide", workers=2, layers="0-2,3-3", quantize=4).wait()
    assert answer(client) == expected
    assert hub.weight_bytes - before == file_bytes(source)


def test_each_worker_fetches_its_slice_and_the_hub_is_asked_once(
    cluster: Cluster, hub: FakeHub, published: Path, started: Callable[..., Daemon], tmp_path: Path
) -> None:
    ada, bob = started("ada"), started("bob")
    daemon, address = serve(cluster, hub, NAME, 2, "--layers", "0-1,2-3")
    wait_serving(address, daemon)
    tensors = open_checkpoint(published).tensors
    size = file_bytes(published)
    print(f"asked of the hub: {hub.weight_bytes} bytes; the checkpoint's files: {size}")
    assert hub.weight_bytes == size
    assert hub.asked_twice() == 0
    assert "from the hub" in daemon.said()
    assert "from other Macs" in daemon.said(), "the tied embedding went from worker to worker"
    expected = greedy(published, PROMPT, 6)
    with Client(address, timeout_s=60) as client:
        assert answer(client) == expected
        moved = "model.layers.2.mlp.up_proj.weight"
        flip(*stored(cluster, "bob", moved, published))
        for file in stored(cluster, "bob", moved, published)[0].parent.glob("*.safetensors"):
            file.touch()
        client.load(NAME, workers=2, layers="0-2,3-3").wait()
        assert answer(client) == expected
        assert hub.weight_bytes == size + tensors[moved].nbytes, "the rest of the layer came from bob"
        quantize_while_loading(client, hub, cluster, tmp_path)
    assert f"store server: damaged tensor counts as missing tensor={moved}" in bob.said()
    assert f"ada: worker bob reports that its copy of the tensor {moved} is damaged" in daemon.said()
    assert "Traceback" not in daemon.said() + ada.said() + bob.said()


@pytest.mark.long
def test_quantized_weights_outlive_a_restart_of_all_daemons(
    cluster: Cluster, hub: FakeHub, started: Callable[..., Daemon], tmp_path: Path
) -> None:
    source, expected = publish_wide(hub, tmp_path)
    for start in range(2):
        workers = [started(name) for name in ("ada", "bob")]
        daemon, address = serve(cluster, hub, "owner/wide", 2, "--quantize", "4")
        wait_serving(address, daemon)
        with Client(address, timeout_s=60) as client:
            assert answer(client) == expected
        for one in (daemon, *workers):
            one.stop()
        if not start:
            asked = hub.weight_bytes
            for worker in ("ada", "bob"):
                forget(cluster, worker, source)
    assert hub.weight_bytes == asked


def test_a_fine_tune_is_not_taken_for_its_base(
    cluster: Cluster, hub: FakeHub, published: Path, started: Callable[..., Daemon], tmp_path: Path
) -> None:
    """Config, tokenizer and headers are those of the other model, by its id and by a folder."""
    tuned = tune(published, tmp_path / "tuned")
    hub.folders["owner/tuned"] = tuned
    answers = {NAME: greedy(published, PROMPT, 6), "owner/tuned": greedy(tuned, PROMPT, 6)}
    assert len(set(answers.values())) == 2
    answers |= {str(published): answers[NAME], str(tuned): answers["owner/tuned"]}
    for name in ("ada", "bob"):
        started(name)
    daemon, address = serve(cluster, hub, NAME, 2)
    wait_serving(address, daemon)
    with Client(address, timeout_s=60) as client:
        assert answer(client) == answers[NAME]
        for model in ("owner/tuned", str(published), str(tuned)):
            client.load(model, workers=2).wait()
            assert answer(client) == answers[model], model


def test_a_worker_that_is_killed_goes_on_where_it_stopped(
    cluster: Cluster, hub: FakeHub, published: Path, started: Callable[..., Daemon]
) -> None:
    solo = started("solo")
    hub.pace_s = 0.5
    daemon, _ = serve(cluster, hub, NAME, 1)
    half = sum(t.nbytes for t in open_checkpoint(published).tensors.values()) // 2
    deadline = time.monotonic() + 60
    while hub.weight_bytes < half:
        assert time.monotonic() < deadline, daemon.said()
        time.sleep(0.02)
    solo.stop(signal.SIGKILL)
    assert daemon.process.wait(60) == 1
    assert "solo" in daemon.said()
    before, hub.pace_s = hub.weight_bytes, 0
    started("solo")
    again, address = serve(cluster, hub, NAME, 1)
    wait_serving(address, again)
    assert hub.weight_bytes - before < 1.5 * half, "what came before the kill was not asked for again"
    with Client(address, timeout_s=60) as client:
        assert answer(client) == greedy(published, PROMPT, 6)


def test_workers_with_different_bytes_of_one_tensor_are_refused(
    cluster: Cluster, hub: FakeHub, published: Path, started: Callable[..., Daemon]
) -> None:
    """Each has the model in its own cache. The tied embedding, which both stages hold, differs."""
    for name in ("ada", "bob"):
        snapshot = cluster.folder / f"hf-{name}" / "hub" / "models--owner--tiny" / "snapshots" / hub.commit
        snapshot.mkdir(parents=True)
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text(hub.commit)
        blobs = snapshot.parent.parent / "blobs"
        blobs.mkdir()
        for file in published.iterdir():
            content = file.read_bytes()
            blob = blobs / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            (snapshot / file.name).symlink_to(blob)
        started(name)
    tensor = open_checkpoint(published).tensors["model.embed_tokens.weight"]
    flip((snapshot / tensor.file).resolve(), tensor.offset)
    daemon, _ = serve(cluster, hub, NAME, 2)
    assert daemon.process.wait(90) == 1
    said = " ".join(daemon.said().split())
    assert "worker ada and worker bob have different bytes of the tensor model.embed_tokens.weight" in said
    assert "Traceback" not in said
    assert hub.weight_bytes < 0.2 * sum(f.stat().st_size for f in published.glob("*.safetensors"))


@pytest.mark.skipif(bool(no_root()), reason=no_root())
def test_workers_without_the_folder_take_it_from_the_coordinator(
    cluster: Cluster, hub: FakeHub, published: Path, started: Callable[..., Daemon], tmp_path: Path
) -> None:
    """The folder is hidden from the workers; then from a disk that is too small nothing is fetched at all."""
    folder = tmp_path / "own"
    folder.mkdir()
    for file in published.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    hide = f'mount -t tmpfs -o size=64k none {folder} && exec "$@"'
    small = (
        f"mkdir -p {cluster.folder}/home-dee && mount -t tmpfs -o size=300m none {cluster.folder}/home-dee && {hide}"
    )
    for name in ("ada", "bob"):
        started(name, before=("unshare", "--mount", "sh", "-c", hide, "sh"))
    daemon, address = serve(cluster, hub, str(folder), 2)
    wait_serving(address, daemon)
    with Client(address, timeout_s=60) as client:
        assert answer(client) == greedy(published, PROMPT, 6)
        assert not hub.ranges
        assert "from other Macs" in daemon.said()
        started("dee", before=("unshare", "--mount", "sh", "-c", small, "sh"))
        with pytest.raises(
            DiskFull, match=r"worker dee: .*needs 0\.\d+ MiB more on disk, but only 0\.3 GiB are free at"
        ):
            client.load(str(folder), workers=3).wait()


def test_a_folder_that_differs_from_the_coordinators_is_named(
    cluster: Cluster, hub: FakeHub, published: Path, started: Callable[..., Daemon], tmp_path: Path
) -> None:
    """The coordinator hashes its own folder, so a tensor that one worker alone holds is proved too."""
    started("solo")
    daemon, address = serve(cluster, hub, str(published), 1)
    wait_serving(address, daemon)
    name = "model.layers.3.mlp.down_proj.weight"
    tensor = open_checkpoint(published).tensors[name]
    try:
        flip(published / tensor.file, tensor.offset)
        (published / tensor.file).touch()
        with Client(address, timeout_s=60) as client, pytest.raises(ModelDiffers, match=name) as told:
            client.load(str(published), workers=1).wait()
        assert "coordinator's folder has different bytes" in told.value.sentence
    finally:
        flip(published / tensor.file, tensor.offset)
        (published / tensor.file).touch()
    with Client(address, timeout_s=60) as client:
        client.load(str(published), workers=1).wait()
        assert answer(client) == greedy(published, PROMPT, 6)
