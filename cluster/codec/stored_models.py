"""Encode and decode the models in Macs' stores. A worker's answer is checked here, before anybody uses it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from cluster.core.errors import MacpipeError, WorkerLost
from cluster.core.limits import MAX_FACT_CHARS, MAX_PATH_CHARS
from cluster.core.plan import LayerRange
from cluster.core.stored_models import MacStore, StoredModel, StoreRemoval
from cluster.v1 import cluster_pb2 as pb

MAX_STORED_MODELS: Final = 128
"""Models of one Mac that are listed, the ones that were used last. A worker's answer has room for as many."""
MAX_STORED_NAMES: Final = 4
"""Ids of one model that are listed. Most models have one; each revision that means the same is another."""
MAX_STORED_RUNS: Final = 64
"""Runs of complete layers of one model that are listed. A Mac that was given layers by many plans has several."""

_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")


def encode_store(store: MacStore) -> pb.MacStore:
    """Encode a Mac's store, as much of it as ``decode_worker_store`` accepts."""
    models = store.models[:MAX_STORED_MODELS]
    return pb.MacStore(
        mac=store.mac,
        folder=store.folder[:MAX_PATH_CHARS],
        id=store.id,
        models=map(_encode_model, models),
        omitted=store.omitted + len(store.models) - len(models),
        problem=store.problem,
    )


def decode_worker_store(message: pb.MacStore, worker: str) -> MacStore:
    """Decode the store that ``worker`` sent, and name the Mac after it. Raises ``WorkerLost`` if it is implausible."""
    names = [name for model in message.models for name in model.names]
    valid = len(message.models) <= MAX_STORED_MODELS and message.folder.isprintable()
    valid = valid and len(message.folder) <= MAX_PATH_CHARS and len(message.id) <= MAX_FACT_CHARS
    valid = valid and all(name.isprintable() and len(name) <= MAX_FACT_CHARS for name in names)
    if not valid or not all(map(_is_plausible, message.models)):
        raise WorkerLost(f"worker {worker} sent an invalid list of its models", worker=worker)
    return replace(decode_store(message), mac=worker, problem="")


def decode_store(message: pb.MacStore) -> MacStore:
    """Decode a Mac's store, as a coordinator sends it. Raises ``MacpipeError`` for invalid layers."""
    models = tuple(_decode_model(model, message.folder) for model in message.models)
    return MacStore(message.mac, message.folder, message.id, models, message.omitted, message.problem)


def encode_removal(removal: StoreRemoval) -> pb.StoreRemoval:
    """Encode what became of a model on one Mac."""
    return pb.StoreRemoval(
        mac=removal.mac, model=removal.model, freed_bytes=removal.freed_bytes, problem=removal.problem
    )


def decode_removal(message: pb.StoreRemoval) -> StoreRemoval:
    """Decode what became of a model on one Mac."""
    return StoreRemoval(message.mac, message.model, message.freed_bytes, message.problem)


def _encode_model(model: StoredModel) -> pb.StoredModel:
    names = [name for name in model.names if len(name) <= MAX_FACT_CHARS and name.isprintable()]
    return pb.StoredModel(
        fingerprint=model.fingerprint,
        names=names[:MAX_STORED_NAMES],
        disk_bytes=model.disk_bytes,
        model_bytes=model.model_bytes,
        layers=[pb.LayerSpan(start=one.start, end=one.end) for one in model.layers[:MAX_STORED_RUNS]],
        last_used=model.last_used,
        in_use=model.in_use,
        weight_bits=model.weight_bits,
    )


def _is_plausible(model: pb.StoredModel) -> bool:
    spans: Sequence[pb.LayerSpan] = model.layers
    counts = len(model.names) <= MAX_STORED_NAMES and len(spans) <= MAX_STORED_RUNS
    facts = _FINGERPRINT.fullmatch(model.fingerprint) and math.isfinite(model.last_used)
    return bool(counts and facts) and all(span.start < span.end for span in spans)


def _decode_model(message: pb.StoredModel, folder: str) -> StoredModel:
    try:
        layers = tuple(LayerRange(span.start, span.end) for span in message.layers)
    except ValueError as e:
        raise MacpipeError(f"protocol error from the coordinator: {e}") from None
    return StoredModel(
        fingerprint=message.fingerprint,
        names=tuple(message.names),
        folder=f"{folder}/{message.fingerprint}",
        disk_bytes=message.disk_bytes,
        model_bytes=message.model_bytes,
        layers=layers,
        last_used=message.last_used,
        in_use=message.in_use,
        weight_bits=message.weight_bits,
    )
