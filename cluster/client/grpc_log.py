"""Keeps gRPC's own log lines off the stderr of programs that use the client. Import it before grpc, which reads this.

gRPC reports each connection that a coordinator ends, as one that restarts does, which the client follows anyway.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # a user who has set it wants to see more, or nothing
