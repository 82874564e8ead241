"""The state of one accepted request: how much of its prompt is on the stages, and its answer so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from cluster.core.request import Request
from cluster.scheduler.acceptance_rates import RightShare
from cluster.scheduler.guessing import Guess, GuessSource
from cluster.scheduler.kept_marks import KeptMark
from cluster.scheduler.prefixes import Owner, Start


class Phase(StrEnum):
    """The phase of a request."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class SavedProgress:
    """The first ``length`` tokens of a prompt that is still being prefilled, saved as ``prefix``."""

    prefix: int
    length: int


class ChainLink(NamedTuple):
    """A decode frame in the ring that feeds ``tokens``, from token ``start`` of a sequence on.

    ``source`` tells who guessed the tokens; None if there is only one, which was sampled. ``back``: the frame has come
    back, and ``tokens`` are those that its samples must still verify.
    """

    number: int
    start: int
    tokens: tuple[int, ...]
    source: GuessSource | None = None
    back: bool = False

    def behind_first(self) -> ChainLink | None:
        """Return the link without its first token, whose sample is known; None if it has no other."""
        return self._replace(start=self.start + 1, tokens=self.tokens[1:]) if len(self.tokens) > 1 else None


@dataclass(slots=True, eq=False)
class ScheduledSequence:
    """The scheduler's record of a request. Only the scheduler changes it.

    ``base`` is the prompt; after a recovery, the prompt and the answer so far. All but its last token are prefilled;
    the last token is the first decode step, as in mlx-lm. ``prefilled`` counts the tokens of ``base`` that are on
    every stage; ``cached`` counts those of them that came from a kept prefix. ``lane`` is -1 while queued.
    """

    request: Request
    id: int
    lane: int = -1
    prefilled: int = 0
    cached: int = 0
    turn: int = 0
    """Rank by start of decoding among all sequences, from 1; 0 before it decodes."""
    fed: list[int] = field(default_factory=list)
    """Every token in the frames written so far, including those of a restored prefix, but for dropped guesses."""
    chunk_ends: set[int] = field(default_factory=set)
    """Lengths at which a chunk of ``base`` ends, so that the sequence can be marked there."""
    marks: dict[int, KeptMark] = field(default_factory=dict)
    """Its marks on the stages, by length."""
    start: Start | None = None
    """The kept prefix that it started from; None if there was none."""
    saves: list[SavedProgress] = field(default_factory=list)
    """What was saved of its prompt for those that wait for it, at most the last two."""
    leader: ScheduledSequence | None = None
    """The sequence that it waits for, since that is prefilling what both begin with; None if it does not wait."""
    awaits: int = 0
    """How many tokens the leader must have been fed."""
    disk_limit: int | None = None
    """It waits for no longer prefix from disk than this, since a read of one failed; None if none did."""
    joined: bool = False
    """A ``Join`` edit for it has been issued."""
    ended: bool = False
    """It leaves: it decodes and reads no further."""
    broken: bool = False
    """A step of it failed, so the stages may hold different states of it."""
    last_served_at_frame: int = 0
    """The number of frames written when its last prefill chunk was sent, or when it joined."""
    next_token: int | None = None
    """The token that the next decode frame feeds; None while such a frame is in the ring."""
    chain: list[ChainLink] = field(default_factory=list)
    """Its decode frames in the ring. The first token of the first one is certain; all those behind are guesses."""
    trim_to: int | None = None
    """The length to which its next step must trim it, since stages may hold dropped guesses; None if they do not."""
    sampled: bool = False
    """A token of it has been sampled in this epoch."""
    window: int = 1
    """How many frames of it may be in flight, by the last decision; 1: no guess."""
    guess_marks: int = 0
    """The number of marks that its guesses may have left on the stages."""
    untried: Guess | None = None
    """A guess of the next token that was not sent. It is only compared, to learn how often guesses are right."""
    acceptance: dict[GuessSource, RightShare] = field(default_factory=dict)
    """How often guesses of it were right."""
    answer: list[int] = field(default_factory=list)
    """The answer so far."""
    scored: int = 1
    """The number of prompt tokens whose log-probability the reader has; the first token has none."""
    batch: tuple[str, ...] = ()
    """The ids of the requests that were submitted together, itself included: the samples of one prompt."""
    base: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.base = (*self.request.prompt, *self.answer)

    def reset_for_replay(self) -> None:
        """Reset it to queued: the stages lost its state, so prompt and answer so far must be prefilled again."""
        self.base = (*self.request.prompt, *self.answer)
        self.lane = -1
        self.prefilled = 0
        self.cached = 0
        self.turn = 0
        self.fed = []
        self.chunk_ends = set()
        self.marks = {}
        self.start = None
        self.saves = []
        self.next_token = None
        self.chain = []
        self.trim_to = None
        self.sampled = False
        self.window = 1
        self.guess_marks = 0
        self.untried = None
        self.joined = False
        self.leader = None
        self.disk_limit = None
        self.broken = False

    def feed_next(self, number: int) -> None:
        """Feed ``next_token`` with decode frame ``number``, so that its chain of frames begins anew."""
        token = self.next_token
        assert token is not None, "a frame of it is in the ring"
        self.chain.append(ChainLink(number, len(self.fed), (token,)))
        self.fed.append(token)
        self.next_token = self.trim_to = None
        self.guess_marks = 0

    def feed_row(self, tokens: tuple[int, ...], source: GuessSource) -> None:
        """Feed guesses with the frame of its chain that was written last."""
        last = self.chain[-1]
        self.chain[-1] = last._replace(tokens=(*last.tokens, *tokens), source=source)
        self.fed.extend(tokens)

    def drop_links(self, kept: int) -> list[ChainLink]:
        """Remove and return the links of ``chain`` behind the first ``kept`` ones, with their tokens."""
        dropped = self.chain[kept:]
        if dropped:
            del self.chain[kept:]
            self.trim_to = dropped[0].start
            del self.fed[self.trim_to :]
        return dropped

    def drop_guesses(self) -> list[ChainLink]:
        """Remove and return all that is not certain: links of ``chain``, and the guesses in its first one."""
        if not self.chain:
            return []
        dropped, head = self.drop_links(1), self.chain[0]
        if rest := head.behind_first():
            self.chain[0] = head._replace(tokens=head.tokens[:1])
            self.trim_to = rest.start
            del self.fed[self.trim_to :]
            dropped.insert(0, rest)
        return dropped

    @property
    def certain_length(self) -> int:
        """The number of its tokens in the frames written so far that are no guesses."""
        return self.chain[0].start + (not self.chain[0].back) if self.chain else len(self.fed)

    @property
    def exact(self) -> bool:
        """Whether the stages hold just ``fed`` of it, once the frames written so far have been applied."""
        return len(self.fed) == self.certain_length and self.trim_to is None

    @property
    def owner(self) -> Owner:
        """The owner of the prefixes that it may start from, and of those saved from it."""
        return Owner(self.request.client, self.request.adapter)

    @property
    def produced(self) -> int:
        """The number of tokens in the answer so far."""
        return len(self.answer)

    @property
    def phase(self) -> Phase:
        if self.lane < 0:
            return Phase.QUEUED
        return Phase.PREFILL if self.prefilled < self.prefill_length else Phase.DECODE

    @property
    def prefill_length(self) -> int:
        return len(self.base) - 1

    @property
    def unscored(self) -> bool:
        """Whether the reader still waits for log-probabilities of the prompt."""
        return self.request.prompt_logprobs is not None and self.scored < len(self.request.prompt)

    @property
    def beginning(self) -> tuple[int, ...]:
        """The tokens of which all but the last may come from a kept prefix.

        A token whose step reports the log-probability of the next one must be computed.
        """
        return self.base[: self.scored] if self.unscored else self.base

    @property
    def unsent(self) -> int:
        """The number of tokens of ``base`` that still have to be sent in prefill frames."""
        return max(self.prefill_length - len(self.fed), 0)

    @property
    def next_chunk_end(self) -> int:
        """The length at which the next chunk ends at the latest."""
        return min((at for at in self.chunk_ends if at > len(self.fed)), default=self.prefill_length)

    @property
    def reserved(self) -> int:
        """The maximum number of tokens that its caches hold."""
        return len(self.request.prompt) + self.request.max_tokens
