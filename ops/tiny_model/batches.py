"""Builds training batches: chats as token ids, with rows of similar length in each batch.

It knows the special tokens, and that only the tokens of answers are predicted. It knows nothing of models.
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
"""Number of tokens of a raw answer that are given, not predicted, because its first words cannot be known."""


@dataclass(frozen=True)
class BatchKind:
    """One kind of batch: rows of chats, each with as many turns as fit into a number of tokens (0: one turn)."""

    rows: int
    budget: int
    share: float


BATCH_KINDS = (
    BatchKind(rows=48, budget=0, share=0.6),
    BatchKind(rows=16, budget=200, share=0.25),
    BatchKind(rows=4, budget=900, share=0.15),
)


@dataclass(frozen=True)
class Row:
    """The token ids of one example, and the id to predict at each position (IGNORED for none)."""

    ids: list[int]
    targets: list[int]

    def __add__(self, after: "Row") -> "Row":
        return Row(self.ids + after.ids, self.targets + after.targets)


def number_of(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"not in the vocabulary: {token}")
    return number


class BatchMaker:
    """Makes rows and batches of entries. All randomness of the data comes from here."""

    def __init__(self, tokenizer: Tokenizer, entries: tuple[corpus.Entry, ...], seed: int) -> None:
        self._tokenizer = tokenizer
        self._entries = entries
        self._turns = corpus.plain_turns(entries)
        self._rng = random.Random(seed)
        self._queue: list[corpus.Turn] = []
        self._ready: dict[BatchKind, list[list[Row]]] = {kind: [] for kind in BATCH_KINDS}

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids and targets of one batch, both [rows, longest row]."""
        kind = self._rng.choices(BATCH_KINDS, [kind.share for kind in BATCH_KINDS])[0]
        if not self._ready[kind]:
            self._ready[kind] = self._make_batches(kind)
        return padded(self._ready[kind].pop())

    def _make_batches(self, kind: BatchKind) -> list[list[Row]]:
        """Make eight batches at once, with rows of similar length together, so that there is little padding."""
        rows = sorted((self._row(kind.budget) for _ in range(8 * kind.rows)), key=lambda row: len(row.ids))
        batches = [rows[at : at + kind.rows] for at in range(0, len(rows), kind.rows)]
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
        """Return the next turn. Each phrasing comes once before any comes again, and two of three are varied."""
        if not self._queue:
            self._queue = self._rng.sample(self._turns, len(self._turns))
        turn = self._queue.pop()
        return corpus.vary_question(turn, self._rng) if self._rng.random() < 0.67 else turn

    def _segment(self, role: str, text: str) -> list[int]:
        return [self._special(role), *self._tokenizer.encode(text.strip()).ids, self._special(END)]

    def _special(self, token: str) -> int:
        return number_of(self._tokenizer, token)


def padded(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and targets of rows, both [rows, longest row], cut at CONTEXT. Padding is never predicted."""
    width = min(CONTEXT, max(len(row.ids) for row in rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), IGNORED)
    for at, row in enumerate(rows):
        length = min(width, len(row.ids))
        ids[at, :length] = torch.tensor(row.ids[:length])
        targets[at, :length] = torch.tensor(row.targets[:length])
    return ids, targets
