"""macpipe: one large language model on several Macs. ops/docs/ARCHITECTURE.md is the map of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the clients when they are first asked for: other parts of the package need no grpc."""
    if name in {"AsyncClient", "Client"}:
        import cluster.client

        return getattr(cluster.client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
