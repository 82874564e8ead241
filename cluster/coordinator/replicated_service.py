"""What a coordinator serves, as its standbys keep it: models, which of them are loaded, and on which workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pydantic import TypeAdapter, ValidationError

from cluster.coordinator.journal import Fsync
from cluster.coordinator.lost_workers import KnownWorker
from cluster.coordinator.settings import ModelEntry
from cluster.core.errors import InvalidOption
from cluster.core.leadership import Replicate
from cluster.core.limits import MAX_SCHEMA_BYTES
from cluster.core.load_limits import LOAD_WAIT_S

__all__ = ["SERVICE_FILE", "ReplicatedService"]

SERVICE_FILE: Final = "service.json"
"""The name of its file, in the coordinator's state folder."""


@dataclass(frozen=True, slots=True)
class ReplicatedService:
    """The service of one coordinator. Its models' folders must be at the same paths on a standby's Mac.

    ``models`` are all that are configured, the default one first; ``guests`` are served besides. ``loaded`` are the
    names of those that are loaded or being loaded, in the order in which another leader loads them. ``workers`` are
    control addresses, and ``known`` those of them that have answered. The other fields are as in ``ServeSettings``.
    """

    models: tuple[ModelEntry, ...]
    loaded: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()
    journal: Fsync | None = None
    replicate: Replicate | None = None
    max_schema_bytes: int = MAX_SCHEMA_BYTES
    load_wait_s: float = LOAD_WAIT_S
    strict: bool = False
    known: tuple[KnownWorker, ...] = ()
    guests: tuple[ModelEntry, ...] = ()

    @property
    def loaded_guests(self) -> tuple[ModelEntry, ...]:
        """The guests that another leader loads."""
        return tuple(guest for guest in self.guests if guest.name in self.loaded)

    def encode(self) -> bytes:
        """Return it as JSON."""
        return _JSON.dump_json(self)

    @staticmethod
    def decode(content: bytes) -> ReplicatedService:
        """Return what ``encode`` wrote. Raises ``InvalidOption`` if it is of another version or damaged."""
        try:
            return _JSON.validate_json(content)
        except ValidationError as e:
            where = ".".join(map(str, e.errors()[0]["loc"]))
            raise InvalidOption(
                f"the leader's settings cannot be read ({where or 'not JSON'}); install the same version of macpipe on"
                " both Macs"
            ) from e


_JSON: Final = TypeAdapter(ReplicatedService)
