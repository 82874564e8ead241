"""The bench of agents' sessions: what its prompts share, what it reads of an answer, and one short run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.model.tokenizer import Tokenizer, load_tokenizer
from integration.benches import run_bench

BENCH = Path(__file__).parents[2] / "ops" / "bench"
CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]}
MESSAGES = {"system": [{"type": "text", "text": "Be brief."}], "messages": [{"role": "user", "content": "Hello"}]}
RESPONSES = {
    "store": False,
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
    ],
}
BODIES = {"/v1/chat/completions": CHAT, "/v1/messages": MESSAGES, "/v1/responses": RESPONSES}


@pytest.fixture(scope="module", autouse=True)
def bench_path() -> Iterator[None]:
    """Let tests import the bench as its own scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield


@pytest.fixture(scope="module")
def tokenizer(bench_path: None, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    from agent_models import make_agent_model

    return load_tokenizer(make_agent_model(tmp_path_factory.mktemp("agents") / "model", "llama", 16384))


def render(tokenizer: Tokenizer, ask: Any, salt: str) -> tuple[int, ...]:
    conversation = ask.prepared(salt, 8).conversation()
    return tokenizer.chat(conversation.messages, conversation.options)


def test_the_longest_shared_beginning_is_reusable_but_for_the_last_token() -> None:
    from agent_sessions import Prompts

    prompts = Prompts()
    assert prompts.reusable((1, 2, 3)) == 0
    prompts.add((1, 2, 3, 70000))
    prompts.add((1, 2, 9))
    assert prompts.reusable((1, 2, 3, 70000, 5)) == 4
    assert prompts.reusable((1, 2, 9, 9)) == 3
    assert prompts.reusable((1, 2, 3, 70000)) == 3
    assert prompts.reusable((2, 1)) == 0


def test_a_new_task_drops_the_thinking_and_other_turns_extend_their_prompt(tokenizer: Tokenizer) -> None:
    from agent_sessions import CALLS, Prompts, Script

    prompts, before = Prompts(), 0
    for number, ask in enumerate(Script(tokenizer, 6000).tool_session()):
        ids = render(tokenizer, ask, "Run.\n")
        if number:
            assert (prompts.reusable(ids) == before) is (number in CALLS), number
        prompts.add(ids)
        before = len(ids)
    assert before == pytest.approx(6000, rel=0.25)


def test_a_chat_has_the_answers_of_the_model_token_for_token(tokenizer: Tokenizer) -> None:
    from agent_sessions import Prompts, Script

    prompts, before = Prompts(), 0
    answer = tokenizer.encode(" stage worker layer", add_special_tokens=False)
    for ask in Script(tokenizer, 4000).chat_session(lambda: "stage worker layer"):
        ids = render(tokenizer, ask, "Run.\n")
        assert prompts.reusable(ids) == before
        prompts.add((*ids, *answer))
        before = len(ids) + len(answer)


@pytest.mark.parametrize("path", BODIES)
def test_another_salt_leaves_nothing_to_share(tokenizer: Tokenizer, path: str) -> None:
    from agent_sessions import Ask, Prompts

    prompts = Prompts()
    prompts.add(render(tokenizer, Ask(path, BODIES[path]), "One.\n"))
    ids = render(tokenizer, Ask(path, BODIES[path]), "Two.\n")
    assert prompts.reusable(ids) < 4 < len(ids)
    assert "One" not in json.dumps(BODIES[path]), "the recording itself was changed"


def test_sub_agents_share_their_beginning(tokenizer: Tokenizer) -> None:
    from agent_sessions import Prompts, Script

    prompts = Prompts()
    begun, went_on = Script(tokenizer, 6000).agents(3, 5000, 2)
    first, *others = (render(tokenizer, ask, "Run.\n") for ask in begun)
    assert len(first) == pytest.approx(5000, rel=0.25)
    prompts.add(first)
    assert all(len(ids) - 40 < prompts.reusable(ids) < len(ids) - 1 for ids in others)
    for ids in others:
        prompts.add(ids)
    for before, ask in zip((first, *others), went_on, strict=True):
        assert prompts.reusable(render(tokenizer, ask, "Run.\n")) == len(before)


USAGES = [
    {"usage": {"prompt_tokens": 30, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 20}}},
    {
        "type": "response.completed",
        "response": {"usage": {"input_tokens": 30, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 20}}},
    },
    {
        "type": "message_start",
        "message": {"usage": {"input_tokens": 10, "cache_read_input_tokens": 20, "output_tokens": 4}},
    },
]


@pytest.mark.parametrize("event", USAGES)
def test_the_counts_of_each_route_are_read(event: dict[str, Any]) -> None:
    from agent_client import Usage

    usage = Usage()
    usage.read({"type": "ping"})
    usage.read(event)
    assert (usage.prompt, usage.cached, usage.answer) == (30, 20, 4)


@pytest.mark.parametrize("text", ["no JSON", '{"path": "/v1/messages"}', '{"path": "/v1/models", "body": {}}', "[1]"])
def test_a_file_that_is_no_recording_is_named(tmp_path: Path, text: str) -> None:
    from agent_sessions import recorded

    file = tmp_path / "session.jsonl"
    file.write_text(text)
    with pytest.raises(SystemExit, match=r"session\.jsonl"):
        recorded(file)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_bench_runs_with_a_short_session(tmp_path: Path) -> None:
    recording = tmp_path / "routes.jsonl"
    recording.write_text("".join(json.dumps({"path": p, "body": b}) + "\n" for p, b in BODIES.items()))
    sizes = ["--tokens", "4000", "--at", "4000", "--agents", "2", "--shared", "3600"]
    facts = run_bench("agents", "--json", "--models", "llama", "--sessions", str(recording), *sizes)
    assert facts["llama_refused"] == 0
    assert facts["llama_cached_over_reusable"] >= 0.99
    assert facts["medians"]["llama_mlx_warm"] > 0
    turns = facts["turns"]["llama"]
    assert {turn["session"] for turn in turns} == {"routes", "tools", "short", "chat", "agents", "restarted"}
    assert all(turn["ttft_ms"] > 0 for turn in turns)
    assert all(turn["prompt"] == turn["mlx_prompt"] for turn in turns if turn["session"] != "restarted")
