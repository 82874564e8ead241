"""Three hosts on one Ethernet, real multicast, no --peer: the coordinator on one, workers on all."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from integration.daemons import START_S, Cluster, bound, command, until, watchdog_pipe
from integration.reference import greedy
from netns import Host

pytestmark = [pytest.mark.netns, pytest.mark.timeout(240)]

PORT = 7700


def on(host: Host):  # type: ignore[no-untyped-def]  # a Launch
    """Start daemons on that host."""

    def launch(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            return host.start(  # type: ignore[return-value]  # bytes or text: nothing is read from it
                *bound(*arguments), stdin=watchdog_pipe(), stdout=out, stderr=out, start_new_session=True
            )

    return launch


def macpipe(host: Host, *arguments: str) -> dict[str, object]:
    done = host.run(*command(*arguments, "--json", "--coordinator", f"127.0.0.1:{PORT}"), timeout=60)
    assert done.returncode == 0, done.stderr
    facts: dict[str, object] = json.loads(done.stdout)
    return facts


NAMES = ("north", "south", "west")


@pytest.fixture
def cluster(three_hosts: tuple[Host, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """`init` on the first host, `join` on the others, and a worker on each; where to listen is left to them."""
    made = Cluster(tmp_path, mtls=False)
    homes = [tmp_path / "coordinator", *(tmp_path / name for name in NAMES[1:])]
    monkeypatch.setenv("MACPIPE_HOME", str(homes[0]))
    monkeypatch.setenv("MACPIPE_CLUSTER", made.name)
    try:
        init = ("init", "--macs", "2", "--name", NAMES[0], "--cluster", made.name, "--json")
        with three_hosts[0].start(*command(*init), stdout=subprocess.PIPE) as leading:
            assert leading.stdout
            tokens = [token["token"] for token in json.loads(leading.stdout.readline())["tokens"]]
            for host, token, name, home in zip(three_hosts[1:], tokens, NAMES[1:], homes[1:], strict=True):
                own = ("--name", name, "--home", str(home), "--cluster", made.name)
                done = host.run(*command("join", token, *own), timeout=60)
                assert done.returncode == 0, done.stderr
            assert leading.wait(30) == 0
        for host, name, home in zip(three_hosts, NAMES, homes, strict=True):
            made.worker(name, "--home", str(home), launch=on(host))
        yield made
    finally:
        made.close()


def test_three_hosts_find_each_other_and_answer_though_a_cable_is_pulled(
    three_hosts: tuple[Host, ...], cluster: Cluster, llama: Path
) -> None:
    first = three_hosts[0]
    serve = cluster.serve(llama, "--workers", "3", "--wait", str(START_S), launch=on(first))
    serve.wait_for("serving")
    record = cluster.folder / "coordinator" / "clusters" / cluster.name / "coordinator.json"
    assert json.loads(record.read_text()) == {"address": f"127.0.0.1:{PORT}"}
    status = macpipe(first, "status")
    workers = status["workers"]
    assert isinstance(workers, list)
    assert sorted(w["name"] for w in workers) == list(NAMES)
    assert sorted(w["control_address"].split(":")[0] for w in workers) == [h.address for h in three_hosts]
    stages = status["stages"]
    assert isinstance(stages, list)
    assert [s["input_route"] for s in stages] == ["relay", "direct", "direct"]
    answer = macpipe(first, "generate", "-p", "hello there", "--raw", "--max-tokens", "16", "--ignore-eos")
    prompt = macpipe(first, "generate", "-p", "hello there", "--raw", "--max-tokens", "1")["usage"]
    assert isinstance(prompt, dict)
    from cluster.model.tokenizer import load_tokenizer

    ids = load_tokenizer(llama).encode("hello there")
    assert prompt["prompt_tokens"] == len(ids)
    assert tuple(answer["tokens"]) == greedy(llama, ids, 16)  # type: ignore[arg-type]
    for host, name in zip(three_hosts[1:], NAMES[1:], strict=True):
        the_coordinator_is_found(host, cluster.folder / name, cluster.name, f"{first.address}:{PORT}")
    the_answer_outlives_a_pulled_cable(first, three_hosts[1], cluster.folder / "answer.log")


def the_coordinator_is_found(host: Host, home: Path, cluster: str, address: str) -> None:
    """Without an argument: where `join` found it, and by its announcement if it is not there any more."""
    record = home / "clusters" / cluster / "coordinator.json"
    assert json.loads(record.read_text()) == {"address": address}
    own = {key: value for key, value in os.environ.items() if key != "MACPIPE_CLUSTER"} | {"MACPIPE_HOME": str(home)}
    status = host.run(*command("status", "--json"), env=own, timeout=60)
    assert status.returncode == 0, status.stderr
    assert sorted(worker["name"] for worker in json.loads(status.stdout)["workers"]) == list(NAMES)
    record.write_text('{"address": "10.77.0.99:7700"}')
    answer = host.run(*command("generate", "-p", "x", "--raw", "--max-tokens", "2", "--json"), env=own, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["usage"]["completion_tokens"] == 2
    assert json.loads(record.read_text()) == {"address": address}


def the_answer_outlives_a_pulled_cable(first: Host, pulled: Host, log: Path) -> None:
    options = ("-p", "x", "--raw", "--max-tokens", "800", "--ignore-eos")
    with log.open("wb") as out:
        asking = first.start(*command("generate", *options), stdout=out, stderr=out)
    until(lambda: log.stat().st_size)
    pulled.unplug()
    assert asking.wait(100) == 0, log.read_text()
    stages = macpipe(first, "status")["stages"]
    assert isinstance(stages, list)
    assert sorted(stage["worker"] for stage in stages) == [NAMES[0], NAMES[2]]
