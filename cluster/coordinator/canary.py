"""Prove that the stages work, by a token that passes all of them."""

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
    model_info: ModelInfo,
    failures: asyncio.Queue[MacpipeError],
    heartbeat: HeartbeatMonitor,
    timeout_s: float = CANARY_TIMEOUT_S,
) -> None:
    """Wait for a token of this epoch, from a live request or from the canary request that this function sends.

    Raises the first error in ``failures``, and removes it there. Raises ``WorkerLost`` if no token comes within
    ``timeout_s``, or if a worker of the plan is gone: it may have gone before this epoch reported to ``failures``.
    """
    canary = _create_request(plan, model_info)
    answer = AnswerQueue(loop.post)
    loop.submit(canary, answer)
    try:
        async with asyncio.timeout(timeout_s):
            while loop.proven != plan.epoch:
                if not failures.empty():
                    raise failures.get_nowait()
                heartbeat.require((s.worker for s in plan.stages), "before a token came back")
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise WorkerLost(
            f"no token passed the stages within {timeout_s:.0f} s; `macpipe status` shows which Macs answer"
        ) from None
    finally:
        loop.end(canary.id, Aborted("the canary is no longer needed"))


def _create_request(plan: Plan, model_info: ModelInfo) -> Request:
    ids = (model_info.tokenizer.encode("Hello") or (0,))[:2]
    return Request(f"canary-{plan.epoch}", ids, SamplingParams(), max_tokens=1, is_canary=True)
