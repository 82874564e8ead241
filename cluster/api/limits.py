"""Bounds on one request, over HTTP and gRPC, each with its reason. All other limits are in ``cluster.core.limits``."""

from __future__ import annotations

from typing import Final

from cluster.core.limits import KIB, MAX_MESSAGES, MIB

MAX_ELEMENTS: Final = 64 * KIB
"""Commas in one body outside strings; also the bound on brackets and colons. 4,096 messages with parts have 50,000."""
MAX_NUMBER_BYTES: Final = 8 * MIB
"""Bytes outside of strings that are not white space: a million token ids. Long numbers cost the parser most."""
MAX_PARTS: Final = 4096
"""Parts in one message's content."""
MAX_ITEMS: Final = 3 * MAX_MESSAGES
"""Input items of a request to /v1/responses: reasoning, a call and its output (three items) make two messages."""
MAX_TURN_CALLS: Final = 256
"""Tool calls in one message."""
MAX_NAME_CHARS: Final = 1024
"""Characters in a model name, or in an id that the client chooses."""
MAX_JSON_VALUES: Final = 16 * KIB
"""Values in one JSON object whose fields the client defines: a schema, or arguments."""
MAX_WORDS: Final = 16
"""Entries in a list of keywords, such as ``include`` or ``modalities``."""
MAX_EMBEDDED: Final = 2048
"""Texts of one request that asks for embeddings, as at OpenAI."""
CONCURRENT_EMBEDDINGS: Final = 32
"""Texts of one request that are computed at the same time. They share a batch; more would fill the queue for others."""
MAX_METADATA: Final = 64
"""Entries of a response's metadata; OpenAI takes 16."""
MAX_IGNORED_CHARS: Final = KIB
"""Characters in the list of ignored fields that a response sends in its header."""
MAX_TOOLS_CHARS: Final = MIB
"""Characters in the descriptions and schemas of all tools of a request. Also the largest --max-schema-bytes."""
