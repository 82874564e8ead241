"""Bounds of trust between the parties of a cluster, each with its reason; all others are in ``cluster.core.limits``."""

from __future__ import annotations

from typing import Final

from cluster.core.limits import KIB, MIB

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

# Who belongs to a cluster
AUTHORITY_S: Final = 10 * 365 * 86_400.0
"""A cluster's authority outlives its Macs; it cannot be renewed without joining anew."""
LEAF_S: Final = 90 * 86_400.0
"""A certificate that was lost sight of ends by itself in a season; those in use are renewed long before."""
MAX_MEMBERS: Final = 1024
"""Certificates' holders that a roster keeps: MAX_ROSTER workers many times over, removed ones included."""
MAX_SERIALS: Final = 64
"""Certificates of one member that may be valid at a time; it has one or two."""
MAX_NAME_CHARS: Final = 63
"""Of a cluster or a member: they name folders, and a certificate's common name has at most 64."""
MAX_STATE_BYTES: Final = 4 * MIB
"""A cluster's roster, tokens or keys on disk; the longest allowed ones have about 2 MiB."""
MAX_PEM_BYTES: Final = 16 * KIB
"""A certificate, a key or a request for one; ours have under 1 KiB."""
MAX_KEYS: Final = 1024
"""API keys that are kept, revoked ones included."""

# Joining
TOKEN_S: Final = 3600.0
"""A join token lasts as long as it takes to walk from Mac to Mac."""
MIN_TOKEN_S: Final = 60.0
MAX_TOKEN_S: Final = 7 * 86_400.0
"""A token that lasts longer is a password that nobody remembers."""
MAX_TOKENS: Final = 1024
"""Join tokens that are kept; those that ended a day ago are forgotten."""
MAX_TOKEN_CHARS: Final = 256
"""A token has 80; whatever is longer is none."""
MAX_JOIN_BYTES: Final = 24 * KIB
"""What either side of a join may say: the longest PEM, with its line ends escaped, and the rest. Strangers send it, and
64 KiB of empty lists kept the event loop for 0.1 s."""
MAX_JOIN_VALUES: Final = 128
"""Commas and opening brackets in what is said at a join, which has six fields, and a name of 63 characters. An error
for each of 7,000 values would take 0.1 s of the event loop, and 32 such requests may come at once."""
JOIN_S: Final = 10.0
"""How long a connection to the join port may last, from its first packet to its last."""
JOIN_HANDSHAKE_S: Final = 5.0
MAX_JOINS: Final = 32
"""Connections to the join port at once; one more is closed at once, and its Mac tries again."""
WRONG_SECRETS: Final = 5.0
"""Wrong secrets a second that get an answer to themselves; against 128 bits, guessing takes for ever anyway."""
JOIN_SEARCH_S: Final = 20.0
"""How long a Mac looks for the coordinator of its token."""
JOIN_TRY_S: Final = 5.0
"""What one address that may be the coordinator's gets to show its authority."""
JOIN_TRIES: Final = 8
"""Addresses that are tried at once."""
MAX_JOIN_TRIED: Final = 256
"""Addresses that are tried in all, however many announce themselves: 8 at once, 64 of which are known at a time."""
JOIN_RETRY_S: Final = 0.5
"""Between two tries of a join port that is full."""
DEFAULT_JOIN_PORT: Final = 7701
