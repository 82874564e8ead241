"""What a command that edits the cluster's files says of the standbys: whether they have the edit."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.core.leadership import StandbyState
    from cluster.security.cluster_folder import ClusterFolder

__all__ = ["StandbyFacts", "confirm_keys", "confirm_members", "print_standbys"]


@dataclass(frozen=True, slots=True)
class StandbyFacts:
    """Which standbys have stored an edit, and which have not, as JSON. ``problem``: no leader answers."""

    stored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    problem: str = ""


def confirm_members(folder: ClusterFolder) -> StandbyFacts | None:
    """Wait a few seconds until the standbys have the roster; None if this Mac knows of no other coordinator."""
    from cluster.coordinator.state_files import MEMBERS_FILE

    return _confirm(folder, MEMBERS_FILE)


def confirm_keys(folder: ClusterFolder) -> StandbyFacts | None:
    """Wait a few seconds until the standbys have the API keys; None if this Mac knows of no other coordinator."""
    from cluster.coordinator.state_files import KEYS_FILE

    return _confirm(folder, KEYS_FILE)


def _confirm(folder: ClusterFolder, name: str) -> StandbyFacts | None:
    from cluster.core.errors import MacpipeError
    from cluster.standby.edit_confirmation import confirm_edit

    try:
        edit = confirm_edit(folder.home, folder.cluster, name)
    except MacpipeError as e:
        return StandbyFacts(problem=e.sentence)
    if edit is None:
        return None
    return StandbyFacts(_names(edit.stored), tuple(f"{one.name}: {one.problem}" for one in edit.missing))


def _names(standbys: tuple[StandbyState, ...]) -> tuple[str, ...]:
    return tuple(one.name for one in standbys)


def print_standbys(facts: StandbyFacts | None) -> None:
    """Say on stdout which standbys have an edit, and on stderr which have not."""
    if facts is None:
        return
    if facts.stored:
        sys.stdout.write(f"stored by the standbys too: {', '.join(facts.stored)}\n")
    for one in facts.missing:
        sys.stderr.write(f"warning: not stored yet by the standby {one}; until it is, do not let it lead\n")
    if facts.problem:
        sys.stderr.write(
            f"warning: done on this Mac alone so far: {facts.problem}; other coordinators learn of it once one leads\n"
        )
