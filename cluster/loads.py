"""What is said of a load while it goes on: how far each stage is, and from where it fetches its bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.types import LayerRange


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far one stage's load is; ``state`` says what it is doing in a word."""

    worker: str
    layers: LayerRange
    done_bytes: int
    total_bytes: int
    state: str = field(default="reading")
    hub_bytes: int = 0
    peer_bytes: int = 0
    notices: tuple[str, ...] = ()
    """What a person should know of the bytes that were found: all sentences so far."""


@dataclass(frozen=True, slots=True)
class StorePlace:
    """A Mac that answers StoreService: a name for people, an address, and who answers there (``ROLE.ID``)."""

    name: str
    address: str
    party: str


@dataclass(frozen=True, slots=True)
class FetchOrder:
    """What a stage needs of the model's files, and who has it.

    ``tensors`` are names, in the order in which they are wanted; those in ``deferred`` come from another worker that
    fetches them first. ``repo`` and ``commit`` say where on the hub the model is; empty: nowhere.
    """

    tensors: tuple[str, ...]
    deferred: tuple[str, ...] = ()
    peers: tuple[StorePlace, ...] = ()
    repo: str = ""
    commit: str = ""


@dataclass(frozen=True, slots=True)
class StageProof:
    """What a stage's tensors hash to on its worker: pairs of name and SHA-256 in hex."""

    worker: str
    digests: tuple[tuple[str, str], ...]
