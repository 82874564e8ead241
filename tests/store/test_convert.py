"""``macpipe convert`` from the outside, with a model of a hub over real HTTP."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from checkpoints import make
from cluster.cli.convert import convert
from cluster.core.errors import BadCheckpoint, InvalidOption, ModelNotFound
from cluster.model.checkpoint import open_checkpoint
from fake_hub import FakeHub
from integration.daemons import command

pytestmark = pytest.mark.timeout(120)


def test_a_model_of_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    named = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "MACPIPE_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        command("convert", "owner/tiny", str(tmp_path / "out"), "--bits", "8", "--group-size", "32", "--json"),
        env={**os.environ, **named},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    config = open_checkpoint(Path(told["folder"])).config
    assert config["quantization"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    assert told["fingerprint"] == open_checkpoint(tmp_path / "out").fingerprint
    assert told["bytes"] == sum(one.nbytes for one in open_checkpoint(tmp_path / "out").tensors.values())
    assert "owner/tiny: 100%, 67.6 of 67.6 KiB" in done.stderr


def test_wrong_usage_is_a_sentence(tmp_path: Path) -> None:
    """Nothing is created, whatever is wrong."""
    source = make("llama", tmp_path / "source")
    text = tmp_path / "model.gguf"
    text.write_text("no model")
    for name, how, why in (
        (source, {"bits": 7}, "no quantization with 7 bits"),
        (source, {"q_mode": "mxfp4", "group_size": 64}, "mode mxfp4 has no groups of 64"),
        (source, {"bits": 4, "dequantize": True}, "either quantizes or dequantizes"),
        (source, {"quant_predicate": "mixed_2_6", "q_mode": "mxfp4"}, "needs the mode affine"),
        (source, {"quant_predicate": "mixed_1_2"}, "unknown recipe"),
        (source, {"dtype": "float64"}, "unknown type 'float64'"),
        (text, {}, "is a file, but not a GGUF file"),
    ):
        with pytest.raises(InvalidOption, match=why):
            convert(str(name), tmp_path / "out", home=tmp_path / "home", **how)
    with pytest.raises(InvalidOption, match="is inside the source's folder"):
        convert(str(source), source / "out", home=tmp_path / "home")
    with pytest.raises(ModelNotFound):
        convert("no-such-model", tmp_path / "out", home=tmp_path / "home")
    (source / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="has no weights"):
        convert(str(source), tmp_path / "out", home=tmp_path / "home")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "source"]
