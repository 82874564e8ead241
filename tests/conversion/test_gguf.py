"""GGUF files: their tensors beside those that the gguf package reads, their tokenizers, and files that are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load, load_model
from transformers import AutoTokenizer

from cluster.core.errors import BadCheckpoint, MacpipeError, ModelUnsupported
from cluster.core.quantization import Quantization
from cluster.model.checkpoint import open_checkpoint
from cluster.model.gguf_tokenizer import write_tokenizer
from cluster.model.weight_conversion import Conversion

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

from cluster.conversion.converter import ConversionProgress, convert_checkpoint  # noqa: E402
from cluster.conversion.gguf_config import build_config  # noqa: E402
from cluster.conversion.gguf_header import write_checkpoint  # noqa: E402
from cluster.conversion.gguf_source import convert_gguf  # noqa: E402

HEADS, KV_HEADS, WIDTH, HEAD, INNER, LAYERS = 4, 2, 64, 16, 96, 2
LETTERS = [chr(i) for i in range(33, 127)] + ["Ġ", "Ċ"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the"]
TOKENS = [*LETTERS, "th", "the", "Ġthe", *SPECIALS]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
Kind = "gguf.GGMLQuantizationType"


def ignore(_progress: ConversionProgress) -> None:
    """Take no notice of the progress."""


def names_of(architecture: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of a small model, as llama.cpp's converter names them."""
    yield "token_embd.weight", (len(TOKENS), WIDTH)
    for i in range(LAYERS):
        shapes = {
            "attn_q.weight": (HEADS * HEAD, WIDTH), "attn_k.weight": (KV_HEADS * HEAD, WIDTH),
            "attn_v.weight": (KV_HEADS * HEAD, WIDTH), "attn_output.weight": (WIDTH, HEADS * HEAD),
            "attn_norm.weight": (WIDTH,), "ffn_norm.weight": (WIDTH,), "ffn_gate.weight": (INNER, WIDTH),
            "ffn_up.weight": (INNER, WIDTH), "ffn_down.weight": (WIDTH, INNER),
        }  # fmt: skip
        if architecture == "qwen2":
            shapes |= {f"attn_{one}.bias": (shapes[f"attn_{one}.weight"][0],) for one in "qkv"}
        if architecture in ("qwen3", "gemma3"):
            shapes |= {f"attn_{one}_norm.weight": (HEAD,) for one in "qk"}
        if architecture == "gemma3":
            shapes |= {"post_attention_norm.weight": (WIDTH,), "post_ffw_norm.weight": (WIDTH,)}
        yield from ((f"blk.{i}.{name}", shape) for name, shape in shapes.items())
    yield "output_norm.weight", (WIDTH,)
    if architecture == "qwen3":
        yield "output.weight", (len(TOKENS), WIDTH)


def write_gguf(
    path: Path,
    architecture: str = "llama",
    kind: str = "Q8_0",
    metadata: Mapping[str, Any] | None = None,
    pre: str = "smollm",
    extra: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Any]:
    """Write a small GGUF file of random numbers. Return its float32 numbers by the file's names."""
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {
        "block_count": LAYERS, "context_length": 256, "embedding_length": WIDTH, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD,
        "attention.sliding_window": 32,
    }  # fmt: skip
    for name, number in numbers.items():
        writer.add_uint32(f"{architecture}.{name}", number)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    for name, value in (metadata or {}).items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_string if isinstance(value, str) else None
        (add or writer.add_float32)(name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(TOKENS.index("<|im_start|>"))
    writer.add_eos_token_id(TOKENS.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    wanted = gguf.GGMLQuantizationType[kind]
    written = {}
    for name, shape in (*names_of(architecture), *(extra or {}).items()):
        values = random.standard_normal(shape, np.float32) / 4
        own = wanted if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(values, own)
        writer.add_tensor(name, data, raw_dtype=own)
        written[name] = gguf.dequantize(data, own)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return written


def deinterleave(values: Any, heads: int) -> Any:
    """Undo llama.cpp's order of a rotary matrix's rows."""
    return values.reshape(heads, values.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)


PLACES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
    "blk.1.attn_k.weight": "model.layers.1.self_attn.k_proj.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
}


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "Q8_0"), ("llama", "F32"), ("qwen2", "Q4_0"), ("qwen3", "Q5_1"), ("gemma3", "F16"), ("llama", "BF16")],
)
def test_tensors_are_those_of_the_gguf_package(architecture: str, kind: str, tmp_path: Path) -> None:
    """Dequantized and cast; then quantized by MLX. The model that mlx-lm loads answers with its vocabulary."""
    pattern = {"gemma3.attention.sliding_window_pattern": 2}
    written = write_gguf(tmp_path / "model.gguf", architecture, kind, pattern if architecture == "gemma3" else None)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "plain", Conversion(dtype="bfloat16"), ignore, write_checkpoint)
    found = mx.load(str(tmp_path / "plain" / "model.safetensors"))
    assert len(found) == len(written)
    for theirs, ours in PLACES.items():
        values = written[theirs]
        if architecture == "llama" and "attn_q" in theirs + ours:
            values = deinterleave(values, HEADS)
        if architecture == "llama" and "attn_k" in theirs:
            values = deinterleave(values, KV_HEADS)
        if architecture == "gemma3" and "norm" in theirs:
            values = values - 1
        assert mx.array_equal(found[ours], mx.array(values).astype(mx.bfloat16)), ours
    convert_gguf(
        tmp_path / "model.gguf",
        tmp_path / "four",
        Conversion(Quantization(4, 32), dtype="bfloat16"),
        ignore,
        write_checkpoint,
    )
    convert_checkpoint(tmp_path / "plain", tmp_path / "again", Conversion(Quantization(4, 32)), ignore)
    four, again = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("four", "again"))
    assert four.keys() == again.keys()
    assert all(mx.array_equal(array, again[name]) for name, array in four.items())
    model, _ = load_model(tmp_path / "four")
    assert model(mx.array([[0, 1]])).shape == (1, 2, len(TOKENS))


def test_the_tokenizer_and_the_template_come_along(tmp_path: Path) -> None:
    """Read by a process of its own, as for users."""
    write_gguf(tmp_path / "model.gguf")
    convert_gguf(tmp_path / "model.gguf", tmp_path / "out", Conversion(), ignore)
    _, tokenizer = load(str(tmp_path / "out"))
    ids = tokenizer.encode("the 12 the<|im_end|>", add_special_tokens=False)
    assert [TOKENS[i] for i in ids] == ["the", "Ġ", "1", "2", "Ġthe", "<|im_end|>"]
    assert tokenizer.decode(ids) == "the 12 the<|im_end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False) == (
        "<|im_start|>the<|im_end|>"
    )
    ends = {TOKENS.index("<|endoftext|>"), TOKENS.index("<|im_end|>")}
    assert set(json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"]) == ends
    assert tokenizer.eos_token_ids == ends


def test_a_token_before_each_text(tmp_path: Path) -> None:
    facts = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.merges": MERGES, "tokenizer.ggml.token_type": [3 if t in SPECIALS else 1 for t in TOKENS],
        "tokenizer.ggml.bos_token_id": TOKENS.index("<|im_start|>"), "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    write_tokenizer("llama", facts, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize("the", add_special_tokens=True) == ["<|im_start|>", "the"]


BYTES = [f"<0x{i:02X}>" for i in range(256)]
PIECES = ["<unk>", "<s>", "</s>", *BYTES, *"▁the12", "th", "the", "▁the", "<start_of_turn>"]


@pytest.mark.parametrize(
    ("architecture", "prefix", "pieces"),
    [
        ("llama", True, ["<s>", "▁the", "▁", "1", "2", "<0xC3>", "<0xA4>"]),
        ("llama", False, ["<s>", "the", "▁", "1", "2", "<0xC3>", "<0xA4>"]),
        ("gemma3", False, ["<s>", "the", "▁", "1", "2", "<0xC3>", "<0xA4>"]),
    ],
)
def test_vocabularies_of_sentencepiece(architecture: str, prefix: bool, pieces: list[str], tmp_path: Path) -> None:
    """As of Mistral's and Gemma's files: no merges but scores, bytes for what is unknown, and a token before a text."""
    facts = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(PIECES))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(PIECES) - 260), 3],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }  # fmt: skip
    write_tokenizer(architecture, facts, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("the 12ä")
    assert [PIECES[i] for i in ids] == pieces
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the 12ä"
    assert PIECES[tokenizer.encode("<start_of_turn>the", add_special_tokens=False)[0]] == "<start_of_turn>"


def test_an_interrupted_conversion_continues(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    convert_gguf(tmp_path / "model.gguf", tmp_path / "whole", Conversion(), ignore, write_checkpoint)

    def interrupt(progress: ConversionProgress) -> None:
        if progress.done > progress.total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out", Conversion(), interrupt, write_checkpoint)
    assert not (tmp_path / "out").exists()
    converted = convert_gguf(tmp_path / "model.gguf", tmp_path / "out", Conversion(), ignore, write_checkpoint)
    assert converted.resumed_bytes > converted.bytes / 2
    assert open_checkpoint(tmp_path / "out").fingerprint == open_checkpoint(tmp_path / "whole").fingerprint
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "out", "whole"]


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"architecture": "phi3"}, ModelUnsupported, "architecture 'phi3' cannot be converted; supported are llama"),
        ({"metadata": {"llama.expert_count": 8}}, ModelUnsupported, "mixture of experts"),
        ({"pre": "chatglm-bpe"}, ModelUnsupported, "splits text by the rules 'chatglm-bpe'"),
        ({"extra": {"blk.0.attn_sinks.weight": (4,)}}, ModelUnsupported, "tensor 'blk.0.attn_sinks.weight'"),
        ({"extra": {"rope_freqs.weight": (8,)}}, ModelUnsupported, "factors that are not Llama 3's"),
        ({"metadata": {"llama.rope.scaling.type": "su", "llama.rope.scaling.factor": 2.0}}, ModelUnsupported, "'su'"),
        ({"metadata": {"llama.rope.scaling.type": "linear"}}, BadCheckpoint, "no llama.rope.scaling.factor"),
    ],
)
def test_what_cannot_be_converted_is_named(
    change: dict[str, Any], error: type[MacpipeError], why: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "model.gguf", **change)
    with pytest.raises(error) as refused:
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out", Conversion(), ignore, write_checkpoint)
    assert why in refused.value.sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("left", [-100, -20_000, 1000, 30, 4])
def test_files_that_are_cut_short(left: int, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    size = (tmp_path / "model.gguf").stat().st_size
    left = left if left > 0 else size + left
    os.truncate(tmp_path / "model.gguf", left)
    with pytest.raises(BadCheckpoint) as refused:
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out", Conversion(), ignore, write_checkpoint)
    if left > size // 2:
        why = f"is cut off: it ends at {left} of {size} bytes"
    else:
        why = f"is cut off or damaged: it ends at byte {left}, inside its header"
    assert refused.value.sentence == f"model.gguf {why}; download it again"
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_the_reason_for_a_refusal_comes_from_the_process_that_reads(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "phi3")
    with pytest.raises(ModelUnsupported, match="architecture 'phi3' cannot be converted"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out", Conversion(), ignore)


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")

    def shrink(progress: ConversionProgress) -> None:
        if progress.done == 0:
            os.truncate(tmp_path / "model.gguf", 9000)

    with pytest.raises(BadCheckpoint, match="was truncated while it was read"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out", Conversion(), shrink, write_checkpoint)


def test_llama_3_positions_are_recognised_by_their_factors() -> None:
    metadata = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 131072,
        "llama.embedding_length": 2048, "llama.feed_forward_length": 8192, "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8, "llama.rope.freq_base": 500000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    plain = 500000.0 ** (np.arange(0, 64, 2) / 64)
    from mlx_lm.models.rope_utils import Llama3RoPE

    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = np.array(Llama3RoPE(64, base=500000.0, scaling_config=scaling)._freqs) / plain
    config = build_config(metadata, {"token_embd.weight"}, 100, factors.tolist(), "bfloat16")
    assert config["rope_scaling"] == {"rope_type": "llama3", **scaling} | {"factor": pytest.approx(32.0, rel=1e-5)}
    assert config["head_dim"] == 64
