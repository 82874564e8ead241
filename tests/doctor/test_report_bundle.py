"""The bundle for a bug report contains no secret."""

from __future__ import annotations

import io
import json
import secrets
import zipfile
from ipaddress import ip_interface

from cluster.doctor.report_bundle import MEMBERS, README, REMOVED, pack_report, redact
from doctor import recorded

PEM = f"-----BEGIN EC PRIVATE KEY-----\n{'QUJD' * 30}\n-----END EC PRIVATE KEY-----"
SECRETS = [
    "mpj1.3mJr7AoUXx2Wqd9Fh",
    f"mpk_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}",
    "hf_AbCdEfGhIjKlMnOpQrSt",
    "sk-proj-AbCdEfGhIjKlMnOpQrSt",
    "QUJDQUJD",
    "00:00:5e:00:53:01",
    "fe80::fc:ff:fe00:1",
    "7F158861-C131-4D0D-83B6-CA50EF76C32B",
    "0x05AC897E0A474D02",
    "8096a9d9edbaac05",
    "8096:a9d9:edba:ac05",
    "5E0C7A4B",
    "fd626d62",
]
TEXT = "\n".join(
    (
        *SECRETS[:4],
        PEM,
        *SECRETS[5:9],
        "Authorization: Bearer abcdef.ghi",
        recorded.THUNDERBOLT_5,
        recorded.VPN,
        recorded.DISPLAY,
        recorded.RDMA_DEVICES,
        recorded.RDMA_PORTS,
    )
)


def test_secrets_are_removed() -> None:
    cleaned = redact(TEXT, "", "")
    assert [secret for secret in (*SECRETS, "abcdef.ghi") if secret in cleaned] == []
    assert REMOVED in cleaned
    assert [kept for kept in ("80 Gb/s", "Tailscale", "PORT_ACTIVE", "rdma_en3") if kept not in cleaned] == []


def test_the_user_and_the_home_folder_are_removed() -> None:
    cleaned = redact("/Volumes/amy/models/amy-7b, amyloid, /Volumes/amy", "amy", "/Volumes/amy")
    assert cleaned == f"~/models/{REMOVED}-7b, amyloid, ~"


def test_a_bundle_has_no_secret_in_any_file() -> None:
    """What is not secret stays: numbers, addresses, and the ids of workers."""
    own = {"id": "a1b2c3d4e5f60718", "address": ip_interface("192.168.1.5/24"), "free": 7, "known": None}
    facts = {name: {"texts": [TEXT, {"text": TEXT}], "own": own} for name in MEMBERS[1:]}
    with zipfile.ZipFile(io.BytesIO(pack_report(facts, "amy", "/Volumes/amy"))) as bundle:
        assert tuple(bundle.namelist()) == MEMBERS
        assert bundle.read("README.txt").decode() == README
        texts = [bundle.read(name).decode() for name in MEMBERS[1:]]
    assert [secret for secret in SECRETS for text in texts if secret in text] == []
    assert [json.loads(text)["own"] for text in texts] == [own | {"address": "192.168.1.5/24"}] * 3
