"""Creates models that call one tool and then say ``OK.``: each token decides the next one, whatever came before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from checkpoints import make

ROOT = Path(__file__).parents[2]
WORDS = 16_384
SPECIALS = ("<s>", "</s>", "<|start|>", "<|end|>", "<|answer|>", "<|after|>")
TEMPLATE = """
{%- macro start(role) %}<|start|>{{ role }}
{% endmacro %}
{%- if tools %}{{ start('system') }}# Tools
{%- for tool in tools %}
{{ tool | tojson }}{% endfor %}
Write <tool_call>{"name": ..., "arguments": ...}</tool_call> to call one.<|end|>{% endif %}
{%- for message in messages %}
{%- if message.role == 'system' and not loop.first %}{{ raise_exception('System must be first.') }}{% endif %}
{{- start(message.role) }}{{ message.content }}
{%- for tool_call in message.tool_calls or [] %}{% set tool_call = tool_call.function %}
<tool_call>{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}</tool_call>
{%- endfor %}<|end|>
{%- endfor %}
{%- if add_generation_prompt %}{{ start('assistant') -}}
{{ '<|after|>' if messages[-1].role == 'tool' else '<|answer|>' }}{% endif %}"""
"""Strict about system messages, as the templates of Qwen3.5 are."""


def make_calling(folder: Path, tool: str, arguments: dict[str, Any]) -> Path:
    """Write a model that calls ``tool`` in answer to a message, and says ``OK.`` to a tool's result."""
    call = json.dumps({"name": tool, "arguments": arguments})
    tokenizer = _tokenizer(call)
    end = tokenizer.token_to_id("<|end|>")
    size = -(-tokenizer.get_vocab_size() // 64) * 64
    make(
        "llama_untied", folder, 2,
        vocab_size=size, hidden_size=64, eos_token_id=end, max_position_embeddings=131_072, rope_theta=1e6,
    )  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    follows = [
        ("<|answer|>", "<tool_call>"), ("<tool_call>", call), (call, "</tool_call>"), ("</tool_call>", "<|end|>"),
        ("<|after|>", "OK."), ("OK.", "<|end|>"),
    ]  # fmt: skip
    _write_weights(folder, [tuple(map(tokenizer.token_to_id, pair)) for pair in follows])  # type: ignore[misc]
    return folder


def _tokenizer(call: str) -> Tokenizer:
    """Return a tokenizer of English and code, so that prompts have as many tokens as with a real model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False)
    paths = sorted((*(ROOT / "ops" / "docs").glob("*.md"), *(ROOT / "cluster").rglob("*.py")))
    tokenizer.train_from_iterator([path.read_text(encoding="utf-8") for path in paths], trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    plain = ("<tool_call>", "</tool_call>", call, "OK.")
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return tokenizer


def _write_weights(folder: Path, follows: list[tuple[int, int]]) -> None:
    """Make the layers add nothing, and the head prefer ``after`` to all others where the last token is ``before``."""
    file = str(folder / "model.safetensors")
    weights = {name: mx.zeros_like(tensor) for name, tensor in mx.load(file).items()}
    size, width = weights["lm_head.weight"].shape
    embedding = np.random.default_rng(0).standard_normal((size, width)).astype(np.float32)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    head = np.zeros_like(embedding)
    for before, after in follows:
        head[after] += 12 * embedding[before]
    weights["model.embed_tokens.weight"], weights["lm_head.weight"] = mx.array(embedding), mx.array(head)
    ones = {name: mx.ones_like(tensor) for name, tensor in weights.items() if "norm" in name}
    mx.save_safetensors(file, weights | ones, metadata={"format": "mlx"})
