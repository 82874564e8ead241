"""Hold the adapters of a served model: those that its stages load, and of these the ones that requests may name."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.core.adapter import MAX_ADAPTERS, Adapter
from cluster.core.errors import InvalidOption, ModelNotFound


class ServedAdapters:
    """The adapters of one model, by name. One that is being added is loaded already, but not served yet."""

    def __init__(self, adapters: Iterable[Adapter] = ()) -> None:
        self._adapters: dict[str, Adapter] = {}
        self._served: set[str] = set()
        for adapter in adapters:
            self.load(adapter)
            self.serve(adapter)

    @property
    def loaded(self) -> tuple[Adapter, ...]:
        """Every adapter that a stage has to hold."""
        return tuple(self._adapters.values())

    @property
    def served(self) -> tuple[Adapter, ...]:
        """Every adapter that requests may name."""
        return tuple(adapter for name, adapter in self._adapters.items() if name in self._served)

    def find(self, name: str) -> Adapter | None:
        """Return the served adapter with a name; None if there is none."""
        return self._adapters[name] if name in self._served else None

    def require(self, key: str) -> None:
        """Raise ``ModelNotFound`` unless the adapter with a key is served; "" stands for the model alone."""
        if key and all(adapter.key != key for adapter in self.served):
            raise ModelNotFound(
                f"the adapter {key} of this request is not served now; add it again, and then send the request again",
                field="adapter",
            )

    def load(self, adapter: Adapter) -> None:
        """Have the stages hold an adapter from their next load on. Raises ``InvalidOption`` if there is no place."""
        name = adapter.ref.name
        if name in self._adapters:
            raise InvalidOption(
                f"there is an adapter {name} already; remove it first, or choose another name", field="adapter"
            )
        if len(self._adapters) >= MAX_ADAPTERS:
            raise InvalidOption(f"{MAX_ADAPTERS} adapters are loaded, which is the most; remove one", field="adapter")
        self._adapters[name] = adapter

    def serve(self, adapter: Adapter) -> None:
        """Let requests name an adapter that all stages hold."""
        self._served.add(adapter.ref.name)

    def remove(self, name: str) -> Adapter:
        """Remove an adapter and return it. Raises ``ModelNotFound``."""
        self._served.discard(name)
        if name not in self._adapters:
            raise ModelNotFound(f"there is no adapter {name[:80]}; `macpipe adapter list` shows them", field="adapter")
        return self._adapters.pop(name)
