"""The models of a file, and what is said of a file that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.cli.models_toml import name_models, parse_models
from cluster.coordinator.models_file import MAX_BYTES, ModelsFile
from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.errors import InvalidOption, MacpipeError
from cluster.core.plan import LayerRange, Objective, Route, Speculation

FILE = """
# The large one answers agents.
[[model]]
name = "coder"
source = "org/Coder-480B-4bit"
max_context = 65536
layers = "0-3,4-7"
objective = "throughput"
route = "relay"
speculate = "auto"
exact = "off"
adapter = ["legal=/adapters/legal"]
take-back = true
pin = true
priority = 5

[[model]]
source = "tiny"
aliases = ["claude-haiku-*", "titles"]
idle_unload = "15m"
replicas = "auto"
fallback = "coder"
kv-bits = 8
workers = 1
"""


def parse(text: str, tmp_path: Path, **options: Any) -> tuple[ModelEntry, ...]:
    return parse_models(tmp_path / "models.toml", options, (), text)


def test_each_table_is_a_model_with_options_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    coder, tiny = parse(FILE, tmp_path, max_context=4096, wait_s=7.0, prefill_chunk=64)
    assert coder == ModelEntry(
        "coder",
        LoadOrder(
            "org/Coder-480B-4bit",
            max_context=65536,
            layers=(LayerRange(0, 4), LayerRange(4, 8)),
            objective=Objective.THROUGHPUT,
            route=Route.RELAY,
            speculation=Speculation.AUTO,
            exact=False,
            adapters=(("legal", "/adapters/legal"),),
            take_back=True,
            wait_s=7.0,
            prefill_chunk=64,
        ),
        pin=True,
        priority=5,
    )
    order = LoadOrder(str(tmp_path / "tiny"), 1, max_context=4096, kv_bits=8, wait_s=7.0, prefill_chunk=64)
    aliases = ("claude-haiku-*", "titles")
    assert tiny == ModelEntry("tiny", order, aliases, False, 900.0, None, 0, "coder")


def test_a_table_overrides_an_option_with_its_default(tmp_path: Path) -> None:
    (entry,) = parse(
        '[[model]]\nsource = "faq"\nexact = "on"\ntake-back = false\n', tmp_path, exact=False, take_back=True
    )
    assert (entry.name, entry.order) == ("faq", LoadOrder("faq"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[[model]]\nsource = "a"\nnam = "b"\n', "models.toml:3: unknown key nam; did you mean name?"),
        (
            '[[model]]\nsource = "a"\nmax-contxt = 1\n',
            "models.toml:3: unknown key max-contxt; did you mean max-context?",
        ),
        ('[[model]]\nsource = "a"\nzzzzzzzz = 1\n', "models.toml:3: unknown key zzzzzzzz; `macpipe models --help`"),
        ('[[model]]\nsource = "a"\nport = 1\n', "models.toml:3: unknown key port"),
        ("[[model]]\nsource = 5\n", "models.toml:2: source must be a text"),
        ('\n[[model]]\nname = "a"\n', "models.toml:2: the source of a model is missing"),
        ('[[model]]\nsource = "a"\naliases = "b"\n', "models.toml:3: aliases must be a list of texts"),
        ('[[model]]\nsource = "a"\naliases = ["b", 1]\n', "models.toml:3: aliases must be a list of texts"),
        ('[[model]]\nsource = "a"\npin = "yes"\n', "models.toml:3: pin must be true or false"),
        ('[[model]]\nsource = "a"\nidle_unload = "soon"\n', "models.toml:3: idle-unload 'soon' is not a duration"),
        ('[[model]]\nsource = "a"\nidle_unload = 15\n', "models.toml:3: idle-unload must be a text"),
        ('[[model]]\nsource = "a"\nreplicas = 0\n', 'models.toml:3: replicas must be "auto" or a number from 1'),
        ('[[model]]\nsource = "a"\nreplicas = true\n', "models.toml:3: replicas must be"),
        ('[[model]]\nsource = "a"\npriority = 1.5\n', "models.toml:3: priority must be a whole number"),
        ('[[model]]\nsource = "a"\nfallback = ""\n', "models.toml:3: fallback must be a text in quotes"),
        ('[[model]]\nsource = "a"\nmax-context = "many"\n', "models.toml:3: max-context: 'many' is not a whole number"),
        ('[[model]]\nsource = "a"\nmax-context = 0\n', "models.toml:3: max-context: 0 is out of range"),
        ('[[model]]\nsource = "a"\nlayers = "x"\n', "models.toml:3: "),
        ('[[model]]\nsource = "a"\nkv-bits = 5\n', "models.toml:3: --kv-bits is 5; it must be 8 or 4"),
        ('[[model]]\nsource = "a"\ndraft = "b"\n', "models.toml:1: --draft needs --speculate auto or draft"),
        ('[[model]]\nsource = "a"\nname = "x*"\n', "models.toml:3: 'x*' cannot be a model's name"),
        ('[[model]]\nsource = "a"\naliases = [""]\n', "models.toml:3: '' cannot be an alias"),
        ('[[model]]\nsource = "a"\n\n[[model]]\nsource = "a"\n', "models.toml:4: two models are named a"),
        (
            '[[model]]\nsource = "a"\naliases = ["b"]\n[[model]]\nsource = "b"\naliases = ["a"]\n',
            "models.toml:3: a and b are aliases of each other, which is a circle",
        ),
        (
            '[[model]]\nname = "a"\nsource = "x"\n[[model]]\nname = "b"\nsource = "y"\nfallback = "c"\n',
            "models.toml:7: the fallback c of the model b is no model's name; the models are a, b",
        ),
        ('[[model]]\nsource = "a"\nfallback = "a"\n', "models.toml:3: the fallbacks a -> a are a circle"),
        (
            "".join(f'[[model]]\nsource = "{a}"\nfallback = "{b}"\n' for a, b in ("ab", "bc", "cb")),
            "models.toml:6: the fallbacks b -> c -> b are a circle",
        ),
        (
            '[[model]]\nsource = "a"\n[[model]]\nsource = "b"\npin = true\naliases = ["a"]\n',
            "models.toml:6: the alias a of the model b already means the model a",
        ),
        (
            '[[model]]\nsource "a"\n',
            "models.toml is not valid TOML: Expected '=' after a key in a key/value pair (at line 2",
        ),
        ("a = " + "[" * 5000, "models.toml is not valid TOML"),
        (
            '[serve]\nport = 1\n[[model]]\nsource = "a"\n',
            "models.toml:1: unknown entry serve; begin each model with [[model]]",
        ),
        ("", "models.toml: it names no model; begin each one with [[model]]"),
        ('[model]\nsource = "a"\n', "models.toml: it names no model"),
        ('model = [{source = "a", pin = 1}]\n', "models.toml: pin must be true or false"),
        ("[[model]]\nsource = 'a'\n" * 65, "at most 64 can be"),
    ],
)
def test_a_wrong_file_is_explained_with_its_line(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption) as refusal:
        parse(text, tmp_path)
    assert sentence in refusal.value.sentence


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "cannot read .*: No such file or directory; give a readable file to --models"),
        (lambda path: path.mkdir(), "give a readable file to --models"),
        (lambda path: path.write_bytes(b"\n# \xff"), ":2: not UTF-8"),
        (lambda path: path.write_bytes(b"#" * (MAX_BYTES + 1)), "give a smaller file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(make: Any, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    make(path)
    with pytest.raises(InvalidOption, match=sentence):
        ModelsFile(path, lambda text: ()).read()


def test_a_change_of_a_file_is_noticed_once(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text('[[model]]\nsource = "a"\n')
    file = ModelsFile(path, lambda text: parse(text, tmp_path))
    assert [entry.name for entry in file.read()] == ["a"]
    assert file.read_changed() is None
    path.write_text('[[model]]\nsource = "b"\n')
    assert [entry.name for entry in file.read_changed() or ()] == ["b"]
    path.write_text("wrong")
    with pytest.raises(InvalidOption):
        file.read_changed()
    assert file.read_changed() is None
    path.unlink()
    with pytest.raises(InvalidOption):
        file.read_changed()
    assert file.read_changed() is None
    path.write_text('[[model]]\nsource = "b"\n')
    assert [entry.name for entry in file.read_changed() or ()] == ["b"]


def test_models_of_a_command_line_share_its_options() -> None:
    (one,) = name_models(["org/One"], {"max_context": 512}, ["mine"])
    assert one == ModelEntry("default", LoadOrder("org/One", max_context=512), ("mine",))
    first, second = name_models(["org/One", "/models/two"], {}, ["mine"])
    assert (first.name, first.aliases, second.name, second.aliases) == ("org/One", ("mine",), "two", ())
    with pytest.raises(InvalidOption, match="two models are named two"):
        name_models(["/a/two", "/b/two"], {}, [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name at least one model, or a file of models with --models"),
        (("faq", "--models", "FILE"), "give one of both"),
    ],
)
def test_serve_needs_models_or_a_file(arguments: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(app, ["config", "show", "serve", "--", *arguments])
    assert isinstance(done.exception, InvalidOption)
    assert said in done.exception.sentence


def test_a_config_file_may_name_several_models(tmp_path: Path) -> None:
    path = tmp_path / "macpipe.toml"
    path.write_text('[serve]\nmodel = ["faq", "org/Other"]\n')
    done = CliRunner().invoke(app, ["config", "show", "serve", "--config", str(path), "--json"])
    assert json.loads(done.stdout)["options"]["model"] == {"value": ["faq", "org/Other"], "source": "file"}
    path.write_text('[serve]\nmodels = "models.toml"\n')
    done = CliRunner().invoke(app, ["config", "show", "serve", "--config", str(path), "--json"])
    assert json.loads(done.stdout)["options"]["models"] == {"value": "models.toml", "source": "file"}


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["models", *arguments], prog_name="macpipe")


def test_models_are_added_and_removed_with_their_comments(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    file = ("--models", str(path))
    assert run("add", "faq", "--set", "pin=true", *file).stdout == f"added faq to {path}\n"
    path.write_text(f"# Ours.\n\n# The default.\n{path.read_text()}\n# The end of faq.\n")
    path.chmod(0o640)
    more = ("--set", "idle-unload=15m", "--set", 'layers="0-3,4-7"', "--set", "fallback=faq")
    assert run("add", "org/Small", "--name", "small", "--alias", "a*", "--alias", "b", *more, *file).exit_code == 0
    faq, small = parse(path.read_text(), tmp_path)
    assert (faq.name, faq.pin) == ("faq", True)
    assert (small.name, small.aliases, small.idle_unload_s, small.fallback) == ("small", ("a*", "b"), 900.0, "faq")
    assert small.order.layers == (LayerRange(0, 4), LayerRange(4, 8))
    listed = json.loads(run("list", "--json", *file).stdout)["models"]
    assert [(one["name"], one["pin"], one["idle_unload"]) for one in listed] == [
        ("faq", True, None),
        ("small", False, "15m"),
    ]
    assert listed[1] == {
        **{"name": "small", "source": "org/Small", "aliases": ["a*", "b"], "pin": False, "idle_unload": "15m"},
        **{"replicas": 1, "priority": 0, "fallback": "faq", "layers": "0-3,4-7"},
    }
    assert "small  org/Small  a*, b" in run("list", *file).stdout
    assert run("add", "org/Third", *file).exit_code == 0
    assert run("remove", "org/Third", *file).exit_code == 0
    assert run("remove", "small", *file).exit_code == 0
    assert path.read_text() == (
        '# Ours.\n\n# The default.\n[[model]]\nsource = "faq"\npin = true\n\n# The end of faq.\n\n'
    )
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "faq"), "two models are named faq"),
        (("add", "x", "--set", "pin"), "write it as KEY=VALUE"),
        (("add", "x", "--set", "pin=maybe"), ":11: pin must be true or false"),
        (("add", "x", "--set", "port=1"), ":11: unknown key port"),
        (("remove", "x"), "has no model x; its models are faq, small"),
        (("remove", "tiny"), "tiny is an alias of small in "),
        (("remove", "faq"), "the fallback faq of the model small is no model's name"),
    ],
)
def test_a_wrong_change_leaves_the_file(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(
        '[[model]]\nsource = "faq"\n[[model]]\nname = "small"\nsource = "y"\nfallback = "faq"\naliases = ["tiny"]\n'
    )
    before = path.read_text()
    done = run(*arguments, "--models", str(path))
    assert isinstance(done.exception, MacpipeError)
    assert said in done.exception.sentence
    assert path.read_text() == before


def test_the_only_model_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text('[[model]]\nsource = "faq"\n')
    assert "the only model" in str(run("remove", "faq", "--models", str(path)).exception)
    assert "cannot read" in str(run("remove", "faq", "--models", str(tmp_path / "none")).exception)
