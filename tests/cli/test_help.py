"""The form of help pages, without starting a process."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from cluster.cli.examples import EXAMPLES
from cluster.cli.help import GROUP_OF
from cluster.cli.main import SECTIONS, app

pytestmark = pytest.mark.xdist_group("help")  # one process renders every page
SHOWS_TYPES = re.compile(r"\{[A-Z|]+\}|<str>|<=x|x>=|\[required\]|\[default: \(")


@cache
def root() -> Any:
    """Return macpipe's command. It is built once, since typer builds all of it anew at each call."""
    return get_command(app)


def command_names() -> Iterator[str]:
    """Names of all commands that are no groups."""
    pending: list[tuple[str, Any]] = [("", root())]
    while pending:
        name, command = pending.pop()
        below = getattr(command, "commands", {})
        pending += [(f"{name} {part}".strip(), one) for part, one in below.items()]
        if not below:
            yield name


def found(name: str) -> Any:
    command: Any = root()
    for part in name.split():
        command = command.commands[part]
    return command


@cache
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
        ("serve", "serve [OPTIONS] [MODEL...] "),
        ("serve", " MODEL... A Hugging Face id"),
        ("serve", "[default: 65536; 1 to 1048576]"),
        ("serve", "0 picks a free one. [default: 7701]"),
        ("worker", "[env: MACPIPE_CLUSTER; default: the last one entered, else default]"),
        ("worker", "[default: --standby]"),
        ("plan", "[default: latency]"),
        ("plan", "Search for workers this long. [default: 5]"),
        ("bench", "Tokens per prompt. [default: 512, or what fits]"),
        ("generate", "[default: 0; 0 to 2]"),
        ("launch", "launch [OPTIONS] CLIENT [-- ARGS] "),
        ("status", "Print one JSON object. -h"),
        ("authority move", "that Mac admits others and renews certificates, also while it stands by."),
    ],
)
def test_a_page_shows(command: str, shown: str) -> None:
    assert shown in " ".join(page(command).split())


def test_examples_stand_on_top_and_can_be_parsed() -> None:
    """People copy them: each has a command of macpipe with options that it knows."""
    for name, examples in EXAMPLES.items():
        assert len(examples) == 2
        text = page(name)
        assert text.index(examples[0]) < text.index(examples[1]) < text.index("Options:")
        for line in examples:
            words = shlex.split(line.partition(" < ")[0].partition(" -- ")[0])
            assert words[0] == "macpipe"
            command = root()
            while hasattr(command, "commands"):
                command = command.commands[words.pop(1)]
            command.make_context(line, words[1:])


def test_a_long_page_has_groups_and_a_short_one_has_none() -> None:
    titles = re.findall(r"^(\w[\w ]*):$", page("serve"), re.MULTILINE)
    assert titles == ["Examples", "Arguments", "Options", "Placement", "Memory and speed", "Network", "HTTP"]
    assert "HTTP:" not in page("launch")
    every = {option.name for name in command_names() for option in found(name).params}
    assert GROUP_OF.keys() <= every


def test_no_list_of_commands_is_cut_at_80_columns() -> None:
    """A page is two columns narrower than the terminal, but not the runner's; a cut text leaves two columns free."""
    for group in ("", *(name for name, command in root().commands.items() if hasattr(command, "commands"))):
        for line in re.findall(r"^  [a-z]+  .*$", page(group), re.MULTILINE):
            assert (len(line) <= 76, "..." in line) == (True, False), line


def test_the_first_page_lists_every_command_once() -> None:
    listed = re.findall(r"^  ([a-z]+)  ", page(""), re.MULTILINE)
    assert sorted(listed) == sorted(root().commands)
    assert {name for names in SECTIONS.values() for name in names} <= set(listed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("generate --temperature 9", "'--temperature': 9 is out of range; give a number from 0 to 2"),
        ("generate --temperature hot", "'--temperature': 'hot' is not a number"),
        ("generate --max-tokens 0", "'--max-tokens': 0 is out of range; give at least 1"),
        ("bench --rounds 1.5", "'--rounds': '1.5' is not a whole number"),
        ("plan faq --route far", "'--route': 'far' is not one of 'direct', 'relay'"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_may_be(arguments: str, said: str) -> None:
    done = CliRunner().invoke(app, arguments.split(), prog_name="macpipe")
    assert done.exit_code == 2
    assert done.stderr.endswith(f"Invalid value for {said}\n")
