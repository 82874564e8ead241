"""Limits, sizes and deadlines of links between workers: how they are measured, kept and chosen."""

from __future__ import annotations

from typing import Final

from cluster.core.limits import KIB, MIB

PROBES: Final = 12
"""Empty messages that measure a link's round trip."""
PROBE_BYTES: Final = MIB
PROBE_MESSAGES: Final = 8
"""Messages that measure its bandwidth: 8 MiB are 70 ms at 1 Gb/s."""
PROBE_TIMEOUT_S: Final = 5.0
LINK_KEPT_S: Final = 24 * 3600.0
"""A link that was measured within a day is not measured again before a load."""
DECODE_FRAME_BYTES: Final = 16 * KIB
PREFILL_FRAME_BYTES: Final = 8 * MIB
"""Activations of one token, and of a chunk of a prompt, in a model of 70 billion parameters."""
MAX_DATA_HOSTS: Final = 16
"""Addresses at which one data port listens."""
MAX_SHARED_HOSTS: Final = 4
"""Addresses of one worker over which another measures the link: the usual one and three more."""
REACH_TIMEOUT_S: Final = 1.5
"""Time limit of a connection that shows whether an address can be reached. It takes milliseconds on a local network,
and a second more if a packet is lost."""
LINKS_S: Final = 30.0
"""Interval at which an idle coordinator looks for a better link between two stages."""
RELINK_S: Final = 600.0
"""The same after it has found one: a link that cannot be used after all must not interrupt answers again and again."""
LINK_GAIN: Final = 1.5
"""How many times better a link must be before the stages are linked again."""
DATA_HOSTS_S: Final = 10.0
"""Interval at which a worker looks for addresses that appeared or went."""
KEPT_LINKS: Final = 128
"""Eight other Macs over the addresses that they share, and as many that have left."""
