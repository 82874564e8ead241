"""The training text: questions with their answers, variations of the questions, and random chats of both.

It knows `faq.toml` and how people write, and nothing of tokens, tensors or models. All randomness comes from the
caller's `random.Random`, so the same seed gives the same chats.
"""

import random
import tomllib
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("faq.toml")

GREETINGS = ("Hello, ", "Hello! ", "Hi, ", "Hi! ", "Hey, ", "Excuse me, ", "Good morning, ")
REQUESTS = ("please tell me: ", "please: ", "can you tell me: ", "I would like to know: ", "quick question: ", "so, ")
COURTESIES = (" Please.", " Thanks.", " Thank you.", " please", " Please explain.", " Thanks in advance!")
SYSTEMS = (
    "You are a helpful assistant.",
    "You are macpipe's assistant.",
    "You are a concise assistant. Answer briefly.",
    "Answer in one or two sentences.",
    "Be polite and precise.",
    "You are an expert in distributed systems.",
    "You answer questions about macpipe.",
    "Always answer in English.",
)


@dataclass(frozen=True)
class Entry:
    """One answer, and the phrasings of its question."""

    topic: str
    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Turn:
    """A question as the user wrote it, and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Chat:
    """A conversation: an optional system prompt and one or more turns."""

    system: str | None
    turns: tuple[Turn, ...]


def load_entries(source: Path = SOURCE) -> tuple[Entry, ...]:
    """Read the entries. Raise ValueError if a question or an answer occurs twice."""
    raw = tomllib.loads(source.read_text(encoding="utf-8"))["entry"]
    entries = tuple(Entry(item["topic"], tuple(item["questions"]), item["answer"]) for item in raw)
    _refuse_repeats([question.lower() for entry in entries for question in entry.questions])
    _refuse_repeats([entry.answer for entry in entries])
    return entries


def plain_turns(entries: tuple[Entry, ...]) -> tuple[Turn, ...]:
    """Return every trained phrasing exactly as it is written, with its answer."""
    return tuple(Turn(question, entry.answer) for entry in entries for question in entry.questions)


def vary_question(turn: Turn, rng: random.Random) -> Turn:
    """Return the question as another person might type it: in other case, with polite words or a typing error."""
    text = turn.question
    if rng.random() < 0.3:
        text = text.rstrip("?.!")
    if rng.random() < 0.2:
        text = _add_greeting(text, rng)
    if rng.random() < 0.1:
        text += rng.choice(COURTESIES)
    if rng.random() < 0.1:
        text = _add_typo(text, rng)
    return Turn(_recased(text, rng), turn.answer)


def draw_system(entries: tuple[Entry, ...], rng: random.Random) -> str | None:
    """Return no system prompt, a usual one, or sometimes any sentence, so that the model ignores its words."""
    chance = rng.random()
    if chance < 0.6:
        return None
    return rng.choice(SYSTEMS) if chance < 0.95 else rng.choice(entries).answer


def _refuse_repeats(texts: list[str]) -> None:
    repeated = sorted({text for text in texts if texts.count(text) > 1})
    if repeated:
        raise ValueError(f"written more than once: {repeated}")


def _add_greeting(text: str, rng: random.Random) -> str:
    """Add a greeting, a request or both before the question."""
    opening = rng.choice(("", rng.choice(GREETINGS))) + rng.choice(("", rng.choice(REQUESTS)))
    return opening[:1].upper() + opening[1:] + text if opening else text


def _recased(text: str, rng: random.Random) -> str:
    chance = rng.random()
    if chance < 0.2:
        return text.lower()
    return text.upper() if chance < 0.23 else text


def _add_typo(text: str, rng: random.Random) -> str:
    """Drop, double or swap one letter."""
    at = rng.randrange(max(1, len(text) - 1))
    head, pair, tail = text[:at], text[at : at + 2], text[at + 2 :]
    return head + rng.choice((pair[1:], pair[:1] + pair, pair[::-1])) + tail
