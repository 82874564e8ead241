"""The bench of guesses on real text: it runs with the bundled model, and no token differs."""

from __future__ import annotations

import pytest

from integration.benches import run_bench


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("draft", [(), ("--draft", "faq-draft")], ids=["ngram", "draft"])
def test_the_bench_of_real_text_compares_equal_answers(draft: tuple[str, ...]) -> None:
    facts = run_bench("guesses", *draft, "--tokens", "24", "--texts", "2", "--json")
    assert facts["tokens_differ"] == 0
    assert {name: len(values) for name, values in facts["rounds"].items()} == {"questions off": 2, "questions on": 2}
    assert facts["speedup_questions"] > 0
    assert 0 <= facts["covered_questions"] <= facts["acceptance_questions"] <= 1
