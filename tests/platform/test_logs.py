from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

LINES = """
import io, logging, sys
from cluster.platform.logs import LogLevel, configure_logging
{before}
configure_logging(LogLevel({level!r}))
for name in ("cluster.platform.paths", "zeroconf"):
    for method in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger(name), method)("%s: %s", name, method)
"""
ALL = ["debug", "info", "warning", "error"]


def logged(level: str, before: str = "") -> list[str]:
    """What a process with that level writes on standard error."""
    code = LINES.format(level=level, before=before)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=20)
    return run.stderr.splitlines()


@pytest.mark.parametrize(
    ("level", "ours", "libraries"),
    [("debug", ALL, ALL[2:]), ("info", ALL[1:], ALL[2:]), ("error", ALL[3:], ALL[3:])],
)
def test_lines_have_time_and_level_and_libraries_only_warn(level: str, ours: list[str], libraries: list[str]) -> None:
    found = [re.fullmatch(r"[0-9-]{10} [0-9:]{8},\d{3} ([A-Z]+) ([a-z.]+): ([a-z]+)", line) for line in logged(level)]
    lines = [(line[2], line[3]) for line in found if line and line[1] == line[3].upper()]
    assert lines == [("cluster.platform.paths", one) for one in ours] + [("zeroconf", one) for one in libraries]
    assert len(lines) == len(found)


def test_a_value_with_blanks_is_quoted() -> None:
    code = (
        "import logging\n"
        "from cluster.platform.logs import LogLevel, configure_logging\n"
        "configure_logging(LogLevel.INFO)\n"
        "log = logging.getLogger('cluster.x')\n"
        "log.info('a: %d of 9%% lost reason=%s worker=%s wait_s=%.1f', 3, 'it \"said\"\\na=b', 'ada', 2)\n"
        "log.info('a: 5% as it stands reason=%s')\n"
        "log.info('a: b path=%s name=%s', '/a', '')\n"
        "logging.getLogger('other').error('its own=%s', 'two words')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert [line.split(" ", 3)[3] for line in run.stderr.splitlines()] == [
        r'a: 3 of 9% lost reason="it \"said\"\na=b" worker=ada wait_s=2.0',
        "a: 5% as it stands reason=%s",
        'a: b path=/a name=""',
        "its own=two words",
    ]


def test_logging_that_is_configured_already_stays_as_it_is() -> None:
    before = 'logging.basicConfig(format="mine %(message)s", level=logging.ERROR)'
    assert logged("debug", before) == ["mine cluster.platform.paths: error", "mine zeroconf: error"]


def test_lines_follow_when_standard_error_is_replaced() -> None:
    """As progress bars and a full disk's guard replace it."""
    code = (
        "import io, logging, sys\n"
        "from cluster.platform.logs import LogLevel, configure_logging\n"
        "configure_logging(LogLevel.INFO)\n"
        "sys.stderr = io.StringIO()\n"
        "logging.getLogger('cluster').info('a: b')\n"
        "assert sys.stderr.getvalue().endswith(' INFO a: b\\n')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_log_file_is_rotated_and_has_all_of_standard_error(tmp_path: Path) -> None:
    """Tracebacks and what child processes write is in it, also after a rotation."""
    code = (
        "import logging, subprocess, sys\n"
        "from pathlib import Path\n"
        "from cluster.platform.logs import LogLevel, configure_logging\n"
        "path = Path(sys.argv[1])\n"
        "configure_logging(LogLevel.INFO, path, max_bytes=1000)\n"
        "for number in range(200):\n"
        "    logging.getLogger('cluster').info('line: %d', number)\n"
        "subprocess.run(['sh', '-c', 'echo from a child >&2'], check=True)\n"
        "raise SystemError('at the end')\n"
    )
    log = tmp_path / "worker.log"
    run = subprocess.run([sys.executable, "-c", code, log], capture_output=True, text=True, timeout=20, check=False)
    assert (run.returncode, run.stderr) == (1, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["worker.log", *(f"worker.log.{n}" for n in range(1, 5))]
    assert all(p.stat().st_size <= 1000 for p in tmp_path.glob("worker.log.*"))
    text = log.read_text()
    assert " INFO line: 199\nfrom a child\n" in text
    assert text.endswith("SystemError: at the end\n")
