"""Creates .venv and installs into it. ``ops/venv`` runs this with a suitable Python if the stamp is missing or old.

It imports only the standard library, because nothing is installed yet. A lock makes two concurrent runs create one
environment. An environment is marked as unfinished until everything is installed, and an unfinished one is deleted by
the next run. A complete environment without a stamp was made by somebody else: it is kept and installed into.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".stamp"
UNFINISHED = VENV / ".unfinished"
CONSTRAINTS = ROOT / "ops" / "constraints.txt"


class InstallFailed(Exception):
    """An installer failed. The argument is its output."""


def say(sentence: str) -> None:
    print(f"macpipe: {sentence}", file=sys.stderr, flush=True)


def run(*command: str) -> None:
    """Run a command without showing its output. Raise InstallFailed with the output if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise InstallFailed(f"$ {' '.join(command)}\n{done.stdout}")


def up_to_date(extras: str, wanted: str) -> bool:
    """Return whether another process created the environment while this one waited for the lock."""
    there = STAMP.read_text().split() if STAMP.exists() and PYTHON.exists() else []
    return there[:1] == [wanted] and there[1:] in ([extras], ["dev"])


def make() -> None:
    """Create an environment that is marked as unfinished. Keep one that somebody else made."""
    if VENV.exists() and (UNFINISHED.exists() or not PYTHON.exists()):
        shutil.rmtree(VENV)
    if VENV.exists() and not STAMP.exists():
        return
    VENV.mkdir(exist_ok=True)
    UNFINISHED.touch()
    STAMP.unlink(missing_ok=True)
    if not PYTHON.exists():
        # Not sys.executable: where .venv was active, that has just been thrown away.
        run(getattr(sys, "_base_executable", sys.executable), "-m", "venv", "--without-pip", str(VENV))


def install(extras: str) -> None:
    """Install with uv if it is available and succeeds (it ignores pip's configuration), else with pip."""
    what = ["-c", str(CONSTRAINTS), "-e", f"{ROOT}[dev]" if extras == "dev" else str(ROOT)]
    if shutil.which("uv"):
        try:
            run("uv", "pip", "install", "--quiet", "--python", str(PYTHON), *what)
            return
        except InstallFailed as failure:
            say("uv could not install it; trying pip")
            print(failure, file=sys.stderr)
    run(str(PYTHON), "-m", "ensurepip", "--upgrade")
    run(str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what)


def finish(extras: str, wanted: str) -> None:
    """Mark the environment as complete. The stamp is written atomically."""
    fresh = STAMP.with_suffix(".new")
    fresh.write_text(f"{wanted} {extras}\n")
    UNFINISHED.unlink(missing_ok=True)
    fresh.replace(STAMP)


def main(extras: str, wanted: str) -> None:
    if VENV.is_symlink():
        sys.exit(
            f"macpipe: {VENV} is a link to {VENV.resolve()}, and installing through it would change that environment;"
            f" remove the link with `rm {VENV}` to get one of its own"
        )
    with CONSTRAINTS.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if up_to_date(extras, wanted):
            return
        say(
            f"downloading and installing the libraries into .venv with Python {sys.version.split()[0]}; nothing is"
            " shown meanwhile, and the first time takes minutes"
        )
        start = time.monotonic()
        try:
            make()
            install(extras)
        except InstallFailed as failure:
            print(failure, file=sys.stderr)
            sys.exit("macpipe: the installation failed; above is what the installer said")
        finish(extras, wanted)
        say(f".venv is ready after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
