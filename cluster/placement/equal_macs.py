"""Take equal Macs for equally fast until their own frames say otherwise.

Other programs can only make a Mac look slower while it is measured, so the fastest of equal Macs was measured best. A
Mac whose frames were measured keeps its own profile: its corrections refer to it. How far apart the speeds of equal
Macs must be before a plan cuts by them is decided in ``search``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from cluster.core.limits import CORRECTION_BOUND, EQUAL_MACS_RATIO
from cluster.core.plan import LayerRange, ModelShape, Profile
from cluster.core.worker import WorkerInfo
from cluster.placement.predicted_step_time import decode_s

__all__ = ["Hardware", "hardware", "trusted_profiles"]

Hardware = tuple[str, int, int, str, str]


def hardware(worker: WorkerInfo) -> Hardware | None:
    """Return what makes Macs equal; None if the chip is unknown.

    Macs of one chip differ in GPU cores, and the smaller memories may be slower.
    """
    if not worker.chip:
        return None
    return worker.chip, worker.gpu_cores, worker.memory_total, worker.backend, worker.mlx_version


def trusted_profiles(shape: ModelShape, workers: Sequence[WorkerInfo]) -> list[Profile]:
    """Return the profile with which to plan each worker for the model, in order."""
    return [_choose_profile(shape, worker, workers) for worker in workers]


def _choose_profile(shape: ModelShape, worker: WorkerInfo, workers: Sequence[WorkerInfo]) -> Profile:
    own = worker.profile
    if hardware(worker) is None or not own.known or _is_judged(shape, own):
        return own
    equal = [w.profile for w in workers if hardware(w) == hardware(worker) and w.profile.known]
    fastest = min(equal, key=partial(_whole_s, shape))
    judged = [profile for profile in equal if _is_judged(shape, profile)]
    if not judged:
        return fastest
    best = min(judged, key=partial(_whole_s, shape))
    known_s = min(_whole_s(shape, best), _whole_s(shape, replace(best, corrections=())))
    return fastest if _whole_s(shape, fastest) * EQUAL_MACS_RATIO < known_s else best


def _is_judged(shape: ModelShape, profile: Profile) -> bool:
    """Return whether frames have said how fast the Mac is. A correction at its bound says only that more is wrong."""
    return bool(profile.corrections) and profile.correction(shape.model.fingerprint) > 1 / CORRECTION_BOUND


def _whole_s(shape: ModelShape, profile: Profile) -> float:
    """Return the seconds of a decode step of the whole model."""
    return decode_s(shape, profile, LayerRange(0, shape.layers))
