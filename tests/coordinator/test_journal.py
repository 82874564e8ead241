"""The journal: unfinished requests come back, whatever happened to the file, and no others do."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api.metrics import Metrics
from cluster.coordinator import journal as journal_module
from cluster.coordinator.answer_resumption import continue_request
from cluster.coordinator.ended_requests import EndedRequests
from cluster.coordinator.journal import Fsync, Journal, JournaledRequest
from cluster.coordinator.request_records import HEADER, as_data, from_data
from cluster.core.cluster_state import ServingState
from cluster.core.errors import InvalidRequest
from cluster.core.journal_limits import JOURNAL_RETRY_S, MAX_ENDED, PARKED_S
from cluster.core.limits import RESUME_S
from cluster.core.request import Grammar, GrammarKind, Parsing, Request, SamplingParams, Tool
from cluster.platform import private_files
from disks import FailingDisk

SAMPLING = SamplingParams(temperature=0.7, logit_bias=((5, -1.5), (9, 2.0)), seed=2**63 + 1)


def request(name: str, client: str = "me", prompt: tuple[int, ...] = (1, 2, 3)) -> Request:
    return Request(name, prompt, SAMPLING, 20, stop=("END",), client=client, priority=3, deadline=5.0)


def kept_on(kept: JournaledRequest) -> tuple[Request, tuple[tuple[int, ...], ...]]:
    """Return a request as it is given to the next coordinator's journal."""
    return kept.request, continue_request(kept, (0,))[0]


def test_what_was_not_ended_comes_back_with_all_it_has_said(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j")
    for name in ("ended", "live"):
        first.record_opened(request(name), ())
        for token in (7, 8):
            first.record_token(name, token)
    first.record_ended("ended")
    first.flush()
    second = Journal(tmp_path / "j")
    assert second.take("ended", "me") is None
    assert second.take("live", "somebody else") is None
    kept = second.take("live", "me")
    assert kept
    assert kept.request == replace(request("live"), deadline=None)
    assert kept.tokens == [[7, 8]]
    assert second.take("live", "me") is kept
    second.record_opened(*kept_on(kept))
    assert second.take("live", "me") is None


def test_an_answer_that_is_resumed_twice_goes_on_from_where_it_was(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j")
    first.record_opened(request("a"), ((7, 8),))
    first.close()
    second = Journal(tmp_path / "j")
    kept = second.take("a", "me")
    assert kept
    second.record_opened(*kept_on(kept))
    second.record_token("a", 9)
    second.close()
    third = Journal(tmp_path / "j").take("a", "me")
    assert third
    assert third.tokens == [[7, 8, 9]]


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 400), noise=st.binary(max_size=20))
def test_a_file_that_was_cut_off_or_damaged_counts_up_to_there(
    tmp_path_factory: pytest.TempPathFactory, cut: int, noise: bytes
) -> None:
    path = tmp_path_factory.mktemp("j") / "j"
    first = Journal(path)
    first.record_opened(request("a"), ())
    for token in range(50):
        first.record_token("a", token)
    first.flush()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut] + noise)
    kept = Journal(path).take("a", "me")
    if kept and not noise:
        assert kept.tokens == [list(range(len(kept.tokens[0])))]


def test_it_is_nobody_elses_to_read_and_forgets_what_is_old(tmp_path: Path) -> None:
    now = [1000.0]
    path = tmp_path / "deep" / "j"
    first = Journal(path, Fsync.ALWAYS, lambda: now[0])
    first.record_opened(request("a"), ())
    first.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    now[0] += RESUME_S + 1
    assert Journal(path, Fsync.NEVER, lambda: now[0]).take("a", "me") is None
    assert path.read_bytes() == HEADER


def test_it_stays_within_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "JOURNAL_BYTES", 5000)
    kept = Journal(tmp_path / "j")
    for i in range(200):
        kept.record_opened(request(f"r{i}", prompt=tuple(range(50))), ())
        kept.record_token(f"r{i}", 5)
        kept.record_ended(f"r{i}")
        kept.flush()
    assert (tmp_path / "j").stat().st_size < 6000
    for i in range(200):
        kept.record_opened(request(f"live{i}", prompt=tuple(range(50))), ())
        kept.flush()
    assert (tmp_path / "j").stat().st_size < 6000
    assert Journal(tmp_path / "j").take("live0", "me")


def test_the_size_that_it_needs_is_counted_as_requests_come_and_go(tmp_path: Path, rng: Random) -> None:
    """It is looked at for each request: to add up what all live ones need took 20 ms with 60,000 of them."""
    journal = Journal(tmp_path / "journal")
    live: dict[str, int] = {}
    empty = journal._needed
    for number in range(300):
        name = f"r{rng.randint(0, 30)}"
        if name not in live or rng.random() < 0.1:
            journal.record_opened(request(name, prompt=(1,) * rng.randint(1, 50)), ((1, 2),) if number % 3 else ())
            live[name] = 2 if number % 3 else 0
        elif rng.random() < 0.6:
            journal.record_token(name, number)
            live[name] += 1
        else:
            journal.record_ended(name)
            del live[name]
        journal.flush()
        records = sum(map(len, journal._records.values()))
        assert journal._needed == records + journal_module._TOKEN_BYTES * sum(live.values())
    for name in live:
        journal.record_ended(name)
    assert journal._needed == empty == 0
    journal.close()


def test_grammars_and_what_an_answer_is_parsed_for_come_back(tmp_path: Path) -> None:
    grammar = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}', free_until=(4, 5))
    parsing = Parsing((Tool("look", "up", "{}"), Tool("do")), thinking=True)
    asked = replace(request("a"), sampling=replace(SAMPLING, grammar=grammar), parsing=parsing, deadline=None)
    first = Journal(tmp_path / "j")
    first.record_opened(asked, ())
    first.close()
    kept = Journal(tmp_path / "j").take("a", "me")
    assert kept
    assert (kept.request, kept.tokens) == (asked, [[]])
    assert kept.request.sampling.grammar
    assert kept.request.sampling.grammar.kind is GrammarKind.JSON_SCHEMA


def test_each_sample_goes_on_from_where_it_was(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j")
    first.record_opened(replace(request("a"), samples=3), ())
    for sample, token in ((0, 7), (2, 8), (2, 9)):
        first.record_token("a", token, sample)
    first.close()
    kept = Journal(tmp_path / "j").take("a", "me")
    assert kept
    assert continue_request(kept, (1, 0, 1)) == (((7,), (), (8, 9)), (1, 0, 1))
    assert continue_request(kept, (0,)) == (((7,), (), (8, 9)), (0, 0, 0))
    with pytest.raises(InvalidRequest, match="got 2 offsets for 3 samples"):
        continue_request(kept, (1, 0))


def test_what_may_have_ended_an_answer_is_computed_anew_and_so_are_log_probabilities() -> None:
    kept = JournaledRequest(replace(request("a"), max_tokens=3), 0.0, [[7, 8, 9]])
    assert continue_request(kept, (2,)) == (((7, 8),), (2,))
    kept.request = replace(kept.request, sampling=replace(SAMPLING, logprobs=True))
    assert continue_request(kept, (1,)) == (((7,),), (1,))
    kept.request = replace(request("a"), max_tokens=3, prompt_logprobs=2)
    assert continue_request(kept, (0,)) == (((),), (0,))
    kept = JournaledRequest(replace(request("a"), max_tokens=0, prompt_logprobs=2), 0.0, [[]])
    assert continue_request(kept, (0,)) == (((),), (0,))


def test_a_request_for_its_prompts_log_probabilities_comes_back_and_older_records_have_none() -> None:
    asked = replace(request("a"), deadline=None, prompt_logprobs=0)
    assert from_data(as_data(asked)) == asked
    assert from_data(as_data(asked)[:-4]) == replace(asked, prompt_logprobs=None)
    for wrong in ("2", 1.5, True):
        with pytest.raises(TypeError):
            from_data((*as_data(asked)[:-4], wrong))


def test_a_request_without_speculation_comes_back_so_and_older_records_allow_it() -> None:
    asked = replace(request("a"), deadline=None, prompt_logprobs=1, speculate=False)
    assert from_data(as_data(asked)) == asked
    assert from_data(as_data(asked)[:-3]) == replace(asked, speculate=True)
    assert from_data(as_data(replace(asked, prediction=(1, 2)))) == asked
    for wrong in (None, 0, "no"):
        with pytest.raises(TypeError):
            from_data((*as_data(asked)[:-3], wrong))


def test_a_request_to_an_adapter_comes_back_so_and_older_records_have_none() -> None:
    asked = replace(request("a"), deadline=None, adapter="legal@" + 64 * "a")
    assert from_data(as_data(asked)) == asked
    assert from_data(as_data(asked)[:-2]) == replace(asked, adapter="")
    for wrong in (None, 0, ("legal",)):
        with pytest.raises(TypeError):
            from_data((*as_data(asked)[:-2], wrong))


def test_a_resumable_request_comes_back_so_and_older_records_are_not() -> None:
    asked = replace(request("a"), deadline=None, resumable=True)
    assert from_data(as_data(asked)) == asked
    assert from_data(as_data(asked)[:-1]) == replace(asked, resumable=False)
    for wrong in (None, 1, "yes"):
        with pytest.raises(TypeError):
            from_data((*as_data(asked)[:-1], wrong))


def parked(path: Path, clock: Callable[[], float], *names: str) -> Journal:
    """Return a journal with parked requests, each with a token."""
    kept = Journal(path, Fsync.NEVER, clock)
    for name in names:
        kept.record_opened(replace(request(name), resumable=True), ())
        kept.record_token(name, 7)
        kept.record_parked(name)
    kept.flush()
    return kept


def test_a_parked_request_can_be_resumed_here_and_by_the_next_coordinator(tmp_path: Path) -> None:
    now = [1000.0]
    path = tmp_path / "j"
    first = parked(path, lambda: now[0], "a", "b")
    first.record_token("a", 8)  # of a reader that is gone
    kept = first.take("a", "me")
    assert kept
    assert kept.tokens == [[7]]
    assert first.take("a", "somebody else") is None
    first.record_opened(*kept_on(kept))
    first.record_token("a", 8)
    first.record_parked("a")
    first.flush()
    now[0] += PARKED_S
    for journal in (Journal(path, Fsync.NEVER, lambda: now[0]), Journal(path, Fsync.NEVER, lambda: now[0])):
        for name, tokens in (("a", [[7, 8]]), ("b", [[7]])):
            again = journal.take(name, "me")
            assert again
            assert again.tokens == tokens
    now[0] += 1
    assert first.take("b", "me") is None
    assert Journal(path, Fsync.NEVER, lambda: now[0]).take("b", "me") is None


def test_parked_requests_leave_when_their_time_has_passed_or_their_room_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "JOURNAL_BYTES", 3000)
    now = [1000.0]
    kept = parked(tmp_path / "j", lambda: now[0], *(f"r{i}" for i in range(100)))
    assert kept.take("r0", "me") is None
    assert kept.take("r99", "me")
    assert kept._needed <= 3000
    kept.record_opened(replace(request("large"), prompt=tuple(range(500))), ())
    assert kept.take("r99", "me"), "only as many leave as must"
    kept.record_ended("large")
    now[0] += PARKED_S + 1
    kept.flush()
    assert kept._needed == 0
    kept.record_opened(request("live"), ())
    for token in range(2000):
        kept.record_token("live", token)
        kept.flush()
    assert (tmp_path / "j").stat().st_size < 20_000


def test_a_resumable_request_that_ended_is_remembered_for_its_client(tmp_path: Path) -> None:
    now = [1000.0]
    path = tmp_path / "j"
    first = Journal(path, Fsync.NEVER, lambda: now[0])
    for name, resumable in (("a", True), ("plain", False), ("again", True)):
        first.record_opened(replace(request(name), resumable=resumable), ())
        first.record_ended(name)
    first.record_opened(replace(request("again"), resumable=True), ())
    first.flush()
    journals = [first, Journal(path, Fsync.NEVER, lambda: now[0])]  # which rewrites the file
    journals.append(Journal(path, Fsync.NEVER, lambda: now[0]))
    for journal in journals:
        assert journal.has_ended("a", "me")
        assert not journal.has_ended("a", "somebody else")
        assert not journal.has_ended("plain", "me")
        assert not journal.has_ended("again", "me")
    now[0] += RESUME_S + 1
    assert not any(journal.has_ended("a", "me") for journal in journals)


def test_so_many_ended_requests_are_remembered_and_no_more() -> None:
    ended = EndedRequests(lambda: 10.0)
    for i in range(MAX_ENDED + 5):
        ended.add(f"r{i}", "me", 20.0)
    assert len(ended.as_data()) == MAX_ENDED
    assert not ended.has("r4", "me")
    assert ended.has("r5", "me")
    again = EndedRequests(lambda: 10.0)
    again.read(ended.as_data())
    assert again.as_data() == ended.as_data()
    for wrong in ([(1, "me", 2.0)], [("a", None, 2.0)], [("a", "me", "2")], [("a",)], 5):
        with pytest.raises((TypeError, ValueError)):
            again.read(wrong)


def test_a_request_with_more_than_data_in_it_is_left_out(tmp_path: Path) -> None:
    kept = Journal(tmp_path / "j")
    kept.record_opened(replace(request("odd"), stop=(object(),)), ())  # type: ignore[arg-type]
    kept.record_token("odd", 5)
    kept.record_ended("odd")
    kept.record_opened(replace(request("too far"), priority=2**70), ())
    kept.record_opened(replace(request("no text"), stop=("\ud800",)), ())
    kept.flush()
    assert (tmp_path / "j").read_bytes() == HEADER


def resumable(path: Path, *names: str) -> dict[str, list[list[int]]]:
    """Return what the next coordinator finds of these requests."""
    successor = Journal(path)
    successor.close()
    found = {name: successor.take(name, "me") for name in names}
    return {name: kept.tokens for name, kept in found.items() if kept}


def test_a_full_disk_turns_the_journal_off_and_room_turns_it_on_with_everything_that_lives(
    tmp_path: Path, failing_disk: FailingDisk
) -> None:
    now = [0.0]
    kept = Journal(tmp_path / "j", monotonic=lambda: now[0])
    kept.record_opened(request("before"), ())
    kept.record_token("before", 7)
    kept.flush()
    failing_disk.room = 5
    kept.record_token("before", 8)
    kept.record_opened(request("while off"), ())
    kept.flush()
    assert "No space left on device" in kept.problem
    assert b"macpipe_journal_on 0.0" in Metrics().exposition(ServingState.SERVING, None, None, kept)
    assert str(tmp_path / "j") in kept.problem
    failing_disk.room = None
    assert resumable(tmp_path / "j", "before", "while off") == {"before": [[7]]}  # up to its last whole record
    kept.record_token("while off", 9)
    kept.record_opened(request("ended while off"), ())
    kept.record_ended("ended while off")
    kept.flush()
    assert kept.problem
    now[0] += JOURNAL_RETRY_S
    kept.flush()
    assert kept.problem == ""
    kept.record_token("while off", 10)
    kept.close()
    names = ("before", "while off", "ended while off")
    assert resumable(tmp_path / "j", *names) == {"before": [[7, 8]], "while off": [[9, 10]]}


def test_a_disk_that_stays_full_is_tried_again_but_not_at_each_token(tmp_path: Path, failing_disk: FailingDisk) -> None:
    now = [0.0]
    kept = Journal(tmp_path / "j", monotonic=lambda: now[0])
    kept.record_opened(request("a"), ())
    failing_disk.room = 0
    for token in range(100):
        kept.record_token("a", token)
        kept.flush()
    assert [p.name for p in tmp_path.iterdir()] == ["j"]
    tried = failing_disk.fsyncs
    now[0] += JOURNAL_RETRY_S
    for token in range(100):
        kept.record_token("a", token)
        kept.flush()
    assert kept.problem
    assert failing_disk.fsyncs == tried
    assert [p.name for p in tmp_path.iterdir()] == ["j"]  # no draft is left behind


def test_a_disk_without_room_for_a_second_file_keeps_the_journal_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    kept = Journal(tmp_path / "j", monotonic=lambda: now[0])
    monkeypatch.setattr(journal_module, "JOURNAL_BYTES", 4000)
    replace_file, refused = journal_module.replace_and_open, 0

    def no_room(*_: object) -> int:
        nonlocal refused
        refused += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal_module, "replace_and_open", no_room)
    kept.record_opened(request("live"), ())
    for i in range(60):
        kept.record_opened(request(f"ended-{i}"), ())
        kept.record_ended(f"ended-{i}")
        kept.record_token("live", i)
        kept.flush()
    assert (kept.problem, refused) == ("", 1)  # tried again only after JOURNAL_RETRY_S
    assert resumable_copy(tmp_path, "live") == {"live": [list(range(60))]}
    monkeypatch.setattr(journal_module, "replace_and_open", replace_file)
    before = (tmp_path / "j").stat().st_size
    now[0] += JOURNAL_RETRY_S
    kept.record_token("live", 60)
    kept.flush()
    assert (tmp_path / "j").stat().st_size < before / 2
    kept.close()
    assert resumable(tmp_path / "j", "live") == {"live": [list(range(61))]}


def resumable_copy(folder: Path, *names: str) -> dict[str, list[list[int]]]:
    """Return what a copy of the journal holds, which leaves the journal as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_module, "replace_and_open", private_files.replace_and_open)
        copy = folder / "copy"
        shutil.copy(folder / "j", copy)
        return resumable(copy, *names)


@pytest.mark.parametrize("truncate_fails", [False, True])
def test_a_write_that_fails_half_way_through_a_record_spoils_no_other(
    tmp_path: Path, failing_disk: FailingDisk, truncate_fails: bool
) -> None:
    kept = Journal(tmp_path / "j")
    kept.record_opened(request("a"), ())
    kept.record_token("a", 7)
    kept.flush()
    failing_disk.room, failing_disk.truncate_fails = 9, truncate_fails
    kept.record_token("a", 8)
    kept.flush()
    failing_disk.room = None
    assert resumable(tmp_path / "j", "a") == {"a": [[7]]}


def test_short_writes_are_completed(tmp_path: Path, failing_disk: FailingDisk) -> None:
    failing_disk.short = True
    kept = Journal(tmp_path / "j")
    kept.record_opened(request("a"), ())
    for token in range(10):
        kept.record_token("a", token)
        kept.flush()
    kept.close()
    assert kept.problem == ""
    assert resumable(tmp_path / "j", "a") == {"a": [list(range(10))]}


def test_records_of_a_failed_sync_are_written_again(tmp_path: Path, failing_disk: FailingDisk) -> None:
    now = [0.0]
    kept = Journal(tmp_path / "j", Fsync.ALWAYS, monotonic=lambda: now[0])
    kept.record_opened(request("a"), ())
    failing_disk.fsync_fails = True
    kept.record_token("a", 7)
    kept.flush()
    kept.sync()
    assert "Input/output error" in kept.problem
    failing_disk.fsync_fails = False
    now[0] += JOURNAL_RETRY_S
    kept.flush()
    assert resumable(tmp_path / "j", "a") == {"a": [[7]]}


def test_a_place_that_cannot_be_written_is_a_problem_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    now = [0.0]
    kept = Journal(tmp_path / "file" / "j", monotonic=lambda: now[0])
    kept.record_opened(request("a"), ())
    kept.flush()
    assert "Not a directory" in kept.problem
    (tmp_path / "file").unlink()
    now[0] += JOURNAL_RETRY_S
    kept.flush()
    assert kept.problem == ""
    assert resumable(tmp_path / "file" / "j", "a") == {"a": [[]]}


def test_a_bit_that_flipped_ends_what_is_read(tmp_path: Path) -> None:
    kept = Journal(tmp_path / "j")
    kept.record_opened(request("a"), ())
    kept.flush()
    kept.record_token("a", 7)
    kept.flush()
    whole = (tmp_path / "j").stat().st_size
    kept.record_token("a", 8)
    kept.close()
    content = bytearray((tmp_path / "j").read_bytes())
    content[whole + 10] ^= 1
    (tmp_path / "j").write_bytes(content)
    assert resumable(tmp_path / "j", "a") == {"a": [[7]]}


def test_a_journal_of_the_format_before_is_read(tmp_path: Path) -> None:
    now = 1000.0
    old = [(0, "a", now, as_data(replace(request("a"), deadline=None)), [[7]]), (1, "a", 8, 0), (0, "b", now, (), [])]
    (tmp_path / "j").write_bytes(b"".join(msgpack.packb(record) for record in old))
    kept = Journal(tmp_path / "j", clock=lambda: now).take("a", "me")
    assert kept
    assert kept.tokens == [[7, 8]]
    assert (tmp_path / "j").read_bytes().startswith(HEADER)


def link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def fifo(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def readable_by_all(path: Path, victim: Path) -> None:
    path.write_text("")
    path.chmod(0o644)


@pytest.mark.parametrize("plant", [link, fifo, readable_by_all])
@pytest.mark.parametrize("name", ["j", "j.new"])
def test_what_lies_in_its_place_is_removed_and_not_followed(
    tmp_path: Path, plant: Callable[[Path, Path], None], name: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o644)
    (tmp_path / "home").mkdir()
    plant(tmp_path / "home" / name, victim)
    kept = Journal(tmp_path / "home" / "j")
    kept.record_opened(request("a"), ())
    kept.close()
    assert kept.problem == ""
    assert victim.read_text() == "precious"
    found = (tmp_path / "home" / "j").lstat()
    assert stat.S_ISREG(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700


def test_nothing_is_resumed_after_its_time_whenever_it_is_asked_for(tmp_path: Path) -> None:
    now = [1000.0]
    first = Journal(tmp_path / "j", clock=lambda: now[0])
    first.record_opened(request("a"), ())
    first.close()
    second = Journal(tmp_path / "j", clock=lambda: now[0] + 1)
    now[0] += RESUME_S
    assert second.take("a", "me") is None
    now[0] = 500.0  # the clock went back: what seems to come from the future is not kept for ever
    third = Journal(tmp_path / "j", clock=lambda: now[0])
    now[0] += RESUME_S + 1
    assert third.take("a", "me") is None


def test_an_answer_that_takes_long_can_be_resumed_once_its_coordinator_ends(tmp_path: Path) -> None:
    now = [1000.0]
    first = Journal(tmp_path / "j", clock=lambda: now[0])
    first.record_opened(request("a"), ())
    for token in range(3):
        now[0] += RESUME_S / 2
        first.record_token("a", token)
        first.flush()
    first.close()
    second = Journal(tmp_path / "j", clock=lambda: now[0])
    now[0] += RESUME_S - 1
    kept = second.take("a", "me")
    assert kept is not None
    assert kept.tokens == [[0, 1, 2]]
    second.close()
    third = Journal(tmp_path / "j", clock=lambda: now[0])  # which does not make an answer live that nobody resumed
    now[0] += 2
    assert third.take("a", "me") is None


def test_a_rewritten_file_holds_what_live_requests_have_said_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "JOURNAL_BYTES", 4000)
    kept = Journal(tmp_path / "j")
    kept.record_opened(replace(request("samples"), samples=2), ())
    kept.record_opened(request("resumed"), ((1, 2),))
    for token in range(400):
        kept.record_token("samples", token, sample=token % 2)
        kept.record_token("resumed", token)
        kept.flush()
    assert (tmp_path / "j").stat().st_size < 8000  # 800 records of tokens alone are more than twice that
    kept.close()
    assert resumable(tmp_path / "j", "samples", "resumed") == {
        "samples": [list(range(0, 400, 2)), list(range(1, 400, 2))],
        "resumed": [[1, 2, *range(400)]],
    }


class Copy:
    """A journal on another machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.wholes = 0

    def append(self, records: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(records)

    def replace(self, content: bytes) -> None:
        self.wholes += 1
        self.path.write_bytes(content)


def test_a_copy_has_what_the_journal_has_also_while_its_own_disk_fails(
    tmp_path: Path, failing_disk: FailingDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, copy = tmp_path / "j", Copy(tmp_path / "copy")
    first = Journal(path)
    first.record_opened(request("before"), ())
    first.record_token("before", 6)
    first.close()
    now = [0.0]
    kept = Journal(path, monotonic=lambda: now[0])
    kept.copies = copy
    kept.record_opened(request("a"), ())
    kept.record_token("a", 7)
    kept.copy(copy.replace)
    kept.record_token("a", 8)
    kept.flush()
    assert resumable(copy.path, "before", "a") == {"before": [[6]], "a": [[7, 8]]}
    failing_disk.room = 0
    for token in (9, 10):
        kept.record_token("a", token)
        kept.flush()
    kept.record_opened(request("b"), ())
    kept.flush()
    assert kept.problem
    assert resumable(copy.path, "a", "b") == {"a": [[7, 8, 9, 10]], "b": [[]]}
    monkeypatch.setattr(journal_module, "JOURNAL_BYTES", 8000)
    for token in range(1000):
        kept.record_token("b", token)
        kept.record_opened(request("c"), ())
        kept.record_ended("c")
        kept.flush()
    assert copy.wholes > 2
    assert copy.path.stat().st_size < 20_000
    assert resumable(copy.path, "b") == {"b": [list(range(1000))]}
