"""Turns every error of a command into one sentence on stderr and an exit code.

MACPIPE_DEBUG=1 also prints the traceback.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, NoReturn

import typer

from cluster.core.errors import InvalidOption, MacpipeError

DEBUG_VARIABLE: Final = "MACPIPE_DEBUG"
FAILED: Final = 1
WRONG_USAGE: Final = 2
FIRST_SIGNAL_CODE: Final = 128
"""Exit codes above this are those of signals."""
INTERRUPTED: Final = 130


@contextmanager
def run_with_error_boundary() -> Iterator[None]:
    """Run the command in the ``with`` block. Exit with a sentence and a code if it raises."""
    for variable, level in (("GRPC_VERBOSITY", "NONE"), ("TRANSFORMERS_VERBOSITY", "error")):
        os.environ.setdefault(variable, level)  # their log lines add nothing to our error sentences
    open_standard_streams()
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # print ? on an ASCII terminal instead of failing
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        end_after_broken_pipe()
    except MacpipeError as error:
        print_error(error.sentence)
        sys.exit(exit_code(error))
    except Exception as error:  # the edge of the process: report any error as a sentence
        hint = "" if is_debugging() else f"; set {DEBUG_VARIABLE}=1 for the traceback"
        print_error(f"unexpected error: {type(error).__name__}: {error}{hint}")
        sys.exit(FAILED)


def open_standard_streams() -> None:
    """Open /dev/null for each standard stream that was closed at start.

    Otherwise the next file or connection would get its number and be used as standard input or output.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False, encoding="utf-8"))  # noqa: SIM115


@contextmanager
def errors_in_json(wanted: bool) -> Iterator[None]:
    """If ``wanted``, print a MacpipeError as one JSON object and exit with 1. InvalidOption passes through."""
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
    """Return 2 for wrong usage, 1 for a failure."""
    return WRONG_USAGE if isinstance(error, InvalidOption) else FAILED


def print_error(sentence: str) -> None:
    """Print one line on stderr, after the traceback if MACPIPE_DEBUG is set."""
    if is_debugging():
        traceback.print_exc()
    from cluster.cli.screen import note

    note(f"macpipe: {sentence}")


def is_debugging() -> bool:
    """Return whether MACPIPE_DEBUG is set."""
    return os.environ.get(DEBUG_VARIABLE, "0") not in {"", "0"}


def end_after_broken_pipe() -> NoReturn:
    """Exit silently: nobody reads stdout. Redirect it so that Python's flush at exit does not fail either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(FAILED)


def exit_at_once(code: int) -> NoReturn:
    """Exit without the interpreter's own end, after all ``with`` blocks were left.

    A signal may have interrupted grpc while it closed a channel. Deleting that channel then waits forever.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(code)
