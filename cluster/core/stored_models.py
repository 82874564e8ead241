"""The models on the disks of a cluster's Macs, and what became of those that were to be removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cluster.core.plan import LayerRange

STORE_S: Final = 30.0
"""Deadline of a call that lists a Mac's models, or removes one: their records are read from a disk that may be busy."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model in the store.

    ``names`` are the Hugging Face ids under which it was fetched; there is none if another Mac sent it. A copy that
    ``--quantize`` made has the name of its model, and ``weight_bits``. ``disk_bytes`` is the space that it takes on
    disk, ``model_bytes`` the size of all its tensors. ``layers`` are those that are complete. ``last_used`` is in
    seconds since the epoch.
    """

    fingerprint: str
    names: tuple[str, ...]
    folder: str
    disk_bytes: int
    model_bytes: int
    layers: tuple[LayerRange, ...]
    last_used: float
    in_use: bool
    weight_bits: int = 0

    @property
    def label(self) -> str:
        """The name to show: a Hugging Face id or a folder's name, else the start of the fingerprint."""
        name = self.names[0] if self.names else self.fingerprint[:12]
        return f"{name}, {self.weight_bits} bits" if self.weight_bits else name


@dataclass(frozen=True, slots=True)
class MacStore:
    """The store of one Mac, by its worker's name, or by several names if workers share it.

    ``id`` is the same for all processes that use the store; empty if it does not exist yet. ``omitted`` counts further
    models. ``problem`` says why the store is not known; empty if it is.
    """

    mac: str
    folder: str = ""
    id: str = ""
    models: tuple[StoredModel, ...] = ()
    omitted: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class StoreRemoval:
    """What became of a model on one Mac. ``problem`` says why the Mac keeps it; empty if it is removed.

    ``model`` is the name to show; empty if the Mac could not be asked for its models.
    """

    mac: str
    model: str = ""
    freed_bytes: int = 0
    problem: str = ""
