"""``macpipe generate``: prints one answer as it arrives."""

from __future__ import annotations

import shutil
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Cluster, Coordinator, Json, answer_options, takes_options
from cluster.core.errors import InvalidOption

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.client import AcceptedRequest, Client, Options, Stream


@takes_options(answer_options)
def generate(
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt; - reads standard input.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", exists=True, dir_okay=False, metavar="FILE", help="Read the prompt from a file."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Send this system message before the prompt.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, without the chat template.")] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="With --json: add log-probabilities and this many alternatives."),
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="With --json: add each token's time per stage, and what guessed it.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print statistics on stderr.")] = False,
    coordinator: Coordinator = None,
    cluster: Cluster = None,
    json: Json = False,
    options: Any = None,
) -> None:
    """Print the answer to a prompt."""
    with errors_in_json(json):
        if raw and system is not None:
            raise InvalidOption(
                "--system needs the chat template, which --raw turns off; give only one of them", field="system"
            )
        if logprobs is not None and not json:
            raise InvalidOption("--logprobs needs --json", field="logprobs")
        if trace and not json:
            raise InvalidOption("--trace needs --json", field="trace")
        text = read_prompt(prompt, file)
        if system is not None:
            require_utf8(system, "--system", "system")
        if logprobs is not None:
            options |= {"logprobs": True, "top_logprobs": logprobs}
        if trace:
            options |= {"stage_timings": True}
        from cluster.client import Client

        with Client(coordinator, cluster=cluster) as client:
            _answer(client, text, system, options, raw=raw, json=json, verbose=verbose)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Read the prompt from --prompt or --file. Raise InvalidOption unless exactly one is given and it is UTF-8 text."""
    if (prompt is None) == (file is None):
        raise InvalidOption("give the prompt with -p TEXT, -p - (standard input) or --file FILE", field="prompt")
    try:
        if file is not None:
            return file.read_text(encoding="utf-8")
        return (
            sys.stdin.buffer.read().decode() if prompt == "-" else require_utf8(prompt or "", "-p / --prompt", "prompt")
        )
    except UnicodeDecodeError:
        raise InvalidOption(f"{file or 'standard input'} is not UTF-8 text", field="prompt") from None
    except OSError as error:
        raise InvalidOption(f"{file} cannot be read: {error.strerror}", field="file") from None


def require_utf8(text: str, source: str, field: str) -> str:
    """Return ``text``, which came from ``source``. Raise InvalidOption if it has bytes that are not UTF-8.

    Python keeps such bytes of an argument, and of a line in some locales, as lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidOption(
            f"{source} holds bytes that are not UTF-8, so it was not sent; convert it, for example with iconv",
            field=field,
        ) from None
    return text


def _answer(
    client: Client, text: str, system: str | None, options: Options, *, raw: bool, json: bool, verbose: bool
) -> None:
    from cluster.cli.answer_summary import answer_as_json, summarize_answer
    from cluster.cli.json_output import print_json
    from cluster.cli.screen import note

    with _ask(client, text, system, options, raw=raw) as stream:
        if json:
            tell_fallback(stream.wait_accepted(), options)
            print_json(answer_as_json(stream.completion()))
            return
        print_stream(stream, client, lambda accepted: tell_fallback(accepted, options))
        if stream.finish and (verbose or sys.stderr.isatty()):
            note(summarize_answer(stream.finish))


def _ask(client: Client, text: str, system: str | None, options: Options, *, raw: bool) -> Stream:
    if raw:
        return client.stream(text, **options)
    opening = [] if system is None else [("system", system)]
    return client.stream_chat([*opening, ("user", text)], **options)


def tell_fallback(accepted: AcceptedRequest, options: Options) -> None:
    """Say on stderr that another model answers than the one that ``options`` ask for, if one does."""
    from cluster.cli.screen import note

    if accepted.fallback:
        asked = options.get("model") or "the default model"
        note(f"(answered by {accepted.fallback}, the fallback: {asked} cannot be served now)")


def print_stream(stream: Stream, client: Client, tell_accepted: Callable[[AcceptedRequest], None]) -> None:
    """Print an answer as it arrives, and end with a line break. On a terminal, say why it pauses.

    ``tell_accepted`` is called before the first text. The line break is printed after an error too, so that later
    output starts on a new line.
    """
    from cluster.cli.pause_watch import PauseWatch
    from cluster.cli.screen import note, printable, write_answer
    from cluster.cli.word_wrap import WordWrapper

    wrapper = WordWrapper(shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
    writing = threading.Lock()

    def tell(sentence: str) -> None:
        with writing:
            write_answer(wrapper.break_line() if wrapper else "")
            note(f"({sentence})")

    watch = PauseWatch(client, tell) if sys.stderr.isatty() else None
    try:
        with watch or nullcontext():
            tell_accepted(stream.wait_accepted())
            for piece in stream.texts():
                with writing:
                    write_answer(wrapper.add(printable(piece)) if wrapper else piece)
                if watch:
                    watch.hear()
    finally:
        write_answer(wrapper.flush() if wrapper else "")
        if stream.text and not stream.text.endswith("\n"):
            write_answer("\n")
