"""Figures are printed wherever a bench ran, also from sources that are not installed."""

from __future__ import annotations

import json
import subprocess
import sys

from integration.benches import ROOT

PRINT = """
from figures import Figure, print_figures
print_figures("medians", [Figure("one_user", "tok/s", [1.0, 2.0, 4.0])], {"ratio": 0.5}, True)
"""


def test_a_package_that_is_not_installed_has_no_version() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", PRINT],  # without site-packages nothing is installed
        cwd=ROOT / "ops" / "bench",
        env={},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert (printed["medians"], printed["ratio"]) == ({"one_user": 2.0}, 0.5)
    assert set(printed["versions"].values()) == {None}
