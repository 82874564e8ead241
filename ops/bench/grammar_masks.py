"""Measures the cost of a grammar per token on the last stage: computing and applying the mask of a large vocabulary.

The vocabulary consists of random words over JSON's characters, so nothing has to be downloaded.

    python ops/bench/grammar_masks.py [--vocabulary 128000] [--json]
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mlx.core as mx
from figures import Figure, options, print_figures
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cluster.core.request import Grammar, GrammarKind
from cluster.model.tokenizer import load_tokenizer

LETTERS = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 {}[]:,."-_'
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "age": {"type": "integer"},
        "kind": {"enum": ["cat", "dog", "bird"]},
    },
    "required": ["name", "tags", "age", "kind"],
    "additionalProperties": False,
}
DOCUMENT = '{"name": "a long name of somebody", "tags": ["one", "two", "three"], "age": 1234, "kind": "bird"}'


def write_tokenizer(folder: Path, size: int) -> None:
    rng = random.Random(1)
    words = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    while len(words) < size - 1:
        word = "".join(rng.choices(LETTERS, k=rng.randint(2, 8)))
        words[word.replace(" ", "\u0120")] = None
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), asked.vocabulary)
        tokenizer = load_tokenizer(Path(folder))
    start = perf_counter()
    grammars = tokenizer.grammars()
    making = [1e3 * (perf_counter() - start)]
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
    ids = tokenizer.encode(DOCUMENT, add_special_tokens=False)
    logits = mx.random.normal((1, asked.vocabulary))
    checks, masks, applied = [], [], []
    for _ in range(asked.rounds):
        start = perf_counter()
        grammars.check(grammar)
        checks.append(1e3 * (perf_counter() - start))
        constraint = grammars.constraint(grammar, 0)
        for i in range(len(ids) + 1):
            start = perf_counter()
            allowed = constraint.allowed_mask(ids, i, asked.vocabulary)
            masks.append(1e3 * (perf_counter() - start))
            start = perf_counter()
            mx.eval(mx.where(mx.array(allowed), logits, -mx.inf))
            applied.append(1e3 * (perf_counter() - start))
    figures = [
        Figure("compiler, once a model", "ms", making),
        Figure("check of a schema", "ms", checks),
        Figure("mask of a token", "ms", masks),
        Figure("applying it", "ms", applied),
    ]
    print_figures("grammar_ms", figures, {"vocabulary": asked.vocabulary}, asked.json)


if __name__ == "__main__":
    main()
