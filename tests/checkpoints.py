"""Create tiny checkpoints on disk: a config, random weights, and a byte-level tokenizer with a template.

``make("qwen3_moe", folder)`` writes one that mlx-lm loads. The weights are float32, since MLX's CPU backend has no
other expert matmuls, and random from ``seed``. No file is fetched from anywhere.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import re
import shutil
from array import array as numbers_of
from collections.abc import Callable
from contextlib import redirect_stdout
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_map_with_path
from mlx_lm.utils import quantize_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cluster.model.checkpoint import open_checkpoint

SPECIALS = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
VOCABULARY = 320
"""Logits: 256 bytes, two merges, the specials, and padding that no token uses."""
SPECIAL_IDS = {text: 258 + i for i, text in enumerate(SPECIALS)}
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('Unknown role: ' + m.role) }}{% endif %}"
    "<|{{ 'assistant' if m.role == 'assistant' else 'user' }}|>{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "eos_token_id": SPECIAL_IDS["<|end|>"],
}


def _llama(**more: Any) -> dict[str, Any]:
    return {**_BASE, "model_type": "llama", "tie_word_embeddings": True, **more}


def _configs(layers: int) -> dict[str, dict[str, Any]]:
    """A config for each architecture; mixes of layer kinds are in an order that puts each kind on both sides."""
    sliding = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    configs = {
        "llama": _llama(),
        "llama_untied": _llama(tie_word_embeddings=False),
        "llama_4bit": _llama(
            hidden_size=64, intermediate_size=64, quantization={"group_size": 32, "bits": 4}, tie_word_embeddings=False
        ),
        "llama_sliding": _llama(layer_types=sliding, sliding_window=16),
        "qwen3": {**_BASE, "model_type": "qwen3", "tie_word_embeddings": True},
        "qwen3_moe": {
            **_BASE, **experts,
            "model_type": "qwen3_moe", "decoder_sparse_step": 1, "mlp_only_layers": [1], "tie_word_embeddings": False,
        },
        "gemma3_text": {
            **_BASE, "model_type": "gemma3_text", "sliding_window": 16, "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 8, "rope_local_base_freq": 10000.0,
        },
        "gpt_oss": {
            **_BASE, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
            "layer_types": sliding,
        },
        "deepseek_v3": {
            **_BASE, "model_type": "deepseek_v3", "num_key_value_heads": 4, "moe_intermediate_size": 16,
            "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "routed_scaling_factor": 1.5,
        },
        "qwen3_next": {
            **_BASE, **experts,
            "model_type": "qwen3_next", "decoder_sparse_step": 1, "mlp_only_layers": [],
            "shared_expert_intermediate_size": 16, "partial_rotary_factor": 0.5, "full_attention_interval": 2,
            "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32,
            "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
        },
        "mamba2": {
            **_BASE, "model_type": "mamba2", "num_heads": 4, "head_dim": 16, "intermediate_size": 64, "state_size": 16,
            "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "n_groups": 1, "use_bias": False, "use_conv_bias": True,
            "tie_word_embeddings": True, "time_step_limit": [0.0, 100.0], "time_step_rank": "auto",
        },
        "rwkv7": {
            **_BASE, "model_type": "rwkv7", "norm_eps": 1e-5, "a_low_rank_dim": 4, "v_low_rank_dim": 4,
            "gate_low_rank_dim": 4, "decay_low_rank_dim": 4,
        },
        "hunyuan": {
            **_BASE, "model_type": "hunyuan", "attention_bias": False, "moe_topk": 2, "num_experts": 4,
            "num_shared_expert": 1, "use_mixed_mlp_moe": True, "use_qk_norm": True, "use_cla": True,
            "cla_share_factor": 2, "moe_intermediate_size": 16, "tie_word_embeddings": True,
            "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1.0},
        },
        "gemma4_text": {
            **_BASE, "model_type": "gemma4_text", "global_head_dim": 8, "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "sliding_window": 16,
            "sliding_window_pattern": 2, "tie_word_embeddings": True,
        },
        "falcon_h1": {
            **_BASE, "model_type": "falcon_h1", "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_d_state": 16,
            "mamba_n_heads": 4, "tie_word_embeddings": True,
        },
        "llama4_text": {
            **_BASE, "model_type": "llama4_text", "intermediate_size_mlp": 48, "tie_word_embeddings": False,
            "no_rope_layers": [1, 1, 0, 1, 1, 0][:layers], "use_qk_norm": True,
        },
        "llama4": {
            **_BASE, "model_type": "llama4", "text_config": {
                **_BASE, "model_type": "llama4_text", "intermediate_size_mlp": 48, "num_hidden_layers": layers,
                "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "use_qk_norm": True,
                "attention_chunk_size": 16, "attention_bias": False, "attn_scale": 0.1, "floor_scale": 8192,
                "attn_temperature_tuning": False, "rope_scaling": None,
            },
        },
        "dbrx": {
            **_BASE, "model_type": "dbrx", "d_model": 32, "n_layers": layers, "n_heads": 4,
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        },
        "kimi_k3": {
            **_BASE, "model_type": "kimi_k3", "hidden_act": "situ", "activation_situ_beta": 1.0,
            "attn_res_block_size": 2, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8, "v_head_dim": 8, "num_experts": 4, "num_experts_per_token": 2,
            "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_shared_experts": 1,
            "linear_attn_config": {
                "kda_layers": [i + 1 for i in range(layers) if i % 3 != 2],
                "full_attn_layers": [i + 1 for i in range(layers) if i % 3 == 2],
                "num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4,
            },
        },
        "deepseek_v41": {
            **_BASE, "model_type": "deepseek_v41", "head_dim": 32, "q_lora_rank": 16, "qk_rope_head_dim": 8,
            "o_groups": 2, "o_lora_rank": 8, "moe_intermediate_size": 16, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "sliding_window": 16, "compress_ratios": [0, 0, 4, 4, 8, 8][:layers],
            "kv_source_layer_ids": list(range(layers)), "index_source_layer_ids": list(range(layers)),
            "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "hc_mult": 2,
        },
        "longcat_flash_ngram": {
            **_BASE, "model_type": "longcat_flash_ngram", "num_layers": layers, "ffn_hidden_size": 48, "moe_topk": 2,
            "expert_ffn_hidden_size": 16, "n_routed_experts": 4, "zero_expert_num": 1, "kv_lora_rank": 16,
            "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
            "routed_scaling_factor": 1.0, "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
            "ngram_vocab_size_ratio": 2, "emb_neighbor_num": 3, "emb_split_num": 2,
        },
        "looped": {**_BASE, "model_type": "iquestloopcoder", "loop_num": 2, "loop_window_size": 16},
    }  # fmt: skip
    for config in configs.values():
        config["num_hidden_layers"] = layers
    return configs


PECULIAR = (
    "rwkv7",  # two arrays cross a cut
    "hunyuan",  # one or three do, by layer
    "kimi_k3",  # an object that carries arrays does
    "gemma4_text",  # late layers read the keys of early ones: not every cut is clean
    "falcon_h1",  # a layer has two caches in one
    "llama4",  # chunked caches
    "llama4_text",  # layers without positions
    "deepseek_v41",  # a cache class of its own
    "longcat_flash_ngram",  # a cache that no layer is called with
    "dbrx",  # the forward evaluates on its way
)
"""Architectures that do something which the common ones do not."""
SLICEABLE = tuple(arch for arch in _configs(4) if arch not in ("looped", *PECULIAR))
"""The common architectures: one array crosses a cut, and every cut is clean."""


def make(
    arch: str, folder: Path, layers: int = 4, seed: int = 0, dtype: mx.Dtype = mx.float32, **overrides: Any
) -> Path:
    """Write a checkpoint of ``arch`` into ``folder`` (made if need be) and return it.

    ``dtype`` is the weights'; ``overrides`` replace entries of its config.
    """
    return write({**_configs(layers)[arch], **overrides}, folder, seed, dtype, _quantize if "4bit" in arch else None)


def write(
    config: dict[str, Any],
    folder: Path,
    seed: int = 0,
    dtype: mx.Dtype = mx.float32,
    quantize: Callable[[nn.Module, dict[str, Any]], None] | None = None,
) -> Path:
    """Write a checkpoint of the model that ``config`` describes into ``folder`` (made if need be) and return it.

    ``quantize`` may change the model and its config before they are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    model = _model(config, seed, dtype)
    if quantize is not None:
        quantize(model, config)
    weights = dict(tree_flatten(model.parameters()))
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    make_tokenizer(folder)
    return folder


def _model(config: dict[str, Any], seed: int, dtype: mx.Dtype) -> nn.Module:
    """A model with random weights; what it wants in float32 whatever the checkpoint's type stays so."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(copy.deepcopy(config)))
    keys = iter(mx.random.split(mx.random.key(seed), 4096))
    model.update(tree_map(lambda a: _random(a, next(keys)), model.parameters()))
    casts = getattr(model, "cast_predicate", lambda _: True)
    model.update(tree_map_with_path(lambda p, a: _as(a, dtype) if casts(p) else a, model.parameters()))
    return model


def _as(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def _random(array: mx.array, key: mx.array) -> mx.array:
    """Vectors (norms, biases) near one, matrices so that activations keep their size and tokens differ."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    noise = mx.random.normal(array.shape, mx.float32, key=key)
    return 1 + 0.1 * noise if array.ndim < 2 else noise * (2.0 / array.shape[-1] ** 0.5)


def _quantize(model: nn.Module, config: dict[str, Any]) -> None:
    """4 bits everywhere but in one matrix of layer 1, which gets 8: the per-layer override that conversions write."""
    special = "model.layers.1.mlp.down_proj"
    config["quantization"][special] = {"group_size": 32, "bits": 8}

    def choose(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        chosen: dict[str, int] = config["quantization"].get(path, {"group_size": 32, "bits": 4})
        return chosen

    nn.quantize(model, class_predicate=choose)


def hollow(
    config: dict[str, Any],
    folder: Path,
    dtype: mx.Dtype = mx.float32,
    quantize: Callable[[nn.Module, dict[str, Any]], None] | None = None,
    names: dict[str, str] | None = None,
) -> Path:
    """Write a checkpoint of any size that takes no room: headers, and a hole where the numbers would be (zeros).

    A shard for each top-level part and each layer. ``names`` splits stacked experts, as ``split_experts`` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    model = _model(config, 0, dtype)
    if quantize is not None:
        quantize(model, config)
    shards: dict[str, dict[str, tuple[str, list[int], int]]] = {}
    for name, array in tree_flatten(model.parameters()):
        stack = next((stack for stack in names or {} if stack in name), None)
        shape = list(array.shape[1:] if stack else array.shape)
        for i in range(array.shape[0] if stack else 1):
            own = name.replace(stack, names[stack].format(i=i)) if stack and names else name
            entry = DTYPES[array.dtype], shape, prod(shape) * array.dtype.size
            shards.setdefault("-".join(re.findall(r"\.(\d+)\.", name)[:1]) or "rest", {})[own] = entry
    for shard, entries in shards.items():
        _write_hole(folder / f"model-{shard}.safetensors", entries)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    make_tokenizer(folder)
    return folder


DTYPES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint32: "U32", mx.uint8: "U8", mx.int32: "I32"}


def _write_hole(file: Path, entries: dict[str, tuple[str, list[int], int]]) -> None:
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, (dtype, shape, nbytes) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        out.truncate(8 + len(raw) + end)


def make_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """Write a byte-level tokenizer: 256 bytes, the specials, and two merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    for merged in ("th", "the"):
        vocabulary[merged] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


def poison(folder: Path, chosen: Callable[[str], bool]) -> None:
    """Overwrite the chosen tensors of the folder's one shard with bits that are not-a-number in every float type.

    The header stays as it is.
    """
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__" and chosen(name):
            a, b = (start + offset for offset in entry["data_offsets"])
            content[a:b] = b"\xff" * (b - a)
    file.write_bytes(content)


def split(folder: Path, parts: int) -> None:
    """Cut the folder's one shard into ``parts`` files with an index, as large models are published."""
    file = folder / "model.safetensors"
    weights = mx.load(str(file))
    mx.eval(weights)
    file.unlink()
    names = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    where = {tensor: names[i % parts] for i, tensor in enumerate(sorted(weights))}
    for name in names:
        mx.save_safetensors(str(folder / name), {t: weights[t] for t in weights if where[t] == name})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def tune(source: Path, target: Path) -> Path:
    """A model like ``source``, of 32-bit numbers, to the last byte of its headers, but with other weights."""
    shutil.copytree(source, target)
    for tensor in open_checkpoint(source).tensors.values():
        with (target / tensor.file).open("r+b") as file:
            file.seek(tensor.offset)
            numbers = numbers_of("I", file.read(tensor.nbytes))
            numbers.reverse()
            file.seek(tensor.offset)
            file.write(numbers.tobytes())
    return target


EXPERTS = {".switch_mlp.": ".experts.{i}."}
"""What mlx-lm calls most models' stacked experts, and what their makers call one of them."""


def split_experts(folder: Path, names: dict[str, str] = EXPERTS) -> int:
    """Undo mlx-lm's stacking of experts: a tensor for each, by the name that its makers gave it. -> how many stacks"""
    file = folder / "model.safetensors"
    split: dict[str, mx.array] = {}
    weights = mx.load(str(file))
    for name, array in weights.items():
        stack = next((stack for stack in names if stack in name), None)
        for i in range(array.shape[0]) if stack else ():
            split[name.replace(stack, names[stack].format(i=i))] = array[i]
        if not stack:
            split[name] = array
    mx.eval(split)
    mx.save_safetensors(str(file), split)
    return sum(name not in split for name in weights)


def mixed_quantization(model: nn.Module, config: dict[str, Any]) -> None:
    """4 bits everywhere but in one matrix of layer 1, which gets 8, and where the model itself wants more: as converted
    checkpoints are. ``config`` is told.
    """
    own = getattr(model, "quant_predicate", None) or (lambda _path, _module: True)
    paths = {id(module): path for path, module in model.named_modules()}
    fit = [m for m in model.layers[1].modules() if hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0]
    special = next(m for m in fit if own(paths[id(m)], m))

    def choose(path: str, module: nn.Module) -> bool | dict[str, int]:
        wanted = own(path, module)
        return {"group_size": 32, "bits": 8} if module is special or isinstance(wanted, dict) else bool(wanted)

    with redirect_stdout(io.StringIO()):  # it prints how many bits a weight has
        config.update(quantize_model(model, config, 32, 4, quant_predicate=choose)[1])


def add_pooling(folder: Path) -> Path:
    """Add the files of sentence-transformers by which a model's last state is an embedding of length 1."""
    steps = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(steps)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder
