"""Guesses from texts: what they follow, whose answers they see, and what is kept."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from cluster.core.limits import ANSWER_AGE_S, CLIENT_ANSWER_BYTES, EARLIER_ANSWER_BYTES, MAX_ANSWER_CLIENTS
from cluster.core.request import Request, SamplingParams
from cluster.scheduler.answer_history import AnswerHistory
from cluster.scheduler.guessing import Guess, GuessSource
from cluster.scheduler.text_guesser import TextGuesser

A_FILE = tuple(random.Random(1).choices(range(1000), k=200))


def ask(
    prompt: tuple[int, ...], *, client: str = "key:a", prediction: tuple[int, ...] = (), name: str = "r"
) -> Request:
    return Request(name, prompt, SamplingParams(), 500, client=client, prediction=prediction)


def replay(guesser: TextGuesser, request: Request, answer: tuple[int, ...]) -> dict[GuessSource, list[bool]]:
    """Give an answer token by token. Return for each source which of its guesses were right."""
    right: dict[GuessSource, list[bool]] = {}
    tokens = list(request.prompt)
    for token in answer:
        if guess := guesser.propose(request, tokens, 1):
            hit = guess.tokens == (token,)
            right.setdefault(guess.source, []).append(hit)
            guesser.learn(request, guess.source, int(hit), int(not hit))
        tokens.append(token)
    guesser.observe(request, tokens)
    guesser.forget(request)
    return right


def now() -> float:
    return 0.0


def test_a_file_rewritten_with_one_change_is_guessed_but_for_the_change() -> None:
    changed = (*A_FILE[:90], 7001, 7002, *A_FILE[93:])
    right = replay(TextGuesser(now), ask((5000, *A_FILE, 5001, A_FILE[0], A_FILE[1])), changed[2:])
    assert sum(right[GuessSource.NGRAM]) >= len(changed) - 2 - 5


def test_a_prediction_is_guessed_from_its_first_token_and_found_again_after_a_change() -> None:
    changed = (*A_FILE[:90], 7001, 7002, *A_FILE[93:])
    right = replay(TextGuesser(now), ask((5000, 5001), prediction=A_FILE), changed)
    assert right[GuessSource.PREDICTION][0]
    assert sum(right[GuessSource.PREDICTION]) >= len(changed) - 5
    assert right[GuessSource.PREDICTION].count(False) <= 2


def test_an_answer_that_begins_otherwise_finds_its_prediction() -> None:
    right = replay(TextGuesser(now), ask((5000, 5001), prediction=A_FILE), (7001, 7002, *A_FILE))
    assert sum(right[GuessSource.PREDICTION]) >= len(A_FILE) - 2


def test_a_prediction_that_is_used_up_guesses_nothing() -> None:
    guesser, request = TextGuesser(now), ask((5000,), prediction=(1, 2, 3))
    assert guesser.propose(request, [5000], 8) == Guess((1, 2, 3), GuessSource.PREDICTION)
    assert guesser.propose(request, [5000, 1, 2], 8) == Guess((3,), GuessSource.PREDICTION)
    assert guesser.propose(request, [5000, 1, 2, 3], 8) is None


def test_a_wrong_guess_in_flight_is_not_followed() -> None:
    """After a miss the tokens are others than those that were seen, at the same positions."""
    guesser, request = TextGuesser(now), ask((1, 2, 3, 4, 5, 6, 1, 2))
    assert guesser.propose(request, [1, 2, 3, 4, 5, 6, 1, 2], 2) == Guess((3, 4), GuessSource.NGRAM)
    assert guesser.propose(request, [1, 2, 3, 4, 5, 6, 1, 2, 3, 4], 1) == Guess((5,), GuessSource.NGRAM)
    assert guesser.propose(request, [1, 2, 3, 4, 5, 6, 1, 2, 4, 5], 1) == Guess((6,), GuessSource.NGRAM)
    assert guesser.propose(request, [1, 2, 3, 4, 5, 6, 1, 2, 9], 1) is None


def test_earlier_answers_serve_their_own_client_alone() -> None:
    guesser = TextGuesser(now)
    replay(guesser, ask((5000,)), A_FILE)
    assert sum(replay(guesser, ask((6000,)), A_FILE)[GuessSource.NGRAM]) >= len(A_FILE) - 3
    assert replay(guesser, ask((6000,), client="key:b"), A_FILE) == {}


def test_the_prompt_of_an_earlier_request_is_not_kept() -> None:
    guesser = TextGuesser(now)
    replay(guesser, ask(A_FILE), (1,))
    assert replay(guesser, ask((6000,)), A_FILE) == {}


def test_a_guess_ends_where_an_earlier_answer_ends() -> None:
    guesser = TextGuesser(now)
    for answer in ((1, 2, 3), (4, 5, 6)):
        replay(guesser, ask((5000,)), answer)
    assert guesser.propose(ask((6000,)), [6000, 1, 2], 8) == Guess((3,), GuessSource.NGRAM)
    assert guesser.propose(ask((6000,)), [6000, 1, 2, 3], 8) is None


def test_a_client_is_forgotten() -> None:
    guesser = TextGuesser(now)
    replay(guesser, ask((5000,)), A_FILE)
    replay(guesser, ask((5000,), client="key:b"), A_FILE)
    guesser.forget_client("key:a")
    assert replay(guesser, ask((6000,)), A_FILE) == {}
    assert replay(guesser, ask((6000,), client="key:b"), A_FILE)


def test_wrong_guesses_ask_for_longer_matches() -> None:
    """Pairs that repeat by chance are followed at first, and no more once they were wrong."""
    noise = random.Random(2).choices(range(12), k=400)
    right = replay(TextGuesser(now), ask((5000, *noise[:50])), tuple(noise[50:]))
    assert len(right[GuessSource.NGRAM]) < 250


def test_what_a_grammar_forces_goes_before_any_text() -> None:
    guesser, request = TextGuesser(now), ask((1, 2, 3, 4, 1, 2))
    assert guesser.propose(request, [1, 2, 3, 4, 1, 2], 1) == Guess((3,), GuessSource.NGRAM)
    guesser.hint(request, 7, (8, 9, 10))
    assert guesser.propose(request, [1, 2, 3, 4, 1, 2, 7], 2) == Guess((8, 9), GuessSource.GRAMMAR)
    assert guesser.propose(request, [1, 2, 3, 4, 1, 2, 7, 8, 9], 2) == Guess((10,), GuessSource.GRAMMAR)
    assert guesser.propose(request, [1, 2, 3, 4, 1, 2, 7, 8, 9, 10, 1, 2], 1) == Guess((7,), GuessSource.NGRAM)
    assert guesser.propose(request, [1, 2, 3, 4, 1, 2, 7, 9, 1, 2], 1) == Guess((7,), GuessSource.NGRAM)


def test_samples_and_long_prompts() -> None:
    """Each sample follows its own tokens; of a prompt longer than what is searched, its end is known."""
    guesser = TextGuesser(now)
    prompt = (*range(100_000), 99_000)
    first = guesser.propose(ask(prompt), [*prompt, 99_001], 2)
    assert first == Guess((99_002, 99_003), GuessSource.NGRAM)
    assert guesser.propose(ask(prompt, name="r#1"), [*prompt, 99_001, 5], 1) is None
    assert guesser.propose(ask(prompt), [*prompt, 99_001, 99_002], 1) == Guess((99_003,), GuessSource.NGRAM)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.lists(st.integers(0, 3), max_size=20), st.data())
def test_a_guess_is_what_followed_somewhere(prompt: list[int], prediction: list[int], data: st.DataObject) -> None:
    """Whatever the tokens become meanwhile, a guess continues a text that ends as they do."""
    guesser = TextGuesser(now)
    request = ask(tuple(prompt), prediction=tuple(prediction))
    answer: list[int] = []
    for _ in range(8):
        answer = answer[: data.draw(st.integers(0, len(answer)))] + data.draw(st.lists(st.integers(0, 3), max_size=4))
        tokens = prompt + answer
        guess = guesser.propose(request, tokens, 3)
        if guess is None:
            continue
        assert 1 <= len(guess.tokens) <= 3
        text = prediction if guess.source is GuessSource.PREDICTION else tokens
        least = min(2, len(answer)) if guess.source is GuessSource.PREDICTION else 2
        places = [i for i in range(len(text)) if text[i : i + len(guess.tokens)] == list(guess.tokens)]
        assert any(text[max(i - least, 0) : i] == tokens[len(tokens) - min(least, i) :] for i in places)


def test_old_answers_are_dropped() -> None:
    time = [0.0]
    answers = AnswerHistory(lambda: time[0])
    answers.add("a", (1, 2))
    time[0] = ANSWER_AGE_S * 0.6
    answers.add("a", (3, 4))
    answers.add("b", (5,))
    assert (answers.size, len(answers.of("a"))) == (32, 24)
    time[0] = ANSWER_AGE_S * 1.1
    assert (len(answers.of("a")), answers.size) == (12, 20)
    time[0] = ANSWER_AGE_S * 1.7
    assert answers.of("a") == b""
    answers.add("c", (6,))
    assert answers.size == 8


def test_bytes_are_bounded() -> None:
    answers = AnswerHistory(now)
    for _ in range(30):
        answers.add("a", tuple(range(CLIENT_ANSWER_BYTES // 30)))
        assert answers.size <= CLIENT_ANSWER_BYTES
    answers.add("a", tuple(range(CLIENT_ANSWER_BYTES)))
    assert CLIENT_ANSWER_BYTES // 2 <= answers.size <= CLIENT_ANSWER_BYTES
    half = A_FILE * (CLIENT_ANSWER_BYTES // 2 // 4 // len(A_FILE))
    for i in range(EARLIER_ANSWER_BYTES // CLIENT_ANSWER_BYTES * 2 + 9):
        answers.add(f"key:{i}", half)
    assert answers.size <= EARLIER_ANSWER_BYTES
    assert answers.of("a") == b""


def test_clients_are_bounded() -> None:
    answers = AnswerHistory(now)
    for i in range(MAX_ANSWER_CLIENTS + 5):
        answers.add(str(i), (i,))
    assert (answers.of("4"), len(answers.of("5")), answers.size) == (b"", 8, 8 * MAX_ANSWER_CLIENTS)


def test_empty_answers_take_no_room() -> None:
    answers = AnswerHistory(now)
    answers.add("a", ())
    assert (answers.of("a"), answers.size) == (b"", 0)
