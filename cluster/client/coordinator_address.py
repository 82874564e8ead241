"""Chooses the coordinator's address: an argument, MACPIPE_COORDINATOR, a remembered one, this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.core.errors import InvalidOption
from cluster.core.follow_limits import MAX_COORDINATORS
from cluster.core.limits import DEFAULT_COORDINATOR_PORT
from cluster.core.text import format_address, parse_address
from cluster.platform.paths import state_home
from cluster.security.cluster_choice import is_member, remembered_coordinator, resolve_cluster

COORDINATOR_VARIABLE: Final = "MACPIPE_COORDINATOR"
DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = DEFAULT_COORDINATOR_PORT


@dataclass(frozen=True, slots=True)
class CoordinatorChoice:
    """The coordinators that a client calls. ``named``: the user named them, so no other one is looked for."""

    addresses: tuple[str, ...]
    home: Path
    cluster: str
    named: bool

    @property
    def address(self) -> str:
        """The address that is called first."""
        return self.addresses[0]

    def find(self) -> str:
        """Return the address at which the coordinator answers now, as ``coordinator_search`` says; may block."""
        if self.named or not is_member(self.home, self.cluster):
            return self.address
        from cluster.client.coordinator_search import find_coordinator

        return find_coordinator(self.home, self.cluster, self.address)


def choose_coordinator(given: str | None, cluster: str | None) -> CoordinatorChoice:
    """Choose by what the caller gave, the environment, and what ``macpipe join`` or ``serve`` remembered.

    Raise InvalidOption for an invalid address (a URL, a port out of range), naming the option or variable.
    """
    home = state_home()
    name = resolve_cluster(cluster, home)
    if named := given or os.environ.get(COORDINATOR_VARIABLE):
        source = "--coordinator" if given else COORDINATOR_VARIABLE
        return CoordinatorChoice(parse_coordinators(named, source), home, name, named=True)
    remembered = remembered_coordinator(home, name) if is_member(home, name) else None
    return CoordinatorChoice((remembered or format_address(DEFAULT_HOST, DEFAULT_PORT),), home, name, named=False)


def parse_coordinators(written: str, source: str) -> tuple[str, ...]:
    """Return the addresses in a list with commas, each once. Raise InvalidOption, naming ``source``."""
    addresses = tuple(dict.fromkeys(parse_coordinator(one, source) for one in written.split(",")))
    if len(addresses) > MAX_COORDINATORS:
        raise InvalidOption(
            f"{source}: {len(addresses)} addresses were given; give at most {MAX_COORDINATORS}", field="coordinator"
        )
    return addresses


def parse_coordinator(written: str, source: str) -> str:
    """Return ``host:port``. A host without a port gets the default port. Raise InvalidOption, naming ``source``."""
    written = written.strip()
    has_no_port = ":" not in written or written.endswith("]")
    try:
        return format_address(*parse_address(f"{written}:{DEFAULT_PORT}" if has_no_port else written))
    except InvalidOption as wrong:
        raise InvalidOption(f"{source}: {wrong.sentence}", field="coordinator") from None
