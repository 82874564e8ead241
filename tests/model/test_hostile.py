"""Checkpoints that contain code or lead out of their folder: nothing of them runs, and a sentence says why."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.core.errors import BadCheckpoint, InvalidRequest, MacpipeError, ModelUnsupported
from cluster.core.request import ChatMessage, ChatOptions
from cluster.model.checkpoint import open_checkpoint
from cluster.model.model_shape import read_shape
from cluster.model.skeleton import open_skeleton
from cluster.model.tokenizer import load_tokenizer

USER = (ChatMessage("user", "hello"),)


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with Python beside it, whose every line that is run leaves a trace; it is also where we are."""
    copy = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    trace = f"open({str(tmp_path / 'it-ran')!r}, 'w').close()\n"
    for name in ("evil", "modeling_evil", "tokenization_evil", "llama", "msgpack"):
        (copy / f"{name}.py").write_text(trace + "class Model: ...\nclass ModelArgs: ...\nclass Evil: ...\n")
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture(autouse=True)
def _nothing_ran(tmp_path: Path) -> Any:
    yield
    assert not (tmp_path / "it-ran").exists(), "code of the model's was run"


def change(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | fields))


def everything(folder: Path) -> None:
    """All that is ever done to a model before its weights are read."""
    open_checkpoint(folder)
    read_shape(folder, "hostile", None)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat(USER)


@pytest.mark.parametrize("file", ["evil.py", "../evil.py", "/evil.py", "", 5, []])
def test_a_model_file_is_refused_on_every_way_in(file: object, folder: Path) -> None:
    change(folder / "config.json", model_file=file)
    with pytest.raises(ModelUnsupported, match="never runs code that comes with a model"):
        open_checkpoint(folder)
    with pytest.raises(MacpipeError):
        open_skeleton(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_classes_of_the_models_own_are_never_made(name: str, folder: Path) -> None:
    classes = {"AutoModel": "modeling_evil.Evil", "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    change(folder / name, auto_map=classes, tokenizer_class="Evil", custom_pipelines={"a": {"impl": "evil.Evil"}})
    try:
        everything(folder)  # where the files alone are enough, they are used
    except BadCheckpoint as refused:
        assert "never runs code that comes with a model" in refused.sentence


@pytest.mark.parametrize("kind", ["evil", "..evil", "llama.os", "../../evil", "os", "", "__init__"])
def test_a_type_names_a_module_of_mlx_lms_or_nothing(kind: str, folder: Path) -> None:
    change(folder / "config.json", model_type=kind)
    with pytest.raises((ModelUnsupported, BadCheckpoint)):
        open_skeleton(folder)


@pytest.mark.parametrize("field", ["chat_template_type", "tool_parser_type"])
@pytest.mark.parametrize("kind", ["evil", "..evil", "../evil", "json_tools.os", 5])
def test_a_template_or_parser_is_one_of_mlx_lms_or_none(field: str, kind: object, folder: Path) -> None:
    change(folder / "tokenizer_config.json", **{field: kind})
    with pytest.raises(BadCheckpoint, match="cannot be used"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch it-ran') }}",
        "{{ lipsum.__globals__['os'].popen('touch it-ran').read() }}",
        "{{ messages.append({'role': 'user', 'content': 'more'}) }}",
        "{{ raise_exception.__globals__['os'].system('touch it-ran') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include 'evil.py' %}",
        "{% import 'config.json' as c %}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(template: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(folder)
    with pytest.raises(InvalidRequest, match="chat template rejects"):
        tokenizer.chat(USER, ChatOptions())


def test_pickles_beside_the_weights_are_not_opened(folder: Path, tmp_path: Path) -> None:
    bomb = b"cbuiltins\nopen\n(V" + str(tmp_path / "it-ran").encode() + b"\nVw\ntR."
    for name in ("pytorch_model.bin", "model.pt", "optimizer.pth", "training_args.bin", "vocab.pkl", "vocab.pickle"):
        (folder / name).write_bytes(bomb)
    everything(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="pickle can run code"):
        open_checkpoint(folder)


def test_a_pickle_under_a_safe_name_is_a_damaged_file(folder: Path, tmp_path: Path) -> None:
    bomb = b"cbuiltins\nopen\n(V" + str(tmp_path / "it-ran").encode() + b"\nVw\ntR."
    (folder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(BadCheckpoint, match="damaged"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"])
def test_a_small_file_that_leads_out_of_the_folder_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"private": "text"}')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(BadCheckpoint, match=f"{name} .* is a link to a file outside the model's folder"):
        open_checkpoint(folder)


def test_the_links_of_the_hugging_face_cache_are_taken(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.move(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert open_checkpoint(snapshot).tensors


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../model.safetensors", "sub/model.safetensors", "\0", "model-9.safetensors"]
)
def test_an_index_cannot_lead_out_of_the_folder(name: str, folder: Path) -> None:
    change(folder / "model.safetensors.index.json", weight_map={"a": name})
    with pytest.raises(BadCheckpoint, match="which is missing"):
        open_checkpoint(folder)


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "model-2.safetensors")
    with pytest.raises(BadCheckpoint, match="is not a regular file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_file_that_no_model_has_is_not_read_into_memory(file: str, folder: Path) -> None:
    with (folder / file).open("r+b") as grown:
        grown.truncate(1 << 40)
    with pytest.raises(BadCheckpoint, match="bytes; at most"):
        open_checkpoint(folder)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers"])
def test_more_layers_than_tensors_are_refused_before_they_are_made(key: str, folder: Path) -> None:
    change(folder / "config.json", **{key: 10**9})
    with pytest.raises(BadCheckpoint, match="1000000000 layers"):
        open_checkpoint(folder)
