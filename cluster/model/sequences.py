"""What a stage remembers between frames: its live sequences and kept prefixes, and the six edits that change them.

Every stage applies the same edits in the same order and so holds the same ids. It knows caches only as something
that can be made, copied, trimmed and gathered, and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import ReferenceType, ref

from cluster.core.errors import BadFrame
from cluster.core.frames import Drop, Edit, Join, Leave, Restore, Save, Trim
from cluster.model.caches import HeldCaches, SequenceCaches
from cluster.model.grammar_compiler import GrammarCompiler
from cluster.model.lane_caches import LaneCaches
from cluster.model.sampling import Sampler

__all__ = ["LiveSequence", "SequenceTable"]


@dataclass(slots=True)
class LiveSequence:
    """``tokens`` are all that were fed so far, prompt and answer. ``broken`` says why no step may use it any more.

    ``kept`` is the prefix that holds just what this sequence does, while there is one.
    """

    id: int
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)
    broken: str = ""
    kept: ReferenceType[Prefix] | None = None

    def feed(self, tokens: Sequence[int]) -> None:
        """A step has put these tokens into its caches."""
        self.tokens.extend(tokens)
        self.kept = None


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Prefix:
    """A kept copy of a sequence: its tokens and its caches."""

    tokens: tuple[int, ...]
    caches: SequenceCaches


class SequenceTable:
    """Live sequences and prefixes by id. ``vocabulary`` bounds the ids that a logit bias may name.

    ``grammars`` compiles for those that are bound to a grammar; only a stage that samples needs one.
    """

    def __init__(
        self,
        new_caches: Callable[[], SequenceCaches],
        vocabulary: int,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self._new_caches = new_caches
        self._vocabulary = vocabulary
        self._grammars = grammars
        self._live: dict[int, LiveSequence] = {}
        self._lanes = LaneCaches()
        self._prefixes: dict[int, Prefix] = {}

    @property
    def sequences(self) -> int:
        return len(self._live)

    @property
    def prefixes(self) -> int:
        return len(self._prefixes)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches; memory that a prefix still shares with a sequence is counted for both."""
        return self._lanes.nbytes + self.prefix_bytes

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the kept prefixes. One that is kept under two ids, nothing computed in between, counts once."""
        return sum(prefix.caches.nbytes for prefix in {id(p): p for p in self._prefixes.values()}.values())

    def get(self, sequence: int) -> LiveSequence:
        """Raises BadFrame for an id that is not live."""
        if sequence not in self._live:
            raise BadFrame(f"sequence {sequence} is not live on this stage")
        return self._live[sequence]

    def usable(self, sequence: int) -> LiveSequence:
        """As ``get``, and raises BadFrame for a sequence that an earlier failure left in pieces."""
        live = self.get(sequence)
        if live.broken:
            raise BadFrame(f"sequence {sequence} can only leave: {live.broken}")
        return live

    def gather(self, lane: int, sequences: Sequence[int]) -> HeldCaches:
        """The caches to compute one step of ``lane`` with; ``Lanes.gather`` says how."""
        return self._lanes.gather(lane, sequences)

    def mark_broken(self, sequences: Sequence[int], why: str) -> None:
        """Refuse every further use of these, until they leave, and free their caches. Unknown ids are passed over."""
        for sequence in sequences:
            if sequence in self._live and not self._live[sequence].broken:
                self._live[sequence].broken = why
                self._lanes.remove(sequence)

    def apply(self, edits: Sequence[Edit], step: Sequence[int] = ()) -> None:
        """Apply edits in order. One that cannot be done changes nothing; the rest are still applied, since the other
        stages apply them too. Then the first refusal is raised (BadFrame), unless there is a step of others: it goes
        on then, and the sequence of the refused edit can only leave.
        """
        elsewhere = {e.sequence for e in edits if not isinstance(e, Drop)} - set(step) if step else set()
        refusals: list[BadFrame] = []
        for edit in edits:
            try:
                self._apply(edit)
            except BadFrame as refusal:
                if isinstance(edit, Trim | Save | Restore) and edit.sequence in elsewhere:
                    self.mark_broken([edit.sequence], refusal.sentence)
                else:
                    refusals.append(refusal)
        if refusals:
            raise refusals[0]

    def _apply(self, edit: Edit) -> None:
        match edit:
            case Join():
                self._join(edit)
            case Leave():
                self._live.pop(edit.sequence, None)
                self._lanes.remove(edit.sequence)
            case Trim():
                self._trim(self.usable(edit.sequence), edit.length)
            case Save():
                self._save(self.usable(edit.sequence), edit.prefix)
            case Restore():
                self._restore(self.usable(edit.sequence), edit.prefix)
            case Drop():
                self._prefixes.pop(edit.prefix, None)

    def _join(self, edit: Join) -> None:
        if edit.sequence in self._live:
            raise BadFrame(f"sequence {edit.sequence} joins a second time")
        outside = [token for token, _ in edit.sampling.logit_bias if not 0 <= token < self._vocabulary]
        if outside:
            raise BadFrame(f"logit_bias names token {outside[0]}; the model has {self._vocabulary} tokens")
        sampler = Sampler(edit.sampling, edit.prompt_length, self._vocabulary, self._grammars)
        self._live[edit.sequence] = LiveSequence(edit.sequence, sampler)
        self._lanes.put(edit.sequence, self._new_caches())

    def _trim(self, live: LiveSequence, length: int) -> None:
        excess = len(live.tokens) - length
        if not 0 <= length <= len(live.tokens):
            raise BadFrame(f"sequence {live.id} has {len(live.tokens)} tokens; it cannot be trimmed to {length}")
        if excess == 0:
            return
        caches = self._lanes.alone(live.id).trimmed(excess) if length > 0 else self._new_caches()
        if caches is None:
            raise BadFrame(f"sequence {live.id} cannot be trimmed: its model's caches do not keep what {length} needs")
        self._lanes.put(live.id, caches)
        del live.tokens[length:]
        live.kept = None
        live.sampler.forget()

    def _save(self, live: LiveSequence, prefix: int) -> None:
        kept = live.kept() if live.kept is not None else None
        if kept is None:
            kept = Prefix(tuple(live.tokens), self._lanes.copy(live.id))
            live.kept = ref(kept)
        self._prefixes[prefix] = kept

    def _restore(self, live: LiveSequence, prefix: int) -> None:
        if live.tokens:
            raise BadFrame(f"sequence {live.id} has {len(live.tokens)} tokens; only a new one can start from a prefix")
        if prefix not in self._prefixes:
            why = f"prefix {prefix} is not kept on this stage"
            self.mark_broken([live.id], why)  # it holds nothing here: a step of it would give wrong tokens
            raise BadFrame(why)
        kept = self._prefixes[prefix]
        self._lanes.put(live.id, kept.caches.copy())
        live.tokens, live.kept = list(kept.tokens), ref(kept)
        live.sampler.forget()
