"""Stand-ins on a demo's PYTHONPATH: a worker that waits, and a scripted coordinator, instead of real daemons.

STAND_IN_FAULT=worker makes workers die at once; =deaf makes everything ignore SIGTERM.
"""

import os
import signal
import sys
import threading
import types
from typing import Any

FAULT = os.environ.get("STAND_IN_FAULT", "")


def wait_for_signal() -> int:
    stopped = threading.Event()
    handler = signal.SIG_IGN if FAULT == "deaf" else lambda *_: stopped.set()
    signal.signal(signal.SIGTERM, handler)
    print("waiting for a signal", file=sys.stderr, flush=True)
    while not stopped.wait(0.05):
        pass
    return 0


def worker(settings: Any) -> int:
    if FAULT == "worker":
        print("macpipe: no Metal here", file=sys.stderr)
        return 1
    return wait_for_signal()


def coordinator(settings: Any, report: Any, models: Any = None) -> int:
    from client.scripted import Coordinator

    if FAULT == "worker":  # one that serves could answer before the demo looks whether its workers live
        return wait_for_signal()
    with Coordinator(settings.port):
        return wait_for_signal()


for name, run in (("cluster.worker.daemon", worker), ("cluster.api.daemon", coordinator)):
    module = types.ModuleType(name)
    module.run = run  # type: ignore[attr-defined]
    sys.modules[name] = module
