"""What ``doctor`` finds in outputs of macOS 14, 15 and 26. Where they come from is in ``recorded``."""

from __future__ import annotations

from dataclasses import fields, replace
from ipaddress import ip_interface
from typing import Any

import pytest

from cluster.core.examination import Finding, Severity
from cluster.discovery.interfaces import Interface
from cluster.doctor.examination import MAC_CHECKS, examine
from cluster.doctor.finding import all_findings, has_problem
from cluster.doctor.network_checks import is_local
from cluster.doctor.readings import (
    CertificateReading,
    MemberConnection,
    ProcessReading,
    ProfileReading,
    Reached,
    Readings,
    Versions,
)
from cluster.platform.mac_commands import MAC_COMMANDS, MacOutputs
from doctor import recorded

NOW = 1_800_000_000.0
DAY = 86_400.0
LAN = Interface("en0", (ip_interface("192.168.1.5/24"),), "Ethernet")
TUNNEL = Interface("utun4", (ip_interface("100.64.0.5/32"),))
OLD_WHEEL = Versions("0.1.0", "3.12.4", "0.32.4", "0.32.2", ("py3-none-macosx_15_0_arm64",))
NEW_WHEEL = replace(OLD_WHEEL, mlx_targets=("py3-none-macosx_26_2_arm64",))
PEER = MemberConnection("mac-2", "192.168.1.7", 50051, Reached.CONNECTED)


def mac(outputs: MacOutputs | None = None, **changed: Any) -> Readings:
    """Return the readings of a Mac on which nothing is wrong, with some of them changed."""
    usual: dict[str, Any] = {
        "outputs": outputs or recorded.healthy_mac(),
        "versions": OLD_WHEEL,
        "disk_path": "/state",
        "disk_free": 400 * recorded.GIB,
        "interfaces": (LAN,),
        "multicast": True,
        "connections": (PEER,),
        "certificates": (CertificateReading("lab", "worker", "mac-1", NOW - DAY, NOW + 89 * DAY),),
        "profiles": (ProfileReading("mac-1", NOW - DAY, "key"),),
        "processes": (ProcessReading(10, 1, "worker"), ProcessReading(11, 10, "cluster.worker.engine")),
    }
    return Readings("Darwin", NOW, **(usual | changed))


def found_by(check: str, readings: Readings) -> tuple[Finding, ...] | None:
    return next(one.findings for one in examine(readings) if one.check == check)


def outputs(**changed: str) -> Readings:
    return mac(recorded.healthy_mac(**changed))


def test_nothing_is_found_on_a_healthy_mac() -> None:
    results = examine(mac())
    assert [(one.check, one.findings) for one in results] == [(check, ()) for check in MAC_CHECKS]
    assert not has_problem(results)


PROBLEMS = [
    ("macOS", outputs(release=recorded.release("13.6.7")), "older than 14.0", "softwareupdate"),
    ("MLX", mac(versions=Versions("0.1.0", "3.12.4")), "MLX is not installed", "pip install"),
    ("memory", outputs(pressure="4\n"), "pressure is critical", "top"),
    ("memory", outputs(wired_limit="65536\n"), "may wire 64 GiB of 64 GiB", "iogpu.wired_limit_mb=0"),
    ("disk", mac(disk_free=500 << 20), "0.488 GiB are free", "du -sh '/state'"),
    ("firewall", outputs(firewall=recorded.FIREWALL_STRICT), "blocks all incoming", "--setblockall off"),
    ("mDNS", mac(interfaces=(TUNNEL,)), "no network but loopback", "networksetup"),
    (
        "certificates",
        mac(certificates=(CertificateReading("lab", "admin", "", NOW - 9 * DAY, NOW - 2 * DAY),)),
        "expired 2 days ago",
        "macpipe join",
    ),
    (
        "certificates",
        mac(certificates=(CertificateReading("lab", "admin", "", NOW + 7200, NOW + DAY),)),
        "clock is behind",
        "sntp",
    ),
    (
        "certificates",
        mac(certificates=(CertificateReading("lab", "admin", damage="no key"),)),
        "cannot be used: no key",
        "macpipe join",
    ),
    ("processes", mac(processes=(ProcessReading(11, 1, "cluster.worker.engine"),)), "process 11", "kill 11"),
]
WARNINGS = [
    ("macOS", outputs(release=recorded.release("26.3.1")), "known to panic", "softwareupdate"),
    ("MLX", outputs(chip="Apple M5 Max\n"), "build for macOS 15.0", "python -m pip install --force-reinstall"),
    (
        "MLX",
        outputs(chip="Apple M5\n", release=recorded.release("26.1")),
        "15.0",
        "update macOS to 26.2 or newer, then ",
    ),
    ("memory", outputs(pressure="2\n"), "pressure is warning", "top"),
    ("disk", mac(disk_free=5 * recorded.GIB), "5 GiB are free", "du -sh"),
    ("sleep", outputs(sleep=recorded.SLEEP_SOON), "sleeps after 10 idle minutes", "sudo pmset -c sleep 0"),
    ("power", outputs(battery=recorded.ON_BATTERY), "runs on battery", "power adapter"),
    (
        "power",
        outputs(sleep=recorded.SLEEP_M1.replace("lowpowermode         0", "lowpowermode         1")),
        "low power mode",
        "lowpowermode 0",
    ),
    (
        "power",
        outputs(sleep=recorded.SLEEP_M1_MAX.replace("powermode            0", "powermode            1")),
        "low power mode",
        "lowpowermode 0",
    ),
    ("heat", outputs(heat=recorded.HOT), "limits the processors to 70% of their speed", "pmset -g therm"),
    ("mDNS", mac(multicast=False), "multicast cannot be used", "--coordinator"),
    ("routes", outputs(routes=recorded.BRIDGE_ROUTES), "goes through bridge0", "networksetup"),
    (
        "Thunderbolt",
        outputs(thunderbolt=recorded.thunderbolt("20 Gb/s")),
        "port 3 to Mac Studio runs at 20 Gb/s",
        "cable",
    ),
    (
        "RDMA",
        outputs(rdma_ports=recorded.RDMA_PORTS.replace("PORT_ACTIVE (4)", "PORT_DOWN (1)")),
        "no port is active",
        "ibv_devinfo",
    ),
    (
        "RDMA",
        outputs(rdma_ports=recorded.RDMA_PORTS.replace("PORT_DOWN (1)", "PORT_ACTIVE (4)")),
        "rdma_en2",
        "another port",
    ),
    (
        "certificates",
        mac(certificates=(CertificateReading("lab", "worker", "a", NOW - 80 * DAY, NOW + 10 * DAY),)),
        "was not renewed and expires in 10 days",
        "macpipe worker",
    ),
]
NOTES = [
    ("display", outputs(displays=recorded.DISPLAY), "a display is on: Studio Display", "displaysleep 1"),
    ("memory", outputs(wired_limit="0\n"), "about 48 GiB of 64 GiB", "iogpu.wired_limit_mb=57344"),
    ("firewall", outputs(firewall=recorded.FIREWALL_ON), "firewall is on", "--unblockapp"),
    ("VPN", outputs(vpn=recorded.VPN), "connected: Tailscale", "scutil --nc stop 'Tailscale'"),
    ("VPN", mac(interfaces=(LAN, TUNNEL)), "connected: utun4", "disconnect utun4"),
    ("ports", mac(busy_ports=(7700,)), "port 7700", "lsof -nP -iTCP:7700"),
    ("RDMA", outputs(rdma="disabled\n"), "not enabled", "rdma_ctl enable"),
    ("RDMA", outputs(release=recorded.release("26.1")), "needs macOS 26.2", "softwareupdate"),
    ("RDMA", outputs(thunderbolt=recorded.thunderbolt("40 Gb/s")), "rdma_en2, rdma_en3", ""),
    (
        "measured speed",
        mac(profiles=(ProfileReading("mac-1", NOW - 200 * DAY, "key"),)),
        "200 days old",
        "--profile new",
    ),
    (
        "measured speed",
        mac(profiles=(ProfileReading("mac-1", NOW - DAY, "key", "9.0 programs ran on 8 processors"),)),
        "measured while this Mac was busy: 9.0 programs",
        "macpipe worker --name mac-1 --profile new",
    ),
]


@pytest.mark.parametrize(
    ("severity", "check", "readings", "what", "remedy"),
    [
        (severity, *case)
        for severity, cases in zip(Severity, (PROBLEMS, WARNINGS, NOTES), strict=True)
        for case in cases
    ],
)
def test_finds(severity: Severity, check: str, readings: Readings, what: str, remedy: str) -> None:
    found = found_by(check, readings)
    assert found is not None
    assert [one.severity for one in found] == [severity]
    assert what in found[0].what
    assert remedy in found[0].remedy
    assert found[0].why.endswith(".")
    assert has_problem(examine(readings)) == (severity is Severity.PROBLEM)


@pytest.mark.parametrize(
    ("check", "readings"),
    [
        ("MLX", mac(recorded.healthy_mac(chip="Apple M5 Ultra\n"), versions=NEW_WHEEL)),
        ("sleep", outputs(sleep=recorded.SLEEP_M1)),  # SleepDisabled outweighs the minutes
        ("memory", mac(recorded.healthy_mac(memory=f"{16 * recorded.GIB}\n", wired_limit="0\n"))),
        ("display", outputs(displays=recorded.displays(asleep=True))),
        ("macOS", outputs(release=recorded.release("14.0"))),
        ("macOS", outputs(release=recorded.release("15.6"))),
        ("RDMA", outputs(thunderbolt=recorded.thunderbolt("40 Gb/s"), rdma_devices="")),
        ("Thunderbolt", outputs(thunderbolt=recorded.thunderbolt("10 Gb/s", "ThunderBay 4"))),  # a disk, no Mac
        ("ports", mac(busy_ports=(7700,), processes=(ProcessReading(9, 1, "serve"),))),
    ],
)
def test_finds_nothing(check: str, readings: Readings) -> None:
    assert found_by(check, readings) == ()


MACS = [
    ("Apple M1", "14.7.6", "40 Gb/s", "", {}),
    ("Apple M2 Pro", "15.6.1", "40 Gb/s", "", {}),
    ("Apple M3 Ultra", "15.6.1", "80 Gb/s", "", {"RDMA": "RDMA needs macOS 26.2, and this Mac has 15.6.1"}),
    ("Apple M3 Ultra", "26.2", "80 Gb/s", "disabled\n", {"RDMA": "RDMA over Thunderbolt 5 is not enabled"}),
    ("Apple M4 Max", "26.5", "80 Gb/s", "enabled\n", {}),
    ("Apple M4", "26.4", "40 Gb/s", "", {"macOS": "macOS 26.4 is known to panic"}),
    ("Apple M5 Max", "26.5", "80 Gb/s", "enabled\n", {"MLX": "MLX is the build for macOS 15.0"}),
    ("Apple M5", "26.1", "40 Gb/s", "", {"MLX": "MLX is the build for macOS 15.0"}),
]


@pytest.mark.parametrize(("chip", "release", "link", "rdma", "expected"), MACS)
def test_macs_from_m1_to_m5(chip: str, release: str, link: str, rdma: str, expected: dict[str, str]) -> None:
    """Nothing but what is expected is found on a Mac of each generation, with and without RDMA."""
    read = outputs(
        chip=f"{chip}\n",
        release=recorded.release(release),
        thunderbolt=recorded.thunderbolt(link),
        rdma=rdma,
        rdma_devices=recorded.RDMA_DEVICES if rdma else "",
        rdma_ports=recorded.RDMA_PORTS if rdma else "",
    )
    found = {one.check: one.findings for one in examine(read)}
    assert None not in found.values()
    assert {check: finding.what for check, findings in found.items() for finding in findings or ()} == expected


def test_a_denied_local_network_is_explained_with_the_settings_path() -> None:
    blocked = MemberConnection("mac-2", "192.168.1.7", 50051, Reached.NO_ROUTE)
    (found,) = found_by("connections to members", mac(connections=(PEER, blocked))) or ()
    assert found.severity is Severity.PROBLEM
    assert "mac-2 (192.168.1.7:50051)" in found.what
    assert "errno 65" in found.what
    assert "System Settings > Privacy & Security > Local Network" in found.remedy


@pytest.mark.parametrize(
    ("host", "reached", "why"),
    [
        ("192.168.1.7", Reached.REFUSED, "macpipe does not run"),
        ("192.168.1.7", Reached.TIMED_OUT, "off or asleep"),
        ("8.8.8.8", Reached.NO_ROUTE, "another network"),
        ("mac-9", Reached.UNKNOWN_HOST, "misspelled"),
        ("192.168.1.7", Reached.FAILED, "network of this Mac"),
    ],
)
def test_a_failed_connection_has_another_cause(host: str, reached: Reached, why: str) -> None:
    (found,) = found_by("connections to members", mac(connections=(MemberConnection("mac-2", host, 1, reached),))) or ()
    assert why in found.why
    assert "Local Network" not in found.remedy


def test_no_route_on_linux_is_no_permission() -> None:
    connections = (MemberConnection("mac-2", "192.168.1.7", 1, Reached.NO_ROUTE),)
    (found,) = found_by("connections to members", replace(mac(connections=connections), system="Linux")) or ()
    assert "Local Network" not in found.remedy


@pytest.mark.parametrize(
    ("host", "local"),
    [
        *((host, True) for host in ("192.168.1.7", "169.254.1.2", "fe80::1", "mac-2.local")),
        *((host, False) for host in ("127.0.0.1", "::1", "8.8.8.8", "example.org")),
    ],
)
def test_local_addresses(host: str, local: bool) -> None:
    assert is_local(host) is local


def test_what_is_not_known_is_not_called_fine() -> None:
    """Without any output, only what macpipe reads itself is judged."""
    blind = Readings("Darwin", NOW, versions=Versions(mlx="0.32.4"))
    judged = {one.check for one in examine(blind) if one.findings is not None}
    assert judged == {"ports", "certificates", "measured speed"}


@pytest.mark.parametrize("field", [field.name for field in fields(MacOutputs)])
@pytest.mark.parametrize("strange", ["", "\x00", "{}", "[]", '{"SPThunderboltDataType": [1]}', "(State = x)", "9" * 9])
def test_strange_output_is_no_error(field: str, strange: str) -> None:
    results = examine(outputs(**{field: strange}))
    assert [one.check for one in results] == list(MAC_CHECKS)


def test_every_output_has_a_command() -> None:
    assert set(MAC_COMMANDS) == {field.name for field in fields(MacOutputs)}


def test_the_worst_comes_first() -> None:
    found = all_findings(examine(outputs(firewall=recorded.FIREWALL_ON, pressure="4\n", sleep=recorded.SLEEP_SOON)))
    assert [one.severity for one in found] == list(Severity)
