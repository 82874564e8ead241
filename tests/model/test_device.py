"""The device's facts, and a thread that computes and ends without leaving anything."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import mlx.core as mx
import pytest

from adapters import make_adapter
from cluster.core.errors import InvalidOption
from cluster.core.plan import ModelShape
from cluster.model import device
from cluster.model.adapters import read_adapter
from cluster.model.import_changes import exported_part
from cluster.model.skeleton import open_skeleton

THREADED = """
import sys, threading
from pathlib import Path
from cluster.model import device
from cluster.model.stage import load_stage
from cluster.model.model_shape import read_shape
from cluster.core.frames import Compute, Frame, Join, Step
from cluster.core.plan import LayerRange, StageSpec
from cluster.core.request import SamplingParams

def run(path):
    shape = read_shape(path, "m", 64)
    stage = load_stage(StageSpec(1, 0, 1, shape.model, LayerRange(0, shape.layers), 64), path, lambda done, total: None)
    hot = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, min_p=0.01, seed=3)
    reply = stage.step(Frame(1, 0, 0, (Join(1, 2, hot),), Step(Compute.DECODE, (1,), ((1, 2),))))
    print(len(reply.samples))
    stage.close()
    device.close_thread()

thread = threading.Thread(target=run, args=(Path(sys.argv[1]),))
thread.start()
thread.join()
"""


@pytest.mark.parametrize("arch", ["llama", "qwen3_next"])
def test_a_thread_of_its_own_computes_and_ends_cleanly(arch: str, checkpoint: Callable[[str], Path]) -> None:
    """It imports mlx on one thread and uses it on another, as daemons do."""
    command = [sys.executable, "-W", "error", "-c", THREADED, str(checkpoint(arch))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "1\n", "")


def test_facts_are_plausible() -> None:
    facts = device.device_facts()
    assert facts.backend in ("metal", "cuda", "cpu")
    assert facts.chip
    assert facts.mlx_version.split(".")[0].isdigit()
    assert facts.mlx_lm_version.split(".")[0].isdigit()
    assert 2**28 < facts.memory_limit <= facts.memory_total < 2**50


def test_a_control_group_bounds_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.device_facts().backend != "cpu":
        pytest.skip("a GPU's memory is no control group's")
    monkeypatch.setattr(device, "CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    unbounded = device.device_facts().memory_limit
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    assert device.device_facts().memory_limit == int(2**30 * 0.75) < unbounded


@pytest.mark.parametrize(
    ("info", "backend", "limit"),
    [
        ({"max_recommended_working_set_size": 7, "memory_size": 10}, "metal", 7),
        ({"total_memory": 11}, "cuda", 11),
    ],
)
def test_a_gpu_names_its_own_limit(
    info: dict[str, int], backend: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_info", lambda: {"device_name": "A chip", **info})
    monkeypatch.setattr(device, "_backend", lambda: backend)
    facts = device.device_facts()
    assert (facts.chip, facts.backend, facts.memory_limit) == ("A chip", backend, limit)
    assert facts.memory_total == info.get("memory_size", info.get("total_memory"))


def test_the_limits_reach_mlx() -> None:
    before, spare = mx.get_memory_limit(), mx.set_cache_limit(2**40)
    try:
        device.set_limits(2**30)
        assert mx.get_memory_limit() == 2**30
        assert mx.set_cache_limit(spare) == int(2**30 * device.SPARE_SHARE)
    finally:
        mx.set_memory_limit(before)
        mx.set_cache_limit(spare)


def test_the_device_is_the_one_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, sentence in (("tpu", "must be cpu or gpu"), ("gpu", "finds no GPU here")):
        if asked == "gpu" and mx.is_available(mx.gpu):
            continue
        monkeypatch.setenv(device.VARIABLE, asked)
        with pytest.raises(InvalidOption, match=sentence):
            device.choose()
    monkeypatch.setenv(device.VARIABLE, "cpu")
    device.choose()
    assert mx.default_device().type == mx.cpu


def test_the_peak_is_what_was_held_at_most() -> None:
    array = mx.zeros((1024, 1024))
    mx.eval(array)
    del array
    assert device.memory_peak() >= device.memory_used() + 2**22


def test_used_memory_counts_arrays_and_release_gives_spare_buffers_back(shape: Callable[[str], ModelShape]) -> None:
    device.release()
    before = device.memory_used()
    array = mx.zeros((1024, 1024))
    mx.eval(array)
    assert device.memory_used() - before == 2**22
    ring: list[object] = [array]
    ring.append(ring)
    del array, ring
    device.release()
    assert device.memory_used() == before
    assert mx.get_cache_memory() == 0


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_random_keys_of_what_was_built_keep_no_graph(
    kind: str, checkpoint: Callable[[str], Path], shape: Callable[[str], ModelShape], tmp_path: Path
) -> None:
    path = checkpoint("llama")
    if kind == "model":
        open_skeleton(path)
    else:
        read_adapter("one", make_adapter(path, tmp_path / "one", 1), path, shape("llama"))
    graph = StringIO()
    mx.export_to_dot(graph, mx.random.state[0])
    assert "->" not in graph.getvalue(), "the key depends on others that are not computed"


PRINT_LIMITS = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
import cluster.model.tokenizer
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("soft", "hard"), [(256, 256), (6000, 9000)])
def test_importing_mlx_lm_leaves_the_limit_of_open_files_as_it_was(soft: int, hard: int) -> None:
    script = PRINT_LIMITS.format(soft=soft, hard=hard)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout.strip() == str((soft, hard)), run.stderr


def test_transformers_reads_the_folders_of_its_models_once_at_import() -> None:
    from transformers.utils import import_utils

    read = import_utils.create_import_structure_from_path.cache_info()
    assert read.misses == read.currsize > 400
    assert read.hits > 0


@pytest.mark.parametrize(
    ("text", "exported"),
    [
        ('import os\n\n__all__ = ["A", "B"]\n', ["A", "B"]),
        ('__all__ = ["A"]', ["A"]),
        ('__all__ = ["A"]\n__all__ = [\n    "B",\n    "C",\n]\nmore = ["D"]\n', ["B", "C"]),
        ('def f():\n    __all__ = ["A"]\n', []),
        ("import os\n", []),
    ],
)
def test_transformers_finds_what_a_file_exports_at_once(text: str, exported: list[str]) -> None:
    from transformers.utils import import_utils

    assert import_utils.fetch__all__(text) == exported
    assert import_utils.fetch__all__("x = 1\n" * 9 + text) == exported
    shown = exported_part("x = 1\n" * 9 + text)
    assert shown.startswith("__all__") == bool(exported), "what is before it was read for nothing"
