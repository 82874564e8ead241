"""Bounds of trust between the parties of a cluster, each with its reason; all others are in ``cluster.limits``."""

from __future__ import annotations

from typing import Final

REVOCATION_LOOK_S: Final = 1.0
"""How often open streams are looked over for parties that were removed meanwhile: three such looks, at the coordinator,
on the way and at a stage, are within the five seconds that a removal may take."""
CLOCKS_DIFFER_S: Final = 120.0
"""Two Macs whose clocks differ by more are told so; certificates bear a day."""
RENEWAL_SHARE: Final = 2 / 3
"""Of a certificate's life, after which it is renewed: a Mac may be off for a month and is let in still."""
RENEWAL_LOOK_S: Final = 10.0
"""How often a coordinator looks whose certificates are due."""
MAX_LEAVES_VALID: Final = 8
"""Certificates of one member that are valid at once, below MAX_SERIALS: none is forgotten that could be revoked."""
MAX_REVOKED: Final = 4096
"""Serials in one heartbeat; those of certificates that have ended by themselves are left out."""
MAX_PARTIES_KNOWN: Final = 1024
"""Certificates whose names a server has read and need not read again."""
STATE_LOCK_S: Final = 10.0
"""How long a command waits for another that edits the cluster's files; an edit takes milliseconds."""
BACKDATED_S: Final = 86_400.0
"""Certificates begin this long before they are made, so that a clock that is behind does not refuse them."""
