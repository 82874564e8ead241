"""Runs ``macpipe`` with a router that draws the replica of each request, whatever prefixes the replicas keep.

Arguments are those of ``macpipe``. The draws are the same in each run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from cluster.cli.main import main
from cluster.coordinator import router
from cluster.scheduler.routing import Offer

DRAWS = random.Random(5)


def choose_any(offers: Sequence[Offer]) -> int:
    """Return the index of any offer."""
    return DRAWS.randrange(len(offers))


if __name__ == "__main__":
    router.choose_replica = choose_any
    main()
