"""`init`, `join`, `token`, `members` and `remove` from the outside: real processes, streams and exit codes."""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import MACPIPE, ROOT
from cluster.cli.main import main
from cluster.coordinator.identity import state_folder
from cluster.joining.join_messages import JoinRequest
from cluster.platform.paths import hold_id
from cluster.security.authority import Authority
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import make_request
from cluster.security.keys import TEXT, KeyLimits, KeyScope, KeyStore
from cluster.security.members import Members
from cluster.security.roles import Role
from cluster.security.tokens import JoinToken
from cluster.worker.identity import hold_identity
from parties import Lead

Macpipe = Any


@pytest.fixture
def home(tmp_path: Path) -> str:
    return str(tmp_path / "mac-1")


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Macpipe:
    """Run the command in this process, which saves starting one."""

    def run(*arguments: str, MACPIPE_HOME: str) -> subprocess.CompletedProcess[str]:  # noqa: N803
        monkeypatch.setenv("MACPIPE_HOME", MACPIPE_HOME)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def cluster(here: Macpipe, home: str) -> dict[str, Any]:
    """A cluster with one token, which no process waits for."""
    done = here("init", "--name", "mac-1", "--no-wait", "--json", MACPIPE_HOME=home)
    assert (done.returncode, done.stderr) == (0, "")
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("macpipe: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def test_init_says_what_to_type_and_where(here: Macpipe, home: str) -> None:
    done = here("init", "--macs", "2", "--name", "mac-1", "--no-wait", "--cluster", "lab", MACPIPE_HOME=home)
    assert (done.returncode, done.stderr) == (0, "")
    tokens = [JoinToken.parse(one) for one in re.findall(r"^macpipe join (mpj1\.\w+)$", done.stdout, re.MULTILINE)]
    assert [token.role for token in tokens] == [Role.WORKER, Role.WORKER]
    assert f"created cluster lab, led by this Mac ({tokens[0].cluster_id}):" in done.stdout
    assert (
        "Then `macpipe worker --cluster lab` on every Mac, and here `macpipe serve MODEL --cluster lab`." in done.stdout
    )
    assert all(len(line) <= 80 or line.startswith(("macpipe join ", "Then ")) for line in done.stdout.splitlines())
    assert KeyStore(ClusterFolder(Path(home), "lab")).find(done.stdout.splitlines()[-1]) is not None
    again = here("init", "--cluster", "lab", "--no-wait", MACPIPE_HOME=home)
    refused(again, 2, "already leads a cluster named lab; `macpipe token create`")


def test_init_in_json(cluster: dict[str, Any]) -> None:
    assert [(one["role"], one["name"]) for one in cluster["members"]] == [
        ("coordinator", "mac-1-coordinator"),
        ("worker", "mac-1"),
        ("admin", "mac-1-admin"),
    ]
    assert cluster["fingerprint"].startswith(cluster["cluster_id"])
    (token,) = cluster["tokens"]
    assert JoinToken.parse(token["token"]).id == token["id"]
    assert TEXT.fullmatch(cluster["api_key"])


def test_keys_are_made_shown_and_revoked(here: Macpipe, home: str, cluster: dict[str, Any]) -> None:
    limits = ("--requests-per-minute", "60", "--tokens-per-minute", "9000", "--concurrency", "4")
    made = here("key", "create", "amy", *limits, MACPIPE_HOME=home)
    text = made.stdout.strip()
    key = KeyStore(ClusterFolder(Path(home), "default")).find(text)
    assert key is not None
    assert (key.limits, key.scope) == (KeyLimits(60, 9000, 4), KeyScope.INFERENCE)
    assert "not shown again" in made.stderr
    shown = here("key", "list", MACPIPE_HOME=home).stdout
    assert all(word in shown for word in ("first", "admin", "amy", "60", "9000", key.id))
    assert text not in shown
    assert "amy" in here("key", "revoke", "amy", MACPIPE_HOME=home).stdout
    listed = json.loads(here("key", "list", "--json", MACPIPE_HOME=home).stdout)["keys"]
    assert [(one["name"], one["revoked"] is None) for one in listed] == [("first", True), ("amy", False)]
    refused(here("key", "revoke", "amy", MACPIPE_HOME=home), 1, "macpipe key list")
    refused(here("key", "create", "x", "--scope", "all", MACPIPE_HOME=home), 2, "inference or admin")
    refused(here("key", "list", "--cluster", "none", MACPIPE_HOME=home), 1, "macpipe init")


def test_tokens_are_made_shown_and_revoked(here: Macpipe, home: str, cluster: dict[str, Any]) -> None:
    made = here("token", "create", "--role", "client", "--ttl", "2h", MACPIPE_HOME=home)
    assert made.returncode == 0
    token = JoinToken.parse(made.stdout.removeprefix("macpipe join "))
    assert (token.role, made.stderr) == (
        Role.CLIENT,
        "valid for one client, for 2 h, while `macpipe serve` runs here\n",
    )
    shown = here("token", "list", MACPIPE_HOME=home)
    assert f"{token.id}  client  " in shown.stdout
    assert "open for 2 h" in shown.stdout
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    ended = here("token", "revoke", token.id, MACPIPE_HOME=home)
    assert (ended.returncode, ended.stdout) == (0, f"token {token.id} is revoked\n")
    listed = json.loads(here("token", "list", "--json", MACPIPE_HOME=home).stdout)["tokens"]
    assert [(one["id"], one["state"]) for one in listed] == [
        (cluster["tokens"][0]["id"], "open"),
        (token.id, "revoked"),
    ]
    for output in (shown.stdout, json.dumps(listed)):
        assert token.secret.hex() not in output
        assert token.text not in output
    refused(here("token", "revoke", "ffffffff", MACPIPE_HOME=home), 1, "no join token ffffffff")
    refused(here("token", "create", "--role", "king", MACPIPE_HOME=home), 2, "worker, client, admin or coordinator")
    refused(here("token", "create", "--ttl", "soon", MACPIPE_HOME=home), 2, "30m or 2h")
    refused(here("token", "create", "--ttl", "9d", MACPIPE_HOME=home), 2, "1 minute to 7 days")


def test_members_are_shown_and_removed(here: Macpipe, home: str, cluster: dict[str, Any]) -> None:
    shown = here("members", MACPIPE_HOME=home)
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    assert [line.split()[0] for line in shown.stdout.splitlines()[2:]] == ["mac-1-coordinator", "mac-1", "mac-1-admin"]
    gone = here("remove", "mac-1", MACPIPE_HOME=home)
    assert gone.stdout == "mac-1 (worker) is removed; its certificates are refused from now on\n"
    facts = json.loads(here("members", "--json", MACPIPE_HOME=home).stdout)
    assert facts["cluster_id"] == cluster["cluster_id"]
    assert [one["name"] for one in facts["members"]] == ["mac-1-coordinator", "mac-1-admin"]
    assert "removed 20" in here("members", "--all", MACPIPE_HOME=home).stdout
    refused(here("remove", "mac-1", MACPIPE_HOME=home), 1, "no member of this cluster is named mac-1")
    refused(here("remove", "mac-1-coordinator", MACPIPE_HOME=home), 2, "cannot be removed")


def test_a_mac_without_the_cluster_is_told_so(here: Macpipe, home: str) -> None:
    for command in (["members"], ["token", "create"], ["token", "list"], ["remove", "x"], ["token", "revoke", "x"]):
        refused(here(*command, MACPIPE_HOME=home), 1, "macpipe init")
    error = json.loads(here("members", "--json", MACPIPE_HOME=home).stdout)["error"]
    assert error["reason"] == "NO_CLUSTER"
    refused(here("members", "--cluster", "../x", MACPIPE_HOME=home), 2, "cannot be a cluster's name")
    refused(here("join", "nonsense", MACPIPE_HOME=home), 2, "this is not a join token: a token begins with mpj1.")


# Processes that talk


def test_a_mac_leaves(here: Macpipe, home: str, cluster: dict[str, Any], tmp_path: Path) -> None:
    leader = ClusterFolder(Path(home), "default")
    party = Lead(leader, Authority.load(leader)).admit_worker("mac-2", tmp_path / "mac-2")
    own = ClusterFolder(tmp_path / "mac-2", "default")
    with hold_identity(own.home, party.name):
        refused(here("leave", MACPIPE_HOME=str(own.home)), 1, "the worker mac-2 still runs")
    assert own.exists
    done = here("leave", MACPIPE_HOME=str(own.home))
    assert done.stdout.splitlines() == [
        "this Mac has left the cluster default",
        "on the coordinator's Mac, `macpipe remove mac-2` takes it off the list",
    ]
    assert not own.path.exists()
    assert (own.home / "workers" / "mac-2" / "id").is_file(), "the Mac keeps its id"
    refused(here("leave", MACPIPE_HOME=str(own.home)), 1, "is in no cluster named default")


def test_the_mac_that_leads_leaves_only_with_the_whole_cluster(
    here: Macpipe, home: str, cluster: dict[str, Any]
) -> None:
    folder = ClusterFolder(Path(home), "default")
    refused(here("leave", MACPIPE_HOME=home), 2, "this Mac leads the cluster default", "--disband")
    with hold_id(state_folder(folder.home, "default")):
        refused(here("leave", "--disband", MACPIPE_HOME=home), 1, "coordinator still runs")
    assert folder.holds_authority
    done = here("leave", "--disband", "--json", MACPIPE_HOME=home)
    assert json.loads(done.stdout) == {"cluster": "default", "members": ["mac-1", "mac-1-admin"], "disbanded": True}
    assert [one.name for one in folder.path.parent.iterdir()] == []
    assert here("init", "--no-wait", "--name", "mac-1", MACPIPE_HOME=home).returncode == 0


@contextmanager
def waiting(home: str, environment: dict[str, str], *options: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`macpipe init` that stays in the foreground; its tokens' texts."""
    command = [*MACPIPE, "init", "--name", "mac-1", "--join-port", "0", "--host", "127.0.0.1", "--json", *options]
    started = subprocess.Popen(
        command, env=environment | {"MACPIPE_HOME": home}, cwd=ROOT, stdout=-1, stderr=-1, text=True
    )
    try:
        assert started.stdout is not None
        yield started, [one["token"] for one in json.loads(started.stdout.readline())["tokens"]]
    finally:
        started.kill()
        started.communicate()


def port_of(started: subprocess.Popen[str]) -> int:
    assert started.stderr is not None
    found = re.search(r"on port (\d+);", line := started.stderr.readline())
    assert found, line
    return int(found[1])


@pytest.mark.timeout(120)
def test_macs_join_while_init_waits(macpipe: Macpipe, home: str, tmp_path: Path, environment: dict[str, str]) -> None:
    """Found over Zeroconf, by an argument and by stdin; at the end init prints who joined, and ends."""
    with waiting(home, environment, "--macs", "2") as (started, (first, second)):
        port_of(started)
        one = macpipe("join", first, "--name", "mac-2", MACPIPE_HOME=str(tmp_path / "mac-2"))
        two = macpipe("join", "-", "--name", "mac-3", "--json", stdin=second, MACPIPE_HOME=str(tmp_path / "mac-3"))
        assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
        assert one.stdout == ("mac-2 is a worker of cluster default now; start it with `macpipe worker --name mac-2`\n")
        facts = json.loads(two.stdout)
        assert (facts["cluster"], facts["role"], facts["name"]) == ("default", "worker", "mac-3")
        assert started.wait(20) == 0
        assert started.stderr is not None
        assert started.stderr.read() == "mac-2 joined as worker\nmac-3 joined as worker\n"
    again = macpipe("join", first, "--peer", "127.0.0.1:1", MACPIPE_HOME=str(tmp_path / "mac-4"))
    assert again.returncode == 1
    for done in (one, two, again):
        for secret in (first, second, JoinToken.parse(first).secret.hex(), JoinToken.parse(second).secret.hex()):
            assert secret not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_a_coordinator_that_joined_is_told_to_stand_by(
    macpipe: Macpipe, home: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    with waiting(home, environment) as (started, _):
        peer = f"127.0.0.1:{port_of(started)}"
        made = macpipe("token", "create", "--role", "coordinator", "--json", MACPIPE_HOME=home)
        token = json.loads(made.stdout)["token"]
        done = macpipe("join", token, "--name", "mac-2", "--peer", peer, MACPIPE_HOME=str(tmp_path / "mac-2"))
    told = "mac-2-coordinator is a coordinator of cluster default now; start it with `macpipe serve --standby`\n"
    assert (done.returncode, done.stdout) == (0, told), done.stderr


def test_ctrl_c_ends_the_wait_and_no_token(home: str, environment: dict[str, str]) -> None:
    with waiting(home, environment) as (started, (token,)):
        port_of(started)
        started.send_signal(2)
        assert started.wait(10) == 0
        assert started.stderr is not None
        assert "one Mac may still join while `macpipe serve` runs" in started.stderr.read()
    assert ClusterFolder(Path(home), "default").holds_authority
    assert JoinToken.parse(token)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_token_is_not_among_the_arguments_of_a_process(
    cluster: dict[str, Any], tmp_path: Path, environment: dict[str, str]
) -> None:
    token = cluster["tokens"][0]["token"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        command = [*MACPIPE, "join", token, "--peer", f"127.0.0.1:{silent.getsockname()[1]}"]
        env = environment | {"MACPIPE_HOME": str(tmp_path / "mac-2")}
        with subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=-1, text=True) as joining:
            silent.settimeout(20)
            line, _ = silent.accept()
            with line:
                proc = Path(f"/proc/{joining.pid}")
                seen = (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
                assert b"\0join\0-\0--peer\0" in seen
                assert token[5:].encode() not in seen
            joining.kill()
            joining.wait()


def attempt(port: int, token: JoinToken, number: int) -> str:
    """Try to join as one Mac with its own key, over its own connection, and return the answer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    ask = JoinRequest(
        token=token.id,
        secret=token.secret.hex(),
        csr=make_request()[1].decode(),
        id=f"{number:016x}",
        name=f"racer-{number}",
        clock=time.time(),
    )
    line = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=30)
    try:
        line.request("POST", "/join", ask.model_dump_json())
        answer = line.getresponse()
        said = json.loads(answer.read())
    finally:
        line.close()
    return "admitted" if answer.status == 200 else f"{said['error']['reason']}: {said['error']['message']}"


def race(port: int, token: JoinToken, attempts: int, at_once: int = 16) -> Counter[str]:
    told: Counter[str] = Counter()
    numbers = iter(range(attempts))
    guard, gun = threading.Lock(), threading.Barrier(at_once)

    def run() -> None:
        gun.wait()
        while True:
            with guard:
                number = next(numbers, None)
            if number is None:
                return
            result = attempt(port, token, number)
            with guard:
                told[re.sub(r"racer-\d+", "RACER", result)] += 1

    racers = [threading.Thread(target=run) for _ in range(at_once)]
    for one in racers:
        one.start()
    for one in racers:
        one.join()
    return told


@pytest.mark.parametrize("attempts", [100, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(240)])])
def test_of_many_that_race_for_one_token_one_wins(home: str, environment: dict[str, str], attempts: int) -> None:
    with waiting(home, environment, "--macs", "2") as (started, (text, _)):
        told = race(port_of(started), JoinToken.parse(text), attempts)
    used = (
        "TOKEN_REFUSED: this join token was used by RACER; a token admits one Mac: ask for a new one: `macpipe token"
        " create` on the coordinator's Mac"
    )
    assert told == {"admitted": 1, used: attempts - 1}
    roster = Members(ClusterFolder(Path(home), "default")).all_members()
    assert [member.name.startswith("racer-") for member in roster] == [False, False, False, True]
