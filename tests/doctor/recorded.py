"""Outputs of macOS commands for the tests of ``cluster.doctor``. None was recorded by this project.

Recorded by others, in public issues, and shortened:

- ``SLEEP_M1``: AppHouseKitchen/AlDente-Battery_Care_and_Monitoring issue 603, 2022-03-19, `pmset -g`
- ``SLEEP_M1_MAX``: alfredapp/low-power-mode-workflow issue 6, 2023-08-21, `pmset -g custom`
- ``VPN``: tailscale/tailscale issue 19776, 2026-05-15, macOS 26.5, `scutil --nc list`; the id is made up
- ``NO_VPN``: mrodalgaard/alfred-network-workflow issue 19, 2024-03-13, `scutil --nc list`
- ``FIREWALL_STRICT``: dan-snelson/Mac-Health-Check pull request 8, 2025-07-23, `socketfilterfw --getglobalstate`
- ``FIREWALL_ON``, ``FIREWALL_OFF``: rgcr/m-cli issue 160, 2021-03-31, the same command
- ``DISPLAY``: the keys ``spdisplays_ndrvs``, ``_name`` and ``spdisplays_online`` as public programs read them; the
  rest, and the key of a display that is asleep, were written from documentation
- ``THUNDERBOLT_5``: values of exo-explore/exo issue 1390, `system_profiler SPThunderboltDataType`, a Mac mini with a
  Mac Studio. The issue shows the text; its JSON form here was written from documentation

Written from documentation: all others.
"""

from __future__ import annotations

import json
from typing import Any

from cluster.platform.mac_commands import MacOutputs

GIB = 1 << 30

SLEEP_M1 = """System-wide power settings:
 SleepDisabled\t\t1
Currently in use:
 standby              1
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 powernap             1
 networkoversleep     0
 disksleep            10
 sleep                1 (sleep prevented by bluetoothd, powerd, sharingd)
 hibernatemode        3
 ttyskeepawake        1
 displaysleep         10 (display sleep prevented by com.apphousekitchen.aldente-pro)
 tcpkeepalive         1
 lowpowermode         0
 womp                 1
"""
SLEEP_M1_MAX = """Battery Power:
 Sleep On Power Button 1
 powermode            0
 standby              1
 ttyskeepawake        1
 hibernatemode        3
 powernap             1
"""
VPN = """Available network connection services in the current set (*=enabled):
* (Connected)      5E0C7A4B-1B2C-4D3E-8F90-0123456789AB VPN (io.tailscale.ipn.macsys) "Tailscale"  \
[VPN:io.tailscale.ipn.macsys]
"""
NO_VPN = """Available network connection services in the current set (*=enabled):
* (Disconnected)   E3A8F336-CCEB-4A29-B50A-FBAD41D84A71 PPP --> L2TP       "My VPN"                         [PPP:L2TP]
"""
FIREWALL_OFF = "Firewall is disabled. (State = 0)\n"
FIREWALL_ON = "Firewall is enabled. (State = 1)\n"
FIREWALL_STRICT = "Firewall is blocking all non-essential incoming connections. (State = 2)\n"

SLEEP_NEVER = """System-wide power settings:
Currently in use:
 sleep                0
 displaysleep         10
 powermode            0
"""
SLEEP_SOON = SLEEP_NEVER.replace("sleep                0", "sleep                10")
ON_BATTERY = (
    "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1)\t84%; discharging; 5:12 remaining present: true\n"
)
ON_POWER = "Now drawing from 'AC Power'\n"
COOL = "Note: No thermal warning level has been recorded\nNote: No performance warning level has been recorded\n"
HOT = "CPU_Scheduler_Limit \t= 100\nCPU_Available_CPUs \t= 10\nCPU_Speed_Limit \t= 70\n"
ROUTES = """Routing tables

Internet:
Destination        Gateway            Flags               Netif Expire
default            192.168.1.1        UGScg                 en0
127                127.0.0.1          UCS                   lo0
"""
BRIDGE_ROUTES = ROUTES.replace(
    "192.168.1.1        UGScg                 en0", "192.168.2.1        UGScg             bridge0"
)
RDMA_DEVICES = """    device          \t   node GUID
    ------          \t----------------
    rdma_en2        \t8096a9d9edbaac05
    rdma_en3        \t8196a9d9edbaac05
"""
RDMA_PORTS = """hca_id:\trdma_en2
\ttransport:\t\t\tThunderbolt (5)
\tnode_guid:\t\t\t8096:a9d9:edba:ac05
\t\tport:\t1
\t\t\tstate:\t\t\tPORT_DOWN (1)

hca_id:\trdma_en3
\ttransport:\t\t\tThunderbolt (5)
\t\tport:\t1
\t\t\tstate:\t\t\tPORT_ACTIVE (4)
"""


def release(version: str) -> str:
    """Return what ``sw_vers`` writes."""
    return f"ProductName:\t\tmacOS\nProductVersion:\t\t{version}\nBuildVersion:\t\t25C56\n"


def thunderbolt(speed: str, device: str = "Mac16,9") -> str:
    """Return a report with one device at ``speed`` and one empty port."""
    bus: dict[str, Any] = {
        "_name": "thunderboltusb4_bus_2",
        "device_name_key": "Mac mini",
        "domain_uuid_key": "7F158861-C131-4D0D-83B6-CA50EF76C32B",
        "receptacle_1_tag": {
            "current_speed_key": speed,
            "link_status_key": "0x2",
            "receptacle_id_key": "3",
            "receptacle_status_key": "receptacle_connected",
        },
        "route_string_key": "0",
        "switch_uid_key": "0x05AC897E0A474D02",
        "vendor_name_key": "Apple Inc.",
        "_items": [{"_name": "Mac Studio", "device_name_key": device, "vendor_name_key": "Apple Inc."}],
    }
    empty = {
        "_name": "thunderboltusb4_bus_1",
        "device_name_key": "Mac mini",
        "receptacle_1_tag": {
            "current_speed_key": "Up to 120 Gb/s",
            "receptacle_id_key": "2",
            "receptacle_status_key": "receptacle_no_devices_connected",
        },
    }
    return json.dumps({"SPThunderboltDataType": [bus, empty]})


THUNDERBOLT_5 = thunderbolt("80 Gb/s")


def displays(*, asleep: bool | None) -> str:
    """Return a report of the GPU with one display, or with None of a Mac without one."""
    card: dict[str, Any] = {"_name": "Apple M4 Max", "sppci_cores": "40"}
    if asleep is not None:
        card["spdisplays_ndrvs"] = [
            {
                "_name": "Studio Display",
                "_spdisplays_display-serial-number": "fd626d62",
                "spdisplays_online": "spdisplays_yes",
            }
            | ({"spdisplays_asleep": "spdisplays_yes"} if asleep else {})
        ]
    return json.dumps({"SPDisplaysDataType": [card]})


DISPLAY = displays(asleep=False)


def healthy_mac(**changed: str) -> MacOutputs:
    """Return the outputs of an M4 Max with macOS 26.5 on which nothing is wrong, with some of them changed."""
    usual = {
        "release": release("26.5"),
        "chip": "Apple M4 Max\n",
        "model": "Mac16,9\n",
        "memory": f"{64 * GIB}\n",
        "wired_limit": "57344\n",
        "pressure": "1\n",
        "sleep": SLEEP_NEVER,
        "battery": ON_POWER,
        "heat": COOL,
        "displays": displays(asleep=None),
        "firewall": FIREWALL_OFF,
        "vpn": NO_VPN,
        "routes": ROUTES,
        "thunderbolt": THUNDERBOLT_5,
        "rdma": "enabled\n",
        "rdma_devices": RDMA_DEVICES,
        "rdma_ports": RDMA_PORTS,
    }
    return MacOutputs(**(usual | changed))
