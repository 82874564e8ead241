"""The proof that stages work: a token that went through every one of them."""

from __future__ import annotations

import asyncio

from cluster.coordinator.answer import Answer
from cluster.coordinator.checkpoint import Checkpoint
from cluster.coordinator.loop import EngineLoop
from cluster.coordinator.watch import Watch
from cluster.errors import Aborted, MacpipeError, WorkerLost
from cluster.limits import CANARY_TIMEOUT_S
from cluster.types import Plan, Request, SamplingParams

POLL_S = 0.01


async def prove(
    loop: EngineLoop,
    plan: Plan,
    checkpoint: Checkpoint,
    troubles: asyncio.Queue[MacpipeError],
    watch: Watch,
    timeout_s: float = CANARY_TIMEOUT_S,
) -> None:
    """Return once a token of this epoch came back: a live request's, or that of a canary sent for the purpose.

    Raises the first trouble instead, which stays in the queue's place no more, and ``WorkerLost`` where none comes or a
    worker of the plan is gone: it may have been so since before anybody listened for troubles of this epoch.
    """
    canary = _canary(plan, checkpoint)
    answer = Answer(loop.post)
    loop.submit(canary, answer)
    try:
        async with asyncio.timeout(timeout_s):
            while loop.proven != plan.epoch:
                if not troubles.empty():
                    raise troubles.get_nowait()
                watch.require((s.worker for s in plan.stages), "before a token came back")
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise WorkerLost(f"no token came through the stages within {timeout_s:.0f} s") from None
    finally:
        loop.end(canary.id, Aborted("the canary is not needed any more"))


def _canary(plan: Plan, checkpoint: Checkpoint) -> Request:
    ids = (checkpoint.tokenizer.encode("Hello") or (0,))[:2]
    return Request(f"canary-{plan.epoch}", ids, SamplingParams(), max_tokens=1)
