"""Examines this Mac: reads an ExamineRequest from stdin, writes an ExamineResponse to stdout, and ends.

``examiner`` starts it. Its priority is low, and so is that of the commands that it runs, because the engine on this Mac
may be in the middle of an answer.
"""

from __future__ import annotations

import os
import signal
import sys
from struct import Struct
from typing import Final

from cluster.sandbox.child_streams import end_with_parent, separate_stdout

LENGTH: Final = Struct("!I")
"""The length of each message, before it."""
NICENESS: Final = 5
"""Added to the worker's own: anything else that wants a processor goes first."""


def main() -> int:
    """Examine once. Return the exit code."""
    os.nice(NICENESS)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal signals the whole group, but only the parent ends this one
    end_with_parent()
    replies = separate_stdout()
    from cluster.codec.examination import encode_results
    from cluster.doctor.examination import examine
    from cluster.doctor.gathering import list_members, read_mac
    from cluster.platform.paths import state_home
    from cluster.v1 import worker_pb2 as pb

    (size,) = LENGTH.unpack(sys.stdin.buffer.read(LENGTH.size))
    request = pb.ExamineRequest.FromString(sys.stdin.buffer.read(size))
    members = list_members((member.name, member.address) for member in request.members)
    results = examine(read_mac(state_home(None), members))
    reply = pb.ExamineResponse(results=encode_results(results)).SerializeToString()
    replies.write(LENGTH.pack(len(reply)) + reply)
    replies.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
