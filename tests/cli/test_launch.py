"""The environments of known clients, derived from a coordinator's description of itself."""

from __future__ import annotations

import json
import re
import shlex
import stat
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cluster.cli.launch import (
    ANY_KEY,
    AUTHORITIES,
    CLIENTS,
    LEAST_CONTEXT,
    Served,
    add_authority,
    fetch_served,
    fetch_with_key,
    find_small_model,
    is_own_address,
    require_model,
    shell_lines,
    short_context,
    write_settings,
)
from cluster.core.errors import MacpipeError, ModelNotFound, Unauthenticated, Unreachable
from cluster.platform.private_files import make_private_folder
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keys import KeyScope, KeyStore
from compat.by_hand import lines_by_hand
from integration.daemons import free_port

SERVED = Served("http://127.0.0.1:8080", "my model", 8192)


@pytest.mark.parametrize("name", CLIENTS)
def test_what_is_printed_is_shell(name: str) -> None:
    found = CLIENTS[name](SERVED)
    words = shlex.split(shell_lines(found), comments=True)
    assert words[0::2] == ["export"] * len(found.environment)
    assert [w.partition("=")[0] for w in words[1::2]] == list(found.environment)
    assert any("127.0.0.1:8080" in v for v in (*found.environment.values(), *found.command))


def test_clients_are_told_the_model_and_how_much_it_takes() -> None:
    claude = CLIENTS["claude"](SERVED).environment
    assert (claude["ANTHROPIC_BASE_URL"], claude["ANTHROPIC_MODEL"]) == ("http://127.0.0.1:8080", "my model")
    assert (claude["CLAUDE_CODE_MAX_CONTEXT_TOKENS"], claude["CLAUDE_CODE_MAX_OUTPUT_TOKENS"]) == ("8192", "2048")
    assert claude["CLAUDE_CODE_ATTRIBUTION_HEADER"] == "0"
    codex = CLIENTS["codex"](SERVED).command
    assert {"model_context_window=8192", "model_auto_compact_token_limit=6144"} <= set(codex)
    assert CLIENTS["qwen"](SERVED).environment["QWEN_CODE_MAX_OUTPUT_TOKENS"] == "2048"
    config = json.loads(CLIENTS["opencode"](SERVED).environment["OPENCODE_CONFIG_CONTENT"])
    assert config["provider"]["macpipe"]["models"]["my model"]["limit"]["context"] == 8192
    assert CLIENTS["goose"](SERVED).environment["GOOSE_CONTEXT_LIMIT"] == "8192"


def test_claude_writes_titles_with_a_small_model_if_one_is_named() -> None:
    claude = CLIENTS["claude"](replace(SERVED, small="small")).environment
    small = {name for name, value in claude.items() if value == "small"}
    assert small == {"ANTHROPIC_DEFAULT_HAIKU_MODEL", "ANTHROPIC_SMALL_FAST_MODEL"}
    assert claude["ANTHROPIC_MODEL"] == claude["CLAUDE_CODE_SUBAGENT_MODEL"] == "my model"


def test_what_a_client_reads_from_a_file_alone_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACPIPE_HOME", str(tmp_path / "home"))
    found = write_settings(CLIENTS["qwen"](SERVED), "qwen")
    file = Path(found.environment["QWEN_CODE_SYSTEM_SETTINGS_PATH"])
    assert json.loads(file.read_text()) == {"model": {"generationConfig": {"contextWindowSize": 8192}}}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert write_settings(CLIENTS["goose"](SERVED), "goose") == CLIENTS["goose"](SERVED)


@pytest.mark.parametrize(("context", "history"), [(8192, "1024"), (65_536, "4096"), (1_000_000, "8192")])
def test_aider_keeps_as_much_history_as_of_a_model_that_it_knows(context: int, history: str) -> None:
    environment = CLIENTS["aider"](replace(SERVED, context=context)).environment
    assert environment["AIDER_MAX_CHAT_HISTORY_TOKENS"] == history
    assert environment["AIDER_SHOW_MODEL_WARNINGS"] == "false"


def test_a_context_that_is_too_short_for_an_agent_is_told() -> None:
    assert "needs a context of 49152 tokens" in short_context("claude", SERVED)
    assert "--max-context 32768" in short_context("qwen", SERVED)
    assert short_context("claude", replace(SERVED, context=49_152)) == ""
    assert short_context("openai", SERVED) == ""


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("aider", "AIDER_TIMEOUT"),
        ("claude", "CLAUDE_STREAM_IDLE_TIMEOUT_MS"),
        ("goose", "OPENAI_TIMEOUT"),
        ("qwen", "QWEN_STREAM_IDLE_TIMEOUT_MS"),
    ],
)
def test_clients_wait_for_a_long_prompt(name: str, place: str) -> None:
    assert CLIENTS[name](SERVED).environment[place] == ("3600000" if place.endswith("_MS") else "3600")


def test_clients_that_are_configured_otherwise_wait_too() -> None:
    assert any("stream_idle_timeout_ms=3600000" in word for word in CLIENTS["codex"](SERVED).command)
    config = json.loads(CLIENTS["opencode"](SERVED).environment["OPENCODE_CONFIG_CONTENT"])
    options = config["provider"]["macpipe"]["options"]
    assert (options["headerTimeout"], options["chunkTimeout"], options["timeout"]) == (3_600_000, 3_600_000, False)


@pytest.mark.parametrize("name", CLIENTS)
def test_clients_are_told_the_key_and_whom_to_believe(name: str) -> None:
    served = Served("https://mac-1.local:8080", "faq", 1024, "mpk_mine", "/lab/authority.pem")
    found = add_authority(CLIENTS[name], served)
    assert any("mpk_mine" in value for value in found.environment.values())
    assert not any("mpk_mine" in word for word in found.command), "everybody on this machine sees a command line"
    assert [found.environment[one] for one in AUTHORITIES] == ["/lab/authority.pem"] * 3
    assert not set(AUTHORITIES) & set(add_authority(CLIENTS[name], SERVED).environment)


@pytest.mark.parametrize("name", LEAST_CONTEXT)
def test_the_lines_by_hand_set_what_launch_sets(name: str) -> None:
    found, lines = CLIENTS[name](SERVED), lines_by_hand(name)
    assert set(re.findall(r"([A-Z][A-Z_]+)=", lines)) <= set(found.environment)
    assert lines.splitlines()[-1].split()[0] == found.command[0]
    options = {word.partition("=")[0] for word in found.command}
    assert {word.partition("=")[0].strip('"') for word in lines.splitlines()[-1].split()} <= options | {"default"}


class Health(BaseHTTPRequestHandler):
    """A coordinator that loads, or serves."""

    def do_GET(self) -> None:
        self.server.keys.append(self.headers.get("authorization"))  # type: ignore[attr-defined]
        admitted = not self.server.guarded or self.server.keys[-1]  # type: ignore[attr-defined]
        routes = getattr(self.server, "routes", {})
        facts = routes.get(self.path, self.server.facts)  # type: ignore[attr-defined]
        body = json.dumps(facts if admitted else {"status": "serving"}).encode()
        self.send_response(200 if self.path in routes else getattr(self.server, "status", 503))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def health() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        server.keys, server.guarded = [], False  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_the_coordinator_is_asked(health: HTTPServer) -> None:
    address = f"127.0.0.1:{health.server_port}"
    health.facts = {"status": "serving", "model": "faq", "context_length": 1024}  # type: ignore[attr-defined]
    assert fetch_served(address) == Served(f"http://{address}", "faq", 1024)
    assert fetch_served(f"http://{address}", "mpk_mine").key == "mpk_mine"
    assert health.keys == [None, "Bearer mpk_mine"]  # type: ignore[attr-defined]
    health.facts = {"status": "serving"}  # type: ignore[attr-defined]
    with pytest.raises(Unauthenticated, match="MACPIPE_API_KEY"):
        fetch_served(address)
    health.facts = {"status": "loading", "message": "a model is being loaded"}  # type: ignore[attr-defined]
    with pytest.raises(MacpipeError, match="being loaded"):
        fetch_served(address)
    with pytest.raises(Unreachable, match="macpipe serve"):
        fetch_served(f"127.0.0.1:{free_port()}")


def test_a_default_model_that_a_request_would_load_is_described_by_its_route(health: HTTPServer) -> None:
    address = f"127.0.0.1:{health.server_port}"
    health.facts = {"status": "idle", "message": "it is not loaded", "model": "big/one"}  # type: ignore[attr-defined]
    with pytest.raises(MacpipeError, match="it is not loaded"):
        fetch_served(address)
    health.routes = {"/v1/models/big/one": {"id": "big/one", "context_length": 4096}}  # type: ignore[attr-defined]
    assert fetch_served(address) == Served(f"http://{address}", "big/one", 4096)


def test_claude_gets_the_model_that_has_the_name_of_a_small_one(health: HTTPServer) -> None:
    served = Served(f"http://127.0.0.1:{health.server_port}", "faq", 1024)
    health.facts = {"error": {"message": "use faq"}}  # type: ignore[attr-defined]
    assert find_small_model(served) == ""
    health.routes = {"/v1/models/claude-haiku-4-5": {"id": "tiny"}}  # type: ignore[attr-defined]
    assert find_small_model(served) == "tiny"
    assert find_small_model(replace(served, model="tiny")) == "", "one model does all"


def test_a_small_model_must_be_one_of_the_coordinators(health: HTTPServer) -> None:
    served = Served(f"http://127.0.0.1:{health.server_port}", "faq", 1024)
    health.facts, health.status = {"id": "a small/one"}, 200  # type: ignore[attr-defined]
    require_model(served, "a small/one")
    health.facts, health.status = {"error": {"message": "use faq"}}, 404  # type: ignore[attr-defined]
    with pytest.raises(ModelNotFound, match="use faq"):
        require_model(served, "other")
    with pytest.raises(Unreachable):
        require_model(replace(served, base=f"http://127.0.0.1:{free_port()}"), "other")


def test_the_leading_mac_makes_a_key_once_and_sends_it_to_itself_only(
    health: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MACPIPE_HOME", str(tmp_path))
    folder = ClusterFolder(tmp_path, "default")
    make_private_folder(folder.path)
    address = f"127.0.0.1:{health.server_port}"
    health.facts = {"status": "serving", "model": "faq", "context_length": 1024}  # type: ignore[attr-defined]
    assert fetch_with_key(address, "", "default").key == ANY_KEY, "none is made where none is needed"
    health.guarded = True  # type: ignore[attr-defined]
    with pytest.raises(Unauthenticated, match="MACPIPE_API_KEY"):
        fetch_with_key(address, "", "default")  # this Mac does not lead the cluster
    folder.authority_key.touch()
    made = fetch_with_key(f"http://{address}", "", "default").key
    assert health.keys[-2:] == [None, f"Bearer {made}"]  # type: ignore[attr-defined]
    assert fetch_with_key(address, "", "default").key == made
    key = KeyStore(folder).find(made)
    assert key
    assert (key.name.startswith("launch-"), key.scope) == (True, KeyScope.INFERENCE)
    assert stat.S_IMODE(folder.launch_key.stat().st_mode) == 0o600
    KeyStore(folder).revoke(key.id)
    assert fetch_with_key(address, "", "default").key != made, "a revoked key is replaced"
    assert fetch_with_key(address, "mpk_mine", "default").key == "mpk_mine"


@pytest.mark.parametrize(
    ("address", "own"),
    [
        ("127.0.0.1:8080", True),
        ("https://localhost:8080", True),
        ("[::1]:8080", True),
        ("mac-1.local:8080", False),
        ("10.0.0.2:8080", False),
        ("https://localhost.example:8080", False),
    ],
)
def test_a_key_is_for_this_machine(address: str, own: bool) -> None:
    assert is_own_address(address) is own
