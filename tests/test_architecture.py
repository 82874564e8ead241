"""The layers of packages, read from the imports. The checker itself is tried on trees that violate them.

Imports inside functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import cluster

pytestmark = pytest.mark.xdist_group("architecture")  # one process parses every file
ROOT = Path(__file__).resolve().parent.parent

FLOORS = (
    {"", "core", "platform", "v1"},
    {"bundled", "codec", "membership", "model", "placement", "scheduler", "security", "wire"},
    {"discovery", "transport"},
    {"doctor", "joining", "sandbox", "store"},
    {"conversion", "coordinator", "worker"},
    {"standby"},
    {"api", "client"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
CLIENT_MAY = FLOORS[0] | {"codec", "discovery", "security", "transport"}
MODEL_ALONE = {"mlx", "mlx_lm", "tokenizers", "transformers"}
PURE = {"codec", "membership", "placement", "scheduler", "wire"}
IMPURE = {
    *("anyio", "asyncio", "concurrent", "datetime", "fcntl", "grpc", "http", "io", "logging", "multiprocessing", "os"),
    *("pathlib", "random", "secrets", "select", "selectors", "shutil", "signal", "socket", "ssl", "subprocess"),
    *("tempfile", "threading", "time", "urllib", "uuid", "zeroconf"),
}
ADAPTERS = ("cluster.api.grpc", "cluster.api.http")
DAEMON = {f"cluster.api.{name}" for name in ("coordinator_process", "daemon", "following", "ports")}
PROTOBUF = ("cluster.v1", "google.protobuf", "grpc")
HEAVY = {"mlx", "mlx_lm", "numpy", "tokenizers", "torch", "transformers"}

# The brackets keep these lines from matching themselves.
INDEX = re.compile(r"py[p]i\.org|python[h]osted|--(extra-)?index[-]url|--find[-]links|--trusted[-]host")
PLACE = re.compile(r"(?<![\w.~$}>-])/(?:[r]oot|[w]ork|[h]ome/\w+|[U]sers/\w+|[o]pt/(wheels|pypi))\b")


@cache
def parsed(path: Path) -> ast.Module:
    """Parse a file once for all tests."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Every imported name, absolute, with its line; ``from x import y`` gives ``x.y``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join((*base, *filter(None, [node.module])))
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and (name := dynamic_import(node)):
            yield node.lineno, name


def dynamic_import(call: ast.Call) -> str:
    """The name that ``import_module("x")`` or ``__import__("x")`` brings in, else nothing."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    first = call.args[0] if call.args else None
    if function in {"import_module", "__import__"} and isinstance(first, ast.Constant):
        return str(first.value)
    return ""


def room_of(module: str) -> str:
    """``cluster.wire.frame_codec`` is in ``wire``; the package itself is in the room without a name."""
    return module.split(".")[1] if "." in module else ""


def broken_rule(room: str, name: str) -> str:
    """Why this room may not import this name; nothing when it may."""
    top = name.split(".")[0]
    if top in MODEL_ALONE and room != "model":
        return f"only model imports {top}"
    if top in IMPURE and room in PURE:
        return f"{room} is pure and imports {top}"
    if top == "cluster":
        return broken_floor(room, room_of(name))
    return ""


def broken_adapter(module: str, name: str) -> str:
    """Why this module of ``api`` may not import this name. HTTP and gRPC are equals: neither builds on the other."""
    if room_of(module) != "api" or module in DAEMON:
        return ""  # the daemon puts the parts together
    if is_within(module, "cluster.api.passing"):
        return ""  # a standby sends HTTP requests on over gRPC
    own = next((adapter for adapter in ADAPTERS if is_within(module, adapter)), "")
    if any(is_within(name, adapter) for adapter in ADAPTERS if adapter != own):
        return f"{module} imports {name}"
    if own != "cluster.api.grpc" and any(is_within(name, one) for one in PROTOBUF):
        return f"only api.grpc imports protobuf, and {module} imports {name}"
    return ""


def is_within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def broken_floor(room: str, other: str) -> str:
    if other not in FLOOR:
        # `from cluster import __version__` names no room.
        return "" if other.startswith("__") else f"{other} is on no floor"
    if other == room or FLOOR[other] < FLOOR[room] or FLOOR[room] == FLOOR[other] == 0:
        return f"client imports {other}" if room == "client" and other not in CLIENT_MAY | {"client"} else ""
    return f"{room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})"


def violations(root: Path) -> Iterator[str]:
    """Each broken rule of the tree under ``root``, as ``file:line: why``."""
    for path in sorted((root / "cluster").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        if room_of(module) not in FLOOR:
            yield f"{path.relative_to(root)}: {room_of(module)} is on no floor"
            continue
        for line, name in imported(parsed(path), parts[:-1]):
            if module == "cluster" and name.startswith("cluster.client"):
                continue  # the package hands the clients out, and imports them when they are asked for
            if why := broken_rule(room_of(module), name) or broken_adapter(module, name):
                yield f"{path.relative_to(root)}:{line}: {why}"


def files(root: Path) -> list[Path]:
    """Return the files that are or could be checked in; in a folder without git, everything but dot-entries."""
    git = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, check=False) if (root / ".git").exists() else None
    if listed and listed.returncode == 0:
        return [root / name for name in listed.stdout.decode().split("\0") if name and (root / name).is_file()]
    found = (p for p in root.rglob("*") if p.is_file() and not p.is_symlink())
    return [p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts)]


def places(root: Path) -> Iterator[str]:
    """Each line of text that names a package index or a folder of one machine."""
    for path in files(root):
        text = path.read_bytes()
        if b"\0" in text[:8192] or path.suffix in {".safetensors", ".json"}:
            continue
        for number, line in enumerate(text.decode("utf-8", "replace").splitlines(), 1):
            if INDEX.search(line) or PLACE.search(line):
                yield f"{path.relative_to(root)}:{number}: {line.strip()[:100]}"


PRINT_LOADED = """
import atexit, json, runpy, sys
atexit.register(lambda: print("\\n" + json.dumps(sorted({m.split(".")[0] for m in sys.modules})), file=sys.stderr))
del sys.argv[0]
if sys.argv[1:]:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    __import__(sys.argv[0])
"""


def loaded_by(*argv: str) -> set[str]:
    """Return the top-level modules of a new Python after an import, or after ``-m`` if there are arguments."""
    command = [sys.executable, "-c", PRINT_LOADED, *argv]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=50, check=False)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stderr.strip().rsplit("\n", 1)[-1]))


def test_every_import_keeps_to_its_floor() -> None:
    broken = list(violations(ROOT))
    assert not broken, "\n".join(broken)


def test_no_file_names_a_package_index_or_a_machine() -> None:
    named = list(places(ROOT))
    assert not named, "\n".join(named)


def test_the_client_starts_without_mlx() -> None:
    loaded = loaded_by("cluster.client")
    assert "grpc" in loaded
    assert loaded & HEAVY == set()


def test_core_needs_neither_grpc_nor_a_library_of_models() -> None:
    modules = [f"cluster.core.{path.stem}" for path in sorted((ROOT / "cluster" / "core").glob("*.py"))]
    program = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
    program += "import cluster\nprint(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, timeout=50, check=True, capture_output=True, text=True
    )
    assert not set(run.stdout.split()) & (HEAVY | {"grpc", "google"})


def test_the_package_hands_out_the_clients_and_loads_them_only_then() -> None:
    program = "import sys, cluster; assert 'grpc' not in sys.modules; from cluster import AsyncClient, Client; "
    program += "import cluster.client as c; assert (cluster.Client, AsyncClient) == (c.Client, c.AsyncClient); "
    program += f"assert 'grpc' in sys.modules; assert not {HEAVY} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=50, check=True)
    with pytest.raises(AttributeError, match="no attribute 'Server'"):
        _ = cluster.Server


def test_type_checkers_of_users_read_the_package() -> None:
    assert (ROOT / "cluster" / "py.typed").is_file()


def test_help_starts_without_mlx() -> None:
    loaded = loaded_by("cluster", "--help")
    assert "typer" in loaded
    assert loaded & HEAVY == set()


def test_the_architecture_page_lists_every_room() -> None:
    """Its table has a row for each folder of ``cluster/``, on the floor that is enforced here."""
    page = (ROOT / "ops" / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = {room: int(floor) for floor, room in re.findall(r"^\| (\d) \| `(\w+)` \|", page, re.MULTILINE)}
    folders = {p.name for p in (ROOT / "cluster").iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert rows == {room: FLOOR[room] for room in folders}


def definitions() -> dict[str, list[str]]:
    """Where each class of ``cluster/`` is defined, generated code aside."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "cluster").rglob("*.py")):
        if "v1" not in path.relative_to(ROOT).parts:
            for node in parsed(path).body:
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    return found


def test_no_class_name_has_two_meanings() -> None:
    twice = {name: places for name, places in definitions().items() if len(places) > 1}
    assert not twice, twice


def import_circles() -> list[list[str]]:
    """Groups of modules that import each other, found by Tarjan's algorithm over module-level imports."""
    modules = {}
    for path in (ROOT / "cluster").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "v1" not in parts:
            modules[".".join(parts).removesuffix(".__init__")] = (path, parts[:-1])
    graph = {}
    for module, (path, package) in modules.items():
        names = imported(parsed(path), package)
        graph[module] = {n if n in modules else n.rpartition(".")[0] for _, n in names} & modules.keys() - {module}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            circle = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(circle) > 1:
                circles.append(sorted(circle))

    for module in graph:
        if module not in index:
            visit(module)
    return circles


def test_no_modules_import_each_other() -> None:
    assert import_circles() == []


WORDS = {"sentence", "message", "problem", "details", "args"}
"""Attributes and methods that hold the text of an error."""
TEXT_METHODS = {
    "startswith",
    "endswith",
    "removeprefix",
    "removesuffix",
    "find",
    "index",
    "count",
    "partition",
    "split",
}
READS_GRPC = {"cluster/transport/rich_errors.py"}
"""It reads the text of gRPC's own failures, which have no codes for these cases."""


def is_sentence(node: ast.AST, caught: frozenset[str]) -> bool:
    """Whether an expression is the text of an error; ``caught`` are the names of ``except ... as name`` around it."""
    match node:
        case ast.Call(func=ast.Name(id="str" | "repr"), args=[ast.Name(id=name)]):
            return name in caught
        case ast.Call(func=ast.Name(id="str" | "repr"), args=[ast.Attribute(attr=attr)]):
            return attr == "error"
        case ast.BoolOp(values=parts) | ast.JoinedStr(values=parts):
            return any(is_sentence(part, caught) for part in parts)
        case ast.FormattedValue(value=ast.Name(id=name)):
            return name in caught
        case ast.Call(func=ast.Attribute(attr="lower" | "casefold" | "strip", value=text)) | ast.Subscript(value=text):
            return is_sentence(text, caught)
        case ast.Call(func=ast.Attribute(attr="details")):
            return True
        case ast.Attribute(attr="sentence"):
            return True
        case ast.Attribute(attr=attr, value=ast.Name(id=name)):
            return attr in WORDS - {"details"} and name in caught
    return False


def reads_sentence(node: ast.AST, caught: frozenset[str]) -> bool:
    """Whether a node compares, searches or cuts the text of an error."""
    match node:
        case ast.Compare(left=left, ops=[ast.In() | ast.NotIn() | ast.Eq() | ast.NotEq()], comparators=[right]):
            return is_sentence(left, caught) or is_sentence(right, caught)
        case ast.Call(func=ast.Attribute(attr=method, value=text)) if method in TEXT_METHODS:
            return is_sentence(text, caught)
        case ast.Call(func=ast.Attribute(attr="search" | "match" | "fullmatch" | "findall"), args=args):
            return any(is_sentence(arg, caught) for arg in args)
    return False


def sentence_readers(node: ast.AST, caught: frozenset[str] = frozenset()) -> Iterator[int]:
    """The lines under ``node`` that look into the text of an error."""
    if isinstance(node, ast.ExceptHandler) and node.name:
        caught |= {node.name}
    if reads_sentence(node, caught):
        yield getattr(node, "lineno", 0)
    for child in ast.iter_child_nodes(node):
        yield from sentence_readers(child, caught)


def test_no_code_looks_into_a_sentence() -> None:
    """Errors carry a reason. A sentence may be reworded at any time, and holds names that others chose."""
    found = []
    for path in sorted((ROOT / "cluster").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name not in READS_GRPC and "v1" not in path.parts:
            found += [f"{name}:{line}" for line in sentence_readers(parsed(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("condition", "found"),
    [
        ("'refused' in e.sentence", True),
        ("'refused' in str(e).lower()", True),
        ("any(word in str(e) for word in words)", True),
        ("str(e) == 'refused'", True),
        ("e.sentence.startswith('refused')", True),
        ("re.search('refused', str(e))", True),
        ("'refused' in e.args[0]", True),
        ("'refused' in failure.details()", True),
        ("'refused' in (failure.details() or '')", True),
        ("'refused' in f'{e}'", True),
        ("'refused' in self.error.sentence", True),
        ("'refused' in str(self.error)", True),
        ("found.sentence.removeprefix('refused: ')", True),
        ("e.reason == Refused.reason", False),
        ("e.errno == errno.ECONNREFUSED", False),
        ("e.details.get('worker') == name", False),
        ("print(str(e))", False),
    ],
)
def test_code_that_looks_into_a_sentence_is_found(condition: str, found: bool) -> None:
    program = f"try:\n    act()\nexcept Exception as e:\n    if {condition}:\n        pass\n"
    assert list(sentence_readers(ast.parse(program))) == [4] * found


LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
LOG_LINE = re.compile(r"[a-z][a-z ]*: (?:[^%=]*[^%= ](?: [a-z_]+=%[0-9.]*[a-z])*|%s)")


def log_lines(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Each line that is logged, with its number; a line that is no literal is ""."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=method)) if method in LOG_METHODS:
                line = node.args[method == "log"]
                yield node.lineno, str(line.value) if isinstance(line, ast.Constant) else ""


def test_log_lines_are_an_event_a_reason_and_values() -> None:
    """``event: what happened key=value``. Only values vary; ``event: %s`` is for values that are joined elsewhere."""
    lines = [
        (f"{path.relative_to(ROOT)}:{number}", line)
        for path in sorted((ROOT / "cluster").rglob("*.py"))
        for number, line in log_lines(parsed(path))
    ]
    assert len(lines) > 40
    wrong = [f"{place}: {line}" for place, line in lines if not LOG_LINE.fullmatch(line)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("line", "fits"),
    [
        ("journal: switched off reason=%s path=%s", True),
        ("join: failed", True),
        ("certificates: not renewed reason=%s retry_s=%.0f", True),
        ("cannot check keys: %s now", False),
        ("%s", False),
        ("journal: %s is off", False),
        ("journal: switched off (%s)", False),
        ("journal switched off reason=%s", False),
        ("journal: switched off reason=full of requests request=%s", False),
    ],
)
def test_a_log_line_of_another_form_is_found(line: str, fits: bool) -> None:
    assert bool(LOG_LINE.fullmatch(line)) == fits


BROKEN = {
    "core/frames.py": ("import cluster.wire.frame_codec", "core (floor 0) imports wire"),
    "wire/frame.py": ("def f():\n    import asyncio", ":2: wire is pure and imports asyncio"),
    "placement/solve.py": ("from os.path import join", "placement is pure and imports os"),
    "scheduler/plan.py": ("from cluster.wire import frame", "scheduler (floor 1) imports wire (floor 1)"),
    "membership/clock.py": ("import importlib\nimportlib.import_module('time')", "membership is pure and imports time"),
    "discovery/browse.py": ("from ..transport import channel", "discovery (floor 2) imports transport"),
    "worker/daemon.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mlx.core as mx",
        "worker/daemon.py:3: only model imports mlx",
    ),
    "coordinator/loop.py": ("from cluster import api", "coordinator (floor 4) imports api"),
    "client/sync.py": ("from cluster.membership import clock", "client imports membership"),
    "api/http.py": ("from cluster import utils", "utils is on no floor"),
    "api/http/chat.py": ("from cluster.v1 import inference_pb2", "only api.grpc imports protobuf"),
    "api/requests.py": ("import google.protobuf.message", "only api.grpc imports protobuf"),
    "api/http/app.py": (
        "from cluster.api.grpc.proto_encoding import x",
        "cluster.api.http.app imports cluster.api.grpc",
    ),
    "api/grpc/service.py": ("from cluster.api import http", "cluster.api.grpc.service imports cluster.api.http"),
    "api/metrics.py": ("from cluster.api.http import sse", "cluster.api.metrics imports cluster.api.http"),
    "helpers.py": ("", "helpers is on no floor"),
}
SOUND = {
    "wire/__init__.py": "from cluster import __version__\nfrom . import frame\nfrom cluster.core.frames import Frame",
    "worker/engine.py": "from cluster.model import stage\nfrom .daemon import start\nimport asyncio",
    "client/__init__.py": "from cluster.transport.channel import connect\nfrom cluster.client.sync import Client",
    "api/http/chat.py": "from cluster.api.requests import ChatParams",
    "api/grpc/decoding.py": "from cluster.v1 import inference_pb2\nimport grpc",
    "cli/main.py": "import cluster.api.http\nfrom ..coordinator import loop",
    "model/stage.py": "import mlx.core as mx\nfrom mlx_lm import load",
}


def plant(root: Path, tree: dict[str, str]) -> None:
    for name, text in tree.items():
        path = root / "cluster" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_sound_tree_passes(tmp_path: Path) -> None:
    plant(tmp_path, SOUND)
    assert list(violations(tmp_path)) == []


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_rule_is_found(tmp_path: Path, name: str) -> None:
    text, why = BROKEN[name]
    plant(tmp_path, SOUND | {name: text})
    (found,) = violations(tmp_path)
    assert found.startswith(f"cluster/{name}:")
    assert why in found


@pytest.mark.parametrize(
    "line", ["pip install --index{}url x".format("-"), "cd /{}/x".format("root"), "open('/{}/ada/m')".format("Users")]
)
def test_a_named_place_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "notes.md").write_text(f"fine: ~/work, a/root/b, https://example.org/work\n{line}\n")
    assert [found.split(":")[1] for found in places(tmp_path)] == ["2"]


def test_what_a_process_loads_is_seen() -> None:
    assert {"json", "wave"} <= loaded_by("wave")
