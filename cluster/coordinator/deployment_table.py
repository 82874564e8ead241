"""Find a coordinator's deployments by the names that its catalog gives to models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final

from cluster.coordinator.copy_keeper import CopyGoal
from cluster.coordinator.deployment import Deployment
from cluster.coordinator.journal import JournaledRequest
from cluster.coordinator.lead_change import LeadChange
from cluster.coordinator.model_catalog import DEFAULT, ModelCatalog, ModelEntry, public_id
from cluster.coordinator.model_reader import ModelInfo
from cluster.coordinator.neighbours import Neighbours, describe_loaded
from cluster.coordinator.settings import LoadOrder
from cluster.coordinator.training_run import ServedModel
from cluster.core.cluster_state import ServingState
from cluster.core.errors import ModelNotFound, NotServing, RequestNotFound
from cluster.core.load_limits import LOADED_RETRY_S
from cluster.placement.arrangement import LoadedModel

__all__ = ["DeploymentTable"]


_BY_URGENCY: Final = (ServingState.LOADING, ServingState.FAILED, ServingState.RECOVERING, ServingState.SERVING)
"""The states of deployments, the one first that the cluster's state shows if deployments differ."""


class DeploymentTable:
    """The deployments of one coordinator, and its catalog: the models that it may serve.

    A deployment is created when it is first asked for, and forgotten once its model is neither loaded nor in the
    catalog. ``create`` makes one of a name. ``is_training`` tells whether models that are not loaded now will be loaded
    again.
    """

    def __init__(self, create: Callable[[str], Deployment], is_training: Callable[[], bool]) -> None:
        self._create, self._is_training = create, is_training
        self._deployments: dict[str, Deployment] = {}
        self.catalog = ModelCatalog(())
        """The models that may be served, and as guests those that are although they are not configured."""
        self.lead_change = LeadChange()
        self._expected: frozenset[str] = frozenset()
        """Guests of the leader before that were not loaded again yet."""

    def __getitem__(self, name: str) -> Deployment:
        """Return the deployment of a model by its own name, or by ``DEFAULT`` that of the first model."""
        name = self.own_name(name)
        if name not in self._deployments:
            self._deployments[name] = self._create(name)
        return self._deployments[name]

    def values(self) -> Collection[Deployment]:
        """Return all deployments, loaded or not."""
        return tuple(self._deployments.values())

    def get(self, name: str) -> Deployment | None:
        """Return the deployment of a model by its own name; None if it was never loaded."""
        return self._deployments.get(self.own_name(name))

    def find_holder(self, holder: str) -> Deployment | None:
        """Return the deployment of the replica that holds slices under this name; None if it is gone."""
        found = (one for one in self.values() if any(replica.holder == holder for replica in one.replicas))
        return next(found, None)

    def own_name(self, name: str) -> str:
        """Return the own name of a model; only ``DEFAULT`` may be another name of one."""
        entries = self.catalog.entries
        return entries[0].name if entries and name == DEFAULT else name

    @property
    def is_single(self) -> bool:
        """Whether there is at most one model, so that no name tells it from others."""
        return len(tuple(self.catalog)) <= 1

    def find_neighbours(self, name: str) -> Neighbours:
        """Return what is loaded beside the model with this own name, and what has no memory yet: what loads, too."""
        loaded = {d.name for d in self.values() if d.model_info and d.name != name}
        services = [(d.name, d.services) for d in self.values() if d.name in loaded]
        holding = [
            describe_loaded(holder, [one.plan for one in found], found[0].model_info.placed_shape if found else None)
            for holder, found in services
        ]
        drafts = [(holder, service.draft_worker) for holder, found in services for service in found]
        holding += [LoadedModel(f"draft of {holder}", {}, {worker: 1.0}) for holder, worker in drafts if worker]
        return Neighbours(name, tuple(holding), tuple(entry for entry in self.catalog if entry.name not in loaded))

    def served(self) -> list[ServedModel]:
        """Return what is served, in the order in which it is loaded again after a training: the default model first."""
        first = self.own_name(DEFAULT)
        found = [ServedModel(one.name, one.order) for one in self.values() if one.order]
        return sorted(found, key=lambda model: model.name != first)

    def find_answerer(self, kept: JournaledRequest) -> Deployment:
        """Return the deployment that serves the model which began an answer.

        Raises ``NotServing`` while that model is not loaded, and ``RequestNotFound`` if it is not served any more.
        """
        by, request_id = kept.answerer, kept.request.id
        name = self.own_name(by.deployment or DEFAULT)
        serving = [d for d in self.values() if d.service and by.fingerprint in ("", d.fingerprint)]
        if serving:  # the record of an older version names no model
            return min(serving, key=lambda deployment: deployment.name != name)
        named = self.get(name)
        if (named and named.service) or (self.catalog.entries and self.catalog.get(name) is None):
            gone = f"the model that began the answer of request {request_id} is no longer served"
            raise RequestNotFound(f"{gone}; send the request again")
        why = f"the model that began the answer of request {request_id} is not loaded now; try again in a moment"
        raise NotServing(why, retry_after_s=LOADED_RETRY_S)

    @property
    def state(self) -> ServingState:
        """The most urgent state of all deployments."""
        states = {deployment.state for deployment in self.values()}
        return next((state for state in _BY_URGENCY if state in states), ServingState.IDLE)

    # The catalog

    def adopt(self, catalog: ModelCatalog) -> None:
        """Serve the models of this catalog from now on. What is loaded and not in it stays, as a guest."""
        loaded = (entry for entry in self.catalog if self._is_loaded(entry.name))
        self.catalog = ModelCatalog(catalog.entries, tuple(loaded))
        self.forget_unloaded()

    def expect_guests(self, guests: Sequence[ModelEntry]) -> None:
        """Keep the guests of the leader before, which are to be loaded again, each until ``end_expecting``."""
        self.catalog = ModelCatalog(self.catalog.entries, guests)
        self._expected = frozenset(guest.name for guest in self.catalog.guests)

    def is_expected(self, name: str) -> bool:
        """Return whether a model with this own name is to be loaded again, as the leader before had it."""
        return name in self._expected

    def end_expecting(self, name: str) -> None:
        """Forget a guest of the leader before if it is not loaded now."""
        self._expected -= {name}
        self.forget_unloaded()

    def begin(self, name: str, order: LoadOrder) -> Deployment:
        """Return the deployment that is about to load ``order``, as a guest if its name is not in the catalog."""
        name = self.own_name(name)
        if self.catalog.get(name) is None:
            self.catalog = self.catalog.with_guest(ModelEntry(name, order))
        return self[name]

    def note_loaded(self, name: str, order: LoadOrder) -> None:
        """Note with which order a model was loaded: that is what its name means from now on."""
        self.catalog = self.catalog.with_order(name, order)

    def forget_unloaded(self) -> None:
        """Forget models that are neither loaded nor configured."""
        self.catalog = self.catalog.without_guests(
            guest.name for guest in self.catalog.guests if not self._is_loaded(guest.name)
        )
        for name in tuple(self._deployments):
            if self.catalog.get(name) is None and not self._is_loaded(name):
                del self._deployments[name]

    def _is_loaded(self, name: str) -> bool:
        """Return whether a model is loaded, is being loaded, or will be loaded again."""
        deployment = self._deployments.get(name)
        if name in self._expected:
            return True
        if deployment is None:
            return False
        waits = self._is_training() and deployment.order is not None
        return deployment.is_loading or deployment.model_info is not None or waits

    def copy_goals(self) -> list[CopyGoal]:
        """Return how many replicas each loaded model should have, in the catalog's order."""
        found = ((self._deployments.get(entry.name), entry) for entry in self.catalog)
        return [
            CopyGoal(deployment, entry.replicas, entry.priority)
            for deployment, entry in found
            if deployment and deployment.model_info
        ]

    # Names

    def resolve(self, requested: str | None) -> tuple[Deployment, str]:
        """Return the deployment of the model that ``requested`` names, and the adapter behind a colon; "" for none.

        A single model that is not loaded has every name. Raises ``ModelNotFound``, and as ``LeadChange.require_going``.
        """
        self.lead_change.require_going()
        if self.is_single and self[DEFAULT].model_info is None:
            return self[DEFAULT], ""
        entry, adapter = self.catalog.resolve(requested)
        return self[entry.name], adapter

    def public_name(self, deployment: Deployment) -> str:
        """Return the name under which a deployment is shown; "" if it is the default one, without a model."""
        if deployment.model_info:
            return self.names_of(deployment.model_info)[0]
        entry = self.catalog.get(deployment.name)
        return self.catalog.public_name(entry) if entry else ""

    def name_among_others(self, holder: str) -> str:
        """Return what a replica's model is called, and the replica's number if there are several.

        Return "" if there is one replica of one model alone.
        """
        deployment = self.find_holder(holder)
        count = len(deployment.replicas) if deployment else 0
        if deployment is None or (self.is_single and count == 1):
            return ""
        number = next(i for i, replica in enumerate(deployment.replicas, 1) if replica.holder == holder)
        return f"{self.public_name(deployment)}{f' #{number}' if count > 1 else ''}"

    def names_of(self, model_info: ModelInfo) -> tuple[str, ...]:
        """Return the names under which a loaded model is listed, its public one first."""
        model = model_info.shape.model
        own = public_id(model.name, model.path)
        deployment = next((d for d in self._deployments.values() if d.serves(model_info)), None)
        entry = self.catalog.get(deployment.name) if deployment else None
        if entry is None:
            return (own,)
        first, *aliases = self.catalog.public_names(entry)
        return tuple(dict.fromkeys((own if entry.name == DEFAULT else first, *aliases)))

    def given_name(self, model_info: ModelInfo) -> str:
        """Return the name that people gave to a loaded model; its source if they gave it none."""
        name = next((d.name for d in self._deployments.values() if d.serves(model_info)), DEFAULT)
        return model_info.shape.model.name if name == DEFAULT else name

    def loaded_models(self) -> list[ModelInfo]:
        """Return what is loaded, in the catalog's order."""
        found = (self._deployments.get(entry.name) for entry in self.catalog)
        return [deployment.model_info for deployment in found if deployment and deployment.model_info]

    def unloaded_names(self) -> list[str]:
        """Return the public names of all models that are not loaded; none if there is only one model."""
        if self.is_single:
            return []
        found = ((entry, self._deployments.get(entry.name)) for entry in self.catalog)
        waiting = (entry for entry, deployment in found if not (deployment and deployment.model_info))
        return [name for entry in waiting for name in self.catalog.public_names(entry)]

    def choose(self, name: str) -> list[Deployment]:
        """Return the deployment to unload: of the model that ``name`` means, else the only one loaded or loading.

        Raises ``ModelNotFound``, also if there are several of these and none is named.
        """
        if name:
            return [self[self.catalog.find(name).name]]
        loaded = [deployment for deployment in self.values() if deployment.model_info or deployment.is_loading]
        if len(loaded) > 1:
            names = ", ".join(sorted(map(self.public_name, loaded)))
            raise ModelNotFound(f"several models are loaded: {names}; name one of them", field="name")
        return loaded
