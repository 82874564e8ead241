"""The Python client of a running coordinator: ``Client`` blocks, ``AsyncClient`` awaits. It needs no mlx.

    from cluster.client import Client

    with Client() as client:
        for piece in client.stream_chat([("user", "Who are you?")], max_tokens=64).texts():
            print(piece, end="", flush=True)

Errors are the classes of ``cluster.errors``.
"""

from cluster.chat import Tool, ToolCall, ToolCallDelta
from cluster.client.answers import Choice, Completion, Finish, Model, Prompt, Timings, Token, Tokens, TopLogprob
from cluster.client.async_client import AsyncClient
from cluster.client.async_stream import AsyncLoading, AsyncStream
from cluster.client.client import Client
from cluster.client.options import ChatKeywords, Options
from cluster.client.state import (
    ClusterState,
    LiveRequest,
    ModelPlan,
    Repair,
    RequestState,
    ServingState,
    StageState,
    WorkerState,
)
from cluster.client.stream import Loading, Stream
from cluster.loads import LoadProgress
from cluster.profiles import Forecast, Objective, Spare
from cluster.types import ChatMessage, FinishReason, LayerRange, Route, StageFigures, Usage

__all__ = [
    "AsyncClient",
    "AsyncLoading",
    "AsyncStream",
    "ChatKeywords",
    "ChatMessage",
    "Choice",
    "Client",
    "ClusterState",
    "Completion",
    "Finish",
    "FinishReason",
    "Forecast",
    "LayerRange",
    "LiveRequest",
    "LoadProgress",
    "Loading",
    "Model",
    "ModelPlan",
    "Objective",
    "Options",
    "Prompt",
    "Repair",
    "RequestState",
    "Route",
    "ServingState",
    "Spare",
    "StageFigures",
    "StageState",
    "Stream",
    "Timings",
    "Token",
    "Tokens",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "TopLogprob",
    "Usage",
    "WorkerState",
]
