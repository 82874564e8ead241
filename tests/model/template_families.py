"""Model families: their chat templates, the format of their tool calls, and tiny tokenizers with both.

The templates in ``templates/`` follow the families' documented formats, with the rules on which agents fail: one
system message at most, alternating roles, one call a message, ids of nine characters, arguments as text or as objects.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from checkpoints import make_tokenizer
from cluster.model.tokenizer import Tokenizer, load_tokenizer

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Family:
    """A template, an answer of its model that calls ``shell`` with ``ls``, and the markers that are tokens there."""

    name: str
    answer: str = ""
    tokens: tuple[str, ...] = ()
    required: bool = False
    """Whether a call can be required."""
    drops_text: bool = False
    """Whether the template leaves out the text of an answer that has a call."""
    has_switch: bool = False
    """Whether the template has an argument for thinking."""
    always_thinks: bool = False


DEEPSEEK_TOKENS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
FAMILIES = (
    Family(
        "qwen2.5",
        '<tool_call>\n{"name": "shell", "arguments": {"command": "ls"}}\n</tool_call>',
        ("<tool_call>", "</tool_call>"),
        True,
    ),
    Family(
        "qwen3",
        '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "shell", "arguments": {"command": "ls"}}\n</tool_call>',
        ("<think>", "</think>", "<tool_call>", "</tool_call>"),
        True,
        has_switch=True,
    ),
    Family(
        "qwen3.5",
        "hm\n</think>\n\n<tool_call>\n<function=shell>\n<parameter=command>\nls\n</parameter>\n</function>\n</tool_call>",
        ("<think>", "</think>", "<tool_call>", "</tool_call>"),
        has_switch=True,
    ),
    Family("llama3", '{"name": "shell", "parameters": {"command": "ls"}}', (), True, drops_text=True),
    Family("mistral", '[TOOL_CALLS]shell[ARGS]{"command": "ls"}', ("[TOOL_CALLS]", "[ARGS]"), True),
    Family(
        "gpt-oss",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.shell "
        '<|constrain|>json<|message|>{"command": "ls"}',
        ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>"),
        True,
        drops_text=True,
        has_switch=True,
    ),
    Family(
        "glm",
        "<think>hm</think>\n<tool_call>shell\n<arg_key>command</arg_key>\n<arg_value>ls</arg_value>\n</tool_call>",
        ("<think>", "</think>", "<tool_call>", "</tool_call>"),
        has_switch=True,
    ),
    Family(
        "deepseek-v3",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>shell\n```json\n{"command": "ls"}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        DEEPSEEK_TOKENS,
        True,
    ),
    Family(
        "deepseek-v3.1",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>shell<｜tool▁sep｜>{"command": "ls"}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        DEEPSEEK_TOKENS,
        True,
        has_switch=True,
    ),
    Family(
        "kimi",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.shell:0<|tool_call_argument_begin|>"
        '{"command": "ls"}<|tool_call_end|><|tool_calls_section_end|>',
        ("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>"),
        True,
    ),
    Family(
        "minimax",
        'hm\n</think>\n\n<minimax:tool_call>\n<invoke name="shell">\n<parameter name="command">ls</parameter>\n'
        "</invoke>\n</minimax:tool_call>",
        ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"),
        always_thinks=True,
    ),
    Family("gemma4", '<|tool_call>call:shell{command:<|"|>ls<|"|>}<tool_call|>', ("<|tool_call>", "<tool_call|>")),
    Family("gemma3"),
    Family("gemma2"),
)


def make(family: Family, folder: Path) -> Tokenizer:
    """Write a tokenizer with the family's template and markers to ``folder``, and load it."""
    folder.mkdir(exist_ok=True)
    make_tokenizer(folder, (TEMPLATES / f"{family.name}.jinja").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    first = 1 + max(token["id"] for token in content["added_tokens"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    known = {token["content"] for token in content["added_tokens"]}
    new = [text for text in family.tokens if text not in known]
    content["added_tokens"] += [{"id": first + i, "content": text, **flags} for i, text in enumerate(new)]
    path.write_text(json.dumps(content))
    return load_tokenizer(folder)


def in_order(text: str, *words: str) -> bool:
    """Return whether all words are in the text, the first occurrence of each behind that of the one before."""
    places = [text.find(word) for word in words]
    return -1 not in places and places == sorted(places)
