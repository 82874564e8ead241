"""One engine's part of the load of a slice, as commands to its supervisor."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.core.quantization import choose_weight_quantization
from cluster.store.quantized_copy import CopyKey
from cluster.v1 import worker_pb2 as pb
from cluster.worker.engine_slots import EngineSlot
from cluster.worker.pipe_messages import Hello, LayOutCopy, Load, Progress, QuantizeLayers
from cluster.worker.stage_loader import StageWeights

__all__ = ["EngineCalls"]


@dataclass(frozen=True, slots=True)
class EngineCalls:
    """The engine's part of the load that ``request`` asks for; a ``StageEngine``. ``hello`` describes its device.

    ``require_term`` raises ``StaleTerm`` if the request's term is not the worker's any more.
    """

    slot: EngineSlot
    hello: Hello
    request: pb.LoadStageRequest
    require_term: Callable[[int], None]

    def copy_key(self) -> CopyKey:
        r, hello = self.request, self.hello
        return CopyKey(
            r.fingerprint,
            choose_weight_quantization(bits=r.weight_bits),
            versions=f"mlx {hello.mlx_version} mlx-lm {hello.mlx_lm_version}",
            device=f"{hello.chip} {hello.backend}",
        )

    def lay_out_copy(self, models: Path, source: Path) -> AsyncIterator[Progress]:
        key, r = self.copy_key().digest, self.request
        return self.slot.supervisor.events(
            lambda call: LayOutCopy(call, str(models), key, str(source), r.weight_bits, r.model)
        )

    def quantize(self, models: Path, source: Path) -> AsyncIterator[Progress]:
        key, r = self.copy_key().digest, self.request
        return self.slot.supervisor.events(
            lambda call: QuantizeLayers(call, str(models), key, str(source), r.weight_bits, r.start_layer, r.end_layer)
        )

    def read(self, weights: StageWeights) -> AsyncIterator[Progress]:
        self.slot.fingerprint = weights.fingerprint
        return self.slot.supervisor.events(lambda call: self._load_command(call, weights))

    def _load_command(self, call: int, weights: StageWeights) -> Load:
        """Return the command, as it is written to the engine: a term that is granted later is fenced behind it."""
        r = self.request
        self.require_term(r.term)
        return Load(
            call=call,
            epoch=r.epoch,
            index=r.index,
            count=r.count,
            model=r.model,
            path=str(weights.folder),
            fingerprint=weights.fingerprint,
            start_layer=r.start_layer,
            end_layer=r.end_layer,
            max_context=r.max_context,
            kv_bits=r.kv_bits,
            weight_bits=weights.weight_bits,
            memory_limit=r.memory_limit,
            term=r.term,
            rank=r.rank,
            ranks=max(r.ranks, 1),
            readers=max(r.readers, 1),
        )
