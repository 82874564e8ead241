"""A standby's own options, and those that it takes from its leader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cluster.cli.main import app
from cluster.cli.standby_options import OF_LEADER
from cluster.core.errors import InvalidOption

OWN = {
    *("standby", "coordinator", "cluster", "home", "config", "log_level", "log_file", "exit_with_stdin"),
    *("host", "port", "join_port", "peer", "peers_only"),
    *("http", "http_allow_host", "http_allow_origin", "http_cert", "http_key"),
}
GIVEN = {
    **{"workers": "2", "layers": "0-3,4-7", "route": "relay", "lanes": "2", "kv_bits": "8", "quantize": "4"},
    **{"prefill_chunk": "64", "objective": "throughput", "acceptance": "0.5", "adapter": "a=b", "group": "ada+bob"},
    **{"insecure_links": "ada+bob", "max_context": "512", "max_step_ms": "50", "speculate": "ngram"},
    **{"exact": "off", "served_model_name": "gpt", "wait": "5", "journal": "never", "replicate": "sync"},
    **{"load_wait": "5", "max_schema_bytes": "100", "draft": "faq-draft"},
}
FLAGS = {"take_back", "strict"}


def parse(*arguments: str) -> dict[str, Any]:
    root: Any = get_command(app)
    with root.make_context("macpipe", ["serve"], resilient_parsing=True) as above:
        found: dict[str, Any] = root.commands["serve"].make_context("serve", list(arguments), parent=above).params
        return found


def test_each_option_is_the_standbys_own_or_its_leaders() -> None:
    root: Any = get_command(app)
    options = {one.name for one in root.commands["serve"].params}
    assert options == OWN | OF_LEADER | {"model", "models"}
    assert GIVEN.keys() | FLAGS == OF_LEADER
    assert not OWN & OF_LEADER


@pytest.mark.parametrize("name", sorted(OF_LEADER))
def test_an_option_without_effect_is_refused_with_the_reason(name: str) -> None:
    option = f"--{name.replace('_', '-')}"
    words = [option, *([GIVEN[name]] if name in GIVEN else [])]
    assert parse("faq", *words)[name]
    with pytest.raises(InvalidOption, match=f"^{option} has no effect with --standby: .*; start the leader") as refused:
        parse("--standby", *words)
    assert refused.value.field == name


def test_several_options_are_named_together_also_those_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "macpipe.toml"
    path.write_text('[serve]\nstandby = true\njournal = "always"\n')
    with pytest.raises(InvalidOption, match=r"^--workers, --journal have no effect"):
        parse("--workers", "2", "--config", str(path))


def test_a_standbys_own_options_and_defaults_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "macpipe.toml"
    path.write_text('[serve]\nwait = 30\nstrict = false\nspeculate = "off"\n')  # as `config show` prints them
    own = ("--peer", "a:1", "--peers-only", "--http", "off", "--http-allow-host", "b", "--port", "5")
    found = parse("--standby", *own, "--coordinator", "c:1", "--config", str(path))
    assert (found["standby"], found["peers_only"], found["port"]) == (True, True, 5)
