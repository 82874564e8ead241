"""Refusals of the hub, in sentences that name the way out, and what works without the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from checkpoints import add_pooling
from cluster.core.errors import BadCheckpoint, HubOffline, HubUnreachable, ModelForbidden, ModelNotFound
from cluster.model.sentence_embedding import SentenceEmbedding, read_sentence_embedding
from cluster.store import hub as hubs
from cluster.store.hub import Hub, HubName
from cluster.store.model_files import git_blob, is_wanted
from cluster.store.partial_checkpoint import PartialCheckpoint
from cluster.store.store import Store
from fake_hub import FakeHub


def test_a_model_that_is_not_there(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no model owner/large on http://127.*or it is private.*HF_TOKEN"):
        Store(tmp_path).find_by_name("owner/large")
    with pytest.raises(ModelNotFound, match=r"owner/tiny has no revision v9.*OWNER/NAME@REVISION"):
        Store(tmp_path).find_by_name("owner/tiny@v9")
    with pytest.raises(ModelNotFound, match="neither a folder nor"):
        Store(tmp_path).find_by_name("-/-")


def test_a_gated_model_and_the_token_that_opens_it(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_right"
    with pytest.raises(ModelForbidden, match=rf"owner/tiny is gated: ask for access on {hub.address}/owner/tiny"):
        Store(tmp_path).find_by_name("owner/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ModelForbidden, match=r"owner/tiny is gated, and the token of this Mac .* has no access"):
        Store(tmp_path).find_by_name("owner/tiny")
    hub.expired = "hf_wrong"
    with pytest.raises(ModelForbidden, match=r"rejects the token of this Mac: HF_TOKEN, .* is invalid or has exp"):
        Store(tmp_path).find_by_name("owner/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert Store(tmp_path).find_by_name("owner/tiny").partial


def test_without_a_network_what_is_known_still_opens(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Store(tmp_path).find_by_name("owner/tiny@main").folder
    gone = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", gone)
    assert Store(tmp_path).find_by_name("owner/tiny").folder == folder
    with pytest.raises(
        HubUnreachable, match=rf"no folder owner/other, .*cannot reach {gone} for owner/other.*HF_ENDPOINT"
    ):
        Store(tmp_path).find_by_name("owner/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Store(tmp_path).find_by_name("owner/tiny").folder == folder
    with pytest.raises(HubOffline, match=r"HF_HUB_OFFLINE forbids.*; unset it and try again while online"):
        Store(tmp_path).find_by_name("owner/other")


@pytest.mark.parametrize("address", ["notaurl", "http://", "ftp://a"])
def test_an_address_of_the_hub_that_is_none(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    with pytest.raises(HubUnreachable, match=f"the hub's address '{address}' is not a valid URL .*HF_ENDPOINT"):
        hubs.look_up(HubName("owner/tiny"))
    close_session()


def test_a_new_version_on_the_hub_is_another_model(hub: FakeHub, published: Path, tmp_path: Path) -> None:
    old = Store(tmp_path).find_by_name("owner/tiny")
    new = tmp_path / "new"
    new.mkdir()
    for file in published.iterdir():
        (new / file.name).write_bytes(file.read_bytes())
    (new / "config.json").write_bytes((published / "config.json").read_bytes() + b" ")
    hub.folders["owner/tiny"], hub.commit = new, "f" * 40
    found = Store(tmp_path).find_by_name("owner/tiny")
    assert found.folder != old.folder
    assert found.partial
    assert found.partial.origin.commit == hub.commit


def test_small_files_that_arrive_damaged_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    before = hub.folders["owner/tiny"]
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in before.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    files = hubs.look_up(HubName("owner/tiny"))
    (damaged / "config.json").write_bytes(b"x" + (before / "config.json").read_bytes()[1:])
    hub.folders["owner/tiny"] = damaged
    (config,) = (file for file in files.files if file.name == "config.json")
    assert not config.matches(Hub("owner/tiny", hub.commit).small(config))
    assert git_blob((before / "config.json").read_bytes()) == config.blob


def test_a_pickle_model_is_refused_before_anything_is_fetched(hub: FakeHub, published: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((published / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    hub.folders["owner/pickled"] = pickled
    with pytest.raises(BadCheckpoint, match=r"only in pickle files \(pytorch_model.bin\)"):
        Store(tmp_path).find_by_name("owner/pickled")
    assert not hub.served


def test_how_an_embedder_pools_is_fetched(hub: FakeHub, published: Path, tmp_path: Path) -> None:
    hub.folders["owner/embedder"] = add_pooling(Path(shutil.copytree(published, tmp_path / "embedder")))
    found = Store(tmp_path).find_by_name("owner/embedder")
    assert found.partial
    assert read_sentence_embedding(found.folder) == SentenceEmbedding(normalized=True)


@pytest.mark.parametrize(
    "name",
    [
        "../config.json",
        "2_Pooling/config.json",
        "1_Pooling/../config.json",
        "a/model.safetensors",
        "model.py",
        "..",
        "evil.bin",
        "a\\b.json",
    ],
)
def test_no_other_files_are_taken(name: str) -> None:
    assert not is_wanted(name)


def test_a_partial_checkpoint_knows_where_it_is_from(hub: FakeHub, tmp_path: Path) -> None:
    partial = Store(tmp_path).find_by_name("owner/tiny").partial
    assert partial
    assert (partial.origin.repo, partial.origin.commit) == ("owner/tiny", hub.commit)
    assert PartialCheckpoint(partial.folder).origin == partial.origin
    assert Store(tmp_path).find_kept(partial.fingerprint)
    assert Store(tmp_path).find_kept("../" + partial.fingerprint) is None
