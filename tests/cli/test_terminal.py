"""The terminal's view: what a person sees, and the effect of Ctrl-C and Ctrl-D."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from cli.terminal import CTRL_C, CTRL_D, Terminal
from client.scripted import Coordinator, answer_of, prompt_event, token_event
from cluster.core import errors
from cluster.v1 import inference_pb2

MACPIPE = [sys.executable, "-W", "error", "-m", "cluster"]
Open = Callable[..., Terminal]


@pytest.fixture
def terminal(environment: dict[str, str], coordinator: Coordinator) -> Iterator[Open]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: str) -> Terminal:
        opened.append(Terminal([*MACPIPE, *arguments], environment | {"MACPIPE_COORDINATOR": coordinator.address}))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.__exit__()


async def endless(request: Any, context: Any) -> AsyncIterator[Any]:
    yield prompt_event(inference_pb2.ChatResponse)
    for index in range(100_000):
        yield token_event(index, "on and ", inference_pb2.ChatResponse)
        await asyncio.sleep(0.01)


def test_a_chat(terminal: Open, coordinator: Coordinator) -> None:
    chat = terminal("chat")
    greeting = chat.wait_for("> ")
    assert "faq on mac-a 0-3, mac-b 4-7" in greeting
    assert "What is a hop?" in greeting
    chat.type("Why?\n")
    chat.wait_for("Macs pass layers on.")
    chat.wait_for("> ")
    chat.type("/stats\n")
    chat.wait_for("5 tokens")
    chat.type("/help\n")
    chat.wait_for("/system TEXT")
    chat.wait_for("> ")
    chat.type(CTRL_D)
    assert chat.end()[0] == 0


def test_a_pasted_text_is_one_message(terminal: Open, coordinator: Coordinator) -> None:
    chat = terminal("chat")
    chat.wait_for("> ")
    chat.type("\x1b[200~def f():\n    pass\x1b[201~\n")
    chat.wait_for("Macs pass layers on.")
    chat.wait_for("> ")
    chat.type("one\\\n")
    chat.wait_for("... ")
    chat.type("two\n")
    chat.wait_for("Macs pass layers on.")
    said = [message.content for message in coordinator.script.seen[-1].messages if message.role == "user"]
    assert said == ["def f():\n    pass", "one\ntwo"]


def test_ctrl_c_ends_the_answer_and_not_the_chat(terminal: Open, coordinator: Coordinator) -> None:
    coordinator.script.answer, whole = endless, coordinator.script.answer
    chat = terminal("chat")
    chat.wait_for("> ")
    chat.type("Why?\n")
    chat.wait_for("on and on and on")
    chat.type(CTRL_C)
    chat.wait_for("(stopped)")
    assert coordinator.script.cancelled.wait(5)
    coordinator.script.answer = whole
    chat.type("Again?\n")
    chat.wait_for("Macs pass layers on.")
    assert [message.role for message in coordinator.script.seen[-1].messages] == ["user", "assistant", "user"]
    chat.wait_for("> ")
    chat.type(CTRL_C)
    chat.wait_for("Ctrl-D or /quit exits")
    chat.type("/quit\n")
    code, shown = chat.end()
    assert code == 0
    assert "Traceback" not in shown


def test_an_error_ends_the_turn_and_not_the_chat(terminal: Open, coordinator: Coordinator) -> None:
    chat = terminal("chat")
    chat.wait_for("> ")
    coordinator.script.refusal = errors.Busy("256 requests wait")
    chat.type("Why?\n")
    chat.wait_for("macpipe: 256 requests wait")
    coordinator.script.refusal = None
    chat.type("Again?\n")
    chat.wait_for("Macs pass layers on.")
    assert [message.content for message in coordinator.script.seen[-1].messages] == ["Again?"]


def test_a_terminal_sees_figures_and_no_control_characters(terminal: Open, coordinator: Coordinator) -> None:
    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        for event in answer_of(request, ("\x1b]0;title\x07", "Hi"), ""):
            yield event

    coordinator.script.answer = answer
    code, shown = terminal("generate", "-p", "x").end()
    assert code == 0
    assert "�]0;title�Hi" in shown
    assert "2 tokens, 400.0/s" in shown


def test_a_load_has_bars(terminal: Open) -> None:
    code, shown = terminal("load", "faq").end()
    assert code == 0
    assert "mac-a layers 0-3" in shown
    assert "100/100 bytes" in shown
    assert "serving faq on 2 workers" in shown


@pytest.mark.parametrize("arguments", [["generate", "-p", "x"], ["generate", "-p", "x", "--json"], ["chat", "-m", "x"]])
def test_ctrl_c_is_130_without_a_word(
    environment: dict[str, str], coordinator: Coordinator, arguments: list[str]
) -> None:
    coordinator.script.answer = endless
    process = subprocess.Popen(
        [*MACPIPE, *arguments, "--coordinator", coordinator.address],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 40
    while not coordinator.script.seen and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=15)
    assert (process.returncode, said) == (130, "")
    assert coordinator.script.cancelled.wait(5)


def test_top_stays_while_the_coordinator_is_gone_and_q_ends_it(terminal: Open, coordinator: Coordinator) -> None:
    top = terminal("top")
    top.wait_for("mac-b")
    top.wait_for("r2")
    coordinator.stop()
    top.wait_for("no answer from the coordinator")
    with Coordinator(int(coordinator.address.rpartition(":")[2])) as again:
        again.script.cluster.model = "returned"
        top.wait_for("returned")
        top.type("q")
        assert top.end()[0] == 0


def test_a_watched_status_is_shown_anew(terminal: Open, coordinator: Coordinator) -> None:
    status = terminal("status", "--watch")
    status.wait_for("unreachable")
    coordinator.script.cluster.model = "another"
    status.wait_for("another")
    coordinator.script.refusal = errors.Forbidden("your key was revoked")
    code, shown = status.end()
    assert (code, "your key was revoked" in shown) == (1, True)
