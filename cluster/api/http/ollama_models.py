"""Ollama's GET /api/tags, /api/ps and /api/version, POST /api/show, and the routes that change its models.

The latter are answered with what to do instead: models are loaded and removed by the cluster's owner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, Final

import anyio
from starlette.requests import Request
from starlette.responses import Response

from cluster.api.http.body import Form, Ignored, ShortText, read
from cluster.api.http.errors import routing_error
from cluster.api.http.json_response import Json
from cluster.api.http.model_names import ModelNames
from cluster.coordinator.model_catalog import public_id
from cluster.coordinator.model_reader import ModelInfo
from cluster.core.errors import InvalidRequest, MacpipeError, NotServing
from cluster.core.plan import LayerRange
from cluster.model.model_details import ModelDetails, read_details

VERSION: Final = "0.12.11"
"""The version of Ollama whose API this is, since clients require a minimum: the first one with log-probabilities."""
LATEST: Final = ":latest"
"""The tag that Ollama's clients add to a name without one."""
NEVER: Final = "9999-12-31T23:59:59Z"
"""When a model is unloaded that stays."""
MOST_DETAILS: Final = 64
"""Models whose details are kept."""
INSTEAD: Final[Mapping[str, str]] = MappingProxyType(
    {
        "/api/pull": "clients cannot fetch models; run `macpipe load MODEL` on a Mac of the cluster",
        "/api/push": "clients cannot upload models; use the tools of the Hugging Face hub",
        "/api/create": "clients cannot create models; run `macpipe convert` on a Mac, and load the result",
        "/api/copy": "clients cannot copy models; name one with `macpipe serve --served-model-name NAME`",
        "/api/delete": "clients cannot delete models; run `macpipe store rm MODEL` on the Mac that holds it",
    }
)
"""What to do instead of requests that are not answered here."""
UNKNOWN: Final = ModelDetails("unknown", 0, "", 0)


def known_name(names: ModelNames, requested: str) -> str:
    """Return a model's name, without the tag ``latest`` if that is no part of it. Raises as ``ModelNames.is_ready``.

    A name with another tag means a model with an adapter, as everywhere.
    """
    if requested.endswith(LATEST) and not names.is_known(requested):
        requested = requested.removesuffix(LATEST)
    names.is_ready(requested)
    return requested


def find_model(names: ModelNames, requested: str) -> ModelInfo:
    """Return the loaded model with a name, as ``known_name``. Raises as that, and as ``ModelNames.resolve``."""
    return names.resolve(known_name(names, requested))


class ShowForm(Form):
    """The body of /api/show. Older clients send ``name``."""

    model: ShortText | None = None
    name: ShortText | None = None
    verbose: Ignored = None
    system: Ignored = None
    template: Ignored = None
    options: Ignored = None

    def asked(self) -> str:
        """Return the requested name. Raises ``InvalidRequest`` if there is none."""
        if not (found := self.model or self.name):
            raise InvalidRequest("model is missing", field="model", code="missing_required_parameter")
        return found


def to_text(time: datetime) -> str:
    """Return a time in UTC as Ollama writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, slots=True)
class _Known:
    """A loaded model under one of its names.

    ``parent`` is the model of an adapter, and ``weight_bits`` those to which the weights were quantized when they were
    loaded; 0 if they were not.
    """

    name: str
    model_info: ModelInfo
    parent: str
    weight_bits: int
    expires_at: str


@dataclass(frozen=True, slots=True)
class OllamaModels:
    """The routes' handlers. ``started`` is the coordinator's start: a model has no date."""

    names: ModelNames
    started: str = field(default_factory=lambda: to_text(datetime.now(UTC)))
    _details: dict[str, ModelDetails] = field(default_factory=dict)
    """By the model's fingerprint, since the headers of a checkpoint are long."""

    async def version(self, request: Request) -> Json:
        """Return the version of Ollama whose API this is."""
        return Json({"version": VERSION})

    async def tags(self, request: Request) -> Json:
        """Return the models that can be asked for, under each of their names, loaded or not."""
        names = [name for model_info in self.names.loaded() for name in self.names.public_names(model_info)]
        loaded = [self._known(name, self.names.resolve(name)) for name in names]  # before others may unload one
        unloaded = [_describe_unloaded(name) for name in self.names.unloaded()]
        found = [*[await self._describe(known) for known in loaded], *unloaded]
        return Json({"models": [{**one, "modified_at": self.started} for one in found]})

    async def running(self, request: Request) -> Json:
        """Return the models that are in memory. All of it is of one kind on a Mac."""
        loaded = [self._known(self.names.id_of(model_info), model_info) for model_info in self.names.loaded()]
        found = []
        for known in loaded:
            one = await self._describe(known)
            context = known.model_info.shape.max_context
            found.append({**one, "size_vram": one["size"], "expires_at": known.expires_at, "context_length": context})
        return Json({"models": found})

    async def show(self, request: Request) -> Json:
        """Return the details of one model. Raises ``ModelNotFound``."""
        name = (await read(request, ShowForm)).asked()
        try:
            model_info = find_model(self.names, name)
        except NotServing:
            if (short := name.removesuffix(LATEST)) not in self.names.unloaded():
                raise
            unknown = _describe_unloaded(short)
            return Json(self._show(short, unknown, {"general.architecture": UNKNOWN.architecture}, ["completion"]))
        name = self.names.shown_name(name, model_info)
        described = await self._describe(self._known(name, model_info))
        return Json(self._show(name, described, await self._facts(model_info), _abilities(model_info)))

    def _show(
        self, name: str, described: dict[str, Any], facts: dict[str, Any], abilities: list[str]
    ) -> dict[str, Any]:
        return {
            "modelfile": f"FROM {name}",
            "parameters": "",
            "template": "",
            "details": described["details"],
            "model_info": facts,
            "capabilities": abilities,
            "modified_at": self.started,
        }

    async def _facts(self, model_info: ModelInfo) -> dict[str, Any]:
        details, shape = await self._read_details(model_info), model_info.shape
        kind = details.architecture
        return {
            "general.architecture": kind,
            "general.basename": PurePath(public_id(shape.model.name, shape.model.path)).name,
            "general.parameter_count": details.parameters,
            f"{kind}.block_count": shape.layers,
            f"{kind}.context_length": shape.max_context,
            f"{kind}.embedding_length": details.width,
            f"{kind}.vocab_size": model_info.vocabulary,
        }

    async def refuse(self, request: Request) -> Response:
        """Refuse a request that Ollama would answer, and say what to do instead."""
        raise routing_error(501, INSTEAD[request.url.path])

    def _known(self, name: str, model_info: ModelInfo) -> _Known:
        """Return what is known of a loaded model without reading its files."""
        entry = self.names.entry_of(model_info)
        left_s = self.names.idle_left_s(entry)
        return _Known(
            name,
            model_info,
            parent=self.names.id_of(model_info) if model_info.adapter else "",
            weight_bits=entry.order.quantize if entry else 0,
            expires_at=NEVER if left_s is None else to_text(datetime.now(UTC) + timedelta(seconds=left_s)),
        )

    async def _describe(self, known: _Known) -> dict[str, Any]:
        """Return what Ollama lists of a model. Names of one model have one digest, by which clients join them."""
        details, shape = await self._read_details(known.model_info), known.model_info.shape
        adapter = known.model_info.adapter
        if known.weight_bits:
            details = replace(details, quantization=f"{known.weight_bits}-bit")
        identity = f"{shape.model.fingerprint} {adapter.key}" if adapter else shape.model.fingerprint
        size = shape.stage_bytes(LayerRange(0, shape.layers)) + (adapter.nbytes if adapter else 0)
        return _encode(known.name, identity, size, details, known.parent)

    async def _read_details(self, model_info: ModelInfo) -> ModelDetails:
        """Return a model's details; unknown ones if its files are gone."""
        fingerprint = model_info.shape.model.fingerprint
        if fingerprint not in self._details:
            try:
                found = await anyio.to_thread.run_sync(read_details, model_info.found.folder)
            except MacpipeError:
                return UNKNOWN
            if len(self._details) >= MOST_DETAILS:
                self._details.clear()
            self._details[fingerprint] = found
        return self._details[fingerprint]


def _describe_unloaded(name: str) -> dict[str, Any]:
    """Return what Ollama lists of a model that is not loaded: its checkpoint is not read before."""
    return _encode(name, name, 0, UNKNOWN)


def _encode(name: str, identity: str, size: int, details: ModelDetails, parent: str = "") -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "size": size,
        "digest": hashlib.sha256(identity.encode()).hexdigest(),
        "details": {
            "parent_model": parent,
            "format": "safetensors",
            "family": details.architecture,
            "families": [details.architecture],
            "parameter_size": format_parameters(details.parameters),
            "quantization_level": details.quantization,
        },
    }


def _abilities(model_info: ModelInfo) -> list[str]:
    tokenizer = model_info.tokenizer
    found = {
        "completion": True,
        "tools": tokenizer.takes_tools,
        "thinking": bool(tokenizer.reasoning_end),
        "embedding": not model_info.embedding.problem,
    }
    return [name for name, able in found.items() if able]


def format_parameters(count: int) -> str:
    """Return a number of parameters as people write it, such as ``8.0B``; empty if it is unknown."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count or "")
