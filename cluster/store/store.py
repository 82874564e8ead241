"""Locates models on this Mac: in a folder, in the Hugging Face cache, or as a partial checkpoint in the store.

It finds and creates folders. It fetches small files and headers, but never tensors (``fetch`` does).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.core.adapter import AdapterRef
from cluster.core.errors import (
    BadCheckpoint,
    FetchFailed,
    HubUnreachable,
    MacpipeError,
    ModelDiffers,
    ModelNotFound,
    ModelUnsupported,
)
from cluster.core.plan import ModelRef
from cluster.model.adapter_files import open_folder
from cluster.model.checkpoint import BUNDLED, open_checkpoint, resolve_model
from cluster.platform.json_file import read_json, write_json
from cluster.store.hub import Hub, HubName, look_up
from cluster.store.limits import MAX_VERSION_BYTES
from cluster.store.model_files import is_digest
from cluster.store.partial_checkpoint import PartialCheckpoint, is_partial, place, read_origin
from cluster.store.peer_client import Peer
from cluster.store.quantized_copy import CopyKey, QuantizedCopy, find_copy

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A folder with a model. ``partial`` is None if the folder is complete."""

    folder: Path
    partial: PartialCheckpoint | None = None


class Store:
    """The models in ``home``, and those that this Mac has elsewhere."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._models = home / "models"

    @property
    def models(self) -> Path:
        """The folder of the models in ``home``."""
        return self._models

    def find_by_name(self, name: str) -> FoundModel:
        """Return the model that ``name`` means on this Mac: a folder, a bundled model, a cached one, or one on the hub.

        For a model on the hub, fetch the small files and headers that are missing. Raise ModelNotFound, BadCheckpoint,
        ModelForbidden or HubUnreachable.
        """
        try:
            folder = resolve_model(name)
            open_checkpoint(folder)
        except MacpipeError:
            if not _is_id(name) or Path(name).is_dir():
                raise
            folder = self._from_hub(HubName.parse(name))
        return _open_found(folder)

    def _from_hub(self, name: HubName) -> Path:
        """Return the partial checkpoint of a model on the hub.

        Use the hub's current version or, if the hub is unreachable, the version seen last.
        """
        noted = self._models / "refs" / f"{name.repo.replace('/', '--')}@{name.revision.replace('/', '--')}.json"
        try:
            origin = look_up(name)
        except (HubUnreachable, ModelNotFound) as e:
            if isinstance(e, HubUnreachable) and (folder := self._find_noted(noted)):
                return folder
            raise type(e)(f"there is no folder {name}, and as a model of the hub: {e.sentence}") from e
        folder = self._find_noted(noted)
        if folder is None or read_origin(folder).commit != origin.commit:
            folder = place(self._models, origin, Hub(name.repo, origin.commit).small)
            _save_version(noted, {"commit": origin.commit, "fingerprint": folder.name})
        return folder

    def _find_noted(self, file: Path) -> Path | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            folder = self._models / str(read_json(file, MAX_VERSION_BYTES)["fingerprint"])
            return folder if is_partial(folder) else None
        return None

    def find_for_worker(self, model: ModelRef, peers: Sequence[Peer]) -> FoundModel:
        """Return where this worker has the coordinator's model, or can put a part of it.

        Try the coordinator's path, then the model's name, then a partial checkpoint, which is created from the peers'
        headers if needed. Raise ModelDiffers if this Mac has another model at that path, and FetchFailed or the last
        peer's error if it has none and no peer provides the headers.
        """
        return self.find_whole(model) or self._find_or_place(model, peers)

    def find_whole(self, model: ModelRef) -> FoundModel | None:
        """Return where this worker has all files of the coordinator's model, or None.

        Raise ModelDiffers if it has another model at the coordinator's path.
        """
        folder = Path(model.path)
        if folder.is_dir() and (found := _match_folder(folder, model, strict=not _is_id(model.name))):
            return found
        with contextlib.suppress(ModelNotFound):
            return _match_folder(resolve_model(model.name), model, strict=False)
        return None

    def find_adapter(self, adapter: AdapterRef, peers: Sequence[Peer]) -> FoundModel:
        """Return where this worker has the coordinator's adapter, or can put a part of it, as for a model.

        Another adapter at the coordinator's path is none. Raise FetchFailed or the last peer's error.
        """
        known = ModelRef(adapter.name, adapter.path, adapter.fingerprint)
        folder = Path(adapter.path)
        with contextlib.suppress(ModelUnsupported):
            if folder.is_dir() and (found := _match_folder(folder, known, strict=False)):
                return found
        return self._find_or_place(known, peers)

    def _find_or_place(self, model: ModelRef, peers: Sequence[Peer]) -> FoundModel:
        """Return the partial checkpoint of a model or an adapter, which is created if there is none."""
        if not is_digest(model.fingerprint):
            raise BadCheckpoint(
                f"invalid model fingerprint {model.fingerprint[:80]!r}; run the same macpipe on all Macs"
            )
        folder = self._models / model.fingerprint
        if not is_partial(folder):
            folder = self._from_peers(model, peers)
        return FoundModel(folder, PartialCheckpoint(folder))

    def find_kept(self, fingerprint: str) -> FoundModel | None:
        """Return the store's own partial checkpoint of a model, or None."""
        folder = self._models / fingerprint
        return FoundModel(folder, PartialCheckpoint(folder)) if is_digest(fingerprint) and is_partial(folder) else None

    def find_copy(self, key: CopyKey) -> QuantizedCopy | None:
        """Return the quantized copy with this key, or None. Raise BadCheckpoint if it is damaged."""
        return find_copy(self._models, key.digest)

    def _from_peers(self, model: ModelRef, peers: Sequence[Peer]) -> Path:
        """Create a partial checkpoint from the headers and small files of the first peer that provides them."""
        error: MacpipeError = FetchFailed(
            f"this worker has no copy of {model.name}: it has neither the folder {model.path} nor a model of that "
            "name, and no other Mac offers one; copy the folder to the same path on this Mac"
        )
        for peer in peers:
            try:
                return place(self._models, peer.describe(), peer.small, model.fingerprint)
            except MacpipeError as failure:
                error = failure
        raise error


def _save_version(file: Path, facts: dict[str, str]) -> None:
    """Record which version was seen last. A failure is only logged: the record is needed only without the hub."""
    try:
        write_json(file, facts)
    except OSError as e:
        log.warning("store: cannot save the model version reason=%s path=%s", e.strerror, file)


def _is_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not (BUNDLED / name).exists()


def _open_found(folder: Path) -> FoundModel:
    return FoundModel(folder, PartialCheckpoint(folder) if is_partial(folder) else None)


def _match_folder(folder: Path, model: ModelRef, *, strict: bool) -> FoundModel | None:
    """Return the folder if it holds that model, else None; with ``strict``, raise ModelDiffers for another model."""
    try:
        fingerprint = open_folder(folder).fingerprint
    except (BadCheckpoint, ModelNotFound):
        return None
    if fingerprint == model.fingerprint:
        return None if is_partial(folder) else FoundModel(folder)  # only its own store may fill a partial checkpoint
    if strict:
        raise ModelDiffers(
            f"the files in {str(folder)!r} are not those of the coordinator's {model.name} (fingerprint "
            f"{fingerprint[:12]}, expected {model.fingerprint[:12]}); copy the coordinator's folder to this machine, "
            "or move this folder away, and the worker fetches the model from the coordinator"
        )
    return None
