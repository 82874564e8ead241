"""Reads from a checkpoint how its hidden states become embeddings, in the files of sentence-transformers.

``modules.json`` lists the steps behind the model. Only the last token's state can be taken here, which is what decoders
are trained for; encoders take the mean or the first one, of states that later tokens change too.
Source: https://sbert.net/docs/package_reference/sentence_transformer/modules.html.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cluster.core.errors import MacpipeError
from cluster.core.limits import MAX_SMALL_FILE_BYTES
from cluster.model.checkpoint import read_json_object

__all__ = ["MODULES", "NO_EMBEDDINGS", "POOLING", "SentenceEmbedding", "read_sentence_embedding"]

MODULES: Final = "modules.json"
POOLING: Final = "1_Pooling/config.json"
"""Where nearly every model has the pooling's config: the only file in a folder that is fetched from the hub."""
LAST: Final = "lasttoken"
MODE: Final = "pooling_mode_"
"""The beginning of the switch of each mode. Newer files name the mode in ``pooling_mode``."""
_FOLDER: Final = re.compile(r"[0-9A-Za-z_]{1,64}")


@dataclass(frozen=True, slots=True)
class SentenceEmbedding:
    """How the last hidden state becomes an embedding. ``problem`` says why it cannot, as a sentence; "" if it can.

    ``normalized``: embeddings have length 1.
    """

    normalized: bool = False
    problem: str = ""


NO_EMBEDDINGS: Final = SentenceEmbedding(
    problem=f"the model makes no embeddings: its checkpoint has no {MODULES} of sentence-transformers, which says how"
)


def read_sentence_embedding(folder: Path) -> SentenceEmbedding:
    """Return how the checkpoint in ``folder`` makes embeddings, or why it cannot."""
    if not (folder / MODULES).is_file():
        return NO_EMBEDDINGS
    try:
        kinds = _read_modules(folder / MODULES)
        pooling = _read_pooling(folder, kinds)
    except (MacpipeError, OSError, ValueError) as e:
        why = e.sentence if isinstance(e, MacpipeError) else str(e)
        return SentenceEmbedding(problem=f"the model makes no embeddings: {why[:500]}")
    if pooling != LAST:
        return SentenceEmbedding(
            problem=f"the model makes no embeddings here: it pools by {pooling[:64]}, and macpipe takes only the state "
            "of the last token"
        )
    return SentenceEmbedding(normalized="Normalize" in kinds)


def _read_modules(file: Path) -> dict[str, str]:
    """Return the folder of each module by its kind. Raises ValueError or OSError for others than known."""
    if file.stat().st_size > MAX_SMALL_FILE_BYTES:
        raise ValueError(f"its {file.name} is too large")
    try:
        found = {str(one["type"]).rpartition(".")[2]: str(one["path"]) for one in json.loads(file.read_bytes())}
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"its {file.name} is damaged") from e
    if list(found) not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(f"its {MODULES} has the steps {', '.join(found)[:200]}, of which some are not known here")
    return found


def _read_pooling(folder: Path, kinds: Mapping[str, str]) -> str:
    """Return the pooling's mode, several joined by ``+``. Raises ValueError or MacpipeError."""
    place = kinds["Pooling"]
    if not _FOLDER.fullmatch(place):
        raise ValueError(f"its {MODULES} has an invalid path")
    file = folder / place / "config.json"
    if not file.is_file():
        raise ValueError(
            f"its {place}/config.json is missing; copy it from the original model, or fetch that with `hf download`"
        )
    return _mode(read_json_object(file))


def _mode(config: Mapping[str, Any]) -> str:
    named = config.get("pooling_mode")
    if named is not None:
        return "+".join(map(str, named)) if isinstance(named, list) else str(named)
    return "+".join(name.removeprefix(MODE) for name, on in config.items() if name.startswith(MODE) and on is True)
