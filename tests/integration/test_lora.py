"""Training over real workers, beside mlx-lm in one process: the same losses and adapters, also if an engine dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from checkpoints import make
from cluster.cli.training_options import TrainingFiles, read_options
from cluster.client import Client
from cluster.core.errors import InvalidOption, InvalidRequest, NotServing
from cluster.core.training import TrainingOptions
from cluster.core.training_events import AdapterFile, TrainingNotice, TrainingReport
from integration.daemons import Cluster, children, command, wait_serving
from lora_reference import fine_tune, write_texts

pytestmark = [pytest.mark.xdist_group("training"), pytest.mark.timeout(400)]
NAMES = ("ada", "bob")
BASE = {
    "train": True, "iters": 8, "batch_size": 2, "num_layers": 3, "learning_rate": 1e-3, "max_seq_length": 48,
    "steps_per_report": 1, "steps_per_eval": 100, "val_batches": 2, "save_every": 3, "grad_accumulation_steps": 2,
}  # fmt: skip

Trainers = tuple[Cluster, str]
Expected = tuple[list[dict[str, Any]], dict[str, mx.array]]
"""mlx-lm's reports and adapters."""


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, str]]:
    """Two workers, and the address of their coordinator."""
    made = Cluster(tmp_path_factory.mktemp("trainers"))
    try:
        for name in NAMES:
            made.worker(name)
        yield made, made.serving(make("llama", made.folder / "model"), len(NAMES))[1]
    finally:
        made.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data"), train=12, valid=6, test=4)


def expect(trainers: Trainers, data: Path, folder: Path, **more: Any) -> Expected:
    return fine_tune(trainers[0].folder / "model", data, folder, **{**BASE, **more})


def lora(trainers: Trainers, *arguments: str) -> subprocess.CompletedProcess[str]:
    made, address = trainers
    model = ["--model", str(made.folder / "model"), "--coordinator", address, "--cluster", made.name]
    environment = {**os.environ, "MACPIPE_HOME": str(made.folder / "coordinator")}
    line = command("lora", *model, "--json", *arguments)
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300, check=False)


def flags(options: dict[str, Any]) -> list[str]:
    return [
        part
        for name, value in options.items()
        for part in ([f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)])
    ]


def test_the_command_trains_as_mlx_lm_and_the_model_is_served_again(
    trainers: Trainers, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    done = lora(trainers, *flags(BASE), "--test", "--data", str(data), "--adapter-path", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sequences will be cut to 48 tokens; the longest has" in done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    reports, adapters = expect(trainers, data, tmp_path / "expected")
    keys = ("iteration", "train_loss", "learning_rate", "val_loss")
    assert [{k: line[k] for k in keys if k in line} for line in lines[:-1]] == reports
    assert set(lines[0]) == {"iteration", "val_loss"}
    assert set(lines[1]["peak_memory"]) == set(NAMES)
    assert lines[-1]["test_loss"] > 0
    made = dict(mx.load(str(folder / "adapters.safetensors")))
    assert made.keys() == adapters.keys()
    assert all(mx.array_equal(made[name], adapters[name]) for name in adapters)
    saved = {f"{step:07d}_adapters.safetensors" for step in (3, 6)}
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapters.safetensors", *saved}
    chosen = read_options(
        {"model": str(trainers[0].folder / "model"), "test": True, "data": data, "adapter_path": str(folder),
         "batch_size": 2, "max_seq_length": 48, "micro_batches": 2},
        None,
    )  # fmt: skip
    with Client(trainers[1], timeout_s=30) as client:  # this waits until the model is served again
        tested = list(client.train(chosen.model, chosen.options, TrainingFiles.of(chosen).sent))
        losses = [e.test_loss for e in tested if isinstance(e, TrainingReport)]
        assert losses == [pytest.approx(lines[-1]["test_loss"], rel=1e-5)], "micro-batches round differently"
        wait_serving(trainers[1], trainers[0].daemons[-1])
        assert client.generate("a", max_tokens=1).tokens


def refusal(client: Client) -> list[NotServing]:
    """The error of a request, if it is refused."""
    try:
        client.generate("a", max_tokens=1)
    except NotServing as error:
        return [error]
    return []


def test_an_engine_that_dies_leaves_the_curve_as_it_is_and_requests_are_told_when_to_return(
    trainers: Trainers, data: Path, tmp_path: Path
) -> None:
    made, address = trainers
    files = {name: data / f"{name}.jsonl" for name in ("train", "valid")}
    more = {"iters": 50, "save_every": 4}
    expected = expect(trainers, data, tmp_path, **more)
    reports, notices, refused, final = list[TrainingReport](), list[str](), list[NotServing](), b""
    with Client(address, timeout_s=30) as client:
        for event in client.train(str(made.folder / "model"), TrainingOptions.of({**BASE, **more}), files):
            if isinstance(event, TrainingReport):
                reports.append(event)
            elif isinstance(event, TrainingNotice):
                notices.append(event.sentence)
            elif isinstance(event, AdapterFile):
                final = event.content
            if isinstance(event, TrainingReport) and event.iteration == 4:
                refused += refusal(client)
                os.kill(children(made.daemons[1].process.pid)[0], signal.SIGKILL)
    if any("training continues from the last kept state" in sentence for sentence in notices):  # else it came too late
        assert [(e.retry_after_s or 0) > 0 and "it serves again afterwards" in e.sentence for e in refused] == [True]
    losses = [r.train_loss if r.val_loss is None else r.val_loss for r in reports]
    assert losses == [r.get("train_loss", r.get("val_loss")) for r in expected[0]]
    file = made.folder / "final.safetensors"
    file.write_bytes(final)
    own = dict(mx.load(str(file)))
    assert all(mx.array_equal(own[name], array) for name, array in expected[1].items())
    wait_serving(address, made.daemons[-1])


@pytest.mark.long
def test_a_worker_that_is_killed_is_replaced_by_a_spare_and_the_curve_is_the_same(data: Path, tmp_path: Path) -> None:
    """Daemon and engine of one of two workers die; a third one holds nothing until then."""
    made = Cluster(tmp_path)
    files = {name: data / f"{name}.jsonl" for name in ("train", "valid")}
    options = {**BASE, "iters": 40, "save_every": 4}
    try:
        for name in ("ada", "bob", "cyd"):
            made.worker(name)
        model = make("llama", tmp_path / "model")
        daemon, address = made.serving(model, 2)
        expected, adapters = fine_tune(model, data, tmp_path / "expected", **options)
        reports, notices, killed, final = list[TrainingReport](), list[str](), "", b""
        with Client(address, timeout_s=60) as client:
            for event in client.train(str(model), TrainingOptions.of(options), files, workers=2):
                if isinstance(event, TrainingReport):
                    reports.append(event)
                elif isinstance(event, TrainingNotice):
                    notices.append(event.sentence)
                elif isinstance(event, AdapterFile):
                    final = event.content
                if isinstance(event, TrainingReport) and event.iteration == 5 and not killed:
                    killed = min(event.peak_memory)[0]
                    worker = next(one for one in made.daemons if one.name == killed)
                    os.killpg(worker.process.pid, signal.SIGKILL)
            wait_serving(address, daemon)
            assert killed not in {stage.worker for stage in client.cluster().stages}
    finally:
        made.close()
    assert any("training continues from the last kept state" in sentence for sentence in notices)
    assert set(dict(reports[-1].peak_memory)) == {"ada", "bob", "cyd"} - {killed}
    losses = [r.train_loss if r.val_loss is None else r.val_loss for r in reports]
    assert losses == [r.get("train_loss", r.get("val_loss")) for r in expected]
    (tmp_path / "final.safetensors").write_bytes(final)
    own = dict(mx.load(str(tmp_path / "final.safetensors")))
    assert all(mx.array_equal(own[name], array) for name, array in adapters.items())


@pytest.mark.long
def test_an_engine_that_dies_among_micro_batches_leaves_the_curve_as_it_is(trainers: Trainers, data: Path) -> None:
    made, address = trainers
    files = {name: data / f"{name}.jsonl" for name in ("train", "valid")}
    options = TrainingOptions.of({**BASE, "iters": 40, "save_every": 4, "batch_size": 4, "micro_batches": 3})
    runs = []
    with Client(address, timeout_s=30) as client:
        for dies in (False, True):
            losses, notices, final = [], list[str](), b""
            for event in client.train(str(made.folder / "model"), options, files):
                if isinstance(event, TrainingReport):
                    losses.append((event.iteration, event.train_loss, event.val_loss))
                    if dies and event.iteration == 5 and event.train_loss:
                        os.kill(children(made.daemons[1].process.pid)[0], signal.SIGKILL)
                elif isinstance(event, TrainingNotice):
                    notices.append(event.sentence)
                elif isinstance(event, AdapterFile):
                    final = event.content
            assert any("training continues from the last kept state" in sentence for sentence in notices) == dies
            runs.append((losses, final))
            wait_serving(address, made.daemons[-1])
    assert runs[0] == runs[1]
    assert len(runs[0][0]) == 42


def test_data_and_adapters_that_do_not_fit_are_refused_while_the_model_is_served(
    trainers: Trainers, data: Path, tmp_path: Path
) -> None:
    made, address = trainers
    model = str(made.folder / "model")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "the red fox ran"}\n{"prompt": "a"}\n')
    with Client(address, timeout_s=30) as client:
        with pytest.raises(InvalidRequest, match=r'train\.jsonl line 2 has no "text"'):
            list(client.train(model, TrainingOptions.of({**BASE, "num_layers": 4}), {"train": bad}))
        bad.write_text('{"text": "the red fox ran"}\n{"text": \n')
        with pytest.raises(InvalidRequest, match=r"train\.jsonl line 2 is not JSON"):
            list(client.train(model, TrainingOptions.of(BASE), {"train": bad}))
        with pytest.raises(InvalidOption, match="the adapter file is damaged"):
            list(client.train(model, TrainingOptions.of(BASE), {"train": data / "train.jsonl", "adapters": bad}))
        assert client.cluster().state == "serving"
        assert client.generate("a", max_tokens=1).tokens
        with pytest.raises(InvalidOption, match="the model has only 4 layers"):
            list(client.train(model, TrainingOptions.of({**BASE, "num_layers": 5}), {"train": data / "train.jsonl"}))
        assert client.cluster().state == "serving"
    done = lora(trainers, *flags(BASE), "--data", str(tmp_path / "nowhere"))
    assert done.returncode == 2, done.stderr
    assert f"there is no {tmp_path / 'nowhere' / 'train.jsonl'}" in done.stderr


def test_a_client_that_leaves_ends_its_training_and_the_workers_that_are_left_serve(
    trainers: Trainers, data: Path
) -> None:
    """The worker that does not train is killed meanwhile. Nobody waits for it afterwards, although serve wants two."""
    made, address = trainers
    options = TrainingOptions.of({**BASE, "iters": 100_000})
    with Client(address, timeout_s=30) as client:
        for event in client.train(str(made.folder / "model"), options, {"train": data / "train.jsonl"}, workers=1):
            if isinstance(event, TrainingReport) and event.peak_memory:
                with pytest.raises(NotServing, match="is training adapters of model, step"):
                    client.unload()
                ((trains, _),) = event.peak_memory
                state = client.cluster()
                assert (state.state, state.problem) == ("training", "")
                assert [(stage.worker, str(stage.layers)) for stage in state.stages] == [(trains, "0-3")]
                assert state.training
                assert 1 <= state.training.iteration < state.training.iterations == 100_000
                assert state.activity.startswith("training adapters of model, step ")
                with pytest.raises(NotServing, match="the cluster is training adapters of model, step"):
                    client.generate("a", max_tokens=1)
                spare = next(one for one in made.daemons if one.name in set(NAMES) - {trains})
                os.killpg(spare.process.pid, signal.SIGKILL)
                spare.process.wait()
                break
        wait_serving(address, made.daemons[-1], 60)
        assert [stage.worker for stage in client.cluster().stages] == [trains]
        assert client.generate("a", max_tokens=1).tokens
