"""What prompts share is read once, over two workers, for caches that can be trimmed and for those that cannot."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from checkpoints import make
from cluster.client import AsyncClient, ChatMessage, Client
from cluster.client.results import Completion
from cluster.model.tokenizer import load_tokenizer
from effort import chosen
from integration.daemons import serve_model
from integration.reference import greedy

pytestmark = [pytest.mark.xdist_group("session-cluster"), pytest.mark.timeout(180)]

KINDS = ("llama", "qwen3_next", "gpt_oss", "gemma3_text", "mamba2")
"""Keys and values; recurrent states beside them; sliding windows; nothing but states."""
LONG = [(i * 37 + 11) % 250 for i in range(900)]
FIRST = (
    ChatMessage("system", "You are a coding agent. " * 8),
    ChatMessage("user", "Please mend the test that fails. " * 6),
)
AGAIN = (ChatMessage("assistant", "Not what was said, since it is rendered anew."), ChatMessage("user", "And now?"))


async def _ask_at_once(address: str, prompts: list[list[int]]) -> list[Completion]:
    async with AsyncClient(address, timeout_s=100) as client:
        return await asyncio.gather(*(client.generate(p, max_tokens=6, ignore_eos=True) for p in prompts))


@pytest.mark.parametrize("arch", chosen(KINDS, "llama", "qwen3_next", "gpt_oss"))
def test_what_prompts_share_is_read_once(client: Client, address: str, models: Path, arch: str) -> None:
    folder = make(arch, models / arch)
    serve_model(client, folder, 2)
    prompts = [[*LONG, *LONG[i : i + 20]] for i in (10, 20, 30, 40)]
    answers = asyncio.run(_ask_at_once(address, prompts))
    assert sum(a.usage.prompt_tokens - a.usage.cached_tokens for a in answers) == 920 + 3 * 20
    assert answers[0].tokens == greedy(folder, prompts[0], 6)
    assert answers[3].tokens == greedy(folder, prompts[3], 6)

    tokenizer = load_tokenizer(folder)
    first = client.chat(FIRST, max_tokens=6, ignore_eos=True)
    again = client.chat((*FIRST, *AGAIN), max_tokens=6, ignore_eos=True)
    other = client.chat((FIRST[0], ChatMessage("user", "What is this?")), max_tokens=6, ignore_eos=True)
    assert first.usage.cached_tokens == 0
    assert first.usage.prompt_tokens - 1 <= again.usage.cached_tokens <= first.usage.prompt_tokens
    system = len(tokenizer.encode("<|user|>" + FIRST[0].content + "<|end|><|user|>"))
    assert other.usage.cached_tokens == system
    for messages, answer in ((FIRST, first), ((*FIRST, *AGAIN), again)):
        assert answer.tokens == greedy(folder, tokenizer.chat(messages), 6)
