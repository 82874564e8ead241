"""Holds a stage's state between frames: live sequences and kept prefixes. Applies the edits that change it.

All stages apply the same edits in the same order, so they hold the same ids. It only creates, copies, trims and gathers
caches; it does not run models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import Protocol
from weakref import ReferenceType, ref

import mlx.core as mx

from cluster.core.errors import BadFrame
from cluster.core.frames import Drop, Edit, Join, Leave, Mark, Persist, Restore, Sample, Save, Step, Trim, Unmark
from cluster.core.limits import MAX_VOCABULARY
from cluster.model.adapters import LoraLayers
from cluster.model.caches import HeldCaches, SequenceCaches
from cluster.model.grammar_compiler import GrammarCompiler
from cluster.model.lane_caches import LaneCaches
from cluster.model.marks import CacheMark
from cluster.model.sampler import Sampler

__all__ = ["LiveSequence", "Prefix", "PrefixStore", "SequenceTable"]


@dataclass(slots=True)
class LiveSequence:
    """A live sequence. ``tokens`` are those fed so far, prompt and answer.

    ``broken`` is the reason why no further step may use it, "" if there is none. ``marks`` are by position. ``kept``
    refers to a prefix's caches with exactly this sequence's state, if there are any. ``deferred`` has the logits
    [1, positions, vocabulary] of a step that is sampled once the sequence's grammar is compiled.

    ``adapter`` computes it; None if it has none. ``adapter_key`` names that. ``embeds``: its samples come with their
    hidden states.

    ``guess_marks`` are those taken before tokens that are still guesses; a prefix does not get them. ``sampled`` is the
    position and the token of the last sample, on the last stage.
    """

    id: int
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)
    broken: str = ""
    marks: dict[int, CacheMark] = field(default_factory=dict)
    kept: ReferenceType[SequenceCaches] | None = None
    deferred: mx.array | None = None
    guess_marks: dict[int, CacheMark] = field(default_factory=dict)
    sampled: tuple[int, int] | None = None
    adapter: LoraLayers | None = None
    adapter_key: str = ""
    embeds: bool = False

    def feed(self, tokens: Sequence[int]) -> None:
        """Add ``tokens``, which a step has written to the caches."""
        self.tokens.extend(tokens)
        self.kept = None


@dataclass(frozen=True, slots=True)
class Prefix:
    """A kept copy of a sequence: its tokens, its caches, its marks by position, and the key of its adapter."""

    tokens: tuple[int, ...]
    caches: SequenceCaches
    marks: dict[int, CacheMark]
    adapter: str = ""


class PrefixStore(Protocol):
    """Where prefixes are kept beside the stage's memory."""

    def persist(self, prefix: Prefix, edit: Persist) -> None:
        """Begin to write a prefix that the stage keeps."""

    def drop(self, prefix: int) -> None:
        """Stop writing or reading the prefix with this id, which the stage drops."""


class SequenceTable:
    """Holds live sequences and prefixes by id. ``vocabulary`` bounds the token ids in a logit bias.

    ``grammars`` compiles the sequences' grammars; only a stage that samples needs it. ``store`` keeps prefixes too.
    ``adapters`` are those of the stage by key, which may change.
    """

    def __init__(
        self,
        new_caches: Callable[[], SequenceCaches],
        vocabulary: int,
        grammars: GrammarCompiler | None = None,
        store: PrefixStore | None = None,
        adapters: Mapping[str, LoraLayers] = MappingProxyType({}),
    ) -> None:
        self._new_caches = new_caches
        self._adapters = adapters
        self._store = store
        self._vocabulary = vocabulary
        self._grammars = grammars
        self._live: dict[int, LiveSequence] = {}
        self._lanes = LaneCaches()
        self._prefixes: dict[int, Prefix] = {}
        self._need_marks: bool | None = None

    @property
    def sequences(self) -> int:
        """Return the number of live sequences."""
        return len(self._live)

    @property
    def prefixes(self) -> int:
        """Return the number of kept prefixes."""
        return len(self._prefixes)

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of all caches. Memory that a prefix or a mark shares with a sequence counts twice."""
        live = self._live.values()
        return self._lanes.nbytes + self._nbytes_of(marks for each in live for marks in (each.marks, each.guess_marks))

    @property
    def prefix_bytes(self) -> int:
        """Return the bytes of the kept prefixes and their marks.

        A prefix saved under two ids without a step in between counts once, and so does a mark of several prefixes.
        """
        return self._nbytes_of(())

    def _nbytes_of(self, more_marks: Iterable[Mapping[int, CacheMark]]) -> int:
        prefixes = self._prefixes.values()
        held: dict[int, SequenceCaches | CacheMark] = {id(p.caches): p.caches for p in prefixes}
        for marks in (*(p.marks for p in prefixes), *more_marks):
            held |= {id(mark): mark for mark in marks.values()}
        return sum(each.nbytes for each in held.values())

    def get(self, sequence: int) -> LiveSequence:
        """Return a live sequence. Raises BadFrame if the id is not live."""
        if sequence not in self._live:
            raise BadFrame(f"sequence {sequence} is not live on this stage")
        return self._live[sequence]

    def usable(self, sequence: int) -> LiveSequence:
        """Return a live sequence. Raises BadFrame if the id is not live, or if an earlier failure broke it."""
        live = self.get(sequence)
        if live.broken:
            raise BadFrame(f"sequence {sequence} is broken and can only leave: {live.broken}")
        return live

    def deferred(self, most: int) -> list[LiveSequence]:
        """Return up to ``most`` sequences whose deferred logits can be sampled now."""
        ready = (live for live in self._live.values() if live.deferred is not None and live.sampler.ready)
        return list(islice(ready, most))

    def gather(self, lane: int, sequences: Sequence[int]) -> HeldCaches:
        """Return the caches for one step of ``lane``; see ``LaneCaches.gather``."""
        return self._lanes.gather(lane, sequences)

    def mark_guesses(self, live: LiveSequence, step: Step) -> None:
        """Mark where a step of guesses starts, and drop the marks before guesses that have turned out right.

        Caches that cannot be trimmed go back to such a mark if the guess is wrong.
        """
        verified = step.start + len(step.tokens[0]) - step.guesses if step.start is not None else len(live.tokens) + 1
        for at in [at for at in live.guess_marks if at < verified]:
            del live.guess_marks[at]
        if self._need_marks is None:
            self._need_marks = self._new_caches().need_marks
        if step.guesses and self._need_marks:
            live.guess_marks[len(live.tokens)] = self._lanes.mark(live.id)

    def note_samples(self, samples: Iterable[Sample]) -> None:
        """Remember the last sample of each sequence, which tells whether a guess of it is right."""
        for sample in samples:
            self.get(sample.sequence).sampled = sample.position, sample.token

    def mark_broken(self, sequences: Sequence[int], why: str) -> None:
        """Reject further use of ``sequences`` until they leave, and free their caches. Unknown ids are ignored."""
        for sequence in sequences:
            if sequence in self._live and not self._live[sequence].broken:
                self._live[sequence].broken = why
                self._live[sequence].deferred = None
                self._live[sequence].marks.clear()
                self._live[sequence].guess_marks.clear()
                self._lanes.remove(sequence)

    def apply(self, edits: Sequence[Edit], step: Sequence[int] = ()) -> None:
        """Apply ``edits`` in order. ``step`` has the sequences of the frame's step.

        An invalid edit changes nothing, and the rest are still applied, since the other stages apply them too. If the
        frame has a step without the edit's sequence, that sequence is marked broken and the step goes on. Otherwise
        the first error is raised (BadFrame) after all edits.
        """
        named = {e.sequence for e in edits if not isinstance(e, Drop | Persist)}
        not_in_step = named - set(step) if step else set()
        errors: list[BadFrame] = []
        for edit in edits:
            try:
                self._apply(edit)
            except BadFrame as error:
                if isinstance(edit, Trim | Save | Restore | Mark) and edit.sequence in not_in_step:
                    self.mark_broken([edit.sequence], error.sentence)
                else:
                    errors.append(error)
        if errors:
            raise errors[0]

    def _apply(self, edit: Edit) -> None:
        match edit:
            case Join():
                self._join(edit)
            case Leave():
                self._live.pop(edit.sequence, None)
                self._lanes.remove(edit.sequence)
            case Trim():
                self._trim(self.usable(edit.sequence), edit.length)
            case Mark():
                self._mark(self.usable(edit.sequence), edit.length)
            case Unmark():
                self.get(edit.sequence).marks.pop(edit.length, None)
            case Save():
                self._save(self.usable(edit.sequence), edit.prefix)
            case Restore():
                self._restore(self.usable(edit.sequence), edit.prefix, edit.length)
            case Drop():
                self._drop(edit.prefix)
            case Persist():
                self._persist(edit)

    def _join(self, edit: Join) -> None:
        if edit.sequence in self._live:
            raise BadFrame(f"sequence {edit.sequence} is already live and cannot join again")
        outside = [token for token, _ in edit.sampling.logit_bias if not 0 <= token < self._vocabulary]
        if outside:
            raise BadFrame(f"logit_bias names token {outside[0]}; the model has {self._vocabulary} tokens")
        if edit.noise > MAX_VOCABULARY:
            raise BadFrame(f"sequence {edit.sequence} draws from {edit.noise} tokens; the limit is {MAX_VOCABULARY}")
        sampler = Sampler(
            edit.sampling,
            edit.prompt_length,
            self._vocabulary,
            self._grammars,
            forced=edit.look_ahead,
            noise=edit.noise,
        )
        adapter = self._adapters.get(edit.adapter)
        live = LiveSequence(edit.sequence, sampler, adapter=adapter, adapter_key=edit.adapter, embeds=edit.embeds)
        self._live[edit.sequence] = live
        self._lanes.put(edit.sequence, self._new_caches())
        if edit.adapter and not adapter:  # its request has ended: no error, since the frame's step may be another's
            self.mark_broken([edit.sequence], f"the adapter {edit.adapter} is not loaded on this stage")

    def _trim(self, live: LiveSequence, length: int) -> None:
        """Drop all but the first ``length`` tokens. A sequence that is no longer than that stays as it is."""
        excess = len(live.tokens) - length
        if length < 0:
            raise BadFrame(f"sequence {live.id} has {len(live.tokens)} tokens; it cannot be trimmed to {length}")
        if excess <= 0:
            return
        mark = live.guess_marks.get(length) or live.marks.get(length)
        if length == 0:
            self._lanes.put(live.id, self._new_caches())
        elif not self._lanes.alone(live.id).rewind(excess, mark):
            raise BadFrame(
                f"sequence {live.id} cannot be trimmed to {length} tokens: it has no mark there and the model's caches "
                "cannot all be trimmed"
            )
        live.sampler.rewind(live.tokens, length)
        del live.tokens[length:]
        live.marks = _up_to(length, live.marks)
        live.guess_marks = _up_to(length, live.guess_marks)
        live.kept = None
        live.deferred = None
        if live.sampled is not None and live.sampled[0] > length:
            live.sampled = None

    def _mark(self, live: LiveSequence, length: int) -> None:
        if length != len(live.tokens):
            raise BadFrame(f"sequence {live.id} has {len(live.tokens)} tokens; it cannot be marked at {length}")
        live.marks[length] = self._lanes.mark(live.id)

    def _save(self, live: LiveSequence, prefix: int) -> None:
        caches = live.kept() if live.kept is not None else None
        if caches is None:
            caches = self._lanes.copy(live.id)
            live.kept = ref(caches)
        self._prefixes[prefix] = Prefix(tuple(live.tokens), caches, dict(live.marks), live.adapter_key)

    def _drop(self, prefix: int) -> None:
        self._prefixes.pop(prefix, None)
        if self._store:
            self._store.drop(prefix)

    def _persist(self, edit: Persist) -> None:
        kept = self._prefixes.get(edit.prefix)
        if self._store and kept:
            self._store.persist(kept, edit)

    def _restore(self, live: LiveSequence, prefix: int, length: int) -> None:
        if live.tokens:
            raise BadFrame(f"sequence {live.id} has {len(live.tokens)} tokens; only an empty one can restore a prefix")
        try:
            caches = self._start_from(prefix, length, live.adapter_key)
        except BadFrame as error:
            self.mark_broken([live.id], error.sentence)  # its caches are empty here: a step would give wrong tokens
            raise
        kept = self._prefixes[prefix]
        self._lanes.put(live.id, caches)
        live.tokens = list(kept.tokens[:length])
        live.marks = _up_to(length, kept.marks)
        live.kept = ref(kept.caches) if length == len(kept.tokens) else None
        live.sampler.forget()

    def add_prefix(self, prefix: int, tokens: tuple[int, ...], caches: SequenceCaches, adapter: str) -> None:
        """Keep a prefix that was read from the store."""
        self._prefixes[prefix] = Prefix(tokens, caches, {}, adapter)

    def _start_from(self, prefix: int, length: int, adapter: str) -> SequenceCaches:
        """Return a copy of a prefix's caches with its first ``length`` tokens.

        Raises BadFrame if there is none, or if it is not one of ``adapter``.
        """
        kept = self._prefixes.get(prefix)
        if kept is None:
            raise BadFrame(f"prefix {prefix} is not kept on this stage")
        if kept.adapter != adapter:
            raise BadFrame(f"prefix {prefix} was computed with another adapter")
        excess = len(kept.tokens) - length
        caches = kept.caches.copy()
        if not 0 < length <= len(kept.tokens) or (excess and not caches.rewind(excess, kept.marks.get(length))):
            raise BadFrame(f"prefix {prefix} has {len(kept.tokens)} tokens and cannot be cut to {length}")
        return caches


def _up_to(length: int, marks: Mapping[int, CacheMark]) -> dict[int, CacheMark]:
    return {at: mark for at, mark in marks.items() if at <= length}
