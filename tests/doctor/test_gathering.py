"""Reading this machine: real sockets, files and processes."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.doctor import gathering
from cluster.doctor.gathering import parse_processes, read_mac
from cluster.doctor.readings import ProcessReading, Reached, reached_of
from cluster.platform import macos
from cluster.platform.json_file import write_json
from cluster.platform.mac_commands import MAC_COMMANDS, MAX_OUTPUT, MacOutputs, run_mac_commands
from cluster.platform.process import list_commands
from cluster.security.roles import Role
from parties import Lead


def test_reads_what_is_there(tmp_path: Path) -> None:
    write_json_profile(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as closed:
        free = closed.getsockname()[1]
        closed.close()
        members = [("open", "127.0.0.1", server.getsockname()[1]), ("closed", "127.0.0.1", free)]
        found = read_mac(tmp_path, members)
    assert [one.reached for one in found.connections] == [Reached.CONNECTED, Reached.REFUSED]
    assert found.versions.mlx
    assert found.disk_free
    assert [(one.worker, one.key, one.disturbed) for one in found.profiles] == [("mac-1", "a key", "hot")]


def test_an_empty_or_missing_home_has_nothing(tmp_path: Path) -> None:
    found = read_mac(tmp_path / "missing" / "deeper", [])
    assert (found.certificates, found.profiles, found.connections) == ((), (), ())
    assert found.disk_free
    assert not (tmp_path / "missing").exists()


def test_certificates_are_read_and_damage_is_told(tmp_path: Path) -> None:
    lead = Lead.make(tmp_path)
    lead.admit_worker("mac-1", tmp_path)
    lead.admit(Role.CLIENT, "laptop", "c1" * 8, tmp_path)
    (tmp_path / "clusters" / "default" / "client" / "key.pem").write_text("no key")
    found = {one.role: one for one in read_mac(tmp_path, []).certificates}
    assert found["worker"].name == "mac-1"
    assert found["worker"].not_before < found["worker"].not_after
    assert not found["worker"].damage
    assert "join again" in found["client"].damage


def write_json_profile(home: Path) -> None:
    for worker, content in (("mac-1", {"key": "a key", "disturbed": "hot"}), ("mac-2", ["no profile"])):
        (home / "workers" / worker).mkdir(parents=True)
        write_json(home / "workers" / worker / "profile.json", content)
    (home / "workers" / "mac-3").mkdir()


PROCESSES = """    1     0 /sbin/launchd
  501     1 /opt/env/bin/python /opt/env/bin/macpipe worker --name mac-1
  502   501 /opt/env/bin/python -m cluster.worker.engine 5 --secret mpk_0123
  503     1 python3.12 -m cluster serve some/model
  504     1 /usr/bin/vim macpipe.txt
garbage
"""


def test_only_our_processes_are_kept_without_arguments() -> None:
    assert parse_processes(PROCESSES) == (
        ProcessReading(501, 1, "worker"),
        ProcessReading(502, 501, "cluster.worker.engine"),
        ProcessReading(503, 1, "serve"),
    )


def test_ps_lists_a_process_of_ours() -> None:
    """A process whose command line is that of an engine is found with its parent."""
    code = "import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, "-m cluster.worker.engine"], stdin=subprocess.PIPE) as child:
        found = parse_processes(list_commands())
        child.communicate()
    assert ProcessReading(child.pid, os.getpid(), "cluster.worker.engine") in found


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def resolve(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(gathering.socket, "create_connection", resolve)
    assert [one.reached for one in read_mac(tmp_path, [("mac-2", "mac-2", 1)]).connections] == [Reached.UNKNOWN_HOST]


@pytest.mark.parametrize(
    ("number", "reached"),
    [
        (errno.EHOSTUNREACH, Reached.NO_ROUTE),
        (errno.ECONNREFUSED, Reached.REFUSED),
        (errno.ETIMEDOUT, Reached.TIMED_OUT),
        (errno.ENETDOWN, Reached.FAILED),
    ],
)
def test_how_a_connection_ended(number: int, reached: Reached) -> None:
    assert reached_of(OSError(number, "")) is reached


def test_commands_run_only_on_macos_and_their_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(macos.platform, "system", lambda: "Linux")
    assert run_mac_commands() == MacOutputs()
    monkeypatch.setattr(macos.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(macos.subprocess, "run", lambda command, **_: Done(f"{' '.join(command)} {'x' * MAX_OUTPUT}"))
    found = run_mac_commands()
    assert found.sleep.startswith("/usr/bin/pmset -g x")
    assert {len(getattr(found, field)) for field in MAC_COMMANDS} == {MAX_OUTPUT}


class Done:
    def __init__(self, stdout: str) -> None:
        self.stdout = stdout
