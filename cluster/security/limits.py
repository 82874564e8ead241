"""Limits of the trust between a cluster's parties, each with its reason. All others are in ``cluster.core.limits``."""

from __future__ import annotations

from typing import Final

from cluster.core.limits import KIB, MIB

REVOCATION_LOOK_S: Final = 1.0
"""Interval at which servers check open streams for removed parties. Three such checks (coordinator, a worker on the
way, a stage) fit into the five seconds that a removal may take."""
CLOCKS_DIFFER_S: Final = 120.0
"""Two Macs whose clocks differ by more are warned; certificates tolerate a day."""
RENEWAL_SHARE: Final = 2 / 3
"""Share of a certificate's life after which it is renewed. A Mac may be off for a month and still get in."""
RENEWAL_LOOK_S: Final = 10.0
"""Interval at which a coordinator looks for certificates that are due."""
CLIENT_RENEWAL_LOOK_S: Final = 600.0
"""Interval at which a client looks whether its certificate is due. Timers stand still while a Mac sleeps."""
RENEWAL_SPREAD: Final = 0.05
"""Share of a certificate's life over which the clients of one machine, which share a certificate, spread renewals."""
MIN_RENEWAL_RETRY_S: Final = 1.0
MAX_RENEWAL_RETRY_S: Final = 3600.0
"""Bounds of the wait after a client's failed renewal: a tenth of the certificate's remaining life."""
RENEWAL_CLOSE_S: Final = 2.0
"""How long closing a client waits for a renewal that has begun. A renewal takes milliseconds."""
OFFER_S: Final = 60.0
"""How long the key is good that a coordinator offers for the move of the authority to its Mac, which takes a second."""
MAX_HTTP_HOSTS: Final = 64
"""Host names and addresses in a certificate for HTTPS; a Mac has a few interfaces."""
MAX_LEAVES_VALID: Final = 8
"""Certificates of one member that may be valid at once. It is below MAX_SERIALS, so that every certificate that might
have to be revoked is remembered."""
MAX_REVOKED: Final = 4096
"""Serials in one heartbeat. Certificates that have expired are left out."""
MAX_PARTIES_KNOWN: Final = 1024
"""Certificates whose parsed names a server caches."""
STATE_LOCK_S: Final = 10.0
"""How long a command waits for another that edits the cluster's files; an edit takes milliseconds."""
BACKDATED_S: Final = 86_400.0
"""Certificates start this long before they are made, so that a Mac whose clock is slow accepts them."""

# Membership
AUTHORITY_S: Final = 10 * 365 * 86_400.0
"""The authority outlives the Macs: replacing it means that every Mac joins again."""
LEAF_S: Final = 90 * 86_400.0
"""A lost certificate expires within three months. Certificates in use are renewed long before."""
MAX_MEMBERS: Final = 1024
"""Members that a roster keeps, removed ones included: many times MAX_ROSTER workers."""
MAX_SERIALS: Final = 64
"""Certificates of one member that may be valid at a time; it has one or two."""
MAX_NAME_CHARS: Final = 63
"""Length of a cluster's or member's name. It names a folder, and a certificate's common name has at most 64."""
MAX_STATE_BYTES: Final = 4 * MIB
"""A cluster's roster, tokens or keys on disk; the longest allowed ones have about 2 MiB."""
MAX_PEM_BYTES: Final = 16 * KIB
"""Size of a certificate, a key or a certificate request. Ours have under 1 KiB."""
MAX_KEYS: Final = 1024
"""API keys that are kept, revoked ones included."""
MAX_KEY_CHARS: Final = 256
"""A key has 60 characters; a longer text is refused."""

# Joining
TOKEN_S: Final = 3600.0
"""A join token lasts long enough to walk from Mac to Mac."""
MIN_TOKEN_S: Final = 60.0
MAX_TOKEN_S: Final = 7 * 86_400.0
"""A token that lasts longer is a password that nobody remembers."""
MAX_TOKENS: Final = 1024
"""Join tokens that are kept. A token is forgotten a day after it ended."""
MAX_TOKEN_CHARS: Final = 256
"""A token has 80 characters; a longer text is refused unread."""
MAX_JOIN_BYTES: Final = 24 * KIB
"""Size of a message of either side of a join: the longest PEM with escaped line ends, and the other fields. Strangers
send it, and 64 KiB of empty lists took 0.1 s of the event loop."""
MAX_JOIN_VALUES: Final = 128
"""Commas and opening brackets in a message of a join, which has six fields and a name of 63 characters. An error for
each of 7,000 values would take 0.1 s of the event loop, and 32 such requests may come at once."""
JOIN_S: Final = 10.0
"""Time that a connection to the join port may last, from its first packet to its last."""
JOIN_HANDSHAKE_S: Final = 5.0
MAX_JOINS: Final = 32
"""Connections to the join port at once. One more is closed immediately, and its Mac tries again."""
WRONG_SECRETS: Final = 5.0
"""Wrong secrets a second that get an answer of their own. Guessing 128 bits is hopeless in any case."""
JOIN_SEARCH_S: Final = 20.0
"""Time that a Mac spends on looking for the coordinator of its token."""
JOIN_TRY_S: Final = 5.0
"""Time that one candidate address gets to show its authority."""
JOIN_TRIES: Final = 8
"""Addresses that are tried at once."""
MAX_JOIN_TRIED: Final = 256
"""Addresses that are tried in all, however many are announced: 8 at once, of 64 known at a time."""
JOIN_RETRY_S: Final = 0.5
"""Pause between two tries of a join port that is full."""
DEFAULT_JOIN_PORT: Final = 7701
