"""The commands whose output says how a Mac is set up. All of them only read, and none needs an administrator.

Each output is kept as the command wrote it; its meaning is decided in ``cluster.doctor``. On another system all outputs
are empty.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from cluster.platform.macos import run_command

MAX_OUTPUT: Final = 64 * 1024
"""Characters that are kept of a command's output; the largest, of system_profiler, has about 10,000."""


@dataclass(frozen=True, slots=True)
class MacOutputs:
    """What each command of ``MAC_COMMANDS`` wrote; empty if it does not exist, failed or took too long."""

    release: str = ""
    chip: str = ""
    model: str = ""
    memory: str = ""
    wired_limit: str = ""
    pressure: str = ""
    sleep: str = ""
    battery: str = ""
    heat: str = ""
    displays: str = ""
    firewall: str = ""
    vpn: str = ""
    routes: str = ""
    thunderbolt: str = ""
    rdma: str = ""
    rdma_devices: str = ""
    rdma_ports: str = ""


MAC_COMMANDS: Final = {
    "release": ("/usr/bin/sw_vers",),
    "chip": ("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"),
    "model": ("/usr/sbin/sysctl", "-n", "hw.model"),
    "memory": ("/usr/sbin/sysctl", "-n", "hw.memsize"),
    "wired_limit": ("/usr/sbin/sysctl", "-n", "iogpu.wired_limit_mb"),
    "pressure": ("/usr/sbin/sysctl", "-n", "kern.memorystatus_vm_pressure_level"),
    "sleep": ("/usr/bin/pmset", "-g"),
    "battery": ("/usr/bin/pmset", "-g", "batt"),
    "heat": ("/usr/bin/pmset", "-g", "therm"),
    "displays": ("/usr/sbin/system_profiler", "-json", "SPDisplaysDataType"),
    "firewall": ("/usr/libexec/ApplicationFirewall/socketfilterfw", "--getglobalstate"),
    "vpn": ("/usr/sbin/scutil", "--nc", "list"),
    "routes": ("/usr/sbin/netstat", "-rn", "-f", "inet"),
    "thunderbolt": ("/usr/sbin/system_profiler", "-json", "SPThunderboltDataType"),
    "rdma": ("rdma_ctl", "status"),
    "rdma_devices": ("ibv_devices",),
    "rdma_ports": ("ibv_devinfo",),
}
"""The command of each field of ``MacOutputs``."""


def run_mac_commands() -> MacOutputs:
    """Run all commands at once and return their outputs. Takes as long as the slowest, at most its time limit."""
    with ThreadPoolExecutor(len(MAC_COMMANDS)) as pool:
        runs = {field: pool.submit(run_command, *command) for field, command in MAC_COMMANDS.items()}
        return MacOutputs(**{field: run.result()[:MAX_OUTPUT] for field, run in runs.items()})
