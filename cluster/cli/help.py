"""The form of help pages: examples first, ``MODEL`` for an argument, options in groups, and what each option is if
it is not given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import Enum
from itertools import groupby
from typing import Any, Final

from typer import BadParameter
from typer.core import TyperCommand

from cluster.cli.examples import EXAMPLES
from cluster.cli.number_ranges import describe_range, plain_number
from cluster.cli.usage_errors import explain_bad_value

HELP_WIDTH: Final = 100
"""Maximum width of a help page, in characters."""
FEW_OPTIONS: Final = 12
"""A page with at most this many options has no groups."""
LEAST_IN_GROUP: Final = 3
_GROUPS: Final = {
    "Placement": "workers layers group insecure_links route lanes objective acceptance assume take_back",
    "Memory and speed": "max_context context kv_bits prefill_chunk max_step_ms memory_limit prefix_disk speculate draft"
    " profile standby throttle",
    "Network": "coordinator cluster host port data_port interface peer peers_only join_port wait",
    "HTTP": "http served_model_name http_allow_host http_allow_origin http_cert http_key strict max_schema_bytes",
    "Sampling": "max_tokens temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty"
    " logit_bias seed stop ignore_eos",
}
OTHERS: Final = "Options"
GROUP_OF: Final = {name: group for group, names in _GROUPS.items() for name in names.split()}
_ORDER: Final = (OTHERS, *_GROUPS)


class Command(TyperCommand):
    """A command whose help names arguments as its usage does, in place of typer's ``{MODEL}`` and ``MODEL <str>``."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line: ``[OPTIONS]``, the arguments (in brackets if optional), ``[-- ARGS]``."""
        given = [one for one in self.get_params(ctx) if one.param_type_name == "argument"]
        arguments = [str(one.metavar) if one.required else f"[{one.metavar}]" for one in given]
        return ["[OPTIONS]", *arguments, *(["[-- ARGS]"] if ctx.allow_extra_args else [])]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line. The error for a wrong value says what it may be."""
        try:
            return super().parse_args(ctx, args)
        except BadParameter as error:
            explain_bad_value(error)
            raise

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write what the command does, then two examples."""
        super().format_help_text(ctx, formatter)
        write_examples(ctx.command_path.partition(" ")[2], formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options, in groups if there are many."""
        shown: list[Any] = list(self.get_params(ctx))
        arguments = [(one.metavar, one.help) for one in shown if one.param_type_name == "argument"]
        records = [(one, one.get_help_record(ctx)) for one in shown if one.param_type_name == "option"]
        rows_of = {one: (record[0], describe_option(one, ctx)) for one, record in records if record}
        options = sorted(group_options(list(rows_of)), key=lambda option: _ORDER.index(option[0]))
        sections = [
            (title, [rows_of[one] for _, one in found]) for title, found in groupby(options, lambda one: one[0])
        ]
        for title, rows in (("Arguments", arguments), *sections):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def write_examples(command: str, formatter: Any) -> None:
    """Write the examples of a command, "" for all of macpipe, if there are any."""
    if lines := EXAMPLES.get(command, ()):
        with formatter.section("Examples"):
            for line in lines:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def group_options(options: Sequence[Any]) -> list[tuple[str, Any]]:
    """Return each option of a page with the title of its section. Short pages and small groups have no section."""
    if len(options) <= FEW_OPTIONS:
        return [(OTHERS, one) for one in options]
    sizes = Counter(GROUP_OF.get(one.name, OTHERS) for one in options)
    groups = ((GROUP_OF.get(one.name, OTHERS), one) for one in options)
    return [(group if sizes[group] >= LEAST_IN_GROUP else OTHERS, one) for group, one in groups]


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
    return plain_number(default) if isinstance(default, float) else str(default)
