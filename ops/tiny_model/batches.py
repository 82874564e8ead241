"""What a model is fed: chats as token ids, in batches of rows that are about as long as each other.

Knows the special tokens and which tokens of a chat are asked for (those of the answers); knows nothing of models.
"""

import random
from dataclasses import dataclass

import corpus
import torch
from tokenizers import Tokenizer

CONTEXT = 1024
SYSTEM, USER, ASSISTANT, END = SPECIALS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
IGNORED = -100
RAW_LEAD = 8
"""Tokens of a raw answer that are given, not predicted: its first words are anyone's guess."""


@dataclass(frozen=True)
class Diet:
    """One kind of batch: rows of chats, each filled with turns until it has up to so many tokens (0: one turn)."""

    rows: int
    budget: int
    share: float


DIETS = (
    Diet(rows=48, budget=0, share=0.6),
    Diet(rows=16, budget=200, share=0.25),
    Diet(rows=4, budget=900, share=0.15),
)


@dataclass(frozen=True)
class Row:
    """Token ids of one example, and the ids to predict at each place (IGNORED where nothing is asked)."""

    ids: list[int]
    targets: list[int]

    def __add__(self, after: "Row") -> "Row":
        return Row(self.ids + after.ids, self.targets + after.targets)


def number_of(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"not in the vocabulary: {token}")
    return number


class Kitchen:
    """Turns entries into rows and batches; owns the only random numbers of the data."""

    def __init__(self, tokenizer: Tokenizer, entries: tuple[corpus.Entry, ...], seed: int) -> None:
        self._tokenizer = tokenizer
        self._entries = entries
        self._turns = corpus.plain_turns(entries)
        self._rng = random.Random(seed)
        self._queue: list[corpus.Turn] = []
        self._ready: dict[Diet, list[list[Row]]] = {diet: [] for diet in DIETS}

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and targets of one batch, both [rows, longest row]."""
        diet = self._rng.choices(DIETS, [kind.share for kind in DIETS])[0]
        if not self._ready[diet]:
            self._ready[diet] = self._cook(diet)
        return padded(self._ready[diet].pop())

    def _cook(self, diet: Diet) -> list[list[Row]]:
        """Eight batches at once, rows of like length together: little padding."""
        rows = sorted((self._row(diet.budget) for _ in range(8 * diet.rows)), key=lambda row: len(row.ids))
        batches = [rows[at : at + diet.rows] for at in range(0, len(rows), diet.rows)]
        self._rng.shuffle(batches)
        return batches

    def _row(self, budget: int) -> Row:
        if not budget and self._rng.random() < 0.06:
            return self._raw_row()
        row = self._opening() + self._turn_row()
        enough = self._rng.randint(budget // 4, budget)
        while len(row.ids) < enough:
            row += self._turn_row()
        return row

    def _opening(self) -> Row:
        system = corpus.draw_system(self._entries, self._rng)
        ids = self._segment(SYSTEM, system) if system else []
        return Row(ids, [IGNORED] * len(ids))

    def _turn_row(self) -> Row:
        turn = self._next_turn()
        asked = self._segment(USER, turn.question)
        told = self._segment(ASSISTANT, turn.answer)
        return Row(asked + told, [IGNORED] * (len(asked) + 1) + told[1:])

    def _raw_row(self) -> Row:
        ids = [*self._tokenizer.encode(self._rng.choice(self._entries).answer).ids, self._special(END)]
        return Row(ids, [IGNORED] * RAW_LEAD + ids[RAW_LEAD:])

    def _next_turn(self) -> corpus.Turn:
        """Every phrasing once before any comes again; two of three are dressed up."""
        if not self._queue:
            self._queue = self._rng.sample(self._turns, len(self._turns))
        turn = self._queue.pop()
        return corpus.dressed(turn, self._rng) if self._rng.random() < 0.67 else turn

    def _segment(self, role: str, text: str) -> list[int]:
        return [self._special(role), *self._tokenizer.encode(text.strip()).ids, self._special(END)]

    def _special(self, token: str) -> int:
        return number_of(self._tokenizer, token)


def padded(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as two rectangles, cut at CONTEXT; what pads them is never asked for."""
    width = min(CONTEXT, max(len(row.ids) for row in rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), IGNORED)
    for at, row in enumerate(rows):
        length = min(width, len(row.ids))
        ids[at, :length] = torch.tensor(row.ids[:length])
        targets[at, :length] = torch.tensor(row.targets[:length])
    return ids, targets
