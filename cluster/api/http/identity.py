"""Ids of answers, calls and items: a prefix that says what it is, and randomness."""

from __future__ import annotations

import secrets


def new_id(prefix: str) -> str:
    """Such as ``chatcmpl-0f3a...``."""
    return f"{prefix}{secrets.token_hex(12)}"
