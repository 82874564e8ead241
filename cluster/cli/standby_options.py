"""Which options of ``serve`` have no effect with --standby: those that a standby takes from its leader.

They are refused when the command line is parsed, so that ``service install`` refuses them, too.
"""

from __future__ import annotations

import inspect
from typing import Any, Final

from cluster.cli.help import Command
from cluster.cli.model_options import model_options
from cluster.core.errors import InvalidOption

OF_LEADER: Final = frozenset(inspect.signature(model_options).parameters) | {
    "served_model_name",
    "wait",
    "journal",
    "replicate",
    "load_wait",
    "max_schema_bytes",
    "strict",
}
"""The parameters whose values a standby takes from its leader, beside the models."""


class ServeCommand(Command):
    """The command ``serve``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line. Raise InvalidOption for options without effect."""
        rest = super().parse_args(ctx, args)
        if ctx.params.get("standby"):
            _refuse_idle(ctx)
        return rest


def _refuse_idle(ctx: Any) -> None:
    """Raise InvalidOption if an option of the leader has another value than its default."""
    options = [one for one in ctx.command.params if one.name in OF_LEADER]
    given = [one for one in options if (ctx.params.get(one.name) or None) != (one.default or None)]
    if given:
        verb = "has" if len(given) == 1 else "have"
        names = ", ".join(one.opts[0] for one in given)
        raise InvalidOption(
            f"{names} {verb} no effect with --standby: a standby goes on with the models and settings of its leader;"
            " start the leader with what you want, and leave it out here",
            field=given[0].name,
        )
