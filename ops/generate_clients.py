"""Writes the blocking client from the asyncio client. ``ops/clients`` calls this; with --check, it only compares.

``async`` and ``await`` go, names lose ``Async`` and ``async_``, and docstrings change by the phrases below. A phrase
that no docstring holds is an error, so that the table cannot rot. What the two clients cannot share is written by hand,
in ``cluster/client/calls.py`` and ``async_calls.py``.
"""

from __future__ import annotations

import difflib
import io
import itertools
import re
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIENT = ROOT / "cluster" / "client"
SOURCES = (
    "async_client.py",
    "async_connection.py",
    "async_following.py",
    "async_streams.py",
    "async_training.py",
)
NAMES = {"__aenter__": "__enter__", "__aexit__": "__exit__", "__aiter__": "__iter__", "__anext__": "__next__"}
PHRASES = {
    "The asyncio client": "The blocking client",
    "It belongs to the event loop of its first call.": "Threads may share it.",
    " Not a coroutine, but needs a running event loop.": "",
    "Leaving the ``async with`` block early cancels the call, down to the workers. Leaving the loop early does the same"
    " as soon as the event loop runs again.": "Leaving the loop or the ``with`` block early cancels the call, down to"
    " the workers.",
    "iterate over it with ``async for``": "iterate over it",
    "``async with``": "``with``",
    "or ``await wait()``": "or call ``wait``",
    "``await client.load(...).wait()``": "``client.load(...).wait()``",
}
LINE_LENGTH = 120
HEADER = "# Generated from {source} by ops/clients. Edit that file, then run ops/clients.\n"


def blocking_name(name: str) -> str:
    """Return the blocking client's name for ``name``: a class without ``Async``, a module without ``async_``."""
    if name in NAMES:
        return NAMES[name]
    return re.sub(r"^(_?)(Async(?=[A-Z])|async_)", r"\1", name)


def translate_docstring(text: str, indent: str, used: set[str]) -> str:
    """Apply PHRASES to a docstring, and fill each paragraph anew that they change."""
    body = text[3:-3]
    end = body[len(body.rstrip()) :]
    paragraphs = [translate_paragraph(one, indent, used) for one in body.rstrip().split("\n\n")]
    return '"""' + "\n\n".join(paragraphs).lstrip() + end + '"""'


def translate_paragraph(text: str, indent: str, used: set[str]) -> str:
    found = [phrase for phrase in PHRASES if phrase in (joined := " ".join(text.split()))]
    if not found:
        return text
    used.update(found)
    for phrase in found:
        joined = joined.replace(phrase, PHRASES[phrase])
    return textwrap.fill(
        joined,
        LINE_LENGTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def edits(source: str, used: set[str]) -> Iterator[tuple[tuple[int, int], tuple[int, int], str]]:
    """Yield the start, the end and the new text of everything that changes, in order."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    for token, following in itertools.pairwise(tokens):
        if token.type == tokenize.NAME and token.string in {"async", "await"}:
            yield token.start, following.start, ""
        elif token.type == tokenize.NAME and (name := blocking_name(token.string)) != token.string:
            yield token.start, token.end, name
        elif token.type == tokenize.STRING and token.string.startswith('"""'):
            yield token.start, token.end, translate_docstring(token.string, " " * token.start[1], used)


def make_blocking(source: str, used: set[str]) -> str:
    """Return the blocking form of ``source``, not yet formatted."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    parts = []
    position = 0
    for (start_line, start_column), (end_line, end_column), text in edits(source, used):
        start = starts[start_line - 1] + start_column
        parts += [source[position:start], text]
        position = starts[end_line - 1] + end_column
    return "".join([*parts, source[position:]])


def run_ruff(text: str, path: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "ruff", *arguments, "--quiet", "--stdin-filename", str(path), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def generate() -> dict[Path, str]:
    """Return the text of each generated file. Exit if a phrase is in no docstring."""
    made = {}
    used: set[str] = set()
    for name in SOURCES:
        path = CLIENT / blocking_name(name)
        text = make_blocking((CLIENT / name).read_text(encoding="utf-8"), used)
        sorted_imports = run_ruff(text, path, "check", "--fix", "--unsafe-fixes", "--select", "I,UP028")
        made[path] = HEADER.format(source=name) + run_ruff(sorted_imports, path, "format")
    if unused := PHRASES.keys() - used:
        sys.exit(f"no docstring holds these phrases; edit PHRASES in {Path(__file__).name}: {sorted(unused)}")
    return made


def main(check: bool) -> int:
    made = generate()
    checked_in = {path: path.read_text(encoding="utf-8") if path.exists() else "" for path in made}
    stale = [path for path in made if made[path] != checked_in[path]]
    for path in stale:
        if check:
            before, after, name = checked_in[path].splitlines(), made[path].splitlines(), str(path.relative_to(ROOT))
            print(*difflib.unified_diff(before, after, name, "generated", lineterm=""), sep="\n")
        else:
            path.write_text(made[path], encoding="utf-8")
    if check and stale:
        print("the blocking client is stale: run ops/clients and commit what it writes")
        return 1
    print(f"{len(made)} files, {sum(len(text.splitlines()) for text in made.values())} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
