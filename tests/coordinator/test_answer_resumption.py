"""What a client is told of an answer that it wants to go on with, if the journal does not have it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.coordinator.answer_resumption import take_request
from cluster.coordinator.journal import Journal
from cluster.coordinator.journal_writer import JournalWriter
from cluster.core.errors import AnswerLost, RequestEnded, RequestNotFound
from cluster.core.limits import RESUME_S
from cluster.core.request import Request, SamplingParams


def test_an_answer_of_a_leader_whose_answers_are_not_here_is_lost_for_as_long_as_it_could_be_resumed(
    tmp_path: Path,
) -> None:
    now = 100.0
    journal = JournalWriter(Journal(tmp_path / "journal"), lacks_earlier=True, clock=lambda: now)
    with pytest.raises(AnswerLost, match=r"request theirs .*leader before it; send the request again") as lost:
        take_request(journal, "theirs", "me")
    assert (lost.value.grpc_status, lost.value.http_status) == ("UNAVAILABLE", 503)
    now += RESUME_S
    with pytest.raises(RequestNotFound):
        take_request(journal, "theirs", "me")


def test_such_a_leader_knows_its_own_answers(tmp_path: Path) -> None:
    kept = Journal(tmp_path / "journal")
    for name in ("live", "ended"):
        kept.record_opened(Request(name, (1, 2), SamplingParams(), 20, client="me", resumable=True), ())
    kept.record_parked("live")
    kept.record_ended("ended")
    journal = JournalWriter(kept, lacks_earlier=True)
    assert take_request(journal, "live", "me").request.prompt == (1, 2)
    with pytest.raises(RequestEnded):
        take_request(journal, "ended", "me")


def test_an_unknown_request_is_not_found_by_a_leader_that_has_all_answers(tmp_path: Path) -> None:
    for journal, why in ((JournalWriter(Journal(tmp_path / "journal")), "resumed$"), (None, "or with --replicate")):
        with pytest.raises(RequestNotFound, match=why):
            take_request(journal, "nobodys", "me")
