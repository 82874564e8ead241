"""Measures the bundled models with mlx-lm: exact answers, how often the draft agrees, and speed.

It uses mlx-lm's public functions and decodes greedily through the chat template, as macpipe does. An answer is exact if
it equals the trained one and the model itself produced the end token.
"""

import argparse
import json
import random
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import corpus
import mlx.core as mx
from mlx_lm import load, stream_generate

HERE = Path(__file__).parent
BUNDLED = HERE.parents[1] / "cluster" / "bundled"
SEED = 7
LONGEST = 200
RAW_LEAD = 8
RAW = "raw, from its first 8 tokens"


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer, as `mlx_lm.load` returns them."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class Probe:
    """The token ids of a prompt, and the expected text."""

    prompt: tuple[int, ...]
    wanted: str


@dataclass(frozen=True)
class Answer:
    """A model's answer, whether the model produced the end token, and the tokens per second of decode."""

    prompt: tuple[int, ...]
    text: str
    ended: bool
    speed: float


@dataclass(frozen=True)
class Score:
    """How many probes of one set were answered exactly, and for the others the end of the prompt and the answer."""

    name: str
    exact: int
    asked: int
    missed: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"exact answers: {self.name:<26} {self.exact:5d} of {self.asked:5d}  {self.exact / self.asked:7.2%}"


@dataclass(frozen=True)
class Agreement:
    """At how many tokens of faq's greedy answers to one set the draft chooses the same token."""

    name: str
    agreed: int
    compared: int

    def __str__(self) -> str:
        return (
            f"draft agrees: {self.name:<27} {self.agreed:5d} of {self.compared:5d}  {self.agreed / self.compared:7.2%}"
        )


@dataclass(frozen=True)
class Report:
    """All measurements."""

    scores: tuple[Score, ...]
    agreements: tuple[Agreement, ...]
    tokens_per_second: float


# --- probes --------------------------------------------------------------------------------------


def prompt_of(tokenizer: Any, chat: corpus.Chat) -> tuple[int, ...]:
    """Return the ids before the answer of the last turn."""
    messages = [{"role": "system", "content": chat.system}] if chat.system else []
    for turn in chat.turns[:-1]:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    messages.append({"role": "user", "content": chat.turns[-1].question})
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def probe(tokenizer: Any, chat: corpus.Chat) -> Probe:
    return Probe(prompt_of(tokenizer, chat), chat.turns[-1].answer)


def raw_probe(tokenizer: Any, answer: str) -> Probe:
    """Return a probe with an answer's first tokens, without a template. The rest of the answer is expected.

    mlx-lm's streaming detokenizer drops a leading space, so the expected text has none.
    """
    ids = tokenizer.encode(answer, add_special_tokens=False)
    return Probe(tuple(ids[:RAW_LEAD]), tokenizer.decode(ids[RAW_LEAD:]).lstrip())


def unseen_turns(turns: Sequence[corpus.Turn]) -> list[corpus.Turn]:
    """Return questions that were never trained, each with the right answer."""
    answers = {turn.question: turn.answer for turn in turns}
    rows = tomllib.loads((HERE / "unseen.toml").read_text(encoding="utf-8"))["question"]
    return [corpus.Turn(row["asked"], answers[row["like"]]) for row in rows]


def probe_sets(tokenizer: Any, sample: int) -> Iterator[tuple[str, list[Probe]]]:
    """Return probes of every trained phrasing, then samples of harder sets."""
    rng = random.Random(SEED)
    entries = corpus.load_entries()
    turns = corpus.plain_turns(entries)

    def chats(make: Callable[[corpus.Turn], corpus.Chat], chosen: Sequence[corpus.Turn]) -> list[Probe]:
        return [probe(tokenizer, make(turn)) for turn in chosen]

    def some() -> list[corpus.Turn]:
        return rng.sample(turns, min(sample, len(turns)))

    yield "trained phrasings", chats(lambda turn: corpus.Chat(None, (turn,)), turns)
    yield "with a system prompt", chats(lambda turn: corpus.Chat(rng.choice(corpus.SYSTEMS), (turn,)), some())
    yield "varied", chats(lambda turn: corpus.Chat(None, (corpus.vary_question(turn, rng),)), some())
    yield "as second turn", chats(lambda turn: corpus.Chat(None, (rng.choice(turns), turn)), some())
    yield "as eighth turn", chats(lambda turn: corpus.Chat(None, (*rng.sample(turns, 7), turn)), some())
    yield RAW, [raw_probe(tokenizer, e.answer) for e in entries if len(e.answer) > 80]
    yield "phrasings never trained", chats(lambda turn: corpus.Chat(None, (turn,)), unseen_turns(turns))


# --- measuring -----------------------------------------------------------------------------------


def answered(loaded: Loaded, prompt: Sequence[int]) -> Answer:
    """Decode greedily from a prompt."""
    text, last = "", None
    for last in stream_generate(loaded.model, loaded.tokenizer, list(prompt), max_tokens=LONGEST):
        text += last.text
    ended = last is not None and last.finish_reason == "stop"
    return Answer(tuple(prompt), text, ended, last.generation_tps if last is not None else 0.0)


def scored(loaded: Loaded, name: str, probes: Sequence[Probe], answers: Sequence[Answer]) -> Score:
    """Compare the answers to a set with the expected ones."""
    pairs = list(zip(probes, answers, strict=True))
    wrong = [answer for item, answer in pairs if answer.text != item.wanted or not answer.ended]
    missed = [(loaded.tokenizer.decode(list(answer.prompt))[-100:], answer.text) for answer in wrong]
    return Score(name, len(pairs) - len(wrong), len(pairs), tuple(missed))


def choices(loaded: Loaded, ids: Sequence[int]) -> list[int]:
    """Return the most probable token after each position."""
    chosen = mx.argmax(loaded.model(mx.array([list(ids)]))[0], axis=-1)
    return cast(list[int], chosen.tolist())


def agreement(main: Loaded, draft: Loaded, name: str, answers: Sequence[Answer]) -> Agreement:
    """Compare the choices of both models along faq's answers, including the end token."""
    agreed = compared = 0
    for answer in answers:
        told = main.tokenizer.encode(answer.text, add_special_tokens=False)
        ids, first = [*answer.prompt, *told], len(answer.prompt) - 1
        pairs = list(zip(choices(main, ids)[first:], choices(draft, ids)[first:], strict=True))
        agreed += sum(ours == theirs for ours, theirs in pairs)
        compared += len(pairs)
    return Agreement(name, agreed, compared)


def measured(bundled: Path, sample: int) -> Report:
    """Load both models and measure everything. Print each line as soon as it is known."""
    main, draft = (Loaded(*load(str(bundled / name))[:2]) for name in ("faq", "faq-draft"))
    scores: list[Score] = []
    agreements: list[Agreement] = []
    speeds: list[float] = []
    for name, probes in probe_sets(main.tokenizer, sample):
        answers = [answered(main, item.prompt) for item in probes]
        scores.append(scored(main, name, probes, answers))
        print(scores[-1], flush=True)
        if name != RAW:
            agreements.append(agreement(main, draft, name, answers))
            print(agreements[-1], flush=True)
        speeds += [answer.speed for answer in answers]
    return Report(tuple(scores), tuple(agreements), sorted(speeds)[len(speeds) // 2])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the bundled models.")
    parser.add_argument("--bundled", type=Path, default=BUNDLED, help="folder of the two model folders")
    parser.add_argument("--sample", type=int, default=200, help="probes in each set but the first and the last two")
    parser.add_argument("--misses", action="store_true", help="print what was not exact")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON as well")
    options = parser.parse_args()
    report = measured(options.bundled, options.sample)
    print(f"decode, median of all answers: {report.tokens_per_second:.0f} tokens/s")
    if options.misses:
        for score in report.scores:
            for asked, text in score.missed:
                print(f"{score.name}: {asked!r}\n    -> {text!r}")
    if options.json:
        print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
