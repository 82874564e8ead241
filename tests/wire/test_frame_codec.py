"""Frames survive encoding and decoding, and the decoder turns any invalid bytes into a ``BadFrame``."""

from __future__ import annotations

import math
import struct
import zlib

import msgpack
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cluster.core.errors import BadFrame, Reason
from cluster.core.frames import (
    Compute,
    Drop,
    Edit,
    Failure,
    Frame,
    Join,
    Leave,
    Mark,
    Persist,
    PromptScoring,
    Restore,
    Sample,
    Save,
    SequenceFailure,
    StageTiming,
    Step,
    Tensor,
    Trim,
    Unmark,
)
from cluster.core.limits import (
    MAX_DRAFTS,
    MAX_EDITS,
    MAX_FORCED_TOKENS,
    MAX_FRAME_HEADER_BYTES,
    MAX_HEADER_ELEMENTS,
    MAX_JOINED_BYTES,
    MAX_LOGIT_BIAS,
    MAX_MARKER_TOKENS,
    MAX_ROWS,
    MAX_TOP_LOGPROBS,
    MAX_VERIFIED,
)
from cluster.core.request import Grammar, GrammarKind, PromptLogprobs, SamplingParams, TopLogprob
from cluster.scheduler.pending_edits import first_load
from cluster.wire.frame_codec import ITEM_BYTES, VERSION, decode, encode

counts = st.integers(0, 2**63 - 1)
small = st.integers(0, 9)
numbers = st.floats(allow_nan=False)
ids = st.integers(0, 2**32 - 1)

grammars = st.builds(Grammar, st.sampled_from(GrammarKind), st.text(max_size=20), st.lists(ids, max_size=3).map(tuple))
samplings = st.builds(
    SamplingParams,
    temperature=numbers,
    top_p=numbers,
    top_k=counts,
    min_p=numbers,
    repetition_penalty=numbers,
    presence_penalty=numbers,
    frequency_penalty=numbers,
    logit_bias=st.lists(st.tuples(ids, numbers), max_size=4).map(tuple),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.booleans(),
    top_logprobs=st.integers(0, 20),
    grammar=st.none() | grammars,
)
edits = st.one_of(
    st.builds(Join, counts, counts, samplings, st.booleans(), counts, st.text(max_size=9), st.booleans()),
    st.builds(Leave, counts),
    st.builds(Trim, counts, counts),
    st.builds(Save, counts, counts),
    st.builds(Mark, counts, counts),
    st.builds(Unmark, counts, counts),
    st.builds(Persist, counts, st.text(max_size=9), st.text(max_size=9)),
    st.builds(Restore, counts, counts, counts),
    st.builds(Drop, counts),
)


scorings = st.builds(PromptScoring, counts, st.lists(ids, max_size=5).map(tuple), st.integers(0, MAX_TOP_LOGPROBS))


@st.composite
def steps(draw: st.DrawFn) -> Step:
    rows, width = draw(st.integers(1, 3)), draw(st.integers(1, MAX_VERIFIED))
    row = st.lists(ids, min_size=width, max_size=width).map(tuple)
    return Step(
        draw(st.sampled_from(Compute)),
        tuple(draw(st.lists(counts, min_size=rows, max_size=rows))),
        tuple(draw(st.lists(row, min_size=rows, max_size=rows))),
        draw(st.none() | scorings),
        draw(small),
        draw(st.none() | counts),
        draw(st.integers(1, MAX_DRAFTS)),
    )


@st.composite
def prompt_logprobs(draw: st.DrawFn) -> PromptLogprobs:
    count, top = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    values = st.floats(width=32, allow_nan=False)
    return PromptLogprobs(
        draw(counts),
        tuple(draw(st.lists(values, min_size=count, max_size=count))),
        tuple(draw(st.lists(ids, min_size=count * top, max_size=count * top))),
        tuple(draw(st.lists(values, min_size=count * top, max_size=count * top))),
    )


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype, shape = draw(st.sampled_from(sorted(ITEM_BYTES))), tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    size = ITEM_BYTES[dtype] * math.prod(shape)
    return Tensor(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


alternatives = st.lists(st.builds(TopLogprob, ids, numbers), max_size=3).map(tuple)
forced = st.lists(ids, max_size=MAX_FORCED_TOKENS).map(tuple)
samples = st.builds(Sample, counts, counts, ids, st.none() | numbers, alternatives, st.booleans(), forced)
frames = st.builds(
    Frame,
    epoch=counts,
    lane=counts,
    number=counts,
    edits=st.lists(edits, max_size=4).map(tuple),
    step=st.none() | steps(),
    tensors=st.lists(tensors(), max_size=3).map(tuple),
    samples=st.lists(samples, max_size=3).map(tuple),
    failures=st.lists(
        st.builds(SequenceFailure, counts, st.sampled_from(Reason), st.text(max_size=20)), max_size=3
    ).map(tuple),
    timings=st.lists(st.builds(StageTiming, small, small, small, small), max_size=4).map(tuple),
    error=st.none() | st.builds(Failure, small, st.sampled_from(Reason), st.text(max_size=20)),
    prompt_logprobs=st.none() | prompt_logprobs(),
    void=st.booleans(),
)


@given(frames)
def test_a_frame_comes_back_as_it_went(frame: Frame) -> None:
    assert decode(encode(frame)) == frame


@given(st.binary(max_size=300))
def test_strangers_bytes_are_a_bad_frame(data: bytes) -> None:
    with pytest.raises(BadFrame):
        decode(data)


@given(frames, st.data())
def test_damage_is_always_seen(frame: Frame, data: st.DataObject) -> None:
    """One to four bytes next to each other: a burst that CRC-32 never misses."""
    whole = encode(frame)
    at = data.draw(st.integers(0, len(whole) - 1))
    burst = data.draw(st.binary(min_size=1, max_size=min(4, len(whole) - at)))
    assume(burst != whole[at : at + len(burst)])
    with pytest.raises(BadFrame) as refusal:
        decode(whole[:at] + burst + whole[at + len(burst) :])
    assert refusal.value.sentence


@given(frames)
def test_a_stranger_who_knows_the_checksum_gains_nothing(frame: Frame) -> None:
    whole = encode(frame)
    with pytest.raises(BadFrame):
        decode(struct.pack("<II", 1, zlib.crc32(whole[8:])) + whole[8:])


@given(frames, st.integers(1, 400))
def test_a_cut_frame_is_a_bad_frame(frame: Frame, cut: int) -> None:
    message = encode(frame)
    with pytest.raises(BadFrame):
        decode(message[: max(0, len(message) - cut)])


def _with_header(header: object, body: bytes = b"") -> bytes:
    packed = msgpack.packb(header)
    checksum = zlib.crc32(packed + body)
    return struct.pack("<II", len(packed), checksum) + packed + body


FLOATS = bytes(4 * (MAX_TOP_LOGPROBS + 1))


def _scoring(value: object) -> list[object]:
    """A header whose step asks for log-probabilities of the prompt."""
    step = [0, [1], 1, b"\0\0\0\0", value, 0, None, 1]
    return [VERSION, 0, 0, 0, [], step, [], [], [], None, [], False, None, False]


def _header(step: object = None, tensors: tuple[object, ...] = (), void: object = False) -> list[object]:
    return [VERSION, 0, 0, 0, [], step, list(tensors), [], [], None, [], False, None, void]


def _scored(value: object) -> list[object]:
    """A header with log-probabilities of the prompt."""
    return [VERSION, 0, 0, 0, [], None, [], [], [], None, [], False, value, False]


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ([1, 0, 0, 0, [], None, [], [], [], None, [], False, None, False], "layout version 1"),
        ([VERSION, -1, 0, 0, [], None, [], [], [], None, [], False, None, False], "whole number"),
        ([VERSION, 0, 0, 0, [[9, 1]], None, [], [], [], None, [], False, None, False], "unknown code 9"),
        (
            [VERSION, 0, 0, 0, [[8, 1, "o", "a" * 130]], None, [], [], [], None, [], False, None, False],
            "130 characters",
        ),
        (_header([7, [1], 1, b"\0\0\0\0", None, 0, None, 1]), "unknown kind 7"),
        (
            [
                VERSION,
                0,
                0,
                0,
                [],
                [0, [1], 2, b"\0\0\0\0", None, 0, None, 1],
                [],
                [],
                [],
                None,
                [],
                False,
                None,
                False,
            ],
            "carries 1 token ids",
        ),
        ([VERSION, 0, 0, 0, [], None, [["float128", [1]]], [], [], None, [], False, None, False], "unknown type"),
        (_header(tensors=(["float32", [2**60, 2**60]],)), "tensors need"),
        ([VERSION, 0, 0, 0, [], None, [], [], [1, 2, 3], None, [], False, None, False], "four numbers"),
        ([VERSION, 0, 0, 0, [], None, [], [], []], "14 fields"),
        (_header([1, [1], 1, b"\0\0\0\0", None, -1, 4, 1]), "field 5"),
        (_header([1, [1], 1, b"\0\0\0\0", None, 1, -4, 1]), "field 6"),
        (_header(void=1), "true or false"),
        (_scoring([0, b"\0", 3]), "multiple of 4"),
        (_scoring([0, b"", MAX_TOP_LOGPROBS + 1]), f"limit is {MAX_TOP_LOGPROBS}"),
        (_scored([0, b"", b"", b""]), "0 prompt tokens"),
        (_scored([0, FLOATS[:8], FLOATS[:12], FLOATS[:12]]), "3 alternatives"),
        (_scored([0, FLOATS[:4], FLOATS[:8], FLOATS[:4]]), "with 1 values"),
        (_scored([0, FLOATS[:4], FLOATS, FLOATS]), f"limit is {MAX_TOP_LOGPROBS}"),
        (_scored([0, struct.pack("<f", math.nan), b"", b""]), "not a number"),
        (_scored([0, FLOATS[:5], b"", b""]), "multiple of 4"),
    ],
)
def test_each_bound_has_its_sentence(header: list[object], sentence: str) -> None:
    with pytest.raises(BadFrame, match=sentence):
        decode(_with_header(header))


def _sealed(header: bytes) -> bytes:
    return struct.pack("<II", len(header), zlib.crc32(header)) + header


def _list_of(item: bytes, length: int) -> bytes:
    """Return a list that takes a whole header, or that many bytes."""
    count = (length - 5) // len(item)
    return b"\xdd" + count.to_bytes(4, "big") + item * count


@pytest.mark.parametrize("item", [b"\x90", b"\x01", b"\xa0", b"\xa1a", b"\xcb" + bytes(8), b"\x91\xc0", b"\xc4\x01a"])
def test_a_header_of_too_many_values_is_refused_before_they_are_built(item: bytes) -> None:
    """4 MiB of empty lists took 1.5 s, during which no other thread of the process ran, and 300 MiB."""
    with pytest.raises(BadFrame, match=f"more than {MAX_HEADER_ELEMENTS} values"):
        decode(_sealed(_list_of(item, MAX_FRAME_HEADER_BYTES)))


def test_lists_that_only_claim_to_be_long_take_no_memory() -> None:
    with pytest.raises(BadFrame, match="max_array_len"):
        decode(_sealed(b"\xdc\xff\xff" * 500 + bytes(60_000)))


def _join(biases: int = 0, grammar: int = 0, mark: int = 0) -> Join:
    bound = Grammar(GrammarKind.REGEX, "x" * grammar, tuple(range(mark))) if grammar else None
    return Join(1, 2, SamplingParams(logit_bias=tuple((i, 1.5) for i in range(biases)), grammar=bound))


LONGEST = _join(MAX_LOGIT_BIAS, 1000, MAX_MARKER_TOKENS)
JOINS = {
    "plain": [_join()] * 3000,
    "marked": [_join(0, 1, MAX_MARKER_TOKENS)] * 600,
    "biased": [_join(MAX_LOGIT_BIAS)] * 25,
    "grammars": [_join(0, MAX_JOINED_BYTES // 2)] * 3,
    "mixed": [LONGEST, *[_join()] * 500] * 4,
}


@pytest.mark.parametrize("joins", JOINS.values(), ids=JOINS)
def test_what_a_frame_is_given_of_joins_may_be_read_again(joins: list[Join]) -> None:
    """With all other edits, and a step, that a frame may have."""
    waiting: list[Edit] = list(joins)
    rows = tuple(range(MAX_ROWS))
    rest = [Trim(2**40, 2**40)] * (MAX_EDITS // 2)
    while waiting:
        taken = first_load(waiting) or len(waiting)
        step = Step(Compute.DECODE, rows, tuple((2**20,) for _ in rows))
        frame = Frame(1, 2, 3, edits=(*waiting[:taken], *rest), step=step)
        assert decode(encode(frame)) == frame
        del waiting[:taken]


def test_all_alternatives_of_a_whole_lane_may_be_read_again() -> None:
    top = tuple(TopLogprob(2**20, -1.5) for _ in range(MAX_TOP_LOGPROBS))
    frame = Frame(1, 2, 3, samples=tuple(Sample(row, 2**20, 2**20, -1.5, top, False) for row in range(MAX_ROWS)))
    assert decode(encode(frame)) == frame


def test_a_newer_workers_reason_is_an_internal_one() -> None:
    sent = encode(Frame(1, 0, 0, error=Failure(1, "MOON", "the moon is in the way")))  # type: ignore[arg-type]
    assert decode(sent).error == Failure(1, Reason.INTERNAL, "the moon is in the way")


def test_bytes_of_no_tensor_are_refused() -> None:
    with pytest.raises(BadFrame, match="belong to no tensor"):
        decode(_with_header([VERSION, 0, 0, 0, [], None, [], [], [], None, [], False, None, False], b"surplus"))


def test_a_header_longer_than_its_bound_is_refused_before_it_is_read() -> None:
    with pytest.raises(BadFrame, match="claims a header"):
        decode((MAX_FRAME_HEADER_BYTES + 1).to_bytes(4, "little") + bytes(64))


def test_a_sample_forces_a_bounded_number_of_tokens() -> None:
    frame = Frame(1, 2, 3, samples=(Sample(1, 2, 3, forced=(7,) * (MAX_FORCED_TOKENS + 1)),))
    with pytest.raises(BadFrame, match="17 forced tokens; the limit is 16"):
        decode(encode(frame))


def test_a_step_samples_a_bounded_number_of_tokens() -> None:
    row = (5,) * (MAX_VERIFIED + 1)
    whole = Frame(1, 2, 3, (), Step(Compute.DECODE, (1,), (row,), guesses=MAX_VERIFIED - 1, start=4))
    assert decode(encode(whole)) == whole
    with pytest.raises(BadFrame, match="samples 9 tokens of a sequence; it may sample 8"):
        decode(encode(Frame(1, 2, 3, (), Step(Compute.DECODE, (1,), (row,), guesses=MAX_VERIFIED, start=4))))


@pytest.mark.parametrize("drafts", [0, MAX_DRAFTS + 1])
def test_a_step_drafts_a_bounded_number_of_tokens(drafts: int) -> None:
    frame = Frame(1, 2, 3, (), Step(Compute.DECODE, (1,), ((5,),), drafts=drafts))
    with pytest.raises(BadFrame, match=f"drafts {drafts} tokens; it may draft 1 to 16"):
        decode(encode(frame))
