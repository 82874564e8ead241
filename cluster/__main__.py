"""Run ``python -m cluster``: the ``macpipe`` command without its script."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  # pip checks it, but a clone is run with any Python
    sys.exit(
        f"macpipe: needs Python 3.11 or newer, and this is {sys.version_info[0]}.{sys.version_info[1]}; "
        "run `uv tool install .` or `brew install python@3.13`"
    )

from cluster.cli.main import main

if __name__ == "__main__":
    main()
