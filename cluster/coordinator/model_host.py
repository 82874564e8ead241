"""What the coordinator is for those that load models and ask about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cluster.coordinator.deployment_table import DeploymentTable
from cluster.coordinator.load_tasks import LoadTasks
from cluster.coordinator.model_catalog import DEFAULT
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.reporter import LoadReporter
from cluster.coordinator.settings import LoadOrder
from cluster.core.cluster_state import ServingState


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A model that stays loaded. ``fallback`` is its name if it answers in place of the one that was asked for."""

    model_info: ModelInfo
    fallback: str = ""


class ModelHost(Protocol):
    """The coordinator, as far as models that come and go are concerned."""

    @property
    def state(self) -> ServingState:
        """What the cluster does."""

    @property
    def loads(self) -> LoadTasks:
        """The loads that run, which ``unload`` ends."""

    @property
    def deployments(self) -> DeploymentTable:
        """The models that may be served, and their deployments."""

    def served_model(self, model: str, adapter: str = "") -> ModelInfo:
        """Return a loaded model. Raises ``NotServing`` or ``ModelNotFound``."""

    async def load(self, order: LoadOrder, follower: LoadReporter | None = None, *, name: str = DEFAULT) -> None:
        """Load a model under a name. Raises ``MacpipeError``."""
