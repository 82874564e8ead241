"""Every text model of mlx-lm is served as mlx-lm would, or is listed as unsupported with a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from architectures import Architecture, architectures, modules, not_models, refused
from checkpoints import make, write
from cluster.core.errors import ModelUnsupported
from cluster.model.model_shape import read_shape
from effort import chosen
from model import table
from model.proof import prove, prove_quickly

ON_CPU = mx.default_device().type == mx.cpu
UNCUT = """
import sys
from pathlib import Path
from model.ring import reference
for _ in range(10):
    reference(Path(sys.argv[1]), 20)
"""


def test_every_module_of_mlx_lm_is_in_one_table() -> None:
    """A new module fails here: give it a tiny configuration, or list what it is instead."""
    listed = [*architectures(), *not_models(), *{a.name for a in refused().values()}.difference(architectures())]
    assert sorted(listed) == modules()


def test_the_table_belongs_to_this_mlx_lm() -> None:
    """Its rows are proved again below; here it is asked whether all else is what ``ops/models`` would write."""
    assert table.text(table.recorded()) == table.FILE.read_text()


@pytest.mark.parametrize("wrong", ["lama", "--chek"])
def test_who_asks_for_no_module_is_told(wrong: str) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, root / "ops" / "prove_models.py", wrong], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"ops/models takes --check, or names of served modules; {wrong} is none\n"


@pytest.mark.parametrize("name", chosen(architectures(), *list(architectures())[::3]))
def test_two_stages_say_what_mlx_lm_says(name: str, tmp_path: Path) -> None:
    arch = architectures()[name]
    shape = prove_quickly(arch, tmp_path)
    cuts, lane, trim = len(shape.clean_cuts), shape.batchable, shape.trimmable
    said = table.surveyed(arch, shape.layers, cuts, lane=lane, trim=trim)
    assert said.items() <= table.cells(name).items()


@pytest.mark.long
@pytest.mark.parametrize("name", architectures())
def test_what_the_table_says_is_so(name: str, tmp_path: Path) -> None:
    arch = architectures()[name]
    assert table.line(arch, prove(arch, tmp_path)) == table.recorded()[name]


@pytest.mark.parametrize("name", [name for name, arch in refused().items() if arch.refusal != "crash"])
def test_what_is_not_served_is_refused_for_the_reason_given(name: str, tmp_path: Path) -> None:
    arch = refused()[name]
    if arch.cpu and not ON_CPU:
        pytest.skip("this one is for a CPU")
    with pytest.raises(ModelUnsupported) as refusal:
        read_shape(_written(arch, tmp_path), name, None)
    assert arch.refusal in refusal.value.sentence


def _written(arch: Architecture, folder: Path) -> Path:
    """A checkpoint of it; where mlx-lm ends the program instead of building one, somebody else's weights do."""
    try:
        return write(arch.config, folder)
    except SystemExit:
        make("llama", folder)
        (folder / "config.json").write_text(json.dumps(arch.config))
        return folder


@pytest.mark.long
@pytest.mark.skipif(not ON_CPU, reason="this one is for a CPU")
@pytest.mark.parametrize("name", [name for name, arch in refused().items() if arch.refusal == "crash"])
def test_what_crashes_here_crashes_uncut_too(name: str, tmp_path: Path) -> None:
    """Once this fails, MLX has been mended: move the configuration to its family."""
    path = write(refused()[name].config, tmp_path)
    command = [sys.executable, "-c", UNCUT, str(path)]
    runs = [subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}, check=False) for _ in range(2)]
    assert any(run.returncode < 0 for run in runs)
