"""Runs a script of ops/bench from the source tree, as a person would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RUN_S = 280


def run_bench(name: str, *arguments: str) -> Any:
    """Return what ``ops/bench/NAME.py`` prints as JSON. ``arguments`` include the option that asks for it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "ops" / "bench" / f"{name}.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
