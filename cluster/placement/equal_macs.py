"""Take equal Macs for equally fast until their own frames say otherwise.

Other programs can only make a Mac look slower while it is measured, so the fastest of equal Macs was measured best. A
Mac whose frames were measured keeps its own profile: its corrections refer to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.plan import Profile
from cluster.core.worker import WorkerInfo

__all__ = ["trusted_profiles"]


def trusted_profiles(workers: Sequence[WorkerInfo]) -> list[Profile]:
    """Return the profile with which to plan each worker, in order."""
    return [_choose_profile(worker, workers) for worker in workers]


def _choose_profile(worker: WorkerInfo, workers: Sequence[WorkerInfo]) -> Profile:
    if not worker.chip or not worker.profile.known or worker.profile.corrections:
        return worker.profile
    equal = [w.profile for w in workers if _hardware(w) == _hardware(worker) and w.profile.known]
    return max(equal, key=lambda profile: (profile.bandwidth, len(profile.corrections)))


def _hardware(worker: WorkerInfo) -> tuple[str, int, int, str, str]:
    """Return what makes Macs equal. Macs of one chip differ in GPU cores, and the smaller memories may be slower."""
    return worker.chip, worker.gpu_cores, worker.memory_total, worker.backend, worker.mlx_version
