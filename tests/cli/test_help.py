"""The form of help pages, without starting a process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from cluster.cli.main import app

SHOWS_TYPES = re.compile(r"\{[A-Z|]+\}|<str>|<=x|x>=|\[required\]|\[default: \(")


def command_names() -> Iterator[str]:
    """Names of all commands that are no groups."""
    pending: list[tuple[str, Any]] = [("", get_command(app))]
    while pending:
        name, command = pending.pop()
        below = getattr(command, "commands", {})
        pending += [(f"{name} {part}".strip(), one) for part, one in below.items()]
        if not below:
            yield name


def page(command: str) -> str:
    done = CliRunner().invoke(app, [*command.split(), "--help"], prog_name="macpipe")
    assert done.exit_code == 0
    return done.stdout


def test_every_page_names_values_without_their_types() -> None:
    pages = {name: page(name) for name in command_names()}
    assert len(pages) > 20
    for name, text in pages.items():
        assert not SHOWS_TYPES.search(text), name
        assert text.startswith(f"Usage: macpipe {name} [OPTIONS]")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("serve", "serve [OPTIONS] MODEL "),
        ("serve", " MODEL A Hugging Face id"),
        ("serve", "[default: 65536; 1 to 1048576]"),
        ("serve", "0 picks a free one. [default: 7701]"),
        ("worker", "[env: MACPIPE_CLUSTER; default: default]"),
        ("worker", "[default: --standby]"),
        ("plan", "[default: latency]"),
        ("plan", "Search for workers this long. [default: 5]"),
        ("bench", "Tokens per prompt. [default: 512, or what fits]"),
        ("generate", "[default: 0; 0 to 2]"),
        ("launch", "launch [OPTIONS] CLIENT [-- ARGS] "),
        ("status", "Print one JSON object. -h"),
    ],
)
def test_a_page_shows(command: str, shown: str) -> None:
    assert shown in " ".join(page(command).split())
