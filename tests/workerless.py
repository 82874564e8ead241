"""What stand-ins for the coordinator have in common: neither a plan, nor workers, nor a journal."""

from __future__ import annotations

from typing import Self

from cluster.coordinator.lead_change import LeadChange
from cluster.coordinator.model_catalog import ModelCatalog, public_id
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.request_timings import ClusterTotals
from cluster.core.cluster_state import ServingState


class WorkerlessCoordinator:
    """The part of a coordinator that health, metrics, status and names read; also its deployments."""

    activity = ""
    catalog = ModelCatalog(())
    journal = None
    totals = ClusterTotals()

    state = ServingState.IDLE

    @property
    def default_state(self) -> ServingState:
        return self.state

    @property
    def deployments(self) -> Self:
        return self

    is_single = True
    lead_change = LeadChange()

    def leadership(self) -> None:
        """Return None: no term is known."""

    def values(self) -> tuple[()]:
        return ()

    def given_name(self, model_info: ModelInfo) -> str:
        return model_info.shape.model.name

    def loaded_models(self) -> list[ModelInfo]:
        return []

    def unloaded_names(self) -> list[str]:
        return []

    def names_of(self, model_info: ModelInfo) -> tuple[str, ...]:
        model = model_info.shape.model
        return (public_id(model.name, model.path),)

    async def plan_and_view(self) -> tuple[None, None]:
        return None, None

    def known_workers(self) -> tuple[()]:
        return ()
