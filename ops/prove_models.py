"""Proves every architecture of the installed mlx-lm and writes ops/docs/MODELS.md. ``ops/models`` calls it.

Names of modules prove those alone and keep the others' rows. ``--check`` proves nothing: it writes the file anew from
its own rows, and fails where that gives another file. That is so for another version of mlx-lm or MLX, for a module
that came or went, and for words outside the rows that were changed by hand. The rows themselves are held against the
models by the tests: some columns by all of them, all columns with ``ops/test --all``.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from architectures import architectures, modules, not_models, refused  # noqa: E402
from model import table  # noqa: E402
from model.proof import prove  # noqa: E402


def unlisted() -> str:
    """What is amiss between mlx-lm's modules and ours, or nothing."""
    known = {*architectures(), *not_models(), *(arch.name for arch in refused().values())}
    new, gone = sorted(set(modules()) - known), sorted(known - set(modules()))
    complaints = [f"new in mlx-lm, and in no table: {', '.join(new)}"] if new else []
    complaints += [f"in a table, and gone from mlx-lm: {', '.join(gone)}"] if gone else []
    return "; ".join(complaints)


def proved(name: str) -> tuple[str, str, str]:
    """The module's name, its line, and what went wrong instead, for one of them."""
    arch = architectures()[name]
    with tempfile.TemporaryDirectory() as folder:
        try:
            return name, table.line(arch, prove(arch, Path(folder))), ""
        except Exception as error:  # whatever it is, the others go on, and this one is named
            return name, "", f"{type(error).__name__}: {str(error)[:500]}"


def check() -> str:
    lines = table.recorded()
    missing = [name for name in architectures() if table.UNPROVED in lines.get(name, table.UNPROVED)]
    if missing:
        return f"ops/docs/MODELS.md proves nothing of {', '.join(missing)}: run ops/models"
    if table.text(lines) != table.FILE.read_text():
        return "ops/docs/MODELS.md is stale: run ops/models and read the diff"
    return ""


def write(names: list[str]) -> str:
    lines, failed = table.recorded(), []
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for name, line, why in pool.map(proved, names):
            print(f"{name:24} {'FAILED ' + why if why else 'ok'}", file=sys.stderr, flush=True)
            lines[name] = line or f"| {name} | {table.UNPROVED} |"
            failed += [name] if why else []
    for name in architectures():
        lines.setdefault(name, f"| {name} | {table.UNPROVED} |")
    table.FILE.write_text(table.text(lines))
    return f"{', '.join(failed)} could not be proved" if failed else check()


def main(arguments: list[str]) -> int:
    names = arguments or list(architectures())
    if arguments != ["--check"] and (unknown := [name for name in names if name not in architectures()]):
        print(f"ops/models takes --check, or names of served modules; {', '.join(unknown)} is none", file=sys.stderr)
        return 2
    complaint = unlisted() or (check() if arguments == ["--check"] else write(names))
    print(complaint or f"{len(architectures())} modules served, {len(table.not_served())} refused")
    return 1 if complaint else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
