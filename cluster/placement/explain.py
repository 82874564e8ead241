"""Explains a plan in sentences: what limits its speed, what more memory would gain, and why a Mac is spare.

It finds the reasons by running the same search with other questions. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, pairwise

from cluster.core.limits import FAR_OFF
from cluster.core.plan import Forecast, LayerRange, ModelShape, Objective, Spare
from cluster.core.text import figure_in_words, gib_in_words, link_in_words
from cluster.placement.candidates import Candidate, Candidates
from cluster.placement.guessed_token_time import guessed_token_s
from cluster.placement.layout_forecast import forecast, hops_s, token_s
from cluster.placement.memory_split import needed_bytes
from cluster.placement.predicted_step_time import fixed_s
from cluster.placement.search import BestLayout, Search
from cluster.placement.stage_table import StageTable

__all__ = ["Layout", "reasons", "spares", "unknown"]

NOTICEABLE = 1.1
"""Ratio of two times below which their difference is not worth a sentence."""
USUAL_ACCEPTANCE = 0.7
"""Share of right guesses for which a plan shows what guesses would bring."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout to explain, in pipeline order. ``lanes`` is what the user asked for; None means one for each stage."""

    shape: ModelShape
    candidates: Candidates
    workers: tuple[Candidate, ...]
    ranges: tuple[LayerRange, ...]
    objective: Objective
    acceptance: float = 0.0
    lanes: int | None = None

    @property
    def token_s(self) -> float:
        return token_s(self.shape, self.candidates, self.workers, self.ranges)

    @property
    def expected_s(self) -> float:
        """The seconds of a token if guesses are right as often as ``acceptance``; without it those of every token."""
        hops = hops_s(self.shape, self.candidates, self.workers, self.ranges)
        return guessed_token_s(self._stages_s, hops, self.acceptance)

    @property
    def slowest_s(self) -> float:
        return max(self._stages_s)

    @property
    def _stages_s(self) -> list[float]:
        return [w.decode_s(self.shape, r) for w, r in zip(self.workers, self.ranges, strict=True)]

    @property
    def forecast(self) -> Forecast:
        return forecast(self.shape, self.candidates, self.workers, self.ranges, self.lanes, self.acceptance)

    @property
    def free_bytes(self) -> int:
        """The memory that weights leave for caches."""
        pairs = zip(self.workers, self.ranges, strict=True)
        return sum(w.ranks * (w.memory.usable - self.shape.of_rank(w.ranks).stage_bytes(r)) for w, r in pairs)

    @property
    def guessed_rate(self) -> float:
        """One user's tokens a second if usually many guesses are right."""
        return 1 / replace(self, acceptance=USUAL_ACCEPTANCE).expected_s

    def of(self, found: BestLayout) -> Layout:
        """Return another layout for the same shape, candidates and objective."""
        return replace(self, workers=found.workers, ranges=found.ranges)

    def gains(self, other: Layout) -> bool:
        """Return whether ``other`` is noticeably better by the objective."""
        if self.objective is Objective.THROUGHPUT:
            return other.slowest_s * NOTICEABLE < self.slowest_s
        return other.expected_s * NOTICEABLE < self.expected_s

    @property
    def merit(self) -> str:
        """The layout's value of the objective, in words."""
        if self.objective is Objective.THROUGHPUT:
            return f"a slowest stage of {_ms(self.slowest_s)}"
        return _rate(self)

    def __str__(self) -> str:
        return ", ".join(f"{w.name} {r}" for w, r in zip(self.workers, self.ranges, strict=True))


def unknown(candidates: Candidates) -> str:
    """Return the reason why a plan has no forecast."""
    names = ", ".join(w.name for w in candidates.workers if not w.profile.known)
    return f"split by memory, with all workers equally full: the speed of {names} has not been measured"


def reasons(layout: Layout, search: Search | None) -> tuple[str, ...]:
    """Return the sentences that explain a plan, the most important first."""
    return tuple(
        sentence
        for sentence in (
            _explain_bottleneck(layout),
            _explain_links(layout),
            _explain_guesses(layout),
            _explain_single_worker(layout, search),
            _explain_better_layout(layout, search),
            _explain_memory_limit(layout),
            _explain_another_mac(layout, search),
            *_explain_corrections(layout),
            "" if search is None or search.every_order else _explain_limited_search(layout),
        )
        if sentence
    )


def _explain_bottleneck(layout: Layout) -> str:
    """Return how a token's time is spent."""
    pairs = list(zip(layout.workers, layout.ranges, strict=True))
    reading = sum(w.decode_s(layout.shape, r) for w, r in pairs)
    adding, starting = 0.0, 0.0
    for w, r in pairs:
        correction = w.profile.correction(layout.shape.model.fingerprint)
        sums = w.sums_s(layout.shape, r) * correction
        adding += sums
        starting += fixed_s(layout.shape.of_rank(w.ranks), w.profile, r) * correction - sums
    hops = hops_s(layout.shape, layout.candidates, layout.workers, layout.ranges)
    shares = [
        (reading - starting - adding, "memory bandwidth", "go to reading weights and caches"),
        (starting, "the start of layers, not by their size", "to starting layers"),
        (adding, "the sums of each layer", "to sums of all ranks"),
        (hops, "links", f"to {len(pairs) + 1} hops"),
    ]
    _, by, _ = max(shares)
    spent = ", ".join(f"{_ms(seconds)} {what}" for seconds, _, what in shares if seconds)
    return f"bound by {by}: of {_ms(layout.token_s)} a token, {spent}"


def _explain_links(layout: Layout) -> str:
    """Name the slowest measured link between two stages."""
    pairs = [(one.name, other.name) for one, other in pairwise(layout.workers)]
    known = [(layout.candidates.links[pair], pair) for pair in pairs if pair in layout.candidates.links]
    if not known:
        return ""
    link, (source, to) = min(known, key=lambda one: (one[0].bandwidth, -one[0].round_trip_s))
    which = "the link" if len(known) == 1 else f"the slowest of {len(known)} links"
    return f"{which} is {source} to {to}{link_in_words(link)}"


def _explain_guesses(layout: Layout) -> str:
    """Return what guessed tokens gain for one user, if the plan counts on them."""
    if not layout.acceptance:
        return ""
    without = figure_in_words(1 / layout.token_s)
    return f"with {layout.acceptance:.0%} of guesses right, one user gets {_rate(layout)} instead of {without}"


def _explain_single_worker(layout: Layout, search: Search | None) -> str:
    """Name a single Mac that can hold the whole model and is faster for one user, if there is one."""
    found = search.best(stage_count=1) if search and len(layout.workers) > 1 else None
    if found is None or layout.of(found).expected_s * NOTICEABLE >= layout.expected_s:
        return ""
    alone = layout.of(found)
    sentence = f"{found.workers[0].name} alone would be faster for one user: {_rate(alone)} against {_rate(layout)}"
    many, now = alone.forecast.eight_users, layout.forecast.eight_users
    return (
        f"{sentence}; and for eight: {figure_in_words(many)} against {figure_in_words(now)}" if many > now else sentence
    )


def _explain_better_layout(layout: Layout, search: Search | None) -> str:
    """Name a better layout than the requested one, if there is one."""
    found = search.best() if search else None
    if found is None or not layout.gains(layout.of(found)):
        return ""
    if len(found.workers) == 1 and layout.objective is Objective.LATENCY:
        return ""  # ``_explain_single_worker`` says so already
    other = layout.of(found)
    return f"the planner would choose {other}: {other.merit} instead of {layout.merit}"


def _explain_memory_limit(layout: Layout) -> str:
    """Name the best layout without memory limits and the memory that it lacks, if it is noticeably better."""
    table = StageTable(layout.shape, 1)
    found = Search(table, layout.candidates, layout.objective, acceptance=layout.acceptance, unbounded=True).best()
    if found is None or not layout.gains(layout.of(found)):
        return ""
    missing = [
        f"{gib_in_words(needed_bytes(layout.shape, r, 1, w.ranks) - w.memory.usable)} more on {w.name}"
        for w, r in zip(found.workers, found.ranges, strict=True)
        if needed_bytes(layout.shape, r, 1, w.ranks) > w.memory.usable
    ]
    if not missing:
        return ""
    return (
        f"also bound by memory: with {' and '.join(missing)}, {layout.of(found)} would give "
        f"{layout.of(found).merit} instead of {layout.merit}"
    )


def _explain_another_mac(layout: Layout, search: Search | None) -> str:
    """Return what one more Mac would bring: a spare one, else one like the last of the plan."""
    if search is None or not search.every_order:
        return ""
    more, who, last = layout, "one more of these Macs", layout.workers[-1]
    if len(layout.workers) == len(layout.candidates.workers):
        more, who = _add_twin(layout), f"another {'group' if last.members else 'Mac'} like {last.name}"
        search = Search(StageTable(layout.shape, 1), more.candidates, layout.objective, acceptance=layout.acceptance)
    found = search.best(stage_count=len(layout.workers) + 1)
    if found is None:
        return ""
    more = more.of(found)
    now, then = layout.forecast, more.forecast
    gains = [f"{gib_in_words(more.free_bytes)} instead of {gib_in_words(layout.free_bytes)} for caches"]
    if then.eight_users > now.eight_users * NOTICEABLE:
        rates = f"{figure_in_words(then.eight_users)} tokens/s instead of {figure_in_words(now.eight_users)}"
        gains.append(f"{rates} for eight users")
    if then.first_token_s * NOTICEABLE < now.first_token_s:
        seconds = f"{figure_in_words(then.first_token_s)} s instead of {figure_in_words(now.first_token_s)} s"
        gains.append(f"the first token of a prompt of {now.prompt_tokens} tokens in {seconds}")
    one = f"one user would get {figure_in_words(then.one_user)} tokens/s instead of {figure_in_words(now.one_user)}"
    if not layout.acceptance:
        one += f", or {figure_in_words(more.guessed_rate)} with {USUAL_ACCEPTANCE:.0%} of guesses right"
    return f"{who} would bring {', '.join(gains)}; {one}"


def _add_twin(layout: Layout) -> Layout:
    """Return the layout among candidates of whom one is new: it equals the last stage's Mac, and so do its links."""
    last, known = layout.workers[-1], layout.candidates
    names = {w.name for w in known.workers}
    name = next(f"{last.name}+{n}" for n in count(1) if f"{last.name}+{n}" not in names)
    twin = replace(last, memory=replace(last.memory, worker=name))
    links = dict(known.links)
    for (source, to), link in known.links.items():
        if source == last.name:
            links[name, to], links[name, last.name] = link, link
        if to == last.name:
            links[source, name], links[last.name, name] = link, link
    return replace(layout, candidates=replace(known, workers=(*known.workers, twin), links=links))


def _explain_corrections(layout: Layout) -> Iterator[str]:
    """Name the workers whose profile is corrected by measured frames."""
    for worker in layout.workers:
        ratio = worker.profile.correction(layout.shape.model.fingerprint)
        if not 1 / NOTICEABLE < ratio < NOTICEABLE:
            yield f"{worker.name}'s frames were {_compare(ratio)} than its profile predicts{_suggest_profile(ratio)}"


def _compare(ratio: float) -> str:
    """Return what a correction means, in words."""
    return f"{ratio:.2f} times slower" if ratio > 1 else f"{1 / ratio:.2f} times faster"


def _suggest_profile(ratio: float) -> str:
    """Return what to do about a profile that is far off, or nothing if the correction is small."""
    if 1 / FAR_OFF <= ratio <= FAR_OFF:
        return ""
    cause = "it is busy, or its profile is wrong" if ratio > 1 else "it was busy when it was measured"
    return f"; {cause}: `macpipe worker --profile new` there measures again"


def _explain_limited_search(layout: Layout) -> str:
    count = len(layout.candidates.workers)
    return f"{count} different workers have too many orders to try: only layouts in order of speed were compared"


def spares(layout: Layout, search: Search | None, asked: str) -> tuple[Spare, ...]:
    """Return the workers that the layout leaves out, each with the reason: the user's request ``asked``, if any."""
    idle = [w for w in layout.candidates.workers if w not in layout.workers]
    return tuple(Spare(w.name, asked or _why_spare(layout, search, w)) for w in idle)


def _why_spare(layout: Layout, search: Search | None, worker: Candidate) -> str:
    if search is None or not search.every_order:
        some = len(layout.workers) > 1
        return f"{_others(layout)} hold{'' if some else 's'} the model, and {'are' if some else 'is'} faster or larger"
    found = search.best(including=worker)
    if found is None:
        return f"no layout fits that uses it with its {gib_in_words(worker.memory.usable)}"
    other = layout.of(found)
    if layout.objective is Objective.THROUGHPUT:
        return f"it would only slow the others down: {other.merit} instead of {layout.merit}"
    enough = f"{_others(layout)} {'are' if len(layout.workers) > 1 else 'is'} enough"
    if other.expected_s < layout.expected_s * NOTICEABLE:
        return f"{enough}, and it would make no token noticeably faster"
    return f"{enough}; with it a token would take {_ms(other.expected_s)} instead of {_ms(layout.expected_s)}"


def _others(layout: Layout) -> str:
    return "the others" if len(layout.workers) > 1 else layout.workers[0].name


def _rate(layout: Layout) -> str:
    return f"{figure_in_words(1 / layout.expected_s)} tokens/s"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
