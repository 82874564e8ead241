"""Limits, sizes and deadlines of prefixes on disk, each with its reason."""

from __future__ import annotations

from typing import Final

from cluster.core.limits import MIB

DISK_NODE_TOKENS: Final = 512
"""Tokens of a piece on disk: 2 MiB per layer of a 70B model, and few tokens to read again at the end of a match."""
MAX_DISK_NODES: Final = 8192
"""Beginnings that one worker keeps on disk and tells its coordinator: 160 KiB, below MAX_ANSWER_BYTES."""
MAX_PIECE_BYTES: Final = 256 * MIB
"""Size of one file: the state of a cache that cannot be trimmed, or the rows of one layer."""
MAX_PIECE_HEADER_BYTES: Final = MIB
MIN_DISK_GAIN: Final = 256
"""A prefix is read from disk only if that saves the prefill of this many tokens."""
DISK_READ_S: Final = 30.0
"""Deadline of a read from disk; less if prefilling takes less, ..."""
LEAST_DISK_READ_S: Final = 1.0
"""... but at least this, since a call alone may take a part of it on a busy machine."""
DISK_OPEN_S: Final = 5.0
"""Time for a worker to delete what it must not keep and to list what it has on disk."""
DISK_FLUSH_S: Final = 1.0
"""Time for writing what is not on disk yet when a stage is unloaded; less than UNLOAD_TIMEOUT_S."""
PIECES_AHEAD: Final = 2
"""Pieces that wait to be written: while one is being written, the next one is copied."""
MAX_DISK_READS: Final = 16
"""Reads that wait on one worker; with one more, the prompt is prefilled."""
MAX_DISK_OWNERS: Final = 4096
"""Owners whose files a coordinator lets a worker keep: its keys and members."""
ASSUMED_DISK_BANDWIDTH: Final = 1e9
"""Bytes a second of a disk until a read was timed. A Mac's own SSD has 3 to 7e9."""
