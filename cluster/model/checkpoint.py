"""Finds, validates and fingerprints a checkpoint folder.

It reads JSON and safetensors headers, never a tensor, and does not import MLX: the coordinator's early checks and the
command line use it in processes that run no model. It rejects pickle files and never runs code that comes with a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from cluster.core.errors import BadCheckpoint, ModelNotFound, ModelUnsupported
from cluster.core.limits import MAX_SMALL_FILE_BYTES
from cluster.core.plan import ModelRef
from cluster.model.safetensors import Shard, TensorInfo, read_shard
from cluster.model.weight_versions import read_weight_versions

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "hash_parts",
    "model_ref",
    "open_checkpoint",
    "read_json_object",
    "resolve_model",
]

BUNDLED: Final = Path(__file__).parent.parent / "bundled"
PICKLES: Final = ("*.bin", "*.pt", "*.pth")
WEIGHTS: Final = "model*.safetensors"
"""The files that mlx-lm reads; others (``consolidated.safetensors``) duplicate the same weights."""
INDEX: Final = "model.safetensors.index.json"
TOKENIZER_FILES: Final = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files that affect tokenization or the end of an answer. Keep them sorted: the fingerprint depends on the order."""
LAYER_KEYS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
FETCHED: Final = ("*.json", "model*.safetensors", "tokenizer.model", "tiktoken.model", "*.txt", "*.jinja")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder whose headers have all been validated.

    ``config`` is config.json. ``tensors`` maps each tensor's name to its description. ``editions`` maps each weight
    file to a content version, which distinguishes files with equal headers. ``fingerprint`` is a hex SHA-256 over
    config, tokenizer, headers and editions; it is equal on all machines that hold the same files.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    editions: Mapping[str, str]
    fingerprint: str


def resolve_model(name: str) -> Path:
    """Return the folder of ``name``: a folder, a bundled model, or a Hugging Face id in the local cache.

    Fetches nothing; the store does that. Raises ModelNotFound, whose sentence names the command that fetches the model.
    """
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder.resolve()
    if name and Path(name).name == name and (BUNDLED / name).is_dir():
        return BUNDLED / name
    if "/" in name and not name.startswith(("/", ".", "~")):
        return _find_cached(name)
    raise ModelNotFound(
        f"model {name!r} not found: it is neither a folder nor a bundled model; "
        "give a folder, a Hugging Face id (owner/name), or a bundled model's name"
    )


def _find_cached(repo: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and only this branch needs it

    name, _, revision = repo.partition("@")
    try:
        found = snapshot_download(name, revision=revision or None, local_files_only=True, allow_patterns=list(FETCHED))
        return Path(found)
    except (OSError, ValueError) as error:  # missing, incomplete, or not a valid id
        raise ModelNotFound(
            f"{repo!r} is neither a folder nor complete in this machine's Hugging Face cache; "
            f"fetch it with: macpipe pull {repo}"
        ) from error


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and check the headers of the checkpoint in folder ``path``.

    Raises ModelNotFound (no folder, no config.json), BadCheckpoint (pickle files, missing or damaged files) and
    ModelUnsupported (a model that needs its own Python code).
    """
    if not path.is_dir():
        raise ModelNotFound(f"there is no model folder {str(path)!r} on this machine")
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelNotFound(f"{str(path)!r} has no config.json: it is not a model folder")
    try:
        return _read(path, config_file)
    except OSError as error:  # no permission to read it, or a dangling link of the cache
        raise BadCheckpoint(f"a file of the model cannot be read: {error}") from error


def model_ref(name: str) -> ModelRef:
    """Resolve and open the model ``name``. Raises the errors of ``resolve_model`` and ``open_checkpoint``."""
    path = resolve_model(name)
    return ModelRef(name=name, path=str(path), fingerprint=open_checkpoint(path).fingerprint)


def _read(path: Path, config_file: Path) -> Checkpoint:
    _refuse_links(path)
    config = read_json_object(config_file)
    _refuse_code(config)
    shards = [read_shard(path / name) for name in _shard_names(path)]
    tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    _require_layers(config, len(tensors))
    editions = read_weight_versions(path, shards)
    fingerprint = _fingerprint(path, shards, editions)
    return Checkpoint(
        path, MappingProxyType(config), MappingProxyType(tensors), MappingProxyType(editions), fingerprint
    )


def _refuse_links(path: Path) -> None:
    """Raise BadCheckpoint if a small file links to a file outside the model's folder.

    Small files are sent to other Macs, so such a link could leak another file of this machine. Links of the Hugging
    Face cache are allowed: they lead to the folder ``blobs`` beside the folder of snapshots.
    """
    homes = (path.resolve(), (path.parent.parent / "blobs").resolve())
    for name in ("config.json", INDEX, *TOKENIZER_FILES):
        file = path / name
        if file.is_symlink() and not any(file.resolve().is_relative_to(home) for home in homes):
            raise BadCheckpoint(
                f"{name} in {str(path)!r} is a link to a file outside the model's folder; put the file itself there",
                file=name,
            )


def _require_layers(config: Mapping[str, Any], tensors: int) -> None:
    """Raise BadCheckpoint if the config has more layers than the files have tensors.

    Otherwise mlx-lm would build all those layers before it notices missing weights.
    """
    nested = config.get("text_config")
    for source in (config, nested if isinstance(nested, Mapping) else {}):
        for key in LAYER_KEYS:
            layers = source.get(key)
            if isinstance(layers, int) and layers > tensors:
                raise BadCheckpoint(
                    f"config.json has {layers} layers ({key}), but the files have only {tensors} tensors: they do not "
                    "belong together; copy or fetch the model again",
                    file="config.json",
                )


def _small_file(path: Path) -> bytes:
    """Return the content of a config or tokenizer file. Raises BadCheckpoint if it is too large or not a file."""
    size = path.stat().st_size
    if not path.is_file():
        raise BadCheckpoint(f"{path.name} is not a regular file", file=path.name)
    if size > MAX_SMALL_FILE_BYTES:
        raise BadCheckpoint(f"{path.name} has {size} bytes; at most {MAX_SMALL_FILE_BYTES} are allowed", file=path.name)
    return path.read_bytes()


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file. Raises BadCheckpoint if it is damaged or too large."""
    try:
        content = json.loads(_small_file(path))
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path.name} is damaged: it is not JSON ({error})", file=path.name) from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path.name} is damaged: it is not a JSON object", file=path.name)
    return content


def _refuse_code(config: Mapping[str, Any]) -> None:
    """Raise ModelUnsupported if the config has ``model_file``: mlx-lm would run that Python file of the checkpoint.

    ``auto_map`` needs no check: nothing reads it.
    """
    if config.get("model_file") is not None:
        raise ModelUnsupported(
            f"this model needs its own Python code (model_file {config['model_file']!r} in config.json); "
            "macpipe never runs code that comes with a model; use a conversion that mlx-lm supports by itself"
        )


def _shard_names(path: Path) -> list[str]:
    """Return the sorted names of the weight files. Raises BadCheckpoint if one is missing or there are none."""
    found = sorted(file.name for file in path.glob(WEIGHTS))
    if not found:
        raise _no_weights(path)
    index = path / INDEX
    named = _read_index(index) if index.is_file() else set()
    missing = sorted(named - set(found))
    if missing:
        raise BadCheckpoint(
            f"{INDEX} names {missing[0]}, which is missing ({len(missing)} of {len(named)} files are); "
            "copy or fetch the model again",
            file=missing[0],
        )
    return found


def _read_index(index: Path) -> set[str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadCheckpoint(f"{index.name} is damaged: it has no weight_map", file=index.name)
    return set(weight_map.values())


def _no_weights(path: Path) -> BadCheckpoint:
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        return BadCheckpoint(
            f"{str(path)!r} has its weights in pickle files only ({pickles[0]}); reading a pickle can run code, "
            "so macpipe rejects it; use a safetensors version of the model",
            file=pickles[0],
        )
    return BadCheckpoint(f"{str(path)!r} has no weights: no file matches {WEIGHTS}; copy or fetch the model again")


def _fingerprint(path: Path, shards: Iterable[Shard], editions: Mapping[str, str]) -> str:
    small = [(name, path / name) for name in TOKENIZER_FILES if (path / name).is_file()]
    parts = [(name, _small_file(file)) for name, file in (("config.json", path / "config.json"), *small)]
    for shard in shards:
        parts += [(shard.file, shard.header), (shard.file, editions[shard.file].encode())]
    return hash_parts(parts)


def hash_parts(parts: Iterable[tuple[str, bytes]]) -> str:
    """Hash names and bytes, each prefixed with its length, so that different folders have different inputs."""
    digest = hashlib.sha256()
    for name, content in parts:
        for part in (name.encode(), content):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
