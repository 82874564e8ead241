"""The Python client of a running coordinator: blocking ``Client``, asyncio ``AsyncClient``. It does not need mlx.

    from cluster.client import Client

    with Client() as client:
        for piece in client.stream_chat([("user", "Who are you?")], max_tokens=64).texts():
            print(piece, end="", flush=True)

Errors are subclasses of MacpipeError, in ``cluster.core.errors``.
"""

import cluster.client.grpc_log  # noqa: F401  # first: grpc reads its setting when it is imported
from cluster.client.async_client import AsyncClient
from cluster.client.async_streams import AsyncLoading, AsyncStream
from cluster.client.async_training import AsyncTraining
from cluster.client.client import Client
from cluster.client.options import ChatKeywords, GenerateKeywords, ModelToPlan, Options
from cluster.client.results import (
    AcceptedRequest,
    Choice,
    Completion,
    Embeddings,
    Finish,
    Model,
    PromptToken,
    Timings,
    Token,
    Tokens,
)
from cluster.client.streams import Loading, Stream
from cluster.client.training import Training
from cluster.core.cluster_state import (
    AdapterState,
    ClusterEvent,
    ClusterState,
    EventKind,
    GuessCounts,
    LiveRequest,
    ModelPlan,
    Repair,
    RequestState,
    ServingState,
    StageState,
    TrainingProgress,
)
from cluster.core.joint_plan import JointPlan, MacMemory, ModelMemory, PlannedModel, UnplacedModel
from cluster.core.plan import Forecast, LayerRange, LoadProgress, Objective, Route, Spare, Speculation
from cluster.core.request import (
    ChatMessage,
    FinishReason,
    StageFigures,
    Tool,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from cluster.core.training_events import AdapterFile, TrainingNotice, TrainingReport
from cluster.core.worker import WorkerState

__all__ = [
    "AcceptedRequest",
    "AdapterFile",
    "AdapterState",
    "AsyncClient",
    "AsyncLoading",
    "AsyncStream",
    "AsyncTraining",
    "ChatKeywords",
    "ChatMessage",
    "Choice",
    "Client",
    "ClusterEvent",
    "ClusterState",
    "Completion",
    "Embeddings",
    "EventKind",
    "Finish",
    "FinishReason",
    "Forecast",
    "GenerateKeywords",
    "GuessCounts",
    "JointPlan",
    "LayerRange",
    "LiveRequest",
    "LoadProgress",
    "Loading",
    "MacMemory",
    "Model",
    "ModelMemory",
    "ModelPlan",
    "ModelToPlan",
    "Objective",
    "Options",
    "PlannedModel",
    "PromptToken",
    "Repair",
    "RequestState",
    "Route",
    "ServingState",
    "Spare",
    "Speculation",
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
    "Training",
    "TrainingNotice",
    "TrainingProgress",
    "TrainingReport",
    "UnplacedModel",
    "Usage",
    "WorkerState",
]
