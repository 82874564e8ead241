"""Limits, sizes and deadlines of the store, each with its reason."""

from __future__ import annotations

from typing import Final

from cluster.core.limits import GIB, KIB, MIB

MAX_STORE_ANSWER_BYTES: Final = 2 * MIB
"""Size of a store's answer: PEER_CHUNK_BYTES of a file, or MAX_MODEL_FILES names."""
FETCH_STREAMS: Final = 4
"""Ranges that one Mac fetches at once: enough to fill a home's line, few enough for the hub's limits."""
FETCH_RANGE_BYTES: Final = 64 * MIB
"""Adjacent tensors are requested together up to this size; a longer tensor is requested alone."""
FETCH_COMMIT_BYTES: Final = 8 * MIB
"""Size of the pieces in which fetched ranges are committed, and so the most that a kill can lose, ..."""
FETCH_COMMIT_S: Final = 1.0
"""... or what arrived in this time, if that is less."""
FETCH_ATTEMPTS: Final = 5
"""Attempts at one range from one source that bring no byte."""
FETCH_BACKOFF_S: Final = 0.5
"""Delay before the second attempt; doubled for each further one."""
HUB_TIMEOUT_S: Final = 10.0
"""An attempt fails if the hub is silent for this long."""
HUB_PEEK_BYTES: Final = 64 * KIB
"""First range of a large file: most headers are shorter."""
MAX_MODEL_FILES: Final = 4096
"""Files of one model; the largest have a few hundred."""
MAX_MODEL_BYTES: Final = 8 * 1024 * GIB
"""Size of all files of one model; file systems accept holes of this size."""
MAX_MODEL_READ_BYTES: Final = GIB
"""Size of one model's small files and headers, which are read before anything else is known of it."""
MAX_VERSION_BYTES: Final = 4 * KIB
"""Size of a record that says which folder has a version of a model."""
MAX_TENSOR_MAP_BYTES: Final = 64 * MIB
"""Size of the record that names the tensors of each layer of a quantized copy: 200,000 names."""
LEFTOVER_S: Final = 86_400.0
"""Age of what an interrupted fetch left before it is removed: no step of a fetch takes a day."""
DEFER_S: Final = 15.0
"""How long a worker waits for another that should fetch a tensor for both but does not report it."""
CHECK_S: Final = 900.0
"""How long a worker waits for another that hashes its files: half a terabyte from an ordinary SSD."""
MAX_NOTICES: Final = 8
"""Notices about one load. A person reads no more, and the log has all of them."""
PEER_CHUNK_BYTES: Final = 1 * MIB
PEER_CALL_TIMEOUT_S: Final = 300.0
"""Deadline of a call for FETCH_RANGE_BYTES to a peer: at least 2 Mbit/s."""
STORE_READERS: Final = 8
"""Calls for bytes that one Mac answers at once; further calls are told to retry."""
MAX_TENSORS_NAMED: Final = 4096
"""Tensors in one message about tensors: under 1 MiB."""
MAX_CHECKPOINT_TENSORS: Final = 1_000_000
HASH_THREADS: Final = 2
"""A core hashes 1 to 2 GB/s; then the disk is the limit."""
DISK_MARGIN_BYTES: Final = 512 * MIB
"""Free space that is kept: a full disk makes a Mac unusable."""
