"""Rate limits and usage of each API key: requests, tokens and concurrency. It only counts; it reads no request.

Requests and tokens have a token bucket each, which holds one minute's worth and refills evenly. Prompt tokens are
charged before the prompt is processed, answer tokens as they are generated. Answer tokens may push the level below
zero; the next request then waits that much longer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from cluster.core.errors import LimitReached, Unauthenticated
from cluster.core.limits import RETRY_AFTER_S
from cluster.security.keys import ApiKey, KeyStore
from cluster.security.limits import MAX_KEYS

_MINUTE_S: Final = 60.0
_CODE: Final = "rate_limit_exceeded"
_OWNER: Final = "key:"


def has_key(client: str) -> bool:
    """Return whether a client's name is that of an API key."""
    return client.startswith(_OWNER)


def client_of(key: ApiKey) -> str:
    """Return the client name of a key. Scheduling is fair between clients, and cached prefixes are per client."""
    return f"{_OWNER}{key.id}"


class TokenBucket:
    """A bucket with room for ``most``, refilled with ``most`` per minute; ``now`` is in seconds of any one clock."""

    def __init__(self, most: int, now: float) -> None:
        self.most = most
        self._level = float(most)
        self._updated = now

    def level(self, now: float) -> float:
        """Return the current level; negative if more was taken than it held."""
        self._level = min(self.most, self._level + (now - self._updated) * self.most / _MINUTE_S)
        self._updated = now
        return self._level

    def take(self, count: float, now: float) -> None:
        """Take ``count``, even if the level becomes negative."""
        self._level = self.level(now) - count

    def wait_s(self, count: float, now: float) -> float:
        """Return the seconds until the bucket holds ``count``, or until it is full if ``count`` exceeds ``most``."""
        return max(0.0, (min(count, self.most) - self.level(now)) * _MINUTE_S / self.most)


@dataclass(slots=True)
class _Usage:
    """The usage of one key; a bucket is None where the key has no limit."""

    key: ApiKey
    requests: TokenBucket | None
    tokens: TokenBucket | None
    running: int = field(default=0)


class KeyUsage:
    """The usage of all keys of one coordinator. Use it from the coordinator's event loop only."""

    def __init__(self, keys: KeyStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._clock = clock
        self._usages: dict[str, _Usage] = {}

    def identify(self, given: Sequence[str]) -> ApiKey:
        """Return the first valid key among the given texts. Raises ``Unauthenticated`` if there is none."""
        key = next((found for text in given if (found := self._keys.find(text))), None)
        if key:
            return key
        if given:
            raise Unauthenticated(
                "the API key is unknown or was revoked; `macpipe key list` on the coordinator's Mac lists the valid "
                "keys",
                code="invalid_api_key",
            )
        raise Unauthenticated(
            "an API key is required: send it as `Authorization: Bearer mpk_...` or `x-api-key: mpk_...`; `macpipe key "
            "create NAME` on the coordinator's Mac creates one",
            code="invalid_api_key",
        )

    def find_by_id(self, key_id: str) -> ApiKey | None:
        """Return the valid key with that id; None if it was revoked."""
        return self._keys.find_by_id(key_id)

    @contextmanager
    def count_request(self, key: ApiKey) -> Iterator[None]:
        """Count one request of ``key`` while the context is open. Raises ``LimitReached``."""
        usage = self._usage_of(key)
        now = self._clock()
        most = key.limits.at_once
        if most is not None and usage.running >= most:
            raise LimitReached(
                f"the key {key.name} has {usage.running} requests in progress; its limit is {most}; try again when "
                "one has ended",
                retry_after_s=RETRY_AFTER_S,
                code=_CODE,
            )
        if usage.requests:
            if wait := usage.requests.wait_s(1, now):
                raise _rate_error(key, f"{usage.requests.most} requests a minute", "none are left", wait)
            usage.requests.take(1, now)
        usage.running += 1
        try:
            yield
        finally:
            usage.running -= 1

    def charge_prompt(self, client: str, tokens: int) -> None:
        """Charge the tokens of a prompt, before it is processed. Clients without a key are not limited.

        Raises ``Unauthenticated`` if the key was revoked meanwhile, and ``LimitReached``.
        """
        if self.is_revoked(client):
            raise revoked_error()
        usage = self._usages.get(client)
        if usage is None or usage.tokens is None:
            return
        now = self._clock()
        if wait := usage.tokens.wait_s(tokens, now):
            left = max(0, math.floor(usage.tokens.level(now)))
            allowed = f"{usage.tokens.most} tokens a minute"
            raise _rate_error(usage.key, allowed, f"{left} are left and the prompt has {tokens}", wait)
        usage.tokens.take(tokens, now)

    def charge_tokens(self, client: str, tokens: int) -> None:
        """Charge ``tokens`` generated tokens."""
        usage = self._usages.get(client)
        if usage and usage.tokens:
            usage.tokens.take(tokens, self._clock())

    def is_revoked(self, client: str) -> bool:
        """Return whether ``client`` is a key that is no longer valid."""
        return has_key(client) and self._keys.find_by_id(client.removeprefix(_OWNER)) is None

    def revoked(self, clients: Collection[str]) -> set[str]:
        """Return those of ``clients`` that are keys which are no longer valid. Reads the keys once."""
        valid = {client_of(key) for key in self._keys.all_keys() if key.revoked is None}
        return {client for client in clients if has_key(client) and client not in valid}

    def rate_limit_headers(self, key: ApiKey) -> dict[str, str]:
        """Return OpenAI's ``x-ratelimit-*`` headers for ``key``; a quantity without a limit has none."""
        usage = self._usage_of(key)
        now = self._clock()
        headers = {}
        for name, bucket in (("requests", usage.requests), ("tokens", usage.tokens)):
            if bucket:
                headers[f"x-ratelimit-limit-{name}"] = str(bucket.most)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level(now))))
                headers[f"x-ratelimit-reset-{name}"] = f"{bucket.wait_s(bucket.most, now):.0f}s"
        return headers

    def _usage_of(self, key: ApiKey) -> _Usage:
        client = client_of(key)
        if client not in self._usages:
            if len(self._usages) >= MAX_KEYS:
                self._drop_revoked()
            requests = self._bucket(key.limits.requests_a_minute)
            tokens = self._bucket(key.limits.tokens_a_minute)
            self._usages[client] = _Usage(key, requests, tokens)
        return self._usages[client]

    def _bucket(self, most: int | None) -> TokenBucket | None:
        return None if most is None else TokenBucket(most, self._clock())

    def _drop_revoked(self) -> None:
        """Drop the usage of revoked keys without requests; at most ``MAX_KEYS`` keys are valid."""
        for client in [c for c, a in self._usages.items() if not a.running and self.is_revoked(c)]:
            del self._usages[client]


def revoked_error() -> Unauthenticated:
    """Return the error that ends a request whose key is revoked while it runs."""
    return Unauthenticated("the API key was revoked", code="invalid_api_key")


def _rate_error(key: ApiKey, allowed: str, left: str, wait_s: float) -> LimitReached:
    sentence = f"the key {key.name} may use {allowed}; {left}; try again in {max(1, math.ceil(wait_s))} s"
    return LimitReached(sentence, retry_after_s=wait_s, code=_CODE)
