"""Bounds of one request, over HTTP and gRPC, each with its reason. ``cluster.core.limits`` has all others."""

from __future__ import annotations

from typing import Final

from cluster.core.limits import KIB, MAX_MESSAGES, MIB

MAX_INTAKE_BYTES: Final = 96 * MIB
"""Bytes of all requests under way, arrived or still arriving; one client gets at most half of it."""
FREE_BODY_BYTES: Final = 64 * KIB
"""The start of each body is not charged, so that ordinary requests pass while large ones fill the budget; with
``MAX_CONNECTIONS`` of them that is 128 MiB."""
MAX_ELEMENTS: Final = 64 * KIB
"""Commas in one body, outside of strings, and as many brackets and colons. 4,096 messages with parts have 50,000."""
MAX_NUMBER_BYTES: Final = 8 * MIB
"""Bytes outside of strings that are not white space: a million token ids. Long numbers cost the parser most."""
MAX_PROMPT_IDS: Final = MIB
"""A prompt that is given as token ids."""
MAX_PARTS: Final = 4096
"""Parts of one message's content."""
MAX_ITEMS: Final = 3 * MAX_MESSAGES
"""Items of a response's input: reasoning, a call, and its output make two messages."""
MAX_TURN_CALLS: Final = 256
"""Calls of tools in one message."""
MAX_NAME_CHARS: Final = 1024
"""A model's name, or an id that a client keeps."""
MAX_JSON_VALUES: Final = 16 * KIB
"""Values in one JSON object whose fields are the client's own: a schema, arguments."""
MAX_WORDS: Final = 16
"""Entries of a list whose entries are words that the form names."""
MAX_METADATA: Final = 64
"""Entries of a response's metadata; OpenAI takes 16."""
MAX_FIELDS: Final = 32 * KIB
"""Fields of one gRPC request, those of its submessages included: 4,096 messages with a call each have 32,000."""
MAX_TOOLS_CHARS: Final = MIB
"""Descriptions and schemas of all tools of a request: what --max-schema-bytes may be at most."""
