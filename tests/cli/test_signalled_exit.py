"""A command that a signal ended does not wait for the interpreter's own end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import time
from cluster.cli import main

class Stuck:
    '''As a grpc channel whose closing a signal interrupted: deleting it waits for ever.'''
    def __del__(self, sleep=time.sleep):
        sleep(3600)

def stop():
    print("before")
    raise {ending}

main.app.command()(stop)
kept = Stuck()
main.main(["stop"])
"""


@pytest.mark.parametrize(("ending", "code"), [("KeyboardInterrupt", 130), ("SystemExit(143)", 143)])
def test_nothing_that_a_signal_interrupted_is_waited_for(ending: str, code: int) -> None:
    command = [sys.executable, "-c", PROGRAM.format(ending=ending)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (code, "before\n", "")
