"""A conversation: what was said, and the slash commands. It reads no keyboard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cluster.cli.answer_summary import in_words
from cluster.cli.generate import print_stream
from cluster.cli.screen import note
from cluster.core.request import ChatMessage, FinishReason

if TYPE_CHECKING:
    from cluster.client import Client, Finish, Options, Stream

COMMANDS: Final = """\
/system TEXT  begin anew with this system message; without TEXT, with none
/reset        forget what was said
/stats        figures of the last answer
/quit         end (as Ctrl-D does)"""


class ChatSession:
    """Turns with one model. ``take`` a line at a time; a turn that failed leaves no trace in what it remembers."""

    def __init__(self, client: Client, options: Options, system: str = "") -> None:
        self._client = client
        self._options = options
        self._system = system
        self._said: list[ChatMessage] = []
        self._last: Finish | None = None

    def take(self, line: str) -> bool:
        """Obey a command, or answer. False once the conversation is to end. Raises MacpipeError for a failed turn."""
        line = line.strip()
        if line.startswith("/"):
            return self._obey(*line.partition(" ")[::2])
        if line:
            self._answer(line)
        return True

    def _obey(self, command: str, rest: str) -> bool:
        match command:
            case "/quit" | "/exit":
                return False
            case "/reset":
                self._begin(self._system)
            case "/system":
                self._begin(rest.strip())
            case "/stats":
                note(in_words(self._last) if self._last else "no answer yet")
            case "/help":
                note(COMMANDS)
            case _:
                note(f"there is no command {command}; /help lists them")
        return True

    def _begin(self, system: str) -> None:
        self._system = system
        self._said.clear()
        note(f"new conversation{', with that system message' if system else ''}")

    def _answer(self, text: str) -> None:
        opening = [ChatMessage("system", self._system)] if self._system else []
        asked = ChatMessage("user", text)
        with self._client.stream_chat([*opening, *self._said, asked], **self._options) as stream:
            try:
                print_stream(stream)
            except KeyboardInterrupt:
                note("(stopped)")
            self._remember(asked, stream)

    def _remember(self, asked: ChatMessage, stream: Stream) -> None:
        if stream.text or stream.finish:
            self._said += [asked, ChatMessage("assistant", stream.text)]
        self._last = stream.finish or self._last
        if stream.finish and stream.finish.reason is FinishReason.LENGTH:
            note("(cut off: that was as many tokens as an answer may have)")
