"""Plans of several models at once, as ``macpipe plan`` shows them."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.cluster_state import ModelPlan


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model under the name by which clients ask for it, with its plan beside the others.

    ``replica`` numbers the copies of a model from 2, on Macs that hold no other layers.
    """

    name: str
    plan: ModelPlan
    replica: int = 1


@dataclass(frozen=True, slots=True)
class UnplacedModel:
    """A model that does not fit beside the others, why, and which of them have to be unloaded before it fits."""

    name: str
    why: str
    unload: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """The bytes of a Mac that a model uses: its weights there, and what its caches may take."""

    name: str
    weight_bytes: int
    cache_bytes: int


@dataclass(frozen=True, slots=True)
class MacMemory:
    """The bytes that a Mac offers to models, and what each of them uses."""

    worker: str
    usable_bytes: int
    models: tuple[ModelMemory, ...]

    @property
    def free_bytes(self) -> int:
        """The bytes that no model may use."""
        return self.usable_bytes - sum(model.weight_bytes + model.cache_bytes for model in self.models)


@dataclass(frozen=True, slots=True)
class JointPlan:
    """The plans of several models on the same Macs, the most important model first.

    ``reasons`` says in a sentence each why the models are where they are.
    """

    models: tuple[PlannedModel, ...]
    left_out: tuple[UnplacedModel, ...]
    memory: tuple[MacMemory, ...]
    reasons: tuple[str, ...]
