"""Prompts that share their beginning with an earlier one have the tokens of a fresh tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluster.model import known_prompts
from cluster.model.known_prompts import KnownPrompts
from cluster.model.rendered_prompt import RenderedPrompt, tokenize

SPACE = "\u2581"
LETTERS = [*"abcdehtx \n<|>_.é", SPACE]
BORDERS = ("<|user|>", "<|end|>", "<|end|>x", "</s>")
"""One is the beginning of another."""
TRAPS = (
    AddedToken("<|wide|>", lstrip=True, rstrip=True, normalized=False),
    AddedToken("the", single_word=True, normalized=False),
    AddedToken("bad", normalized=True),
    AddedToken("x" * 12, normalized=False),
)
"""Added tokens that take what is beside them, or depend on it."""


def byte_level(prefix_space: bool) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["he", "th", "the", "Ġt"]
    vocabulary = {letter: i for i, letter in enumerate([*letters, *merged])}
    merges = [("h", "e"), ("t", "h"), ("t", "he"), ("Ġ", "t")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_pieces() -> Tokenizer:
    vocabulary = {text: i for i, text in enumerate(["<unk>", *LETTERS, "th", "he", f"{SPACE}t", SPACE * 2])}
    merges = [("t", "h"), ("h", "e"), (SPACE, "t"), (SPACE, SPACE)]
    return Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True))


def with_first_space() -> Tokenizer:
    tokenizer = sentence_pieces()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def normalized() -> Tokenizer:
    tokenizer = sentence_pieces()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    return tokenizer


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": lambda: byte_level(prefix_space=False),
    "with a space before": lambda: byte_level(prefix_space=True),
    "with a space first": with_first_space,
    "normalized": normalized,
}


def wrap(tokenizer: Tokenizer) -> TokenizerWrapper:
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in BORDERS])
    tokenizer.add_tokens(list(TRAPS))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    return TokenizerWrapper(fast)  # type: ignore[no-untyped-call]


@pytest.fixture(params=MAKERS)
def wrapper(request: pytest.FixtureRequest) -> TokenizerWrapper:
    return wrap(MAKERS[request.param]())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let short prompts count, and check none of them."""
    monkeypatch.setattr(known_prompts, "_LEAST_TOKENS", 1)
    monkeypatch.setattr(known_prompts, "_SAME_CHARS", 1)
    monkeypatch.setattr(known_prompts, "_CHECKS", 0)


def text_of(random: Random, parts: int) -> str:
    pieces: Sequence[str] = [*BORDERS, *LETTERS, *(trap.content for trap in TRAPS), "the hat ", "bad bad"]
    return "".join(random.choices(pieces, k=parts))


def check(known: KnownPrompts, wrapper: TokenizerWrapper, text: str, owner: str) -> None:
    found, fresh = known.tokenize(text, owner), tokenize(wrapper, text)
    assert found.ids == fresh.ids, text
    assert [found.tokens_before(n) for n in range(len(text) + 1)] == [
        fresh.tokens_before(n) for n in range(len(text) + 1)
    ], text


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_prompts_has_the_tokens_of_a_fresh_tokenizer(
    seed: int, wrapper: TokenizerWrapper, small: None
) -> None:
    random, known = Random(seed), KnownPrompts(wrapper, most_tokens=400)
    texts = [text_of(random, 20)]
    for _ in range(25):
        start = random.choice(texts[-3:])
        texts.append(start[: random.randrange(len(start) + 1)] + text_of(random, random.randrange(12)))
        check(known, wrapper, texts[-1], random.choice("ab"))


def test_only_what_follows_the_last_shared_border_is_tokenized(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = wrap(MAKERS["byte level"]())
    known, asked = KnownPrompts(wrapper), list[str]()

    def record(wrapper: TokenizerWrapper, text: str) -> RenderedPrompt:
        asked.append(text)
        return tokenize(wrapper, text)

    monkeypatch.setattr(known_prompts, "tokenize", record)
    first = "<|user|>the hat<|end|><|user|>a cat<|end|>"
    known.tokenize(first, "amy")
    known.tokenize(first + "<|user|>and a dog that is old<|end|>", "amy")
    known.tokenize(first + "<|user|>and a dog that is old", "bob")
    known.tokenize(first + "<|user|>and a dog that is not", "amy")
    known.tokenize(first + "<|user|>and a dog that is not", "")
    assert asked == [
        first,
        "<|user|>a cat<|end|><|user|>and a dog that is old<|end|>",
        first + "<|user|>and a dog that is old",
        "<|user|>and a dog that is not",
        first + "<|user|>and a dog that is not",
    ]


def test_prompts_are_bounded_and_the_next_turn_takes_the_place_of_the_last(small: None) -> None:
    wrapper = wrap(MAKERS["byte level"]())
    known = KnownPrompts(wrapper, most_tokens=1000)
    text = "<|user|>the hat<|end|>" * 40
    for _ in range(10):
        text += "<|user|>the hat<|end|>"
        known.tokenize(text, "amy")
    assert len(known) == 1
    for i in range(200):
        known.tokenize(f"{i}{text[:300]}", "amy")
        assert known._tokens == sum(len(prompt.ids) for prompt in known._prompts.values()) <= 1000
    known.tokenize(text * 10, "amy")
    assert len(known) == known._tokens == 0, "a prompt above the bound leaves nothing"


def test_a_tokenizer_that_looks_across_added_tokens_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_prompts, "_LEAST_TOKENS", 1)
    monkeypatch.setattr(known_prompts, "_SAME_CHARS", 1)
    wrapper = wrap(MAKERS["byte level"]())
    known = KnownPrompts(wrapper)

    def change_first(wrapper: TokenizerWrapper, text: str) -> RenderedPrompt:
        return replace(tokenize(wrapper, text.replace("a", "e", 1)), text=text)

    monkeypatch.setattr(known_prompts, "tokenize", change_first)
    first = "<|user|>the hat<|end|><|user|>a cat<|end|>"
    known.tokenize(first, "amy")
    longer = first + "<|user|>a rat<|end|>"
    assert known.tokenize(longer, "amy").ids == change_first(wrapper, longer).ids
    assert not known._borders
