"""The form of help pages: ``MODEL`` for an argument, and each option's environment variable, default and range."""

from __future__ import annotations

from enum import Enum
from typing import Any, Final

from typer.core import TyperCommand

HELP_WIDTH: Final = 100
"""Maximum width of a help page, in characters."""


class Command(TyperCommand):
    """A command whose help names arguments as its usage does, in place of typer's ``{MODEL}`` and ``MODEL <str>``."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line: ``[OPTIONS]``, the arguments, and ``[-- ARGS]`` for another program."""
        arguments = [str(one.metavar) for one in self.get_params(ctx) if one.param_type_name == "argument"]
        return ["[OPTIONS]", *arguments, *(["[-- ARGS]"] if ctx.allow_extra_args else [])]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options."""
        shown: list[Any] = list(self.get_params(ctx))
        arguments = [(one.metavar, one.help) for one in shown if one.param_type_name == "argument"]
        records = [(one, one.get_help_record(ctx)) for one in shown if one.param_type_name == "option"]
        options = [(record[0], describe_option(one, ctx)) for one, record in records if record]
        for title, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def describe_option(option: Any, ctx: Any) -> str:
    """Return an option's help, followed by its environment variable, its default and its range in brackets."""
    notes = [f"env: {option.envvar}"] if option.show_envvar and option.envvar else []
    if default := describe_default(option, ctx):
        notes.append(f"default: {default}")
    if span := describe_range(option):
        notes.append(span)
    return f"{option.help} [{'; '.join(notes)}]" if notes else str(option.help)


def describe_default(option: Any, ctx: Any) -> str:
    """Return an option's default as a user would write it; empty if there is none."""
    if isinstance(option.show_default, str):
        return option.show_default
    default = option.get_default(ctx, call=False)
    if option.is_bool_flag:
        switches = option.opts if default else option.secondary_opts
        return switches[0] if option.secondary_opts else ""
    if not option.show_default or default in (None, "", []):
        return ""
    if isinstance(default, Enum):
        return str(default.value)
    return _plain(default) if isinstance(default, float) else str(default)


def describe_range(option: Any) -> str:
    """Return the range of a number that is bounded on both sides, except a port; else empty."""
    least, most = getattr(option, "min", None), getattr(option, "max", None)
    if least is None or most is None or option.metavar == "PORT":
        return ""
    return f"{_plain(least)} to {_plain(most)}"


def _plain(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)
