"""API keys: shown once, stored as hashes, with unique names, and invalid as soon as they are revoked."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import Busy, ClusterDamaged, DuplicateName, InvalidOption, MemberNotFound
from cluster.security import keys as module
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keys import TEXT, KeyLimits, KeyScope, KeyStore


@pytest.fixture
def folder(tmp_path: Path) -> ClusterFolder:
    return ClusterFolder(tmp_path, "lab")


@pytest.fixture
def keys(folder: ClusterFolder) -> KeyStore:
    return KeyStore(folder)


def test_a_key_opens_what_it_was_made_for_and_only_its_hash_is_kept(folder: ClusterFolder, keys: KeyStore) -> None:
    key, text = keys.create("amy", KeyScope.ADMIN, KeyLimits(60, 10_000, 4))
    assert TEXT.fullmatch(text)
    other = KeyStore(folder)
    assert other.find(text) == key
    assert (key.name, key.scope, key.limits) == ("amy", KeyScope.ADMIN, KeyLimits(60, 10_000, 4))
    kept = folder.keys.read_bytes()
    assert text.encode() not in kept
    assert text[17:].encode() not in kept
    assert folder.keys.stat().st_mode & 0o777 == 0o600
    assert text not in repr(key)
    assert repr(key.digest) not in repr(key)


def test_what_is_not_quite_the_key_opens_nothing(keys: KeyStore) -> None:
    _, text = keys.create("amy")
    _, other = keys.create("bob")
    swapped = text[:17] + other[17:]
    last = "A" if text[-1] != "A" else "B"
    for wrong in ("", "mpk_", text[:-1], text + "A", text[:-1] + last, text.upper(), f" {text}", f"{text}\n", swapped):
        assert keys.find(wrong) is None, wrong


@given(st.text(max_size=80))
def test_no_text_breaks_the_lookup(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    assert KeyStore(ClusterFolder(tmp_path_factory.getbasetemp(), "none")).find(text) is None


def test_hashes_are_compared_in_constant_time_whether_the_id_is_known_or_not(
    keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text = keys.create("amy")
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(module.hmac, "compare_digest", compare)
    assert keys.find(text)
    assert keys.find(text[:-1] + ("A" if text[-1] != "A" else "B")) is None
    assert keys.find("mpk_" + "0" * 12 + text[16:]) is None
    assert [(len(a), len(b)) for a, b in compared] == [(32, 32)] * 3


def test_a_revoked_key_is_refused_everywhere_at_the_next_look(folder: ClusterFolder, keys: KeyStore) -> None:
    key, text = keys.create("amy")
    running = KeyStore(folder)
    assert running.find(text)
    keys.revoke("amy")
    assert running.find(text) is None
    assert running.find_by_id(key.id) is None
    assert [one.revoked is None for one in running.all_keys()] == [False]
    with pytest.raises(MemberNotFound, match="amy"):
        keys.revoke("amy")
    again, _ = keys.create("amy")
    assert keys.revoke(again.id).id == again.id


def test_names_are_unique_and_keys_bounded(keys: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KEYS", 3)
    keys.create("a")
    with pytest.raises(DuplicateName, match="revoke it first"):
        keys.create("a")
    with pytest.raises(InvalidOption):
        keys.create("../a")
    for name in ("b", "c"):
        keys.create(name)
    with pytest.raises(Busy, match="3 keys"):
        keys.create("d")
    for name in ("b", "c"):
        keys.revoke(name)
    keys.create("d")
    assert [k.name for k in keys.all_keys()] == ["a", "c", "d"], "the longest revoked one is forgotten"


@pytest.mark.parametrize("wrong", [0, -1, 2**31])
def test_a_limit_is_a_number_of_something(wrong: int) -> None:
    with pytest.raises(InvalidOption, match="tokens a minute"):
        KeyLimits(tokens_a_minute=wrong)


@pytest.mark.parametrize("content", [b"", b"\xff", b"\x92\x01\x91\x91\xa1x", b"\x92\x02\x90"])
def test_a_damaged_file_is_no_empty_one(folder: ClusterFolder, keys: KeyStore, content: bytes) -> None:
    folder.write(folder.keys, content)
    with pytest.raises(ClusterDamaged):
        keys.find("mpk_" + "0" * 12 + "_" + "a" * 43)


def test_scopes() -> None:
    assert KeyScope.ADMIN.covers(KeyScope.INFERENCE)
    assert not KeyScope.INFERENCE.covers(KeyScope.ADMIN)
