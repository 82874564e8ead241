"""Summarizes an answer: one line for people, or an object for ``--json``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.core.request import FinishReason

if TYPE_CHECKING:
    from cluster.client import Completion, Finish, Token


def summarize_answer(finish: Finish) -> str:
    """Return one line: token counts, speed, and each stage's compute time."""
    usage, timings = finish.usage, finish.timings
    cached = f", {usage.cached_tokens} of them cached" if usage.cached_tokens else ""
    cut = "; cut off at --max-tokens" if finish.reason is FinishReason.LENGTH else ""
    stages = ", ".join(f"{stage.worker} {stage.compute_ms:.0f} ms" for stage in finish.stages)
    return (
        f"{usage.completion_tokens} tokens, {timings.tokens_per_second:.1f}/s, first after {timings.ttft_ms:.0f} ms;"
        f" prompt {usage.prompt_tokens}{cached}{cut}{'; ' if stages else ''}{stages}"
    )


def answer_as_json(completion: Completion) -> dict[str, Any]:
    """Return the object that ``--json`` prints, with ``logprobs`` and ``trace`` if the request asked for them."""
    facts = {
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "usage": completion.usage,
        "timings": completion.timings,
        "stages": completion.stages,
        "seed": completion.seed,
        "request_id": completion.request_id,
        "model": completion.model,
    }
    if any(token.logprob is not None for token in completion.events):
        facts["logprobs"] = [_logprobs(token) for token in completion.events]
    if any(token.stages for token in completion.events):
        facts["trace"] = [
            {"token": token.token, "guess": token.guess, "stages": token.stages} for token in completion.events
        ]
    return facts


def _logprobs(token: Token) -> dict[str, Any]:
    return {"token": token.token, "text": token.text, "logprob": token.logprob, "top": token.top}
