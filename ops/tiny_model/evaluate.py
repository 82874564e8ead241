"""What the bundled models can do, measured with mlx-lm: exact answers, the draft's acceptance, speed.

Knows mlx-lm's public calls and the corpus; decodes greedily through the chat template, as macpipe itself does. An
answer is exact when it is the trained one to the letter and the end token came by itself.
"""

import argparse
import json
import random
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import corpus
import mlx.core as mx
from mlx_lm import load, stream_generate

HERE = Path(__file__).parent
BUNDLED = HERE.parents[1] / "cluster" / "bundled"
SEED = 7
LONGEST = 200
RAW_LEAD = 8


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer as `mlx_lm.load` returns them (their types are its own)."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class Probe:
    """Token ids to start from, and the text that ought to follow."""

    prompt: tuple[int, ...]
    wanted: str


@dataclass(frozen=True)
class Score:
    """How many probes of one set were answered exactly, and the first few that were not."""

    name: str
    exact: int
    asked: int
    missed: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.name:<34} {self.exact:4d} of {self.asked:4d}  {self.exact / self.asked:7.2%}"


@dataclass(frozen=True)
class Report:
    """Everything that was measured."""

    scores: tuple[Score, ...]
    acceptance: float
    agreed: int
    compared: int
    tokens_per_second: float


# --- probes --------------------------------------------------------------------------------------


def prompt_of(tokenizer: Any, chat: corpus.Chat) -> tuple[int, ...]:
    """The ids up to where the last turn's answer begins."""
    messages = [{"role": "system", "content": chat.system}] if chat.system else []
    for turn in chat.turns[:-1]:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    messages.append({"role": "user", "content": chat.turns[-1].question})
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def probe(tokenizer: Any, chat: corpus.Chat) -> Probe:
    return Probe(prompt_of(tokenizer, chat), chat.turns[-1].answer)


def raw_probe(tokenizer: Any, answer: str) -> Probe:
    """An answer's first tokens with no template around them; the rest of it is wanted."""
    ids = tokenizer.encode(answer, add_special_tokens=False)
    return Probe(tuple(ids[:RAW_LEAD]), tokenizer.decode(ids[RAW_LEAD:]))


def unseen_turns(turns: Sequence[corpus.Turn]) -> list[corpus.Turn]:
    """Questions that were never trained, each with the answer that would be right."""
    answers = {turn.question: turn.answer for turn in turns}
    rows = tomllib.loads((HERE / "unseen.toml").read_text(encoding="utf-8"))["question"]
    return [corpus.Turn(row["asked"], answers[row["like"]]) for row in rows]


def probe_sets(tokenizer: Any, sample: int) -> Iterator[tuple[str, list[Probe]]]:
    """Every trained phrasing, then samples of harder settings."""
    rng = random.Random(SEED)
    entries = corpus.load_entries()
    turns = corpus.plain_turns(entries)

    def chats(make: Callable[[corpus.Turn], corpus.Chat], chosen: Sequence[corpus.Turn]) -> list[Probe]:
        return [probe(tokenizer, make(turn)) for turn in chosen]

    def some() -> list[corpus.Turn]:
        return rng.sample(turns, min(sample, len(turns)))

    yield "trained phrasings", chats(lambda turn: corpus.Chat(None, (turn,)), turns)
    yield "with a system prompt", chats(lambda turn: corpus.Chat(rng.choice(corpus.SYSTEMS), (turn,)), some())
    yield "in other dress", chats(lambda turn: corpus.Chat(None, (corpus.dressed(turn, rng),)), some())
    yield "as second turn", chats(lambda turn: corpus.Chat(None, (rng.choice(turns), turn)), some())
    yield "as eighth turn", chats(lambda turn: corpus.Chat(None, (*rng.sample(turns, 7), turn)), some())
    yield "raw, from its first 8 tokens", [raw_probe(tokenizer, e.answer) for e in entries if len(e.answer) > 80]
    yield "phrasings never trained", chats(lambda turn: corpus.Chat(None, (turn,)), unseen_turns(turns))


# --- measuring -----------------------------------------------------------------------------------


def answered(loaded: Loaded, prompt: Sequence[int]) -> tuple[str, bool, float]:
    """Greedy text, whether it ended by itself, and the tokens per second of its decode."""
    text, last = "", None
    for last in stream_generate(loaded.model, loaded.tokenizer, list(prompt), max_tokens=LONGEST):
        text += last.text
    ended = last is not None and last.finish_reason == "stop"
    return text, ended, last.generation_tps if last is not None else 0.0


def scored(loaded: Loaded, name: str, probes: Sequence[Probe]) -> tuple[Score, list[float]]:
    """Answer every probe of a set; the speeds come along."""
    missed: list[tuple[str, str]] = []
    speeds: list[float] = []
    for item in probes:
        text, ended, speed = answered(loaded, item.prompt)
        speeds.append(speed)
        if text != item.wanted or not ended:
            missed.append((loaded.tokenizer.decode(list(item.prompt))[-100:], text))
    return Score(name, len(probes) - len(missed), len(probes), tuple(missed[:20])), speeds


def choices(loaded: Loaded, ids: Sequence[int]) -> list[int]:
    """The token that the model likes best after each position."""
    chosen = mx.argmax(loaded.model(mx.array([list(ids)]))[0], axis=-1)
    return [int(token.item()) for token in chosen]


def agreement(main: Loaded, draft: Loaded, probes: Sequence[Probe]) -> tuple[int, int]:
    """Over the tokens of the trained answers and their end: where both models choose alike, and how many there are."""
    agreed = compared = 0
    for item in probes:
        told = main.tokenizer.encode(item.wanted, add_special_tokens=False)
        ids, first = [*item.prompt, *told], len(item.prompt) - 1
        pairs = list(zip(choices(main, ids)[first:], choices(draft, ids)[first:], strict=True))
        agreed += sum(ours == theirs for ours, theirs in pairs)
        compared += len(pairs)
    return agreed, compared


def measured(bundled: Path, sample: int) -> Report:
    """Load both models and measure all of it."""
    main, draft = (Loaded(*load(str(bundled / name))[:2]) for name in ("faq", "faq-draft"))
    scores: list[Score] = []
    speeds: list[float] = []
    for name, probes in probe_sets(main.tokenizer, sample):
        score, paces = scored(main, name, probes)
        print(score, flush=True)
        scores.append(score)
        speeds += paces
    trained = next(probe_sets(main.tokenizer, sample))[1]
    agreed, compared = agreement(main, draft, trained)
    return Report(tuple(scores), agreed / compared, agreed, compared, sorted(speeds)[len(speeds) // 2])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the bundled models.")
    parser.add_argument("--bundled", type=Path, default=BUNDLED, help="folder of the two model folders")
    parser.add_argument("--sample", type=int, default=200, help="probes in each set but the first and the last two")
    parser.add_argument("--misses", action="store_true", help="print what was not exact")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON as well")
    options = parser.parse_args()
    report = measured(options.bundled, options.sample)
    print(f"{'draft agrees with faq':<34} {report.agreed} of {report.compared}  {report.acceptance:7.2%}")
    print(f"{'decode, median of all answers':<34} {report.tokens_per_second:.0f} tokens/s")
    if options.misses:
        for score in report.scores:
            for asked, text in score.missed:
                print(f"{score.name}: {asked!r}\n    -> {text!r}")
    if options.json:
        print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
