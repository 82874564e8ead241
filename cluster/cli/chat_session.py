"""A chat's history and its slash commands. It does not read the keyboard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cluster.cli.answer_summary import summarize_answer
from cluster.cli.generate import print_stream, tell_fallback
from cluster.cli.screen import note
from cluster.core.request import ChatMessage, FinishReason

if TYPE_CHECKING:
    from cluster.client import AcceptedRequest, Client, Finish, Options, Stream

COMMANDS: Final = """\
/system TEXT  start over with this system message; without TEXT, with none
/reset        clear the conversation
/stats        statistics of the last answer
/quit         exit (as Ctrl-D does)
A pasted text is one message. A line that ends with \\ goes on in the next."""


class ChatSession:
    """A conversation with one model. ``handle_line`` handles one line. A failed turn is not kept in the history."""

    def __init__(self, client: Client, options: Options, system: str = "") -> None:
        self._client = client
        self._options = options
        self._system = system
        self._history: list[ChatMessage] = []
        self._last: Finish | None = None
        self._fallback = ""

    def handle_line(self, line: str) -> bool:
        """Run a command or send a message. Return False to end the chat. Raise MacpipeError if the turn fails."""
        line = line.strip()
        if line.startswith("/"):
            command, _, rest = line.partition(" ")
            return self._run_command(command, rest)
        if line:
            self._answer(line)
        return True

    def _run_command(self, command: str, rest: str) -> bool:
        match command:
            case "/quit" | "/exit":
                return False
            case "/reset":
                self._start_over(self._system)
            case "/system":
                self._start_over(rest.strip())
            case "/stats":
                note(summarize_answer(self._last) if self._last else "no answer yet")
            case "/help":
                note(COMMANDS)
            case _:
                note(f"no command {command}; /help lists the commands")
        return True

    def _start_over(self, system: str) -> None:
        self._system = system
        self._history.clear()
        note(f"new conversation{', with that system message' if system else ''}")

    def _answer(self, text: str) -> None:
        opening = [ChatMessage("system", self._system)] if self._system else []
        question = ChatMessage("user", text)
        with self._client.stream_chat([*opening, *self._history, question], **self._options) as stream:
            try:
                print_stream(stream, self._client, self._tell_new_fallback)
            except KeyboardInterrupt:
                note("(stopped)")
            self._remember(question, stream)

    def _tell_new_fallback(self, accepted: AcceptedRequest) -> None:
        if accepted.fallback != self._fallback:
            tell_fallback(accepted, self._options)
        self._fallback = accepted.fallback

    def _remember(self, question: ChatMessage, stream: Stream) -> None:
        if stream.text or stream.finish:
            self._history += [question, ChatMessage("assistant", stream.text)]
        self._last = stream.finish or self._last
        if stream.finish and stream.finish.reason is FinishReason.LENGTH:
            note("(cut off: the answer reached its token limit)")
