"""How long requests wait for models that are not loaded, and how long models stay, each with its reason."""

from __future__ import annotations

from typing import Final

LOAD_WAIT_S: Final = 120.0
"""A request that is not streamed waits this long for its model: long enough for tens of GB from a disk or a peer, less
than SDKs wait for a response."""
MAX_LOAD_WAIT_S: Final = 3600.0
STREAM_BEGIN_S: Final = 1.0
"""A stream whose model is being loaded begins after this long. A refusal within it is still the response's status."""
MIN_RESIDENT_S: Final = 30.0
"""A model stays loaded for at least this long, so that two models do not evict each other with every request."""
BUSY_RETRY_S: Final = 10.0
"""A client may ask again this long after a model did not fit beside busy ones: about the time of a short answer."""
REFUSED_RETRY_S: Final = 1.0
"""A refusal for lack of memory is given again for this long: it ends as soon as another model is idle."""
LOADED_RETRY_S: Final = 5.0
"""A client may ask again this long after it asked for a model that is being loaded."""
FAILED_RETRY_S: Final = 10.0
"""A load that failed is not tried again for this long, twice as long after each further failure, ..."""
MAX_FAILED_RETRY_S: Final = 300.0
"""... and at most for this long: each try reads headers, and may evict other models and read weights."""
LOAD_TRIES: Final = 3
"""Loads in a row that lose a worker before the request that waits is told."""
IDLE_CHECK_S: Final = 5.0
"""Interval at which models that nobody uses are looked for."""
RETURN_WAIT_S: Final = 300.0
"""A model that left for another one that recovers is loaded again beside it if it serves within this time."""
MAX_COMING: Final = 6
"""Models that are yet to be loaded for which a load leaves room on certain Macs; of more, only their number counts."""
COMING_READ_S: Final = 5.0
"""The headers of such models are read for this long, while the load waits."""
