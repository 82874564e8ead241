"""``macpipe chat``: a conversation on the terminal, or one turn per line of standard input."""

from __future__ import annotations

import io
import select
import sys
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.generate import require_utf8
from cluster.cli.options import Cluster, Coordinator, Json, answer_options, takes_options
from cluster.core.cluster_state import holders_in_words
from cluster.core.errors import InvalidOption, NotServing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster.cli.chat_session import ChatSession
    from cluster.client import Client, ClusterState, Options

PROMPT: Final = "> "
CONTINUATION: Final = "... "
PASTE_S: Final = 0.03
"""Lines that arrive within this time of each other are one paste."""
BUNDLED: Final = "faq"
SUGGESTIONS: Final = ("Who are you?", "What can you do?", "What is a hop?")


@takes_options(answer_options)
def chat(
    message: Annotated[
        str | None,
        typer.Option("--message", "-m", metavar="TEXT", help="Send this message, print the answer, and exit."),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Start with this system message.")] = None,
    coordinator: Coordinator = None,
    cluster: Cluster = None,
    json: Json = False,
    options: Any = None,
) -> None:
    """Chat with the model.

    The conversation is kept; /help lists the commands. From a pipe, each line is one turn.
    """
    with errors_in_json(json):
        if json and message is None:
            raise InvalidOption("--json needs --message", field="json")
        for text, source, field in ((message, "-m / --message", "message"), (system, "--system", "system")):
            require_utf8(text or "", source, field)
        from cluster.client import Client

        with Client(coordinator, cluster=cluster) as client:
            if message is None:
                converse(client, options, system or "")
            else:
                _send_once(client, message, system, options, json=json)


def converse(client: Client, options: Options, system: str = "") -> None:
    """Chat until Ctrl-D, /quit or the end of standard input.

    Raise NotServing if no model is loaded, unless there are several: then a message loads one.
    """
    from cluster.cli.chat_session import ChatSession

    state = client.cluster()
    if state.state != "serving" and not state.deployments:
        raise NotServing(state.problem or f"the coordinator at {client.address} serves no model; see `macpipe status`")
    session = ChatSession(client, options, system)
    if sys.stdin.isatty():
        _greet(state, options.get("model") or "")
        _chat_on_terminal(session)
    else:
        _chat_from_pipe(session)


def _chat_from_pipe(session: ChatSession) -> None:
    from cluster.cli.screen import note

    line = None
    for line in read_piped_lines():
        if not session.handle_line(line):
            return
    if line is None:
        note("standard input has no line, so nothing was sent; run this on a terminal, or pipe in one message a line")


def _greet(state: ClusterState, model: str) -> None:
    from cluster.cli.screen import note

    note(f"{describe_partner(state, model)}. /help lists the commands, Ctrl-D exits.")
    if state.model == BUNDLED:
        note(f"Try: {'  '.join(SUGGESTIONS)}")


def describe_partner(state: ClusterState, model: str) -> str:
    """Describe the model that ``model`` names, "" the default one: where it is, or that the first message loads it."""
    named = [one for one in state.deployments if model in (one.name, one.model, *one.aliases)]
    one = next(iter([*named, *([] if model else state.deployments[:1])]), None)
    name, stages = (one.name, one.stages) if one else (model or state.model, () if state.deployments else state.stages)
    if held := holders_in_words(stages):
        return f"{name} on {held}"
    return f"{name}, which the first message loads" if one else name


def _chat_on_terminal(session: ChatSession) -> None:
    """Read turns from the terminal. Ctrl-C ends an answer or clears the line; an error ends only its turn."""
    from cluster.cli.screen import note
    from cluster.core.errors import MacpipeError

    is_more = _is_more_pasted if _edit_lines() else lambda: False
    while True:
        try:
            if not session.handle_line(read_message(input, is_more)):
                return
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /quit exits)")
        except UnicodeError:
            note("macpipe: the input is not UTF-8 text")
        except MacpipeError as error:
            note(f"macpipe: {error.sentence}")


def read_message(read: Callable[[str], str], is_more: Callable[[], bool]) -> str:
    """Read a message: a line, the lines of a paste, or lines that end with a backslash but for the last.

    ``read`` returns a line for a prompt, and ``is_more`` whether a paste goes on after it. Raises UnicodeEncodeError
    where the line has bytes that are no UTF-8.
    """
    lines = [read(PROMPT)]
    while (continued := lines[-1].endswith("\\")) or is_more():
        if continued:
            lines[-1] = lines[-1][:-1]
        lines.append(read(CONTINUATION))
    message = "\n".join(lines)
    message.encode()
    return message


def _edit_lines() -> bool:
    """Enable line editing and history for ``input``, if Python was built with readline.

    Return whether a paste arrives line by line: libedit, which macOS has, does not know bracketed paste.
    """
    try:
        import readline
    except ImportError:
        return True
    if "libedit" in (readline.__doc__ or ""):
        return True
    readline.parse_and_bind("set enable-bracketed-paste on")
    return False


def _is_more_pasted() -> bool:
    """Return whether more input is there already, sooner than anybody types."""
    return bool(select.select([sys.stdin], [], [], PASTE_S)[0])


def read_piped_lines() -> Iterator[str]:
    """Yield the lines of standard input. Raise InvalidOption at the first one that is not UTF-8, in every locale."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # else a whole block of lines would fail
    for number, line in enumerate(sys.stdin, start=1):
        yield require_utf8(line.rstrip("\n"), f"line {number} of standard input", "message")


def _send_once(client: Client, message: str, system: str | None, options: Options, *, json: bool) -> None:
    from cluster.cli.answer_summary import answer_as_json
    from cluster.cli.generate import print_stream, tell_fallback
    from cluster.cli.json_output import print_json

    opening = [] if system is None else [("system", system)]
    with client.stream_chat([*opening, ("user", message)], **options) as stream:
        if json:
            tell_fallback(stream.wait_accepted(), options)
            print_json(answer_as_json(stream.completion()))
        else:
            print_stream(stream, client, lambda accepted: tell_fallback(accepted, options))
