"""Options from a TOML file, as ``config show`` prints them; nothing is started."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from time import sleep

import pytest
from typer.testing import CliRunner, Result

from cli.conftest import MACPIPE
from cluster.cli.main import app, main

FILE = """
[worker]
name = "mac-7"
port = 7800
data_port = 7801
standby = false
memory-limit = "24GiB"

[serve]
model = "faq"
peer = ["mac-1:7800", "mac-2:7800"]
wait = 20
exact = "off"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "macpipe.toml"
    path.write_text(FILE)
    return path


def show(*arguments: str) -> Result:
    return CliRunner(env={"MACPIPE_CLUSTER": "", "MACPIPE_LOG_LEVEL": ""}).invoke(
        app, ["config", "show", *arguments], prog_name="macpipe"
    )


def options(*arguments: str) -> dict[str, dict[str, object]]:
    done = show(*arguments, "--json")
    assert done.exit_code == 0
    found: dict[str, dict[str, object]] = json.loads(done.stdout)["options"]
    return found


def test_each_daemon_takes_its_table(file: Path) -> None:
    worker = options("worker", "--config", str(file))
    assert worker["name"] == {"value": "mac-7", "source": "file"}
    assert worker["data-port"]["value"] == 7801
    assert worker["standby"] == {"value": False, "source": "file"}
    assert worker["profile"] == {"value": "kept", "source": "default"}
    serve = options("serve", "--config", str(file))
    assert serve["model"] == {"value": "faq", "source": "file"}
    assert serve["peer"] == {"value": ["mac-1:7800", "mac-2:7800"], "source": "file"}
    assert serve["wait"]["value"] == 20
    assert serve["port"] == {"value": 7700, "source": "default"}


def test_the_command_line_comes_first_then_variables(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('[worker]\ncluster = "lab"\nlog-level = "debug"\nport = 1\n')
    found = options("worker", "--config", str(file))
    assert [found[key]["value"] for key in ("cluster", "log-level", "port")] == ["lab", "debug", 1]
    done = CliRunner(env={"MACPIPE_CLUSTER": "home", "MACPIPE_LOG_LEVEL": "error"}).invoke(
        app, ["config", "show", "worker", "--config", str(file), "--json", "--", "--log-level", "info", "--port", "2"]
    )
    found = json.loads(done.stdout)["options"]
    assert found["cluster"] == {"value": "home", "source": "environment"}
    assert found["log-level"] == {"value": "info", "source": "command line"}
    assert found["port"] == {"value": 2, "source": "command line"}


def test_what_is_printed_is_a_file_again(file: Path, tmp_path: Path) -> None:
    before = options("serve", "--config", str(file))
    printed = tmp_path / "printed.toml"
    printed.write_text(show("serve", "--config", str(file)).stdout)
    after = options("serve", "--config", str(printed))
    assert {key: one["value"] for key, one in after.items()} == {key: one["value"] for key, one in before.items()}


@pytest.mark.parametrize(
    ("daemon", "text", "said"),
    [
        ("worker", "[worker]\nport = 70000", "worker.port: 70000 is out of range; give a number from 0 to 65535"),
        ("worker", "[worker]\nport = true", "worker.port: give a text or a number"),
        ("worker", '[worker]\nport = "x"', "worker.port: 'x' is not a whole number"),
        ("worker", "[worker]\nnmae = 'x'", "unknown option worker.nmae; did you mean name?"),
        ("worker", "[worker]\nthrottle = 2", "unknown option worker.throttle"),
        ("worker", "[worker]\nconfig = 'x'", "unknown option worker.config"),
        ("worker", "[worker]\nstandby = 'no'", "worker.standby: give true or false"),
        ("worker", "[worker]\nprofile = 'fast'", "worker.profile: 'fast' is not one of 'kept', 'new', 'off'"),
        ("serve", "[serve]\npeer = 'a:1'", "serve.peer: give a list of texts, like ['a', 'b']"),
        ("worker", "[workers]", "unknown entry workers; write options below [worker] or [serve]"),
        ("worker", "port = 5", "unknown entry port; write options below [worker] or [serve]"),
        ("worker", "[worker", "is not valid TOML"),
        ("worker", "\udcff", "is not valid TOML"),
        ("worker", f"# {'x' * 2**20}", "has more than 1048576 bytes"),
    ],
)
def test_a_wrong_file_is_one_sentence(
    daemon: str, text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    for arguments in (["config", "show", daemon, "--config", str(path)], [daemon, "--config", str(path)]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        error = capsys.readouterr().err
        assert end.value.code == 2
        assert error.startswith(f"macpipe: {path}")
        assert said in error
        assert error.count("\n") == 1


def test_a_missing_file_or_daemon_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["config", "show", "worker", "--config", str(tmp_path / "none.toml")])
    assert "cannot read" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["config", "show", "chat"])
    assert capsys.readouterr().err == "macpipe: unknown daemon chat; give worker or serve\n"


def test_a_worker_starts_with_its_file_and_logs_to_a_file(environment: dict[str, str], tmp_path: Path) -> None:
    log, path = tmp_path / "logs" / "worker.log", tmp_path / "macpipe.toml"
    lines = ("[worker]", 'name = "mac-7"', "standby = false", 'profile = "off"', f"log-file = {json.dumps(str(log))}")
    path.write_text("\n".join(lines))
    command = [*MACPIPE, "worker", "--config", str(path), "--home", str(tmp_path / "home"), "--exit-with-stdin"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stderr=pipe, text=True) as worker:
        assert worker.stdin
        assert worker.stderr
        assert worker.stderr.readline() == f"log: {log}\n"
        while "worker mac-7 of cluster default on 127.0.0.1:" not in (log.read_text() if log.exists() else ""):
            assert worker.poll() is None
            sleep(0.05)
        worker.stdin.close()
        assert worker.wait() == 0
        assert worker.stderr.read() == "", "all else is in the file"
