"""Streams a response as numbered events. Each item is added, extended and done before the next one is added."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

from cluster.api.http.answer_assembly import held_size, is_content, reasoning_counters
from cluster.api.http.json_response import compact, encoded_list
from cluster.api.http.logprobs import entry
from cluster.api.http.reasoning_counter import ReasoningCounter
from cluster.api.http.responses_object import ResponseEncoder, output_text
from cluster.api.http.sse import event
from cluster.api.request_service import RunningRequest
from cluster.core.errors import InvalidRequest, MacpipeError
from cluster.core.limits import MIB
from cluster.core.request import FinishEvent, TokenEvent
from cluster.transport.byte_budget import Charge

Pieces = Iterator[dict[str, Any]]
MAX_REPEATED_BYTES: Final = 10 * MIB
"""Charged for the log-probabilities of one stream. Its last event encodes them four times, in one step of the loop."""


@dataclass(slots=True)
class OutputItem:
    """The open item. ``kind`` is ``message``, ``reasoning``, or ``call`` with its number."""

    kind: str
    id: str
    index: int
    call_id: str = ""
    name: str = ""
    text: str = ""
    logprobs: list[str] = field(default_factory=list)
    """JSON texts: one object per token."""

    @property
    def place(self) -> dict[str, Any]:
        """The fields that assign an event to this item."""
        return {"item_id": self.id, "output_index": self.index}


@dataclass(slots=True)
class ResponseStreamEncoder:
    """One streamed response."""

    encoder: ResponseEncoder
    charge: Charge
    """What the request holds until it ends: the log-probabilities are kept for the last events, which repeat them."""
    _logprob_bytes: int = 0
    _number: int = 0
    _running: RunningRequest = field(init=False)
    _reasoning_counter: ReasoningCounter = field(init=False)
    _open: OutputItem | None = None
    _done: list[dict[str, Any]] = field(default_factory=list)

    def attach(self, running: RunningRequest, model: str) -> None:
        self._running = running
        self.encoder = replace(self.encoder, model=model)
        (self._reasoning_counter,) = reasoning_counters(running)

    def begin(self) -> Iterator[bytes]:
        yield self._event({"type": "response.created", "response": self.encoder.begin_object()})
        yield self._event({"type": "response.in_progress", "response": self.encoder.begin_object()})

    def encode(self, e: TokenEvent | FinishEvent) -> Iterator[bytes]:
        self._reasoning_counter.add(e)
        for piece in self._extend(e):
            yield self._event(piece)
        if isinstance(e, FinishEvent):
            for piece in self._finish(e):
                yield self._event(piece)

    def end(self) -> Iterator[bytes]:
        yield from ()  # the finish event was the end

    def idle(self) -> bytes:
        """Return ``response.in_progress`` again: the idle timeout of Codex counts events, not comments."""
        return self._event({"type": "response.in_progress", "response": self.encoder.begin_object()})

    def fail(self, error: MacpipeError) -> bytes:
        return self._event({"type": "response.failed", "response": self.encoder.fail_object(self._done, error)})

    def _event(self, data: dict[str, Any]) -> bytes:
        numbered = {"type": data["type"], "sequence_number": self._number, **data}
        self._number += 1
        return event(numbered, data["type"])

    def _finish(self, finish: FinishEvent) -> Pieces:
        if not self._open and not self._done:
            yield from self._open_item("message")  # an empty answer has one empty message
        yield from self._close_item(self.encoder.item_status(finish))
        response = self.encoder.finish_object(self._done, finish, self._reasoning_counter.tokens)
        yield {"type": f"response.{response['status']}", "response": response}

    def _extend(self, e: TokenEvent | FinishEvent) -> Pieces:
        """Yield the events that add one token's output to the items."""
        if e.reasoning:
            yield from self._open_item("reasoning")
            yield from self._add_part(e.reasoning, "response.reasoning_text.delta", {"content_index": 0})
        if e.text:
            logprobs = []
            if self.encoder.form.logprobs and isinstance(e, TokenEvent) and is_content(e):
                logprobs = [compact(entry(e, self._running))]
                self._charge_logprobs(sum(map(held_size, logprobs)))
            yield from self._open_item("message")
            assert self._open
            self._open.logprobs += logprobs
            yield from self._add_part(
                e.text, "response.output_text.delta", {"content_index": 0, "logprobs": encoded_list(logprobs)}
            )
        for call in e.calls:
            yield from self._open_item(f"call {call.index}", call.id, call.name)
            if call.arguments:
                yield from self._add_part(call.arguments, "response.function_call_arguments.delta", {})

    def _charge_logprobs(self, size: int) -> None:
        """Charge kept log-probabilities. Raises ``InvalidRequest`` if there are too many, ``Busy`` as ``Charge``."""
        self._logprob_bytes += size
        if self._logprob_bytes > MAX_REPEATED_BYTES:
            raise InvalidRequest(
                f"the log-probabilities of this stream need more than {MAX_REPEATED_BYTES // MIB} MiB, and its last "
                "events repeat them; ask for fewer tokens or alternatives",
                field="top_logprobs",
            )
        self.charge.add(size)

    def _add_part(self, text: str, kind: str, more: dict[str, Any]) -> Pieces:
        assert self._open
        self._open.text += text
        yield {"type": kind, **self._open.place, **more, "delta": text}

    def _open_item(self, kind: str, call_id: str = "", name: str = "") -> Pieces:
        """Yield the events that open this item and close the previous one; nothing if it is already open."""
        if self._open and self._open.kind == kind:
            return
        yield from self._close_item()
        prefix = {"message": "msg_", "reasoning": "rs_"}.get(kind, "fc_")
        item = self._open = OutputItem(kind, self._item_id(prefix), len(self._done), call_id, name)
        added = {"output_index": item.index, "item": self._object("in_progress")}
        yield {"type": "response.output_item.added", **added}
        if part := self._part(""):
            yield {"type": "response.content_part.added", **item.place, "content_index": 0, "part": part}

    def _item_id(self, prefix: str) -> str:
        """Return the id of the next item, which follows from the response's: a new leader must find the same one."""
        key = f"{self.encoder.id}/{len(self._done)}"
        return f"{prefix}{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}"

    def _close_item(self, status: str = "completed") -> Pieces:
        """Yield the events that close the open item with ``status``; nothing if none is open."""
        item = self._open
        if not item:
            return
        yield from self._text_done(item)
        if part := self._part(item.text):
            yield {"type": "response.content_part.done", **item.place, "content_index": 0, "part": part}
        self._done.append(self._object(status))
        self._open = None
        yield {"type": "response.output_item.done", "output_index": item.index, "item": self._done[-1]}

    def _text_done(self, item: OutputItem) -> Pieces:
        if item.kind == "message":
            done = {"content_index": 0, "text": item.text, "logprobs": encoded_list(item.logprobs)}
            yield {"type": "response.output_text.done", **item.place, **done}
        elif item.kind == "reasoning":
            yield {"type": "response.reasoning_text.done", **item.place, "content_index": 0, "text": item.text}
        else:
            done = {"name": item.name, "arguments": item.text}
            yield {"type": "response.function_call_arguments.done", **item.place, **done}

    def _part(self, text: str) -> dict[str, Any] | None:
        assert self._open
        if self._open.kind == "message":
            return output_text(text, encoded_list(self._open.logprobs))
        return {"type": "reasoning_text", "text": text} if self._open.kind == "reasoning" else None

    def _object(self, status: str) -> dict[str, Any]:
        item = self._open
        assert item
        if item.kind == "message":
            return self.encoder.message(item.id, item.text, encoded_list(item.logprobs), status)
        if item.kind == "reasoning":
            return self.encoder.reasoning(item.id, item.text, status)
        return self.encoder.call(item.id, item.call_id, item.name, item.text, status)
