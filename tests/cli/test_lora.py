"""The options and files of ``macpipe lora``: a YAML file below the command line, and adapters stored as mlx-lm's."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm import lora as mlx_lora

from cluster.cli import training_options
from cluster.cli.training_options import ChosenTraining, TrainingFiles, read_options
from cluster.cli.training_report import TrainingScreen
from cluster.core.errors import DiskFull, InvalidOption
from cluster.core.training import TrainingOptions
from cluster.core.training_events import AdapterFile, TrainingReport

YAML = """
model: some/model
train: true
data: texts
learning_rate: 1e-5
lora_parameters: {rank: 4, scale: 10.0, keys: [self_attn.q_proj]}
lr_schedule: {name: cosine_decay, warmup: 10, arguments: [1e-5, 100, 1e-7]}
optimizer_config: {adam: {}, adamw: {weight_decay: 0.1}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(YAML)
    return file


def chosen(folder: Path, **more: Any) -> ChosenTraining:
    return read_options({"model": "m", "train": True, "data": folder, **more}, None)


def test_the_command_line_goes_before_the_file(config: Path) -> None:
    read = read_options({"learning_rate": 0.5, "iters": 7}, config)
    assert (read.model, read.data, read.adapter_path) == ("some/model", Path("texts"), Path("adapters"))
    options = read.options
    assert (options.learning_rate, options.iters, options.batch_size) == (0.5, 7, 4)
    assert options.lora_parameters.keys == ("self_attn.q_proj",)
    assert options.lr_schedule
    assert options.lr_schedule.arguments == (1e-5, 100, 1e-7), "YAML has 1e-5 as a text"
    assert TrainingOptions.from_json(options.to_json()) == options


def test_defaults_are_mlx_lms() -> None:
    options = TrainingOptions.of({"train": True}).plain()
    shared = options.keys() & mlx_lora.CONFIG_DEFAULTS.keys() - {"train", "optimizer_config", "lora_parameters"}
    assert {name: options[name] for name in shared} == {name: mlx_lora.CONFIG_DEFAULTS[name] for name in shared}
    assert mlx_lora.CONFIG_DEFAULTS["lora_parameters"] == {"rank": 8, "dropout": 0.0, "scale": 20.0}
    assert options["lora_parameters"] == {"rank": 8, "dropout": 0.0, "scale": 20.0, "keys": None}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"train": True, "data": "d"}, "give the model"),
        ({"model": "m", "train": True}, "give the training data"),
        ({"model": "m", "data": "d"}, "give --train, --test or both"),
        (
            {"model": "m", "data": "d", "train": True, "fine_tune_type": "full"},
            "option fine_tune_type: Input should be",
        ),
        ({"model": "m", "data": "d", "train": True, "hf_dataset": "x"}, "option hf_dataset: Extra inputs"),
    ],
)
def test_wrong_options_are_named(given: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidOption, match=why):
        read_options(given, None)


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    with pytest.raises(InvalidOption, match="cannot read"):
        read_options({}, file)
    file.write_text("a: [")
    with pytest.raises(InvalidOption, match="is not YAML"):
        read_options({}, file)
    file.write_text("- a")
    with pytest.raises(InvalidOption, match="has no options"):
        read_options({}, file)


def test_data_is_a_folder_or_one_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match=r"there is no .*train\.jsonl; --train needs it"):
        TrainingFiles.of(chosen(tmp_path))
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    assert set(TrainingFiles.of(chosen(tmp_path)).sent) == {"train", "valid", "test"}
    assert set(TrainingFiles.of(chosen(tmp_path / "train.jsonl")).sent) == {"train"}
    tested = read_options({"model": "m", "test": True, "data": tmp_path, "adapter_path": ""}, None)
    assert set(TrainingFiles.of(tested).sent) == {"test"}
    assert tested.options.num_layers == -1


def test_the_folder_is_one_that_mlx_lm_reads_and_that_is_tested_later(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "test.jsonl").write_text("{}\n")
    folder = tmp_path / "out" / "adapters"
    files = TrainingFiles.of(chosen(tmp_path, adapter_path=str(folder), num_layers=3, fine_tune_type="dora"))
    assert files.store(AdapterFile(100, b"early", final=False)) == folder / "0000100_adapters.safetensors"
    assert files.store(AdapterFile(150, b"late", final=True)) == folder / "adapters.safetensors"
    at_the_end = TrainingFiles.of(chosen(tmp_path, adapter_path=str(tmp_path / "even")))
    assert at_the_end.store(AdapterFile(200, b"last", final=True)) == tmp_path / "even" / "adapters.safetensors"
    assert (tmp_path / "even" / "0000200_adapters.safetensors").read_bytes() == b"last", "as mlx_lm.lora does"
    content = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert content.keys() == {"0000100_adapters.safetensors", "adapters.safetensors", "adapter_config.json"}
    assert (content["0000100_adapters.safetensors"], content["adapters.safetensors"]) == (b"early", b"late")
    config = SimpleNamespace(**json.loads(content["adapter_config.json"]))
    assert (config.fine_tune_type, config.num_layers) == ("dora", 3)
    assert config.lora_parameters == {"rank": 8, "dropout": 0.0, "scale": 20.0}
    tested = read_options({"model": "m", "test": True, "data": tmp_path, "adapter_path": str(folder)}, None)
    assert (tested.options.fine_tune_type, tested.options.num_layers) == ("dora", 3)
    assert TrainingFiles.of(tested).sent == {
        "test": tmp_path / "test.jsonl",
        "adapters": folder / "adapters.safetensors",
    }


def test_a_full_disk_leaves_the_earlier_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    files = TrainingFiles.of(chosen(tmp_path, adapter_path=str(tmp_path / "out")))
    files.store(AdapterFile(100, b"early", final=True))

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(training_options, "replace_file", full)
    with pytest.raises(DiskFull, match=r"cannot write adapters to .* free some room"):
        files.store(AdapterFile(150, b"late", final=True))
    assert (tmp_path / "out" / "adapters.safetensors").read_bytes() == b"early"


def test_steps_are_numbered_as_mlx_lm_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    screen = TrainingScreen(io.StringIO(), 12, json=False)
    screen.show(TrainingReport(0, val_loss=3.5))
    screen.show(TrainingReport(1, train_loss=3.25, learning_rate=1e-5, tokens_per_second=80.0))
    screen.show(TrainingReport(2, train_loss=3.0, learning_rate=1e-5, tokens_per_second=90.0, seconds_left=20.0))
    screen.show(TrainingReport(12, train_loss=2.0, peak_memory=(("ada", 2**20),)))
    first, unknown, known, last = capsys.readouterr().out.splitlines()
    assert first == "step 1 of 12: validation loss 3.500"
    assert unknown == "step 1 of 12: training loss 3.250, learning rate 1e-05, 80 tokens/s; peak memory: "
    assert known.startswith("step 2 of 12: training loss 3.000, learning rate 1e-05, 90 tokens/s, 20 s left")
    assert last.endswith("0 tokens/s, done; peak memory: ada 1.0 MiB")
