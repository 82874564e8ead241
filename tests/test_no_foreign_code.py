"""Nothing in the tree can run what it reads: no pickle, no eval, no shell. The checker is tried on lines that could."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "yaml",
    "code",
}
SAFE = {("yaml", "YAMLError"), ("yaml", "safe_load")}
"""Names of such a module that run nothing."""
NAMES = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    ("os", "system"), ("os", "popen"), ("torch", "load"), ("asyncio", "create_subprocess_shell"),
    ("subprocess", "getoutput"), ("subprocess", "getstatusoutput"), ("builtins", "eval"), ("builtins", "exec"),
}  # fmt: skip
FLAGS = {"shell", "trust_remote_code", "allow_pickle"}


def dangers(source: str) -> Iterator[tuple[int, str]]:
    """Lines that could run foreign code, and by what."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in MODULES:
            if not all((node.module, alias.name) in SAFE for alias in node.names):
                yield node.lineno, str(node.module)
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in ATTRIBUTES:
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in FLAGS and not _is_false(node.value):
            yield node.value.lineno, f"{node.arg}="
        elif isinstance(node, ast.Dict):
            pairs = ((k.value, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant))
            yield from ((node.lineno, str(key)) for key, value in pairs if key in FLAGS and not _is_false(value))


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


@pytest.mark.parametrize("room", ["cluster", "ops"])
def test_nothing_in_the_tree_runs_what_it_reads(room: str) -> None:
    files = [path for path in (ROOT / room).rglob("*.py") if "v1" not in path.parts]
    assert files
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}" for path in files for line, what in dangers(path.read_text("utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "import yaml", "from yaml import load, safe_load",
        "import pickle", "from pickle import loads", "torch.load(path)", "eval('1')", "run = exec",
        "__import__('os')", "os.system('ls')", "subprocess.run('ls', shell=True)", "f(shell=wanted)", "os.popen('ls')",
        "load(path, trust_remote_code=True)", "extra = {'trust_remote_code': True}", "np.load(p, allow_pickle=True)",
    ],
)  # fmt: skip
def test_the_checker_sees(line: str) -> None:
    assert list(dangers(line))


@pytest.mark.parametrize("line", ["mx.eval(a)", "f(trust_remote_code=False)", "re.compile('a')", "run(['ls'])"])
def test_the_checker_lets_pass(line: str) -> None:
    assert not list(dangers(line))
