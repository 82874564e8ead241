"""Uses of libraries beyond their public API: each by name, with a version cap for what may break it."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import grpc.experimental
import h11
import llguidance
import pytest
import uvicorn
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from starlette.routing import BaseRoute, Match, Route
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from cluster.model.grammars import JSON_STYLE

ROOT = Path(__file__).parent.parent
GRPC = ("grpcio", "grpcio-health-checking", "grpcio-reflection", "grpcio-status")
CAPPED = (*GRPC, "h11", "llguidance", "starlette", "uvicorn")
PRIVATE = {"_chat_template", "_idx", "_tokenizer", "_trim"}
"""Private names of mlx-lm's objects that are used."""


def required() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    split = (re.fullmatch(r"([\w-]+)(.*)", line.split(";")[0].strip()) for line in project["dependencies"])
    return {found[1]: found[2] for found in split if found}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


@pytest.mark.parametrize("name", CAPPED)
def test_libraries_whose_internals_are_used_are_capped_and_the_installed_version_is_below(name: str) -> None:
    cap = re.search(r"<([\d.]+)", required()[name])
    assert cap, f"{name} has no cap in pyproject.toml"
    assert numbers(version(name)) < numbers(cap[1])
    assert f"{name}=={version(name)}\n" in (ROOT / "ops" / "constraints.txt").read_text()


def test_mlx_lm_whose_caches_and_tokenizers_are_looked_into_has_an_exact_version() -> None:
    assert required()["mlx-lm"] == f"=={version('mlx-lm')}"
    assert f"mlx-lm=={version('mlx-lm')}\n" in (ROOT / "ops" / "constraints.txt").read_text()


def borrowed_names(source: str) -> set[str]:
    """Private names that ``source`` uses on objects other than ``self``. Misses names that it also defines or has."""
    tree = ast.parse(source)
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr)]
    own = {node.attr for node in used if ast.unparse(node.value) in {"self", "cls", "super()"}}
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {node.attr for node in used if ast.unparse(node.value) not in {"self", "cls", "super()"}} - own


def test_private_names_of_other_packages_are_listed() -> None:
    modules = [path for path in (ROOT / "cluster").rglob("*.py") if path.parent.name != "v1"]
    found = {name for path in modules for name in borrowed_names(path.read_text())}
    assert found == {*PRIVATE, "_exit", "_replace"}, "os._exit and a named tuple's _replace are documented"
    private_modules = re.compile(r"^ *(?:from|import) (?!cluster)\S*\b_[a-z]\S*", re.MULTILINE)
    imports = {name.strip() for path in modules for name in private_modules.findall(path.read_text())}
    assert imports == {"from llguidance._lib", "from _typeshed"}, "the latter is for type checkers alone"


def test_mlx_lms_caches_and_tokenizers_have_what_is_used() -> None:
    cache = RotatingKVCache(max_size=4)
    assert cache._idx == 0
    assert list(inspect.signature(cache._trim).parameters)[:2] == ["trim_size", "v"]
    source = inspect.getsource(TokenizerWrapper.__init__)
    for name in ("_tokenizer", "_chat_template"):
        assert re.search(rf"self\.{name} = ", source), name


def test_llguidance_takes_the_options_of_its_json_compiler() -> None:
    stubs = ast.parse(Path(llguidance.__file__).with_name("_lib.pyi").read_text())
    (options,) = (node for node in stubs.body if isinstance(node, ast.ClassDef) and node.name == "JsonCompileOptions")
    names = {ast.unparse(node.target) for node in options.body if isinstance(node, ast.AnnAssign)}
    assert set(JSON_STYLE) <= names
    assert llguidance.LLMatcher.grammar_from_json_schema("{}", defaults=JSON_STYLE)


def test_uvicorns_protocol_has_what_is_overridden_and_called() -> None:
    called = ("connection_made", "connection_lost", "data_received", "handle_events", "timeout_keep_alive_handler")
    for name in (*called, "on_response_complete", "send_400_response"):
        assert inspect.isfunction(getattr(H11Protocol, name)), name
    source = inspect.getsource(H11Protocol)
    for name in ("conn", "cycle", "flow", "transport", "loop", "logger"):
        assert re.search(rf"self\.{name}\b.* = ", source), name
    assert {"config", "server_state", "app_state"} < set(inspect.signature(H11Protocol.__init__).parameters)
    assert {"conn", "on_response"} < set(inspect.signature(RequestResponseCycle.__init__).parameters)


def private_names(source: str) -> set[str]:
    """Names with a leading underscore that ``source`` defines or accesses; dunder names are public."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    return {name for name in names if name.startswith("_") and not name.endswith("__")}


def test_no_private_name_of_uvicorn_is_used_or_overridden() -> None:
    library = private_names(inspect.getsource(uvicorn.Server)) | private_names(inspect.getsource(H11Protocol))
    assert "_unset_keepalive_if_required" in library
    modules = [path for path in (ROOT / "cluster").rglob("*.py") if "uvicorn" in path.read_text()]
    subclasses = [path for path in (ROOT / "cluster").rglob("*.py") if "(QuietProtocol)" in path.read_text()]
    assert len(modules) >= 3
    assert len(subclasses) >= 2
    for path in {*modules, *subclasses}:
        assert not private_names(path.read_text()) & library, path


def test_uvicorns_server_has_what_is_overridden() -> None:
    for name in ("startup", "shutdown", "on_tick"):
        assert inspect.iscoroutinefunction(getattr(uvicorn.Server, name)), name
    assert callable(uvicorn.Server.capture_signals)
    source = inspect.getsource(uvicorn.Server)
    assert "for server in self.servers" in source
    assert "await asyncio.sleep(0.1)" in inspect.getsource(uvicorn.Server.main_loop), (
        "ticks are counted as ten a second"
    )


def test_h11_has_the_states_by_which_a_connection_is_judged() -> None:
    connection = h11.Connection(h11.SERVER)
    assert (connection.our_state, connection.their_state, connection.trailing_data[0]) == (h11.IDLE, h11.IDLE, b"")
    connection.receive_data(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n")
    assert isinstance(connection.next_event(), h11.Request)
    assert (connection.our_state, connection.their_state) == (h11.SEND_RESPONSE, h11.SEND_BODY)
    connection.send(h11.Response(status_code=413, headers=[(b"content-length", b"0")]))
    connection.send(h11.EndOfMessage())
    assert (connection.our_state, connection.their_state) == (h11.DONE, h11.SEND_BODY), "refused unread"
    connection.receive_data(b"x")
    assert [type(connection.next_event()) for _ in range(2)] == [h11.Data, h11.EndOfMessage]
    connection.start_next_cycle()
    assert connection.their_state is h11.IDLE


def test_starlettes_routes_match_as_access_reads_them() -> None:
    route = Route("/a", lambda request: None, methods=["GET"])
    assert isinstance(route, BaseRoute)
    scope = {"type": "http", "path": "/a", "method": "GET"}
    assert route.matches(scope)[0] is Match.FULL
    assert route.matches({**scope, "method": "POST"})[0] is Match.PARTIAL


def test_grpc_knows_the_experimental_option() -> None:
    assert isinstance(grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, str)
