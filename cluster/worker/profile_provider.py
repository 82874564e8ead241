"""Provide a worker's profile before it is announced: the stored one, or a new one that its engine measures."""

from __future__ import annotations

import logging
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Final

import anyio

from cluster import __version__
from cluster.core.errors import MacpipeError
from cluster.core.limits import PROFILE_TIMEOUT_S
from cluster.core.plan import Profile
from cluster.worker.pipe_messages import Measure, Measured
from cluster.worker.profile_file import ProfileFile
from cluster.worker.settings import Profiling, WorkerSettings
from cluster.worker.supervisor import Supervisor

log = logging.getLogger(__name__)
FORMAT = 3
"""Version of the figures and of their measurement; a new one makes every stored profile invalid."""
MAX_TRIES: Final = 3
"""Measurements at one start."""
PAUSE_S: Final = 1.0
"""Time between two measurements, in which a short disturbance may end."""
MAX_S: Final = 10.0
"""No measurement begins later than this after the first: a worker that starts is waited for."""


async def ensure_profile(settings: WorkerSettings, supervisor: Supervisor) -> ProfileFile:
    """Return the worker's file with a profile, or without one if that is off or fails; then its speed is unknown."""
    file = ProfileFile(_profile_path(settings), _profile_key(settings, supervisor))
    wanted = settings.profile is Profiling.NEW or not file.kept.profile.known or bool(file.kept.disturbed)
    if wanted and settings.profile is not Profiling.OFF:
        await request_measurement(supervisor, file)
    return file


async def request_measurement(supervisor: Supervisor, file: ProfileFile, pause_s: float = PAUSE_S) -> None:
    """Have the engine measure itself, and store the result.

    A disturbed measurement is repeated after a pause, ``MAX_TRIES`` times in all. The fastest counts if all were
    disturbed: what disturbs only ever makes the machine look slower.
    """
    sys.stderr.write("measuring this machine's speed, once ...\n")
    fastest: Measured | None = None
    began = time.monotonic()
    for tries in range(1, MAX_TRIES + 1):
        try:
            found = await supervisor.ask(Measure, PROFILE_TIMEOUT_S)
        except MacpipeError as e:
            log.warning("profile: speed not measured, plans use memory alone reason=%s", e.sentence)
            break
        assert isinstance(found, Measured)
        if not found.disturbed:
            file.put(found.profile)
            return
        log.info("profile: disturbed measurement reason=%s tries=%d", found.disturbed, tries)
        if fastest is None or found.bandwidth > fastest.bandwidth:
            fastest = found
        if tries == MAX_TRIES or time.monotonic() - began > MAX_S:
            break
        await anyio.sleep(pause_s)
    if fastest:
        log.warning("profile: may be too slow, the next start measures again reason=%s", fastest.disturbed)
        if _is_faster(fastest.profile, file):
            file.put(fastest.profile, fastest.disturbed)


def _is_faster(profile: Profile, file: ProfileFile) -> bool:
    """Return whether a disturbed measurement is better than what is stored."""
    return profile.bandwidth > file.kept.profile.bandwidth


def _profile_path(settings: WorkerSettings) -> Path:
    file = "unprofiled.json" if settings.profile is Profiling.OFF else "profile.json"
    return settings.home / "workers" / settings.name / file


def _profile_key(settings: WorkerSettings, supervisor: Supervisor) -> str:
    """Return a text of everything that a measurement depends on."""
    hello = supervisor.hello
    device = (hello.chip, hello.backend, hello.mlx_version, hello.mlx_lm_version) if hello else ()
    throttle = () if settings.throttle == 1.0 else (f"throttle {settings.throttle:g}",)
    versions = (f"form {FORMAT}", f"macpipe {__version__}", f"grpcio {version('grpcio')}")
    return " / ".join((*versions, *device, *throttle))
