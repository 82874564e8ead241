"""Conversions beside mlx-lm's own, bit for bit, and what interruptions and full disks leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import convert as convert_with_mlx_lm
from mlx_lm.convert import MODEL_CONVERSION_DTYPES
from mlx_lm.utils import load

from architectures import architectures
from checkpoints import EXPERTS, add_pooling, hollow, make, split, split_experts, write
from cluster.conversion import converter
from cluster.conversion.converter import ConversionProgress, Converted, convert_checkpoint
from cluster.conversion.work_folder import open_work_folder
from cluster.core.errors import BadCheckpoint, DiskFull, InvalidOption, ModelUnsupported
from cluster.core.quantization import MODES, RECIPES, Quantization, choose_weight_quantization
from cluster.model.checkpoint import open_checkpoint
from cluster.model.sentence_embedding import read_sentence_embedding
from cluster.model.weight_conversion import Conversion
from disks import FailingDisk
from model.memory import settled_memory

FOUR_BITS = Conversion(Quantization(4, 32))


def ignore(_progress: ConversionProgress) -> None:
    """Take no notice of the progress."""


def read_tensors(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in folder.glob("model*.safetensors"):
        found |= mx.load(str(file))
    return found


def require_equal(ours: Path, theirs: Path) -> None:
    """Require the tensors and the config of both folders to be equal, bit for bit."""
    found, expected = read_tensors(ours), read_tensors(theirs)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert mx.array_equal(mx.view(found[name], mx.uint8), mx.view(array, mx.uint8)), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    assert configs[0] == configs[1]
    indices = [json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (ours, theirs)]
    assert indices[0] == indices[1]


def convert_both(source: Path, folder: Path, conversion: Conversion, **theirs: Any) -> Converted:
    """Convert with both programs and require equal results."""
    convert_with_mlx_lm(str(source), str(folder / "theirs"), **theirs)
    converted = convert_checkpoint(source, folder / "ours", conversion, ignore)
    require_equal(folder / "ours", folder / "theirs")
    return converted


UNSTACKED = ("qwen3_moe", "deepseek_v3", "mixtral", "qwen2_moe")
"""Their makers publish each expert as a tensor; mlx-lm stacks them."""


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "olmo2", "gpt_oss", "qwen3_next", "lfm2", *UNSTACKED]
)
def test_tensors_are_those_of_mlx_lm(name: str, tmp_path: Path) -> None:
    source = write(architectures()[name].config, tmp_path / "source")
    if name in UNSTACKED:
        assert split_experts(source, architectures()[name].stacks)
    split(source, 3)
    convert_both(source, tmp_path, FOUR_BITS, quantize=True, q_bits=4, q_group_size=32)


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str, tmp_path: Path) -> None:
    source = make("qwen3_moe", tmp_path / "source", hidden_size=64, moe_intermediate_size=64, dtype=mx.bfloat16)
    chosen = choose_weight_quantization(mode)
    converted = convert_both(source, tmp_path, Conversion(chosen), quantize=True, q_mode=mode)
    assert converted.bits_per_weight > chosen.bits


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_of_mixed_bits(recipe: str, tmp_path: Path) -> None:
    source = make("llama_untied", tmp_path / "source", layers=8)
    convert_both(
        source,
        tmp_path,
        Conversion(Quantization(4, 32), recipe),
        quantize=True,
        q_group_size=32,
        quant_predicate=recipe,
    )


@pytest.mark.parametrize("dtype", MODEL_CONVERSION_DTYPES)
def test_types(dtype: str, tmp_path: Path) -> None:
    source = make("mamba2", tmp_path / "source")
    convert_both(source, tmp_path, Conversion(dtype=dtype), dtype=dtype)


def test_the_type_that_the_config_names(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source", torch_dtype="bfloat16")
    convert_both(source, tmp_path, FOUR_BITS, quantize=True, q_bits=4, q_group_size=32)
    assert mx.bfloat16 in {array.dtype for array in read_tensors(tmp_path / "ours").values()}


def test_back_from_four_bits(tmp_path: Path) -> None:
    source = make("llama_4bit", tmp_path / "source")
    convert_both(source, tmp_path, Conversion(dequantize=True), dequantize=True)
    model, tokenizer = load(str(tmp_path / "ours"))
    assert model(mx.array([tokenizer.encode("the")])).shape[-1] == 320


@pytest.mark.parametrize(
    ("conversion", "wanted"),
    [
        (Conversion(Quantization(8, 32)), "8 bits (affine, groups of 32)"),
        (Conversion(Quantization(4, 64)), "4 bits (affine, groups of 64)"),
        (Conversion(Quantization(4, 32, "mxfp4")), "4 bits (mxfp4, groups of 32)"),
        (Conversion(Quantization(4, 32), "mixed_2_6"), "mixed bits"),
    ],
)
def test_a_quantized_model_is_not_quantized_otherwise(conversion: Conversion, wanted: str, tmp_path: Path) -> None:
    """mlx-lm would write it with its old bits, without a word."""
    source = make("llama_4bit", tmp_path / "source")
    with pytest.raises(InvalidOption) as refused:
        convert_checkpoint(source, tmp_path / "out", conversion, ignore)
    assert refused.value.sentence == (
        "the model is quantized to 4 bits (affine, groups of 32) already, so it cannot be quantized to "
        f"{wanted}; leave out --bits and the other options that quantize, or dequantize it first with --dequantize"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_quantized_model_is_copied_by_its_own_quantization(tmp_path: Path) -> None:
    source = make("llama_4bit", tmp_path / "source")
    convert_both(source, tmp_path, FOUR_BITS, quantize=True, q_bits=4, q_group_size=32)


def test_how_states_become_embeddings_is_copied(tmp_path: Path) -> None:
    source = add_pooling(make("llama", tmp_path / "source"))
    convert_checkpoint(source, tmp_path / "target", FOUR_BITS, ignore)
    assert read_sentence_embedding(tmp_path / "target") == read_sentence_embedding(source)
    assert not read_sentence_embedding(source).problem


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Two of the largest layer are enough, also where mlx-lm stacks experts that are published one by one."""
    config = {**architectures()["qwen3_moe"].config, "num_hidden_layers": 8, "hidden_size": 128}
    source = hollow({**config, "moe_intermediate_size": 64}, tmp_path / "source", mx.bfloat16, names=EXPERTS)
    layers: Counter[str] = Counter()
    for name, tensor in open_checkpoint(source).tensors.items():
        layers[name.partition(".layers.")[2].partition(".")[0]] += tensor.nbytes
    largest = max(size for layer, size in layers.items() if layer)
    held = settled_memory()
    mx.reset_peak_memory()
    convert_checkpoint(source, tmp_path / "out", Conversion(Quantization(4, 64)), ignore)
    assert mx.get_peak_memory() - held <= 2 * largest


def test_a_converted_model_is_split_into_files_as_large_ones_are(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")
    convert_checkpoint(source, tmp_path / "whole", FOUR_BITS, ignore)
    convert_checkpoint(source, tmp_path / "parts", FOUR_BITS, ignore, shard_bytes=5000)
    files = sorted(file.name for file in (tmp_path / "parts").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 4
    whole, parts = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(mx.array_equal(array, parts[name]) for name, array in whole.items())
    open_checkpoint(tmp_path / "parts")


class Interrupted(Exception):
    """What a test raises in the middle of a conversion."""


def interrupt_at(share: float) -> Callable[[ConversionProgress], None]:
    def report(progress: ConversionProgress) -> None:
        if progress.done > share * progress.total:
            raise Interrupted

    return report


def test_an_interrupted_conversion_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make("llama", tmp_path / "source")
    convert_checkpoint(source, tmp_path / "whole", FOUR_BITS, ignore, shard_bytes=9000)
    with pytest.raises(Interrupted):
        convert_checkpoint(source, tmp_path / "out", FOUR_BITS, interrupt_at(0.5), shard_bytes=9000)
    assert not (tmp_path / "out").exists()
    told: list[ConversionProgress] = []
    converted = convert_checkpoint(source, tmp_path / "out", FOUR_BITS, told.append, shard_bytes=9000)
    assert told[0].done == converted.resumed_bytes > 0.5 * converted.bytes
    assert not (tmp_path / "out.partial").exists()
    require_equal(tmp_path / "out", tmp_path / "whole")


def test_a_killed_conversion_continues_from_the_last_record(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from cluster.conversion import converter\n"
        "from cluster.core.quantization import Quantization\n"
        "from cluster.model.weight_conversion import Conversion\n"
        "converter.RECORD_BYTES = 4000\n"
        "def report(progress):\n"
        "    if progress.done > 0.6 * progress.total: os.kill(os.getpid(), signal.SIGKILL)\n"
        "converter.convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), Conversion(Quantization(4, 32)), report)\n"
    )
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, cwd=tmp_path, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    converted = convert_checkpoint(source, tmp_path / "out", FOUR_BITS, ignore)
    assert 0.4 * converted.bytes < converted.resumed_bytes < converted.bytes
    convert_checkpoint(source, tmp_path / "whole", FOUR_BITS, ignore)
    require_equal(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("change", ["options", "source", "files"])
def test_another_conversion_starts_again(change: str, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")
    with pytest.raises(Interrupted):
        convert_checkpoint(source, tmp_path / "out", FOUR_BITS, interrupt_at(0.5))
    conversion = FOUR_BITS
    if change == "options":
        conversion = Conversion(Quantization(8, 32))
    elif change == "source":
        make("llama", tmp_path / "source", seed=1)
    else:
        (tmp_path / "out.partial" / "model" / "model.safetensors").write_bytes(b"")
    assert convert_checkpoint(source, tmp_path / "out", conversion, ignore).resumed_bytes == 0
    convert_checkpoint(source, tmp_path / "whole", conversion, ignore)
    require_equal(tmp_path / "out", tmp_path / "whole")


def test_a_disk_that_fills_up(tmp_path: Path, failing_disk: FailingDisk) -> None:
    source = make("llama", tmp_path / "source")
    failing_disk.room = 20_000
    with pytest.raises(DiskFull, match=r"cannot write the converted model to .*out.partial: No space left"):
        convert_checkpoint(source, tmp_path / "out", FOUR_BITS, ignore)
    assert not (tmp_path / "out").exists()
    failing_disk.room = None
    converted = convert_checkpoint(source, tmp_path / "out", FOUR_BITS, ignore)
    convert_checkpoint(source, tmp_path / "whole", FOUR_BITS, ignore)
    require_equal(tmp_path / "out", tmp_path / "whole")
    assert converted.resumed_bytes < 20_000


def test_a_disk_without_room_is_refused_before_the_first_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make("llama", tmp_path / "source")
    monkeypatch.setattr(converter, "free_bytes", lambda _: 1000)
    told: list[ConversionProgress] = []
    with pytest.raises(DiskFull, match=r"needs .* more on disk, but only .* are free"):
        convert_checkpoint(source, tmp_path / "out", FOUR_BITS, told.append)
    assert told == []


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidOption, match="out exists already"):
        convert_checkpoint(source, tmp_path / "out", FOUR_BITS, ignore)
    assert list((tmp_path / "out").iterdir()) == []


def test_two_conversions_into_one_folder(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")
    with (
        open_work_folder(tmp_path / "out"),
        pytest.raises(InvalidOption, match="another process is converting a model into"),
    ):
        convert_checkpoint(source, tmp_path / "out", FOUR_BITS, ignore)
    convert_checkpoint(source, tmp_path / "out", FOUR_BITS, ignore)


def test_a_source_that_shrinks_meanwhile(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")

    def shrink(progress: ConversionProgress) -> None:
        if progress.done == 0:
            os.truncate(source / "model.safetensors", 9000)

    with pytest.raises(BadCheckpoint, match="could not be read"):
        convert_checkpoint(source, tmp_path / "out", FOUR_BITS, shrink)
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_does_not_fit_the_model(tmp_path: Path) -> None:
    source = make("mamba2", tmp_path / "source")
    with pytest.raises(ModelUnsupported, match=r"mlx-lm cannot convert this model so: .*mixed quant"):
        convert_checkpoint(source, tmp_path / "out", Conversion(Quantization(4, 32), "mixed_2_6"), ignore)


def test_every_quantization_that_is_listed_exists_and_no_other() -> None:
    """The table against the installed MLX."""
    weights = mx.ones((32, 128), mx.float32)

    def works(mode: str, bits: int, group_size: int) -> bool:
        try:
            mx.eval(mx.quantize(weights, group_size, bits, mode))
        except ValueError:
            return False
        return True

    for mode, known in MODES.items():
        for bits in range(1, 10):
            for group_size in (8, 16, 32, 64, 128):
                listed = bits in known.bits and group_size in known.group_sizes
                assert works(mode, bits, group_size) == listed, (mode, bits, group_size)


@pytest.mark.parametrize(
    ("mode", "bits", "group_size", "why"),
    [
        ("affine", 7, None, "mode affine has no quantization with 7 bits; choose 1, 2, 3, 4, 5, 6 or 8"),
        ("mxfp4", 8, None, "mode mxfp4 has no quantization with 8 bits; choose 4"),
        ("nvfp4", None, 64, "mode nvfp4 has no groups of 64; choose 16"),
        ("int4", None, None, "unknown quantization mode 'int4'; choose affine, mxfp4, nvfp4, mxfp8"),
    ],
)
def test_a_quantization_that_does_not_exist(mode: str, bits: int | None, group_size: int | None, why: str) -> None:
    with pytest.raises(InvalidOption) as refused:
        choose_weight_quantization(mode, bits, group_size)
    assert refused.value.sentence == why
