"""The ``macpipe`` command and its subcommands.

Imports here are light, so that ``--help`` is fast: each command imports the rest when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from cluster import __version__
from cluster.cli.adapter import adapter
from cluster.cli.authority import authority
from cluster.cli.bench import bench
from cluster.cli.chat import chat
from cluster.cli.config import config
from cluster.cli.convert import convert
from cluster.cli.demo import demo
from cluster.cli.doctor import doctor
from cluster.cli.drain import drain
from cluster.cli.embed import embed
from cluster.cli.error_boundary import FIRST_SIGNAL_CODE, exit_at_once, run_with_error_boundary
from cluster.cli.fuse import fuse
from cluster.cli.generate import generate
from cluster.cli.handover import handover
from cluster.cli.help import HELP_WIDTH, Command, write_examples
from cluster.cli.init import init
from cluster.cli.join import join
from cluster.cli.key import key
from cluster.cli.launch import launch
from cluster.cli.leave import leave
from cluster.cli.load import load
from cluster.cli.lora import lora
from cluster.cli.members import members
from cluster.cli.models import models
from cluster.cli.plan import plan
from cluster.cli.ps import ps
from cluster.cli.pull import pull
from cluster.cli.remove import remove
from cluster.cli.report import report
from cluster.cli.serve import serve
from cluster.cli.service import service
from cluster.cli.standby_options import ServeCommand
from cluster.cli.status import status
from cluster.cli.store import store
from cluster.cli.token import token
from cluster.cli.top import top
from cluster.cli.trace import trace
from cluster.cli.unload import unload
from cluster.cli.worker import worker

SECTIONS: Final = {
    "Set up": (
        *("demo", "init", "join", "worker", "service", "config"),
        *("token", "members", "remove", "leave", "authority"),
    ),
    "Serve a model": ("plan", "serve", "pull", "load", "unload", "models", "drain", "handover", "store"),
    "Make a model": ("convert", "lora"),
    "Send requests": ("generate", "chat", "embed", "launch", "key"),
    "Look at it": ("status", "ps", "top", "trace", "bench", "doctor", "report"),
}
"""The commands under their headings on the first help page; others follow under ``More``."""


class Commands(TyperGroup):
    """All commands, in the order in which a new user needs them."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command. Ctrl-C ends it silently with exit code 130."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write what macpipe is, then two examples."""
        super().format_help_text(ctx, formatter)
        write_examples("", formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands in sections."""
        listed = {name for names in SECTIONS.values() for name in names}
        more = tuple(name for name in self.commands if name not in listed)
        for title, names in (*SECTIONS.items(), ("More", more)):
            rows = [(name, self.commands[name].get_short_help_str(limit=formatter.width)) for name in names]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order of their definition, not alphabetically."""
        return list(self.commands)


app = typer.Typer(
    name="macpipe",
    cls=Commands,
    help="Several Macs, one large model. Try `macpipe demo`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": HELP_WIDTH},
)
for command in (
    *(demo, init, join, worker, plan, pull, convert, fuse, generate, chat, embed, status, ps, load, unload),
    *(drain, handover, lora, top, trace, bench, doctor, report),
):
    app.command(cls=Command)(command)
app.command(cls=ServeCommand)(serve)
app.add_typer(token, name="token")
app.add_typer(authority)
app.add_typer(key)
app.add_typer(service)
app.add_typer(config)
app.add_typer(adapter)
app.add_typer(store)
app.add_typer(models)
for command in (members, remove, leave):
    app.command(cls=Command)(command)
app.command(cls=Command, context_settings={"allow_extra_args": True})(launch)


def show_version(wanted: bool) -> None:
    """Print the version and exit, if ``wanted``."""
    if wanted:
        typer.echo(f"macpipe {__version__}")
        raise typer.Exit


@app.callback()
def accept_global_options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Several Macs, one large model. Try `macpipe demo`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 success, 1 failure, 2 wrong usage, 128 + N after signal N (130 for Ctrl-C)."""
    try:
        with run_with_error_boundary():
            app(args=arguments, prog_name="macpipe")
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > FIRST_SIGNAL_CODE:
            exit_at_once(end.code)
        raise
