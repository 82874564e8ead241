"""The journal: what was not ended comes back, whatever the file went through, and nothing else does."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.chat import Parsing, Tool
from cluster.coordinator import journal as journal_module
from cluster.coordinator.journal import Fsync, Journal, Kept, continued
from cluster.errors import InvalidRequest
from cluster.grammar import Grammar, GrammarKind
from cluster.limits import RESUME_S
from cluster.types import Request, SamplingParams

SAMPLING = SamplingParams(temperature=0.7, logit_bias=((5, -1.5), (9, 2.0)), seed=2**63 + 1)


def request(name: str, client: str = "me", prompt: tuple[int, ...] = (1, 2, 3)) -> Request:
    return Request(name, prompt, SAMPLING, 20, stop=("END",), client=client, priority=3, deadline=5.0)


def kept_on(kept: Kept) -> tuple[Request, tuple[tuple[int, ...], ...]]:
    """A request as the next coordinator's journal is told of it."""
    return kept.request, continued(kept, (0,))[0]


def test_what_was_not_ended_comes_back_with_all_it_has_said(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j")
    for name in ("ended", "live"):
        first.opened(request(name), ())
        for token in (7, 8):
            first.said(name, token)
    first.ended("ended")
    second = Journal(tmp_path / "j")
    assert second.take("ended", "me") is None
    assert second.take("live", "somebody else") is None
    kept = second.take("live", "me")
    assert kept
    assert kept.request == replace(request("live"), deadline=None)
    assert kept.said == [[7, 8]]
    assert second.take("live", "me") is None


def test_an_answer_that_is_resumed_twice_goes_on_from_where_it_was(tmp_path: Path) -> None:
    Journal(tmp_path / "j").opened(request("a"), ((7, 8),))
    second = Journal(tmp_path / "j")
    kept = second.take("a", "me")
    assert kept
    second.opened(*kept_on(kept))
    second.said("a", 9)
    third = Journal(tmp_path / "j").take("a", "me")
    assert third
    assert third.said == [[7, 8, 9]]


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 400), noise=st.binary(max_size=20))
def test_a_file_that_was_cut_off_or_damaged_counts_up_to_there(
    tmp_path_factory: pytest.TempPathFactory, cut: int, noise: bytes
) -> None:
    path = tmp_path_factory.mktemp("j") / "j"
    first = Journal(path)
    first.opened(request("a"), ())
    for token in range(50):
        first.said("a", token)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut] + noise)
    kept = Journal(path).take("a", "me")
    if kept and not noise:
        assert kept.said == [list(range(len(kept.said[0])))]


def test_it_is_nobody_elses_to_read_and_forgets_what_is_old(tmp_path: Path) -> None:
    now = [1000.0]
    path = tmp_path / "deep" / "j"
    Journal(path, Fsync.ALWAYS, lambda: now[0]).opened(request("a"), ())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    now[0] += RESUME_S + 1
    assert Journal(path, Fsync.NEVER, lambda: now[0]).take("a", "me") is None
    assert path.stat().st_size == 0


def test_it_stays_within_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "JOURNAL_BYTES", 5000)
    kept = Journal(tmp_path / "j")
    for i in range(200):
        kept.opened(request(f"r{i}", prompt=tuple(range(50))), ())
        kept.said(f"r{i}", 5)
        kept.ended(f"r{i}")
    assert (tmp_path / "j").stat().st_size < 6000
    for i in range(200):
        kept.opened(request(f"live{i}", prompt=tuple(range(50))), ())
    assert (tmp_path / "j").stat().st_size < 6000
    assert Journal(tmp_path / "j").take("live0", "me")


def test_grammars_and_what_an_answer_is_parsed_for_come_back(tmp_path: Path) -> None:
    grammar = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}', free_until=(4, 5))
    parsing = Parsing((Tool("look", "up", "{}"), Tool("do")), thinking=True)
    asked = replace(request("a"), sampling=replace(SAMPLING, grammar=grammar), parsing=parsing, deadline=None)
    Journal(tmp_path / "j").opened(asked, ())
    kept = Journal(tmp_path / "j").take("a", "me")
    assert kept
    assert (kept.request, kept.said) == (asked, [[]])
    assert kept.request.sampling.grammar
    assert kept.request.sampling.grammar.kind is GrammarKind.JSON_SCHEMA


def test_each_sample_goes_on_from_where_it_was(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j")
    first.opened(replace(request("a"), samples=3), ())
    for sample, token in ((0, 7), (2, 8), (2, 9)):
        first.said("a", token, sample)
    kept = Journal(tmp_path / "j").take("a", "me")
    assert kept
    assert continued(kept, (1, 0, 1)) == (((7,), (), (8, 9)), (1, 0, 1))
    assert continued(kept, (0,)) == (((7,), (), (8, 9)), (0, 0, 0))
    with pytest.raises(InvalidRequest, match="2 offsets were given for 3 samples"):
        continued(kept, (1, 0))


def test_what_may_have_ended_an_answer_is_computed_anew_and_so_are_log_probabilities() -> None:
    kept = Kept(replace(request("a"), max_tokens=3), 0.0, [[7, 8, 9]])
    assert continued(kept, (2,)) == (((7, 8),), (2,))
    kept.request = replace(kept.request, sampling=replace(SAMPLING, logprobs=True))
    assert continued(kept, (1,)) == (((7,),), (1,))


def test_a_request_with_more_than_data_in_it_is_left_out(tmp_path: Path) -> None:
    kept = Journal(tmp_path / "j")
    kept.opened(replace(request("odd"), stop=(object(),)), ())  # type: ignore[arg-type]
    kept.said("odd", 5)
    kept.ended("odd")
    assert (tmp_path / "j").stat().st_size == 0
