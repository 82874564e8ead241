"""``macpipe report``: writes a bundle for a bug report, without prompts, tokens or keys."""

from __future__ import annotations

import getpass
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.error_boundary import errors_in_json
from cluster.cli.options import Coordinator, Home, Json
from cluster.core.errors import InvalidOption
from cluster.platform.paths import state_home


def report(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="Write to this file, which must not exist.", show_default="macpipe-report-TIME.zip"
        ),
    ] = None,
    coordinator: Coordinator = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Write a bundle for a bug report.

    It is a zip file: findings.json has what `doctor --cluster` finds, readings.json this Mac's versions, disk, network
    and settings, and cluster.json what `status --json` shows. It has no prompts, answers, tokens, keys or logs.
    """
    with errors_in_json(json):
        path = file or Path(time.strftime("macpipe-report-%Y%m%d-%H%M%S.zip"))
        _write(path, _collect(state_home(home), coordinator))
        if json:
            from cluster.cli.json_output import print_json

            print_json({"file": str(path)})
        else:
            typer.echo(f"wrote {path}; look through it before you send it")


def _collect(home: Path, coordinator: str | None) -> bytes:
    from cluster.cli.doctor import ask_cluster, examinations_as_json, examine_macs
    from cluster.core.json_types import to_json_types
    from cluster.doctor.report_bundle import pack_report

    answers = ask_cluster(coordinator)  # no answer is a common reason for a report
    readings, examined = examine_macs(home, coordinator, answers)
    findings = examinations_as_json(examined)
    facts = {"findings.json": findings, "readings.json": readings, "cluster.json": answers.state or {}}
    return pack_report({name: to_json_types(one) for name, one in facts.items()}, _user_name(), str(Path.home()))


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user has no entry in the system's list, as in a container
        return ""


def _write(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read. Raises ``InvalidOption`` if it exists or cannot be written."""
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(number, "wb") as opened:
            opened.write(content)
    except OSError as error:
        raise InvalidOption(f"{path} cannot be written: {error.strerror}; name another FILE", field="file") from error
