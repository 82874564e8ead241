"""What each API key may use and has used: requests, tokens, and what is under way. It counts; it reads no request.

Both rates are buckets that hold a minute's worth and are refilled evenly. Tokens of a prompt are taken before it is
read; those of an answer as they come, which may leave less than nothing: what comes next waits for that much longer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from cluster.core.errors import LimitReached, Unauthenticated
from cluster.core.limits import RETRY_AFTER_S
from cluster.security.bounds import MAX_KEYS
from cluster.security.keys import ApiKey, KeyStore

_MINUTE_S: Final = 60.0
_CODE: Final = "rate_limit_exceeded"
_OWNER: Final = "key:"


def client_of(key: ApiKey) -> str:
    """Whose requests are whose: turns are shared between keys, and kept prefixes stay with theirs."""
    return f"{_OWNER}{key.id}"


class TokenBucket:
    """``most`` at once, and as much a minute; ``now`` is in seconds of any clock."""

    def __init__(self, most: int, now: float) -> None:
        self.most, self._level, self._then = most, float(most), now

    def level(self, now: float) -> float:
        """What is left; below zero where more was taken than foreseen."""
        self._level = min(self.most, self._level + (now - self._then) * self.most / _MINUTE_S)
        self._then = now
        return self._level

    def take(self, count: float, now: float) -> None:
        """Take it, whatever is left."""
        self._level = self.level(now) - count

    def wait_s(self, count: float, now: float) -> float:
        """How long until ``count`` are there; what is more than it ever holds waits until it is full."""
        return max(0.0, (min(count, self.most) - self.level(now)) * _MINUTE_S / self.most)


@dataclass(slots=True)
class _Usage:
    """Of one key; a bucket where it has a limit."""

    key: ApiKey
    requests: TokenBucket | None
    tokens: TokenBucket | None
    under_way: int = field(default=0)


class KeyUsage:
    """The accounts of one coordinator. Belongs to its event loop."""

    def __init__(self, keys: KeyStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys, self._clock = keys, clock
        self._accounts: dict[str, _Usage] = {}

    def identify(self, given: Sequence[str]) -> ApiKey:
        """The key that one of these texts is. Raises ``Unauthenticated``."""
        key = next((found for text in given if (found := self._keys.find(text))), None)
        if key:
            return key
        if given:
            raise Unauthenticated(
                "the API key is none of this cluster's, or was revoked; `macpipe key list` on the coordinator's Mac "
                "shows those that are good",
                code="invalid_api_key",
            )
        raise Unauthenticated(
            "an API key is needed: send it as `Authorization: Bearer mpk_...` or `x-api-key: mpk_...`; `macpipe key "
            "create NAME` on the coordinator's Mac makes one",
            code="invalid_api_key",
        )

    @contextmanager
    def request(self, key: ApiKey) -> Iterator[None]:
        """While one request of ``key`` is answered. Raises ``LimitReached``."""
        account, now = self._account(key), self._clock()
        most = key.limits.at_once
        if most is not None and account.under_way >= most:
            raise LimitReached(
                f"the key {key.name} has {account.under_way} requests under way, and may have {most}; try again when "
                "one has ended",
                retry_after_s=RETRY_AFTER_S,
                code=_CODE,
            )
        if account.requests:
            if wait := account.requests.wait_s(1, now):
                raise _spent(key, f"{account.requests.most} requests a minute", "none is left", wait)
            account.requests.take(1, now)
        account.under_way += 1
        try:
            yield
        finally:
            account.under_way -= 1

    def prompt(self, client: str, tokens: int) -> None:
        """A prompt of ``client`` is about to be read. Raises ``Unauthenticated`` where its key was revoked meanwhile,
        and ``LimitReached``. Whoever has no key is no concern of this.
        """
        if self.is_revoked(client):
            raise revoked_error()
        account = self._accounts.get(client)
        if account is None or account.tokens is None:
            return
        now = self._clock()
        if wait := account.tokens.wait_s(tokens, now):
            left = max(0, math.floor(account.tokens.level(now)))
            allowed = f"{account.tokens.most} tokens a minute"
            raise _spent(account.key, allowed, f"{left} are left and the prompt has {tokens}", wait)
        account.tokens.take(tokens, now)

    def count_tokens(self, client: str, tokens: int) -> None:
        """So many tokens of an answer came."""
        account = self._accounts.get(client)
        if account and account.tokens:
            account.tokens.take(tokens, self._clock())

    def is_revoked(self, client: str) -> bool:
        """Whether ``client`` is a key that is good no more."""
        return client.startswith(_OWNER) and self._keys.find_by_id(client.removeprefix(_OWNER)) is None

    def figures(self, key: ApiKey) -> dict[str, str]:
        """What is left, as the headers that OpenAI's clients read; none for what has no limit."""
        account, now = self._account(key), self._clock()
        told = {}
        for name, bucket in (("requests", account.requests), ("tokens", account.tokens)):
            if bucket:
                told[f"x-ratelimit-limit-{name}"] = str(bucket.most)
                told[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level(now))))
                told[f"x-ratelimit-reset-{name}"] = f"{bucket.wait_s(bucket.most, now):.0f}s"
        return told

    def _account(self, key: ApiKey) -> _Usage:
        client = client_of(key)
        if client not in self._accounts:
            if len(self._accounts) >= MAX_KEYS:
                self._forget()
            limits = key.limits
            requests, tokens = self._bucket(limits.requests_a_minute), self._bucket(limits.tokens_a_minute)
            self._accounts[client] = _Usage(key, requests, tokens)
        return self._accounts[client]

    def _bucket(self, most: int | None) -> TokenBucket | None:
        return None if most is None else TokenBucket(most, self._clock())

    def _forget(self) -> None:
        """Drop the accounts of keys that are gone; there are at most ``MAX_KEYS`` others."""
        for client in [c for c, a in self._accounts.items() if not a.under_way and self.is_revoked(c)]:
            del self._accounts[client]


def revoked_error() -> Unauthenticated:
    """What ends the requests of a key that was revoked while they were under way."""
    return Unauthenticated("the API key was revoked", code="invalid_api_key")


def _spent(key: ApiKey, allowed: str, left: str, wait_s: float) -> LimitReached:
    sentence = f"the key {key.name} may use {allowed}; {left}; try again in {max(1, math.ceil(wait_s))} s"
    return LimitReached(sentence, retry_after_s=wait_s, code=_CODE)
