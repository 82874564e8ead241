"""The authority moves from a leader's Mac to a running standby's: real processes, each with its own state folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keys import KeyStore
from integration.daemons import Daemon, free_port, launch, until
from integration.test_joining import macpipe

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]


class Mac:
    """A coordinator's Mac on loopback."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.home, self.port, self.join_port = folder / name, free_port(), free_port()

    def run(self, *words: str) -> str:
        return macpipe(*words, "--home", str(self.home))

    @contextmanager
    def serve(self, *options: str) -> Iterator[Daemon]:
        here = ["--host", "127.0.0.1", "--port", str(self.port), "--join-port", str(self.join_port), "--http", "off"]
        words = ["serve", *options, *here, "--peers-only", "--home", str(self.home), "--cluster", "default"]
        log = self.folder / f"{self.name}.log"
        daemon = Daemon(self.name, launch(words, log), log)
        try:
            yield daemon
        finally:
            daemon.stop()

    def token(self, role: str) -> str:
        found = re.search(r"mpj1\.\w+", self.run("token", "create", "--role", role))
        assert found
        return found[0]


def test_the_authority_moves_to_a_running_standby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Mac(tmp_path, "mac-1"), Mac(tmp_path, "mac-2")
    first.run("init", "--name", "mac-1", "--macs", "0")
    at_first = f"127.0.0.1:{first.port}"
    with first.serve("faq", "--wait", "200"):
        token = first.token("coordinator")
        admitting = ("--peer", f"127.0.0.1:{first.join_port}")
        until(lambda: _joined(second, token, *admitting))
        with second.serve("--standby", "--coordinator", at_first) as standby:
            standby.wait_for("standing by")
            until(lambda: (ClusterFolder(second.home, "default").members).is_file())
            monkeypatch.setenv("MACPIPE_HOME", str(first.home))
            with pytest.raises(AssertionError, match="this Mac's own coordinator"):
                macpipe("authority", "move", "mac-1", "--coordinator", at_first)
            moved = macpipe("authority", "move", "mac-2", "--coordinator", at_first, "--json")
            assert json.loads(moved)["holder"] == "mac-2-coordinator"
            assert not ClusterFolder(first.home, "default").holds_authority
            for mac, here in ((first, False), (second, True)):
                until(lambda mac=mac, here=here: json.loads(mac.run("authority", "show", "--json"))["here"] is here)
            client = Mac(tmp_path, "mac-3")
            token = second.token("client")
            until(lambda: _joined(client, token, "--peer", f"127.0.0.1:{second.join_port}"))
            until(lambda: "mac-3-client" in first.run("members"))


def test_what_is_removed_and_revoked_is_confirmed_by_the_standbys(tmp_path: Path) -> None:
    first, second, third = (Mac(tmp_path, f"mac-{number}") for number in (1, 2, 3))
    first.run("init", "--name", "mac-1", "--macs", "0")
    at_first, admitting = f"127.0.0.1:{first.port}", ("--peer", f"127.0.0.1:{first.join_port}")
    with first.serve("faq", "--wait", "200"):
        for mac, role in ((second, "coordinator"), (third, "client")):
            token = first.token(role)
            until(lambda mac=mac, token=token: _joined(mac, token, *admitting))
        first.run("key", "create", "amy")
        assert json.loads(first.run("key", "revoke", "amy", "--json"))["standbys"] is None, "no standby was ever there"
        with second.serve("--standby", "--coordinator", at_first) as standby:
            standby.wait_for("standing by")
            until(lambda: ClusterFolder(second.home, "default").keys.is_file())
            first.run("key", "create", "bob")
            revoked = json.loads(first.run("key", "revoke", "bob", "--json"))
            assert revoked["standbys"] == {"stored": ["mac-2-coordinator"], "missing": [], "problem": ""}
            copied = KeyStore(ClusterFolder(second.home, "default")).all_keys()
            assert [key.revoked is None for key in copied if key.name == "bob"] == [False]
            removed = json.loads(second.run("remove", "mac-3-client", "--json"))
            assert removed["standbys"]["stored"] == ["mac-2-coordinator"]
            assert "mac-3-client" not in first.run("members"), "the leader has it, too"
        first.run("key", "create", "cyd")
        missing = json.loads(first.run("key", "revoke", "cyd", "--json"))["standbys"]["missing"]
        assert [one.partition(":")[0] for one in missing] == ["mac-2-coordinator"]
    first.run("key", "create", "dee")
    standbys = json.loads(first.run("key", "revoke", "dee", "--json"))["standbys"]
    assert "no coordinator of cluster default says that it leads" in standbys["problem"]


def test_a_standby_that_is_removed_ends_and_says_what_to_do(tmp_path: Path) -> None:
    first, second, third = (Mac(tmp_path, f"mac-{number}") for number in (1, 2, 3))
    first.run("init", "--name", "mac-1", "--macs", "0")
    follow, admitting = (
        ("--standby", "--coordinator", f"127.0.0.1:{first.port}"),
        ("--peer", f"127.0.0.1:{first.join_port}"),
    )
    with first.serve("faq", "--wait", "200"):
        for mac in (second, third):
            token = first.token("coordinator")
            until(lambda mac=mac, token=token: _joined(mac, token, *admitting))
        with second.serve(*follow) as standby:
            standby.wait_for("standing by")
            until(lambda: ClusterFolder(second.home, "default").members.is_file())
            for mac in (second, third):
                first.run("remove", f"{mac.name}-coordinator")
            assert standby.process.wait(15) == 1
            assert _what_to_do(standby)
        with third.serve(*follow) as told_by_the_leader:
            assert told_by_the_leader.process.wait(30) == 1
            assert "mac-3-coordinator was removed from this cluster" in told_by_the_leader.said()
            assert _what_to_do(told_by_the_leader)
    with second.serve(*follow) as told_by_its_list:
        assert told_by_its_list.process.wait(30) == 1
        assert _what_to_do(told_by_its_list)


def test_a_leader_that_is_removed_on_a_standbys_mac_ends_so_that_the_standby_can_lead(tmp_path: Path) -> None:
    first, second = Mac(tmp_path, "mac-1"), Mac(tmp_path, "mac-2")
    first.run("init", "--name", "mac-1", "--macs", "0")
    with first.serve("faq", "--wait", "200"):
        token = first.token("coordinator")
        until(lambda: _joined(second, token, "--peer", f"127.0.0.1:{first.join_port}"))
        with second.serve("--standby", "--coordinator", f"127.0.0.1:{first.port}") as standby:
            standby.wait_for("following leader")  # it has the list of members then
    with (
        second.serve("faq", "--wait", "200") as leader,
        first.serve("--standby", "--coordinator", f"127.0.0.1:{second.port}") as standby,
    ):
        standby.wait_for("following leader")
        first.run("remove", "mac-2-coordinator")
        assert leader.process.wait(30) == 1
        assert _what_to_do(leader)
        standby.wait_for("the leader stops")


def _what_to_do(ended: Daemon) -> bool:
    said = ended.said()
    return "this Mac was removed from the cluster default" in said and "`macpipe token create --role coord" in said


def _joined(mac: Mac, token: str, *options: str) -> bool:
    try:
        mac.run("join", token, "--name", mac.name, *options)
    except AssertionError as error:
        assert "no coordinator admits Macs" in str(error)  # the join port is not open yet
        return False
    return True
