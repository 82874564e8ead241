"""Run ``python -m cluster``: the ``macpipe`` command without its script."""

from cluster.cli.main import main

if __name__ == "__main__":
    main()
