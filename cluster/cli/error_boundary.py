"""Where a process ends: every error becomes one sentence on stderr and an exit code, never a traceback.

MACPIPE_DEBUG=1 shows the traceback too.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

import typer

from cluster.core.errors import InvalidOption, MacpipeError

DEBUG_VARIABLE: Final = "MACPIPE_DEBUG"
FAILED: Final = 1
WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130


@contextmanager
def run_with_error_boundary() -> Iterator[None]:
    """Run a command line; whatever escapes from it ends the process with its sentence and its code."""
    for quiet in (("GRPC_VERBOSITY", "NONE"), ("TRANSFORMERS_VERBOSITY", "error")):
        os.environ.setdefault(*quiet)  # their log lines say nothing that our sentences do not
    open_standard_streams()
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # an ASCII terminal shows ? and does not end the command
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        end_after_broken_pipe()
    except MacpipeError as error:
        complain(error.sentence)
        sys.exit(exit_code(error))
    except Exception as error:  # the process's edge: a person gets a sentence, whatever went wrong
        hint = "" if is_debugging() else f"; set {DEBUG_VARIABLE}=1 for the traceback"
        complain(f"unexpected error: {type(error).__name__}: {error}{hint}")
        sys.exit(FAILED)


def open_standard_streams() -> None:
    """Let a process that was started with a standard stream closed read nothing, or write to nowhere, instead.

    Else the first files and connections that it opens would be taken for its input and output.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False, encoding="utf-8"))  # noqa: SIM115


@contextmanager
def errors_in_json(wanted: bool) -> Iterator[None]:
    """If ``wanted``, print an error as one JSON object on stdout and exit with 1; wrong usage is told on stderr."""
    try:
        yield
    except MacpipeError as error:
        if not wanted or isinstance(error, InvalidOption):
            raise
        from cluster.cli.json_output import print_json

        facts = {"reason": error.reason, "message": error.sentence, "details": dict(error.details)}
        field = {"field": error.field} if error.field else {}
        retry = {} if error.retry_after_s is None else {"retry_after_s": error.retry_after_s}
        print_json({"error": facts | field | retry})
        raise typer.Exit(FAILED) from None


def exit_code(error: MacpipeError) -> int:
    """2 where the command was called wrongly, 1 where it failed."""
    return WRONG_USAGE if isinstance(error, InvalidOption) else FAILED


def complain(sentence: str) -> None:
    """One line on stderr; the traceback before it when MACPIPE_DEBUG is set."""
    if is_debugging():
        traceback.print_exc()
    typer.echo(f"macpipe: {sentence}", err=True)


def is_debugging() -> bool:
    """Whether a person asked for tracebacks."""
    return os.environ.get(DEBUG_VARIABLE, "0") not in {"", "0"}


def end_after_broken_pipe() -> NoReturn:
    """Exit without a word: nobody reads stdout, and Python's own flush at exit must not complain either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(FAILED)
