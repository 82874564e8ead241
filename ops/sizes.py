"""Counts the lines of functions and files in cluster/ (generated code aside) and fails where the house's bounds break.

A function's length is from its ``def`` to its last line, docstring included, decorators not.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FUNCTION = 60
LONGEST_FILE = 500
LONG_FUNCTION = 25
LONG_SHARE = 0.10
MEDIAN = 8


def sources(root: Path) -> Iterator[Path]:
    return (p for p in sorted((root / "cluster").rglob("*.py")) if "v1" not in p.relative_to(root).parts)


def functions(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """Each function's length and where it is."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.end_lineno - node.lineno + 1, f"{path.relative_to(root)}:{node.lineno} {node.name}"


def complaints(lengths: list[tuple[int, str]], files: dict[str, int]) -> Iterator[str]:
    for length, where in lengths:
        if length > LONGEST_FUNCTION:
            yield f"{where} has {length} lines; {LONGEST_FUNCTION} are allowed"
    for name, length in files.items():
        if length > LONGEST_FILE:
            yield f"{name} has {length} lines; {LONGEST_FILE} are allowed"
    counts = [length for length, _ in lengths]
    if counts and statistics.median(counts) > MEDIAN:
        yield f"the median function has {statistics.median(counts):g} lines; {MEDIAN} are allowed"
    long = [length for length in counts if length > LONG_FUNCTION]
    if len(long) > LONG_SHARE * len(counts):
        yield f"{len(long)} of {len(counts)} functions have more than {LONG_FUNCTION} lines; one in ten is allowed"


def summary(lengths: list[tuple[int, str]], files: dict[str, int]) -> str:
    counts = sorted(length for length, _ in lengths) or [0]
    over = sum(length > LONGEST_FILE for length in files.values())
    p90 = counts[min(len(counts) - 1, len(counts) * 9 // 10)]
    return (
        f"{len(lengths)} functions: median {statistics.median(counts):g}, p90 {p90}, longest {max(counts)} lines; "
        f"{len(files)} files, {over} over {LONGEST_FILE} lines"
    )


def main(root: Path) -> int:
    paths = list(sources(root))
    lengths = [found for path in paths for found in functions(root, path)]
    files = {str(p.relative_to(root)): len(p.read_text(encoding="utf-8").splitlines()) for p in paths}
    wrong = list(complaints(lengths, files))
    print(*wrong, summary(lengths, files), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
