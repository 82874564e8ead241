"""Tells who may have prefixes on the workers' disks: valid API keys and members, or anybody where no key is needed."""

from __future__ import annotations

from cluster.api.key_usage import client_of
from cluster.coordinator.prefix_disks import PrefixOwners
from cluster.core.prefix_keys import owner_key
from cluster.security.keys import KeyStore
from cluster.security.trust import Trust


def prefix_owners(keys: KeyStore | None, trust: Trust) -> PrefixOwners:
    """Return the present owners. ``keys`` None: no key is needed. Raises ``ClusterDamaged``."""
    clients = [client_of(key) for key in keys.all_keys() if key.revoked is None] if keys else []
    if trust.members:
        clients += [f"{member.role}.{member.id}" for member in trust.members.current()]
    return PrefixOwners(frozenset(map(owner_key, clients)), anonymous=keys is None)
