"""Provide a worker's profile before it is announced: the stored one, or a new one that its engine measures."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import version
from pathlib import Path

from cluster import __version__
from cluster.core.errors import MacpipeError
from cluster.core.limits import PROFILE_TIMEOUT_S
from cluster.worker.pipe_messages import Measure, Measured
from cluster.worker.profile_file import ProfileFile
from cluster.worker.settings import Profiling, WorkerSettings
from cluster.worker.supervisor import Supervisor

log = logging.getLogger(__name__)
FORMAT = 2
"""Version of the figures and of their measurement; a new one makes every stored profile invalid."""


async def ensure_profile(settings: WorkerSettings, supervisor: Supervisor) -> ProfileFile:
    """Return the worker's file with a profile, or without one if that is off or fails; then its speed is unknown."""
    file = ProfileFile(_profile_path(settings), _profile_key(settings, supervisor))
    wanted = settings.profile is Profiling.NEW or not file.kept.profile.known
    if wanted and settings.profile is not Profiling.OFF:
        await request_measurement(supervisor, file)
    return file


async def request_measurement(supervisor: Supervisor, file: ProfileFile) -> None:
    """Have the engine measure itself, and store the result."""
    sys.stderr.write("measuring this machine's speed, once ...\n")
    try:
        found = await supervisor.ask(Measure, PROFILE_TIMEOUT_S)
    except MacpipeError as e:
        log.warning("profile: speed not measured, plans use memory alone reason=%s", e.sentence)
        return
    assert isinstance(found, Measured)
    file.put(found.profile)


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
