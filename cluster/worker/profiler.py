"""Sees to it that a worker has a profile before it is announced: the one it kept, or a new one from its engine."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import version
from pathlib import Path

from cluster import __version__
from cluster.core.errors import MacpipeError
from cluster.core.limits import PROFILE_TIMEOUT_S
from cluster.core.plan import Profile
from cluster.worker.pipe_messages import Measure, Measured
from cluster.worker.profile_file import ProfileFile
from cluster.worker.settings import Profiling, WorkerSettings
from cluster.worker.supervisor import Supervisor

log = logging.getLogger(__name__)
FORM = 2
"""Of the figures and of how they are measured; another one makes every kept profile void."""


async def ensure_profile(settings: WorkerSettings, supervisor: Supervisor) -> ProfileFile:
    """The worker's file, with a profile in it unless that is off or cannot be had; then its speed is unknown."""
    file = ProfileFile(_path(settings), _key(settings, supervisor))
    wanted = settings.profile is Profiling.NEW or not file.kept.profile.known
    if wanted and settings.profile is not Profiling.OFF:
        await measure(supervisor, file)
    return file


async def measure(supervisor: Supervisor, file: ProfileFile) -> None:
    """Have the engine time itself, and keep what it finds."""
    sys.stderr.write("measuring this machine's speed, once ...\n")
    try:
        found = await supervisor.ask(Measure, PROFILE_TIMEOUT_S)
    except MacpipeError as e:
        log.warning("this machine's speed was not measured, plans will go by memory: %s", e.sentence)
        return
    assert isinstance(found, Measured)
    file.put(Profile(found.bandwidth, found.layer_s, found.step_s, found.flops, found.row_cost))


def _path(settings: WorkerSettings) -> Path:
    file = "unprofiled.json" if settings.profile is Profiling.OFF else "profile.json"
    return settings.home / "workers" / settings.name / file


def _key(settings: WorkerSettings, supervisor: Supervisor) -> str:
    """What a measurement depends on."""
    hello = supervisor.hello
    device = (hello.chip, hello.backend, hello.mlx_version, hello.mlx_lm_version) if hello else ()
    throttle = () if settings.throttle == 1.0 else (f"throttle {settings.throttle:g}",)
    return " / ".join((f"form {FORM}", f"macpipe {__version__}", f"grpcio {version('grpcio')}", *device, *throttle))
