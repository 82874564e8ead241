"""``macpipe pull`` from the outside, against a hub over real HTTP."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from fake_hub import FakeHub
from integration.daemons import command

pytestmark = pytest.mark.timeout(120)


def pull(hub: FakeHub, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    named = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home / "hf"), "MACPIPE_HOME": str(home), **more}
    return subprocess.run(
        command("pull", *arguments), env={**os.environ, **named}, capture_output=True, text=True, timeout=100
    )


def test_layers_first_and_then_the_rest(hub: FakeHub, published: Path, tmp_path: Path) -> None:
    part = pull(hub, tmp_path, "owner/tiny", "--layers", "1-2", "--json")
    assert part.returncode == 0, part.stderr
    told = json.loads(part.stdout)
    assert told["layers"] == [1, 3]
    assert told["fetched_bytes"] == told["bytes"] < 0.6 * sum(f.stat().st_size for f in published.glob("*.safetensors"))
    assert "owner/tiny: fetching, " in part.stderr
    whole = pull(hub, tmp_path, "owner/tiny", "--json")
    assert json.loads(whole.stdout)["fetched_bytes"] == json.loads(whole.stdout)["bytes"] - told["bytes"]
    assert hub.asked_twice() == 0
    for file in published.iterdir():
        assert (Path(told["folder"]) / file.name).read_bytes() == file.read_bytes()
    hub.down = True
    again = pull(hub, tmp_path, "owner/tiny", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert "owner/tiny: " in again.stdout
    assert "checking, 100%" in again.stderr
    assert "fetching" not in again.stderr


def test_refusals_are_one_sentence(hub: FakeHub, tmp_path: Path) -> None:
    missing = pull(hub, tmp_path, "owner/none")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "there is no model owner/none" in missing.stderr
    assert "Traceback" not in missing.stderr
    beyond = pull(hub, tmp_path, "owner/tiny", "--layers", "2-9")
    assert beyond.returncode == 2
    assert "has layers 0-3" in beyond.stderr
    hub.token = "hf_right"
    assert json.loads(pull(hub, tmp_path, "owner/tiny", "--json").stdout)["error"]["reason"] == "MODEL_FORBIDDEN"
    assert pull(hub, tmp_path, "owner/tiny", "--layers", "0-0", HF_TOKEN="hf_right").returncode == 0
