"""A checkpoint's folder: what it needs to be served, and the error of each defect."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import make, split
from cluster.core.errors import BadCheckpoint, MacpipeError, ModelNotFound, ModelUnsupported
from cluster.model import checkpoint as checkpoints
from cluster.model.checkpoint import model_ref, open_checkpoint, resolve_model
from cluster.model.safetensors import read_shard
from cluster.model.skeleton import open_skeleton


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Callable[[str], Path]) -> Path:
    """A copy to damage."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "copy")


def header(content: object) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


def test_a_checkpoint_is_described_without_mlx(checkpoint: Callable[[str], Path]) -> None:
    program = (
        "import sys; from pathlib import Path; from cluster.model.checkpoint import open_checkpoint;"
        "found = open_checkpoint(Path(sys.argv[1])); print(found.fingerprint, len(found.tensors));"
        "assert not {m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm', 'numpy', 'transformers')}"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint("llama"))], capture_output=True, text=True, check=True
    )
    here = open_checkpoint(checkpoint("llama"))
    assert run.stdout.split() == [here.fingerprint, str(len(here.tensors))]
    tensor = here.tensors["model.layers.0.self_attn.q_proj.weight"]
    assert (tensor.dtype, tensor.shape, tensor.file, tensor.nbytes) == ("F32", (32, 32), "model.safetensors", 4096)
    assert here.config["model_type"] == "llama"


def test_the_fingerprint_is_the_contents_alone(folder: Path, checkpoint: Callable[[str], Path]) -> None:
    same = open_checkpoint(checkpoint("llama")).fingerprint
    (folder / "README.md").write_text("Words about the model change nothing.")
    (folder / "config.json").touch()
    assert open_checkpoint(folder).fingerprint == same
    assert len(bytes.fromhex(same)) == 32


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_the_fingerprint_follows_each_file(name: str, folder: Path, checkpoint: Callable[[str], Path]) -> None:
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    assert open_checkpoint(folder).fingerprint != open_checkpoint(checkpoint("llama")).fingerprint


def test_the_fingerprint_follows_the_weights(folder: Path, checkpoint: Callable[[str], Path]) -> None:
    """Two fine-tunes have the same headers."""
    file = folder / "model.safetensors"
    tensor = open_checkpoint(folder).tensors["model.layers.1.mlp.up_proj.weight"]
    content = bytearray(file.read_bytes())
    content[tensor.offset : tensor.end] = content[tensor.offset : tensor.end][::-1]
    file.write_bytes(content)
    assert open_checkpoint(folder).fingerprint != open_checkpoint(checkpoint("llama")).fingerprint


def test_the_fingerprint_follows_the_headers(folder: Path, checkpoint: Callable[[str], Path]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"format":"mlx"', b'"format":"mly"', 1))
    assert open_checkpoint(folder).fingerprint != open_checkpoint(checkpoint("llama")).fingerprint


def test_shards_are_read_together(folder: Path, checkpoint: Callable[[str], Path]) -> None:
    split(folder, 3)
    found = open_checkpoint(folder)
    assert found.tensors.keys() == open_checkpoint(checkpoint("llama")).tensors.keys()
    assert len({tensor.file for tensor in found.tensors.values()}) == 3


def test_a_missing_shard_is_named(folder: Path) -> None:
    split(folder, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"model-00002-of-00003\.safetensors, which is missing \(1 of 3"):
        open_checkpoint(folder)


def test_no_folder_and_no_config(folder: Path) -> None:
    with pytest.raises(ModelNotFound, match="no model folder"):
        open_checkpoint(folder / "nowhere")
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        open_checkpoint(folder)


def test_a_link_that_leads_nowhere(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "blob")
    with pytest.raises(BadCheckpoint, match=r"cannot be read.*model\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", ["{", "[]", "\xff", '{"a": ' * 100_000])
def test_a_damaged_config(content: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(BadCheckpoint, match=r"config\.json is damaged"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": {"a": 1}}'])
def test_a_damaged_index(content: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BadCheckpoint, match=r"index\.json is damaged"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickle_is_refused_in_a_sentence(name: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(BadCheckpoint, match=rf"{name}.*pickle can run code.*use a safetensors version"):
        open_checkpoint(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(BadCheckpoint, match="has no weights"):
        open_checkpoint(folder)


@pytest.mark.parametrize("kept", [0, 5, 200, -1, -5000])
def test_a_file_that_is_cut_short_says_by_how_much(kept: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    cut = whole[:kept]
    file.write_bytes(cut)
    start = 8 + int.from_bytes(whole[:8], "little")
    missing = len(whole) - len(cut) if kept < 0 else (8 if kept < 8 else start) - len(cut)
    with pytest.raises(BadCheckpoint, match=rf"model\.safetensors is cut short: {missing} bytes"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "content",
    [
        header(b"{"),
        header([]),
        header({"a": 1}),
        header({"a": {"dtype": "F32", "shape": [2]}}),
        header({"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}),
        header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}),
        header({"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}),
        header({"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}),
        header(b"[" * 200_000),
        (2**63).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_damaged_header(content: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(content + bytes(16))
    with pytest.raises(BadCheckpoint, match=r"header of model\.safetensors is damaged"):
        open_checkpoint(folder)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Whatever a file contains, it is read or refused with one of our errors."""
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    for text in (content, header(content)):
        file.write_bytes(text)
        try:
            assert read_shard(file).tensors == ()
        except MacpipeError as error:
            assert "any.safetensors" in error.sentence


def test_a_models_own_code_is_refused_and_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    auto_map = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    open_skeleton(folder)  # mlx-lm has its own llama and looks at no auto_map
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "evil.py"}))
    with pytest.raises(ModelUnsupported, match=r"evil\.py.*never runs code"):
        open_checkpoint(folder)
    with pytest.raises(BadCheckpoint, match="custom"):
        open_skeleton(folder)  # mlx-lm itself would refuse as well


def test_a_folder_resolves_to_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve_model("copy") == folder
    assert resolve_model("./copy") == folder
    assert model_ref("copy").path == str(folder)
    assert model_ref("copy").name == "copy"


def test_a_bundled_model_goes_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "BUNDLED", folder.parent)
    assert resolve_model("copy") == folder
    for name in ("", ".", "..", "copy/..", "other"):
        if not Path(name).is_dir():
            with pytest.raises(ModelNotFound):
                resolve_model(name)


def test_a_hugging_face_id_is_looked_up_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelNotFound, match="macpipe pull owner/tiny"):
        resolve_model("owner/tiny")
    home = tmp_path / "hub" / "models--owner--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc123")
    shutil.copytree(folder, home / "snapshots" / "abc123")
    assert open_checkpoint(resolve_model("owner/tiny")).fingerprint == open_checkpoint(folder).fingerprint


def test_in_the_cache_the_weights_are_what_the_hub_says(
    folder: Path, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    """The name of a linked blob identifies its content, as the hub defines it."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for blob in ("ab" * 32, "cd" * 32):
        shutil.copy(checkpoint("llama") / "model.safetensors", blobs / blob)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(blobs / blob)
        assert open_checkpoint(folder).editions == {"model.safetensors": blob}


@pytest.mark.parametrize("name", ["a/b/c", "a//b", "-/-", "no such model", "/nowhere/at/all"])
def test_names_that_mean_nothing(name: str) -> None:
    with pytest.raises(ModelNotFound):
        resolve_model(name)


def test_an_unknown_architecture_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "marvin"}))
    with pytest.raises(ModelUnsupported, match="marvin"):
        open_skeleton(folder)
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match="model_type"):
        open_skeleton(folder)


def test_weights_that_do_not_fit_the_config(tmp_path: Path) -> None:
    path = make("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(BadCheckpoint, match=r"layers\.4"):
        open_skeleton(path)
    (path / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(BadCheckpoint, match="cannot build"):
        open_skeleton(path)
