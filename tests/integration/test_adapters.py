"""Adapters on real workers: served beside the model, added and removed while it runs, and kept through faults."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from adapters import make_adapter
from checkpoints import make
from cluster.cli.main import main
from cluster.client import AsyncClient, Client
from cluster.core.errors import InvalidOption, MacpipeError, ModelDiffers, ModelNotFound, NotServing
from cluster.model.adapter_files import open_adapter
from integration.daemons import Cluster, bound, children, free_port, serve_model, wait_serving, watchdog_pipe
from integration.reference import greedy
from netns import missing as no_root

pytestmark = [pytest.mark.xdist_group("session-cluster"), pytest.mark.timeout(180)]

PROMPT = tuple(range(5, 45))
TOKENS = 12


@dataclass(frozen=True)
class Tuned:
    """A model and two adapters for it; the answer of each, by name, is mlx-lm's own."""

    model: Path
    folders: dict[str, Path]

    def expected(self, name: str, prompt: tuple[int, ...] = PROMPT, tokens: int = TOKENS) -> tuple[int, ...]:
        return greedy(self.model, prompt, tokens, adapter=self.folders.get(name))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("tuned")
    model = make("llama", folder / "model")
    one = make_adapter(model, folder / "one", 1)
    return Tuned(model, {"one": one, "two": make_adapter(model, folder / "two", 2, num_layers=2)})


@pytest.fixture
def served(client: Client, tuned: Tuned) -> Client:
    serve_model(client, tuned.model, 2, adapters={name: str(folder) for name, folder in tuned.folders.items()})
    return client


def ask(client: Client, adapter: str, prompt: tuple[int, ...] = PROMPT, **more: object) -> tuple[int, ...]:
    return client.generate(prompt, max_tokens=TOKENS, ignore_eos=True, adapter=adapter, **more).tokens  # type: ignore[arg-type]


def over_http(address: str, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    with closing(HTTPConnection(address, timeout=30)) as connection:
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        with connection.getresponse() as reply:
            assert reply.status == 200, reply.read()
            return json.loads(reply.read())


def test_twelve_mixed_requests_are_answered_as_by_mlx_lm_with_each_adapter_alone(
    served: Client, address: str, tuned: Tuned
) -> None:
    asked = [(name, PROMPT[i:]) for i in range(4) for name in ("", "one", "two")]

    async def ask_all() -> list[tuple[int, ...]]:
        async with AsyncClient(address, timeout_s=60) as client:
            answers = [client.generate(p, max_tokens=TOKENS, ignore_eos=True, adapter=name) for name, p in asked]
            return [answer.tokens for answer in await asyncio.gather(*answers)]

    expected = [tuned.expected(name, prompt) for name, prompt in asked]
    assert len({expected[0], expected[1], expected[2]}) == 3
    assert asyncio.run(ask_all()) == expected
    again = served.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True, model=f"{tuned.model}:two")
    assert again.tokens == tuned.expected("two")
    assert again.usage.cached_tokens > 0  # from a prefix of its own
    assert again.model == f"{tuned.model}:two"


def test_adapters_are_listed_and_counted_as_memory(served: Client, tuned: Tuned) -> None:
    assert [m.id for m in served.models()] == [str(tuned.model), *(f"{tuned.model}:{n}" for n in tuned.folders)]
    state = served.cluster()
    assert [a.name for a in state.adapters] == ["one", "two"]
    sizes = {n: sum(t.nbytes for t in open_adapter(f).tensors.values()) for n, f in tuned.folders.items()}
    assert {a.name: a.nbytes for a in state.adapters} == sizes
    adapters = {name: str(folder) for name, folder in tuned.folders.items()}
    plans = [served.plan(str(tuned.model), workers=2, adapters=a) for a in ({}, adapters)]
    weights = [sum(s.weight_bytes for s in plan.stages) for plan in plans]
    assert weights[1] - weights[0] == sum(a.nbytes for a in state.adapters)
    assert sum(s.weight_bytes for s in state.stages) == weights[1]


def test_an_adapter_that_is_not_there_or_does_not_fit_is_refused_in_a_sentence(
    served: Client, tuned: Tuned, tmp_path: Path
) -> None:
    with pytest.raises(ModelNotFound, match="three is not served here; served are: one, two"):
        ask(served, "three")
    with pytest.raises(ModelNotFound, match="three is not served"):
        served.generate(PROMPT, model=f"{tuned.model}:three")
    with pytest.raises(MacpipeError, match="two adapters"):
        served.generate(PROMPT, model=f"{tuned.model}:one", adapter="two")
    with pytest.raises(InvalidOption, match="already"):
        served.add_adapter("one", str(tuned.folders["two"]))
    with pytest.raises(InvalidOption, match="cannot be the name"):
        served.add_adapter("a:b", str(tuned.folders["two"]))
    with pytest.raises(ModelNotFound, match="no adapter folder"):
        served.add_adapter("three", str(tmp_path / "none"))
    other = make("llama", tmp_path / "other", intermediate_size=96)
    with pytest.raises(ModelDiffers, match="is not for the model"):
        served.add_adapter("three", str(make_adapter(other, tmp_path / "adapter", 1)))
    assert [a.name for a in served.cluster().adapters] == ["one", "two"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """A command in this process; what it printed."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_adapters_are_added_and_removed_while_requests_run(
    client: Client, tuned: Tuned, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_model(client, tuned.model, 2)
    before = client.cluster()
    stream = client.stream(PROMPT, max_tokens=200, ignore_eos=True)
    stream.wait_accepted()
    at = ("--coordinator", address)
    added = json.loads(run(capsys, "adapter", "add", f"one={tuned.folders['one']}", *at, "--json"))
    assert added["name"] == "one"
    assert f"{tuned.model}:one" in run(capsys, "adapter", "list", *at)
    assert ask(client, "one") == tuned.expected("one")
    assert stream.completion().tokens == greedy(tuned.model, PROMPT, 200)
    held = client.cluster()
    assert sum(s.weight_bytes for s in held.stages) - sum(s.weight_bytes for s in before.stages) == added["nbytes"]
    endless = client.stream(PROMPT, max_tokens=2000, ignore_eos=True, adapter="one", request_id="endless")
    endless.wait_accepted()
    assert run(capsys, "adapter", "remove", "one", *at) == "removed one, ended 1 request\n"
    with pytest.raises(NotServing, match="the adapter one was removed"):
        list(endless)
    with pytest.raises(ModelNotFound, match="served are: none"):
        ask(client, "one")
    with pytest.raises(ModelNotFound, match="no adapter one"):
        client.remove_adapter("one")
    assert ask(client, "") == tuned.expected("")
    assert client.cluster().adapters == ()
    client.add_adapter("one", str(tuned.folders["two"]))
    assert ask(client, "one") == tuned.expected("two")  # nothing of the former one is left


def test_a_drained_workers_layers_move_with_their_adapters(served: Client, tuned: Tuned) -> None:
    worker = served.cluster().stages[0].worker
    stream = served.stream(PROMPT, max_tokens=300, ignore_eos=True, adapter="one")
    stream.wait_accepted()
    try:
        state = served.drain(worker)
        assert worker not in {s.worker for s in state.stages}
        assert stream.completion().tokens == tuned.expected("one", tokens=300)
        assert ask(served, "two") == tuned.expected("two")
    finally:
        served.drain(worker, undo=True)


def test_guesses_change_no_token_of_an_adapter(client: Client, tuned: Tuned) -> None:
    folders = {name: str(folder) for name, folder in tuned.folders.items()}
    serve_model(client, tuned.model, 2, adapters=folders, speculate="ngram")
    for name in ("one", "", "one"):  # the second answer of a client is guessed from its first one
        answer = client.generate(PROMPT, max_tokens=60, ignore_eos=True, adapter=name)
        assert answer.tokens == tuned.expected(name, tokens=60)


@pytest.mark.skipif(bool(no_root()), reason=no_root())
def test_workers_fetch_their_part_and_adapters_outlive_engines_and_coordinators(
    cluster: Cluster, tuned: Tuned, tmp_path: Path
) -> None:
    """The folder of the adapter is hidden from the workers, each of which has a state folder of its own."""
    folder = tmp_path / "own"
    folder.mkdir()
    for file in tuned.folders["one"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    hide = f'mount -t tmpfs -o size=64k none {folder} && exec "$@"'

    def launch(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            hidden = ["unshare", "--mount", "sh", "-c", hide, "sh", *bound(*arguments)]
            return subprocess.Popen(hidden, stdin=watchdog_pipe(), stdout=out, stderr=out, start_new_session=True)

    homes = {name: cluster.folder / f"home-{name}" for name in ("eve", "fay")}
    workers = {name: cluster.worker(name, "--home", str(home), launch=launch) for name, home in homes.items()}  # type: ignore[arg-type]
    options = ["--journal", "never", "--http", f"127.0.0.1:{free_port()}"]
    daemon, address = cluster.serving(tuned.model, 2, *options, "--adapter", f"one={folder}")
    fetched = {name: set(home.glob("models/*/adapters.safetensors")) for name, home in homes.items()}
    assert all(len(found) == 1 for found in fetched.values())
    full = (folder / "adapters.safetensors").stat().st_size
    for (file,) in fetched.values():
        assert file.stat().st_size == full
        assert file.read_bytes() != (folder / "adapters.safetensors").read_bytes()  # holes for the other's layers
    expected = tuned.expected("one", tokens=400)
    with Client(address, timeout_s=90) as client:
        said: list[int] = []
        for token in client.stream(PROMPT, max_tokens=400, ignore_eos=True, adapter="one"):
            said.append(token.token)
            if len(said) == 20:
                os.kill(children(workers["eve"].process.pid)[0], signal.SIGKILL)
        assert tuple(said) == expected
        assert client.cluster().recoveries == 1
        (folder / "adapters.safetensors").rename(tmp_path / "away")  # the workers have their parts
        os.kill(children(workers["fay"].process.pid)[0], signal.SIGKILL)
        assert ask(client, "one") == expected[:TOKENS]
        (tmp_path / "away").rename(folder / "adapters.safetensors")
        models = over_http(options[3], "GET", "/v1/models")
        assert [m["id"] for m in models["data"]] == ["model", "model:one"]
        assert [m.get("parent") for m in models["data"]] == [None, "model"]
        body = {"model": "model:one", "prompt": list(PROMPT), "max_tokens": TOKENS, "ignore_eos": True}
        assert over_http(options[3], "POST", "/v1/completions", body)["model"] == "model:one"
        stream = client.stream(PROMPT, max_tokens=400, ignore_eos=True, adapter="one", request_id="goes-on")
        reading = iter(stream)
        begun = [next(reading).token for _ in range(30)]
        daemon.process.kill()
        daemon.process.wait(10)
    port = address.rpartition(":")[2]
    without = cluster.serve(tuned.model, "--workers", "2", "--port", port, *options)
    wait_serving(address, without)
    with Client(address, timeout_s=90) as client, pytest.raises(ModelNotFound, match="is not served now"):
        list(client.resume("goes-on", len(begun)))
    with Client(address, timeout_s=90) as client:
        client.add_adapter("one", str(folder))
        rest = [token.token for token in client.resume("goes-on", len(begun))]
    assert (*begun, *rest) == expected
