"""Parsing of macOS commands' output. The texts follow Apple's documented formats, with values of real models.

They were not recorded on a Mac. Any other output of a Mac counts as "not known" and is never an error.
"""

from __future__ import annotations

import json

import pytest

from cluster.platform import macos

DISPLAYS = json.dumps(
    {
        "SPDisplaysDataType": [
            {
                "_name": "kHW_AppleM2UltraItem",
                "sppci_bus": "spdisplays_builtin",
                "sppci_cores": "76",
                "sppci_device_type": "spdisplays_gpu",
                "sppci_model": "Apple M2 Ultra",
                "spdisplays_mtlgpufamilysupport": "spdisplays_metal3",
            }
        ]
    }
)
PORTS = """
Hardware Port: Ethernet
Device: en0
Ethernet Address: 00:00:5e:00:53:01

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: 00:00:5e:00:53:02

Hardware Port: Wi-Fi
Device: en1
Ethernet Address: 00:00:5e:00:53:03

VLAN Configurations
===================
"""

RELEASE = """ProductName:\t\tmacOS
ProductVersion:\t\t15.1
BuildVersion:\t\t24B83
"""


def test_gpu_cores() -> None:
    assert macos.parse_gpu_cores(DISPLAYS) == 76
    for strange in ("", "no JSON", "[]", "{}", '{"SPDisplaysDataType": [{}]}', '{"SPDisplaysDataType": [1]}'):
        assert macos.parse_gpu_cores(strange) == 0


def test_macos_version() -> None:
    assert macos.parse_version(RELEASE) == "15.1"
    assert macos.parse_version(RELEASE.replace("15.1", "26.0.1").replace("macOS", "Mac OS X")) == "26.0.1"
    for strange in ("", "ProductName: macOS", "ProductVersion: soon", "ProductVersion:\t\x1b[2J15.1", RELEASE[:40]):
        assert macos.parse_version(strange) == "", strange


@pytest.mark.parametrize(("said", "limit"), [("0\n", 0), ("180224\n", 180224 << 20), ("", 0), ("unknown oid", 0)])
def test_wired_limit(said: str, limit: int) -> None:
    assert macos.parse_wired_limit(said) == limit


@pytest.mark.parametrize(
    ("said", "word"), [("1\n", "normal"), ("2", "warning"), ("4\n", "critical"), ("", ""), ("x", "")]
)
def test_memory_pressure(said: str, word: str) -> None:
    assert macos.parse_pressure(said) == word


def display(**said: str) -> str:
    cards = json.loads(DISPLAYS)
    cards["SPDisplaysDataType"][0]["spdisplays_ndrvs"] = [{"_name": "Studio Display"} | said]
    return json.dumps(cards)


@pytest.mark.parametrize(
    ("said", "names"),
    [
        (DISPLAYS, ()),  # a Mac without a display
        (display(spdisplays_online="spdisplays_yes"), ("Studio Display",)),
        (display(spdisplays_online="spdisplays_no"), ()),
        (display(spdisplays_asleep="spdisplays_yes"), ()),
        ("", None),
        ('{"SPDisplaysDataType": [1]}', None),
    ],
)
def test_displays_that_are_on(said: str, names: tuple[str, ...] | None) -> None:
    assert macos.parse_displays(said) == names


def test_hardware_ports() -> None:
    assert macos.parse_hardware_ports(PORTS) == {"en0": "Ethernet", "bridge0": "Thunderbolt Bridge", "en1": "Wi-Fi"}
    assert macos.parse_hardware_ports("") == {}


def test_elsewhere_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    macos.machine_facts.cache_clear()
    assert macos.machine_facts() == macos.MachineFacts()
    assert macos.memory_pressure() == ""


def test_a_command_that_is_not_there_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert macos.run_command("no-such-command-anywhere") == ""
    assert macos.run_command("false") == ""
    assert macos.run_command("echo", "7") == "7\n"
