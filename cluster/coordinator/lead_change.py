"""What a change of the leader means for requests that were not accepted yet.

The new leader lets them wait for the model that the one before served. The old one ends them with the error that has
clients, and standbys, go on to the new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from cluster.core.errors import MacpipeError, NotServing


class LeadChange:
    """The changes at the beginning and at the end of one coordinator. Uses one event loop."""

    def __init__(self) -> None:
        self._error: MacpipeError | None = None
        self._settled = asyncio.Event()
        self._settled.set()
        self._waits: set[asyncio.Timeout] = set()
        """Of the blocks that ``end`` interrupts."""

    @property
    def is_returning(self) -> bool:
        """Whether the default model is about to be loaded again, in the place of the leader before."""
        return not self._settled.is_set()

    def begin_return(self) -> None:
        """Have requests wait for the default model from now on."""
        self._settled.clear()

    def end_return(self) -> None:
        """Have requests wait no longer: the model is served, or is not loaded any more."""
        self._settled.set()

    async def wait_returned(self, seconds: float) -> bool:
        """Wait at most so many seconds while the default model is loaded again. Return whether that has ended."""
        try:
            async with asyncio.timeout(seconds):
                await self._settled.wait()
        except TimeoutError:
            return False
        return True

    def end(self, error: MacpipeError) -> None:
        """Have all requests that were not accepted yet end with ``error``: this coordinator stops."""
        self._error = error
        self._settled.set()
        for wait in [one for one in self._waits if not one.expired()]:
            wait.reschedule(asyncio.get_running_loop().time())

    def require_going(self) -> None:
        """Raise the error of ``end`` after that."""
        if self._error:
            raise self._error

    @asynccontextmanager
    async def until_end(self) -> AsyncIterator[None]:
        """Run the block until ``end``, which interrupts it: it raises that error then. Errors are renamed as below.

        What the block waits for, say a grammar that is being checked, may last longer than this process.
        """
        try:
            async with asyncio.timeout(None) as wait:
                self._waits.add(wait)
                try:
                    with self.renamed_errors():
                        yield
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            self.require_going()
            raise

    @contextmanager
    def renamed_errors(self) -> Iterator[None]:
        """Replace ``NotServing`` in the block by the error of ``end`` after that: the model left since all stops."""
        try:
            yield
        except NotServing:
            self.require_going()
            raise
