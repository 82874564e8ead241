"""Reads what the checks judge: commands, files, sockets. It changes nothing on the Mac.

Commands and connections have a time limit of a few seconds. A member's name is resolved within the limit of the
system's resolver, which is about 30 s where no name server answers; addresses need no resolving.
"""

from __future__ import annotations

import platform
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from cluster import __version__
from cluster.core.errors import MacpipeError
from cluster.core.limits import DEFAULT_COORDINATOR_PORT, KIB, MAX_ROSTER
from cluster.core.text import is_loopback, parse_address
from cluster.discovery.interfaces import interfaces
from cluster.doctor.readings import (
    CertificateReading,
    MemberConnection,
    ProcessReading,
    ProfileReading,
    Reached,
    Readings,
    Versions,
    reached_of,
)
from cluster.platform.json_file import read_json
from cluster.platform.mac_commands import run_mac_commands
from cluster.platform.process import list_commands
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.roles import Role

CONNECT_S: Final = 3.0
"""Time limit of a connection to a member; on a local network it takes milliseconds."""
CONNECTING: Final = 16
"""Connections that are made at once."""
MAX_FOLDERS: Final = 64
"""Clusters, and workers of one, that are looked at."""
MAX_PROFILE_BYTES: Final = 256 * KIB
COORDINATOR_PORTS: Final = (DEFAULT_COORDINATOR_PORT, 8080)
MULTICAST: Final = ("224.0.0.251", 5353)

_OURS: Final = re.compile(r"(?:-m cluster|(?:^|/)macpipe)(?:(\.[\w.]{1,60})| ([a-z]{1,20}))(?:\s|$)")


def list_members(addresses: Iterable[tuple[str, str]]) -> list[tuple[str, str, int]]:
    """Return name, host and port of each member of which name and address are given.

    Members on loopback, and those without a valid address, are left out.
    """
    members = []
    for name, address in addresses:
        try:
            host, port = parse_address(address)
        except MacpipeError:
            continue
        if not is_loopback(host):
            members.append((name, host, port))
    return members


def read_mac(home: Path, members: Sequence[tuple[str, str, int]]) -> Readings:
    """Read this Mac. ``members`` are names, hosts and ports of other members to connect to."""
    with ThreadPoolExecutor(CONNECTING) as pool:
        outputs = pool.submit(run_mac_commands)
        processes = pool.submit(_read_processes)
        connections = list(pool.map(_connect, members[:MAX_ROSTER]))
        return Readings(
            system=platform.system(),
            now=time.time(),
            versions=_read_versions(),
            disk_path=str(home),
            disk_free=_read_disk(home),
            interfaces=interfaces(),
            multicast=_try_multicast(),
            connections=tuple(connections),
            busy_ports=tuple(port for port in COORDINATOR_PORTS if _is_busy(port)),
            certificates=tuple(_read_certificates(home)),
            profiles=tuple(_read_profiles(home)),
            processes=processes.result(),
            outputs=outputs.result(),
        )


def parse_processes(report: str) -> tuple[ProcessReading, ...]:
    """Parse lines of process id, parent's id and command. Only macpipe's processes are kept, without arguments."""
    found = []
    for line in report.splitlines():
        pid, _, rest = line.strip().partition(" ")
        parent, _, command = rest.strip().partition(" ")
        ours = _OURS.search(command)
        if ours and pid.isdigit() and parent.isdigit():
            found.append(ProcessReading(int(pid), int(parent), f"cluster{ours[1]}" if ours[1] else ours[2]))
    return tuple(found)


def _read_processes() -> tuple[ProcessReading, ...] | None:
    report = list_commands()
    return parse_processes(report) if report else None


def _connect(member: tuple[str, str, int]) -> MemberConnection:
    name, host, port = member
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except socket.gaierror:
        return MemberConnection(name, host, port, Reached.UNKNOWN_HOST)
    except OSError as error:
        return MemberConnection(name, host, port, reached_of(error))
    return MemberConnection(name, host, port, Reached.CONNECTED)


def _is_busy(port: int) -> bool:
    return _connect(("", "127.0.0.1", port)).reached is Reached.CONNECTED


def _try_multicast() -> bool:
    """Return whether an empty mDNS query can be sent over some interface.

    The system chooses one first. It has no choice where there is no default route, as on Macs joined by a cable alone.
    """
    found = [str(own.ip) for one in interfaces() for own in one.addresses if own.version == 4]
    own = [address for address in found if not is_loopback(address)]
    return any(map(_can_multicast, ("", *own)))


def _can_multicast(address: str) -> bool:
    """Return whether it can be sent over the interface with this address, or over the system's choice for ""."""
    interface = socket.inet_aton(address) if address else bytes(4)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(MULTICAST[0]) + interface)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
            sender.sendto(bytes(12), MULTICAST)
    except OSError:
        return False
    return True


def _read_versions() -> Versions:
    targets = _targets_of("mlx-metal" if platform.system() == "Darwin" else "mlx")
    versions = (_version_of("mlx"), _version_of("mlx-lm"))
    return Versions(__version__, platform.python_version(), *versions, targets)


def _version_of(package: str) -> str:
    try:
        return distribution(package).version
    except PackageNotFoundError:
        return ""


def _targets_of(package: str) -> tuple[str, ...]:
    """Return the tags of the installed wheel, such as ``py3-none-macosx_14_0_arm64``."""
    try:
        wheel = distribution(package).read_text("WHEEL") or ""
    except PackageNotFoundError:
        return ()
    return tuple(line.partition(": ")[2] for line in wheel.splitlines() if line.startswith("Tag: "))


def _read_disk(home: Path) -> int | None:
    present = next((folder for folder in (home, *home.parents) if folder.exists()), None)
    try:
        return shutil.disk_usage(present).free if present else None
    except OSError:
        return None


def _read_certificates(home: Path) -> Iterator[CertificateReading]:
    for cluster in _folders(home / "clusters"):
        try:
            folder = ClusterFolder(home, cluster)
        except MacpipeError:  # its name is not a cluster's
            continue
        workers = [(Role.WORKER, name) for name in _folders(folder.path / "workers")]
        for role, name in ((Role.COORDINATOR, ""), (Role.ADMIN, ""), (Role.CLIENT, ""), *workers):
            if reading := _read_certificate(folder, role, name):
                yield reading


def _read_certificate(folder: ClusterFolder, role: Role, name: str) -> CertificateReading | None:
    try:
        ring = folder.keyring(role, name)
    except (MacpipeError, OSError) as error:
        damage = error.sentence if isinstance(error, MacpipeError) else str(error)
        return CertificateReading(folder.cluster, role.value, name, damage=damage)
    if ring is None:
        return None
    return CertificateReading(folder.cluster, role.value, name, ring.not_before, ring.not_after)


def _read_profiles(home: Path) -> Iterator[ProfileReading]:
    for worker in _folders(home / "workers"):
        path = home / "workers" / worker / "profile.json"
        try:
            kept = read_json(path, MAX_PROFILE_BYTES)
            disturbed = str(kept.get("disturbed", ""))
            yield ProfileReading(worker, path.stat().st_mtime, str(kept["key"]), disturbed)
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
        ):  # the worker ignores such a file and measures again
            continue


def _folders(parent: Path) -> list[str]:
    try:
        return sorted(path.name for path in parent.iterdir() if path.is_dir())[:MAX_FOLDERS]
    except OSError:
        return []
