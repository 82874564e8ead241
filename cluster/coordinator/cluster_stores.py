"""Lists and removes the models in the stores of all of the cluster's Macs: the workers', and the coordinator's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import anyio

from cluster.coordinator.concurrent_calls import call_for_each
from cluster.coordinator.roster import Roster, RosterEntry
from cluster.core.errors import InvalidRequest, MacpipeError, ModelInUse, ModelNotFound, VersionMismatch
from cluster.core.stored_models import MacStore, StoredModel, StoreRemoval
from cluster.store.stored_models import find_models, list_models, remove_model, store_id

OWN: Final = "coordinator"
"""The name of the coordinator's own store, where no worker shares it."""
MAX_REMOVED: Final = 64
"""Names of models in one request to remove them."""


@dataclass(frozen=True, slots=True)
class _StoreAnswer:
    """A store, and the control address of a worker that uses it; empty for the coordinator's own."""

    store: MacStore
    address: str = ""


class ClusterStores:
    """The stores of a cluster. ``members`` returns the workers as they are known now, ``home`` has the own store."""

    def __init__(self, roster: Roster, members: Callable[[], Awaitable[tuple[RosterEntry, ...]]], home: Path) -> None:
        self._roster, self._members, self._home = roster, members, home
        self._removing = anyio.Lock()

    async def list_stores(self) -> tuple[MacStore, ...]:
        """Return the store of each worker, by name, and then the own one. Workers that share a store have one entry."""
        return tuple(answer.store for answer in await self._ask_all())

    async def remove(self, names: Sequence[str]) -> tuple[StoreRemoval, ...]:
        """Remove models, by id or fingerprint, from all stores. Return what became of each on each Mac that had it.

        A Mac that cannot be asked, or keeps a model, is a result with a ``problem``. Raises ``ModelNotFound`` if no Mac
        has one of the models, and ``ModelInUse`` if one is in use anywhere; nothing has been removed then.
        """
        if not 0 < len(names) <= MAX_REMOVED:
            raise InvalidRequest(f"name 1 to {MAX_REMOVED} models, not {len(names)}", field="models")
        async with self._removing:
            answers = await self._ask_all()
            wanted = _find_all([model for answer in answers for model in answer.store.models], names)
            _require_unused(answers, wanted)
            results = await call_for_each(lambda answer: self._remove_from(answer, wanted), answers)
        return tuple(result for found in results for result in found)

    async def _ask_all(self) -> list[_StoreAnswer]:
        by_store: dict[str, list[_StoreAnswer]] = defaultdict(list)
        for number, answer in enumerate(await call_for_each(self._ask, await self._members())):
            by_store[answer.store.id or f"#{number}"].append(answer)
        found = [await self._join(shared) for shared in by_store.values()]
        models = await anyio.to_thread.run_sync(list_models, self._home)
        own = MacStore(OWN, str(self._home / "models"), store_id(self._home), models)
        return found if own.id in by_store or not models else [*found, _StoreAnswer(own)]

    async def _ask(self, entry: RosterEntry) -> _StoreAnswer:
        info = entry.info
        store = MacStore(info.name, problem=entry.problem)
        if entry.reachable:
            try:
                store = await self._roster.control(info.control_address).list_stored()
            except VersionMismatch:
                problem = f"it runs macpipe {info.version}, which cannot list its models for others"
                store = MacStore(info.name, problem=problem)
            except MacpipeError as error:
                store = MacStore(info.name, problem=error.sentence)
        return _StoreAnswer(store, info.control_address)

    async def _join(self, shared: Sequence[_StoreAnswer]) -> _StoreAnswer:
        """Return one answer for all workers that share a store.

        A worker that is asked closes the models that it does not need. So after all were asked, the first is asked
        again whether its models are in use.
        """
        first = shared[0]
        if len(shared) == 1:
            return first
        store = first.store
        if any(model.in_use for model in store.models):
            try:
                store = await self._roster.control(first.address).list_stored()
            except MacpipeError as error:
                store = replace(store, problem=error.sentence)
        return replace(first, store=replace(store, mac=", ".join(answer.store.mac for answer in shared)))

    async def _remove_from(self, answer: _StoreAnswer, wanted: Mapping[str, str]) -> list[StoreRemoval]:
        mac, results = answer.store.mac, list[StoreRemoval]()
        if answer.store.problem:
            results.append(StoreRemoval(mac, problem=answer.store.problem))
        for model in answer.store.models:
            if (label := wanted.get(model.fingerprint)) is None:
                continue
            try:
                await self._remove(answer.address, model.fingerprint)
            except ModelNotFound:  # somebody else was faster
                continue
            except MacpipeError as error:
                results.append(StoreRemoval(mac, label, problem=error.sentence))
            else:
                results.append(StoreRemoval(mac, label, model.disk_bytes))
        return results

    async def _remove(self, address: str, fingerprint: str) -> None:
        if address:
            await self._roster.control(address).remove_stored(fingerprint)
        else:
            await anyio.to_thread.run_sync(remove_model, self._home, fingerprint)


def _require_unused(answers: Iterable[_StoreAnswer], wanted: Mapping[str, str]) -> None:
    """Raise ``ModelInUse`` if one of the ``wanted`` models is; they are names to show, by fingerprint.

    A worker that holds layers of a model uses it.
    """
    stores = [answer.store for answer in answers]
    for fingerprint, label in wanted.items():
        users = [s.mac for s in stores for one in s.models if one.fingerprint == fingerprint and one.in_use]
        if users:
            raise ModelInUse(
                f"the model {label} is in use on {', '.join(users)}; `macpipe unload` ends that if it is served; else"
                " wait until it is fetched, and try again"
            )


def _find_all(models: Sequence[StoredModel], names: Sequence[str]) -> dict[str, str]:
    """Return the fingerprints of the models that ``names`` mean, each with a name to show. Raises ``ModelNotFound``."""
    found = {model.fingerprint: model.fingerprint[:12] for name in names for model in _find(models, name)}
    return found | {one.fingerprint: one.label for one in models if one.names and one.fingerprint in found}


def _find(models: Sequence[StoredModel], name: str) -> tuple[StoredModel, ...]:
    try:
        return find_models(models, name)
    except ModelNotFound:
        raise ModelNotFound(
            f"no Mac that answers has a model {name[:200]!r} in its store; `macpipe store list --everywhere` shows what"
            " they have"
        ) from None
