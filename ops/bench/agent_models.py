"""Makes tiny random models, one per kind of cache, with a chat template that has tools, calls and thinking."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopback import make_model

from cluster.model.checkpoint import resolve_model

MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Tokens to add to the bundled tokenizer, with the ids after its last one."""
TEMPLATE = """\
{%- set last = namespace(user=-1) -%}
{%- for m in messages if m.role == "user" -%}
    {%- set last.user = messages.index(m) -%}
{%- endfor -%}
{%- if tools and messages[0].role != "system" -%}{{- "<|system|>" -}}{%- endif -%}
{%- for m in messages -%}
    {%- if m.role == "system" -%}
        {{- "<|system|>" ~ m.content -}}
    {%- endif -%}
    {%- if loop.first and tools -%}
        {{- "\\n\\n# Tools\\nCall a tool with <tool_call>{\\"name\\": ..., \\"arguments\\": {...}}</tool_call>\\n" -}}
        {%- for tool in tools -%}{{- tool | tojson ~ "\\n" -}}{%- endfor -%}
        {{- "<|end|>" -}}
    {%- elif m.role == "system" -%}
        {{- "<|end|>" -}}
    {%- endif -%}
    {%- if m.role == "user" -%}
        {{- "<|user|>" ~ m.content ~ "<|end|>" -}}
    {%- elif m.role == "tool" -%}
        {{- "<|user|><tool_response>" ~ m.content ~ "</tool_response><|end|>" -}}
    {%- elif m.role == "assistant" -%}
        {{- "<|assistant|>" -}}
        {%- if m.reasoning_content and loop.index0 > last.user -%}
            {{- "<think>" ~ m.reasoning_content ~ "</think>" -}}
        {%- endif -%}
        {%- if m.content -%}{{- " " ~ m.content -}}{%- endif -%}
        {%- for called in m.tool_calls or () -%}
            {%- set tool_call = called.function -%}
            {{- "<tool_call>" ~ {"name": tool_call.name, "arguments": tool_call.arguments} | tojson -}}
            {{- "</tool_call>" -}}
        {%- endfor -%}
        {{- "<|end|>" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|assistant|>" -}}
    {%- if enable_thinking -%}{{- "<think>" -}}{%- endif -%}
{%- endif -%}
"""
"""Thinking before the last user message is dropped, as in the templates of reasoning models. With ``enable_thinking`` a
prompt ends with the beginning of the thinking, so the next task shares the prompts before it up to there.

Content begins with a space, since the words of the bundled vocabulary do and servers strip it from an answer.
"""

_BASE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _BASE,
    "qwen3_next": {
        **_BASE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
    },
    "gpt_oss": {
        **_BASE,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma3_text": {
        **_BASE,
        "sliding_window": 512,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16,
        "rope_local_base_freq": 10000.0,
    },
}
"""Plain attention; recurrent layers; two models whose windows cannot be trimmed once they are full."""


def make_agent_model(folder: Path, model_type: str, context: int) -> Path:
    """Write a random model of this type into ``folder``, for up to ``context`` tokens."""
    faq = resolve_model("faq")
    tokenizer = json.loads((faq / "tokenizer.json").read_text())
    first = 1 + max(*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"]))
    tokenizer["added_tokens"] += [_marker(first + i, text) for i, text in enumerate(MARKERS)]
    config: Mapping[str, Any] = {
        **MODELS[model_type],
        "model_type": model_type,
        "max_position_embeddings": context,
        "vocab_size": first + len(MARKERS),
    }
    model = make_model(folder, config)
    settings = json.loads((faq / "tokenizer_config.json").read_text()) | {"model_max_length": context}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


def _marker(identity: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": identity, "content": text, **flags}
