"""The proof that stages work: a token that went through every one of them."""

from __future__ import annotations

import asyncio

from cluster.coordinator.answer_queue import AnswerQueue
from cluster.coordinator.engine_loop import EngineLoop
from cluster.coordinator.heartbeat import HeartbeatMonitor
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import Aborted, MacpipeError, WorkerLost
from cluster.core.limits import CANARY_TIMEOUT_S
from cluster.core.plan import Plan
from cluster.core.request import Request, SamplingParams

POLL_S = 0.01


async def run_canary(
    loop: EngineLoop,
    plan: Plan,
    checkpoint: ModelInfo,
    troubles: asyncio.Queue[MacpipeError],
    watch: HeartbeatMonitor,
    timeout_s: float = CANARY_TIMEOUT_S,
) -> None:
    """Return once a token of this epoch came back: a live request's, or that of a canary sent for the purpose.

    Raises the first trouble instead, which stays in the queue's place no more, and ``WorkerLost`` where none comes or a
    worker of the plan is gone: it may have been so since before anybody listened for troubles of this epoch.
    """
    canary = _canary(plan, checkpoint)
    answer = AnswerQueue(loop.post)
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


def _canary(plan: Plan, checkpoint: ModelInfo) -> Request:
    ids = (checkpoint.tokenizer.encode("Hello") or (0,))[:2]
    return Request(f"canary-{plan.epoch}", ids, SamplingParams(), max_tokens=1)
