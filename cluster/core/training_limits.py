"""Limits of fine-tuning: sizes of what crosses the wire, and deadlines."""

from __future__ import annotations

from typing import Final

from cluster.core.limits import GIB, MIB

MAX_SEQUENCE: Final = 131_072
"""Tokens of one training sequence."""
MAX_MODULE_NAMES: Final = 1024
"""Modules that may be named as those that get adapters."""
MAX_TRAINING_HEADER_BYTES: Final = 4 * MIB
MAX_STATE_TENSORS: Final = 8192
"""Tensors and names of one message; also the parameters that one stage may train."""
STATE_PART_TENSORS: Final = 1024
STATE_PART_BYTES: Final = 32 * MIB
"""A stage's state is sent in parts of about this size. A larger tensor is a part of its own."""
MAX_COMMANDS_WAITING: Final = 64
"""Commands that wait on one stage. The coordinator sends a few batches ahead."""
MAX_STATE_BYTES: Final = 4 * GIB
"""Adapters and optimizer of all stages together, which the coordinator keeps for a lost worker."""
MAX_BATCH_BYTES: Final = 192 * MIB
"""A batch of tokens in a message: MAX_ROWS sequences of MAX_SEQUENCE tokens."""
MAX_DATA_BYTES: Final = GIB
"""Training data that a client may send."""
DATA_CHUNK_BYTES: Final = MIB
"""Data and adapters are sent in pieces of this size."""
DATA_TIMEOUT_S: Final = 1800.0
"""How long tokenizing the data may take, and later each batch."""
DATA_MEMORY_BYTES: Final = 16 * GIB
"""Memory of the process that holds the tokenized data: about 40 bytes a token."""
DATA_WATCH_S: Final = 1.0
PREPARE_TIMEOUT_S: Final = 900.0
"""How long a stage may take to make its adapters: it reads its weights again."""
STEP_FLOOR_S: Final = 300.0
"""Least time that a stage has for a step of training before it counts as lost."""
STEP_FACTOR: Final = 20.0
"""It has at least this many times the longest step so far."""
KEEP_INTERVAL_S: Final = 60.0
"""The state is kept after so much time even if no adapters are due. Keeping it empties the stages for a moment."""
TRAINING_WAIT_S: Final = 600.0
"""How long a training waits for enough Macs after a loss before it ends."""
MAX_ENGINE_LOSSES: Final = 3
"""Losses without a finished batch between them after which a training ends: the stage itself must be at fault."""
MAX_EVENTS_WAITING: Final = 1024
"""Events that wait for a client to read them."""
