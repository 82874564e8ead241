"""Limits of sandbox processes: tokenizing, rendering chat templates, compiling grammars, reading tool calls."""

from __future__ import annotations

from typing import Final

from cluster.core.limits import GIB, KIB, MIB

SANDBOX_PROCESSES: Final = 2
"""Processes for text, and as many for grammars, so that a schema that keeps its process busy delays no prompt."""
SANDBOX_CPU_S: Final = 0.5
"""CPU time of one job. Ordinary prompts and schemas need 1 to 50 ms."""
SANDBOX_CPU_S_PER_MIB: Final = 2.0
"""Additional CPU time per MiB of text; tokenizers take 0.5 to 0.7 s."""
SANDBOX_MEMORY_BYTES: Final = 256 * MIB
"""Memory of one job beyond what its process holds, at least."""
SANDBOX_MEMORY_PER_BYTE: Final = 128
"""Memory per byte of text, if this and the next together are more. A single long word takes 100 to 127."""
SANDBOX_MEMORY_PER_TOKEN: Final = 256
"""Memory per token. In random printable text nearly every byte is a token; it takes 340 per byte in all."""
SANDBOX_WALL_FACTOR: Final = 20.0
"""A job may take this many times its CPU time while others use the processors; then the machine is overloaded."""
SANDBOX_OPEN_CPU_S: Final = 30.0
"""CPU time to load a tokenizer and prepare it for grammars; the largest take 5 s."""
SANDBOX_OPEN_MEMORY_BYTES: Final = 3 * GIB
"""Memory for the same; the largest take 1 GiB."""
SANDBOX_OPEN_WALL_S: Final = 120.0
SANDBOX_WARM_UP_CPU_S: Final = 5.0
"""CPU time to compile a chat template and render one message; the largest accepted one takes 2.2 s."""
LARGE_PROMPT_BYTES: Final = 256 * KIB
"""A larger prompt is tokenized in a separate process, one at a time: it takes half a second or more."""
MAX_SANDBOX_WAITING: Final = 256
"""Jobs that wait for a process; one more is refused with RESOURCE_EXHAUSTED."""
SANDBOX_WAIT_S: Final = 30.0
"""How long a job waits for a process before it is refused in the same way."""
SANDBOX_GROW_S: Final = 0.25
"""How long a job waits before another process is started, which takes a second of CPU."""
MEMORY_WATCH_S: Final = 0.1
"""Interval of checks of a busy process's memory; short jobs end before the first one."""
MAX_SANDBOX_MESSAGE_BYTES: Final = 64 * MIB
"""The longest prompt as text, or its tokens as texts."""
