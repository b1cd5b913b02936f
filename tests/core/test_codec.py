import re

import numpy as np
import pytest
from conftest import make_spec
from hypothesis import given
from hypothesis import strategies as st

from vla0 import InputError
from vla0.core.codec import END, SPACE, SYMBOLS, ActionCodec, ChunkError, Grammar

BINS = st.one_of(
    st.sampled_from([2, 9, 10, 99, 100, 255, 1000, 4095, 10000]), st.integers(2, 20000)
)


@st.composite
def codecs(draw):
    dimensions = draw(st.integers(1, 7))
    bound = st.floats(-1e3, 1e3, width=32)
    low = draw(st.lists(bound, min_size=dimensions, max_size=dimensions))
    span = draw(
        st.lists(
            st.one_of(st.just(0.0), st.floats(2**-10, 1e3, width=32)),
            min_size=dimensions,
            max_size=dimensions,
        )
    )
    high = [a + b for a, b in zip(low, span, strict=True)]
    return ActionCodec(
        make_spec(low=low, high=high, chunk_size=draw(st.integers(1, 9)), bins=draw(BINS))
    )


def chunk_of(codec, data, below=0.0, above=1.0):
    size = codec.chunk_size * codec.dimensions
    share = data.draw(st.lists(st.floats(below, above), min_size=size, max_size=size))
    return codec.low + np.array(share).reshape(codec.chunk_size, codec.dimensions) * (
        codec.high - codec.low
    )


@given(codecs(), st.data())
def test_read_inverts_write(codec, data):
    size = codec.chunk_size * codec.dimensions
    levels = np.array(
        data.draw(st.lists(st.integers(0, codec.bins), min_size=size, max_size=size))
    ).reshape(codec.chunk_size, -1)
    np.testing.assert_array_equal(codec.read(codec.write(levels)), levels)


@given(codecs(), st.data())
def test_decode_is_at_most_half_a_level_from_what_was_encoded(codec, data):
    actions = chunk_of(codec, data)
    half = (codec.high - codec.low) / codec.bins / 2
    # float32 of the result
    rounding = 1e-6 * np.maximum(np.abs(codec.low), np.abs(codec.high)) + 1e-9
    assert (np.abs(codec.decode(codec.encode(actions)) - actions) <= half + rounding).all()


@given(codecs(), st.data())
def test_encode_inverts_decode(codec, data):
    size = codec.chunk_size * codec.dimensions
    levels = np.array(
        data.draw(st.lists(st.integers(0, codec.bins), min_size=size, max_size=size))
    ).reshape(codec.chunk_size, -1)
    # in float32
    apart = (codec.high - codec.low) / codec.bins > 1e-6 * np.maximum(
        np.abs(codec.low), np.abs(codec.high)
    )
    np.testing.assert_array_equal(codec.encode(codec.decode(levels))[:, apart], levels[:, apart])


@given(codecs(), st.data())
def test_outside_the_bounds_levels_clip_and_are_counted(codec, data):
    actions = chunk_of(codec, data, -3, 3)
    levels = codec.encode(actions)
    assert levels.min() >= 0
    assert levels.max() <= codec.bins
    outside = (actions < codec.low) | (actions > codec.high)
    np.testing.assert_array_equal(codec.outside(actions), outside.sum(0))
    assert (levels[actions < codec.low] == 0).all()
    assert (levels[(actions > codec.high) & (codec.high > codec.low)] == codec.bins).all()


def test_a_dimension_that_never_moves_survives():
    codec = ActionCodec(make_spec(low=(0.3, 0.0, 0.0), high=(0.3, 1.0, 1.0)))
    np.testing.assert_allclose(
        codec.decode(codec.encode(np.full((3, 3), 0.3)))[:, 0], 0.3, rtol=1e-6
    )
    assert codec.outside(np.full((3, 3), 0.3, np.float64))[0] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_actions_that_are_not_finite_are_refused(bad):
    actions = np.zeros((3, 3))
    actions[1, 2] = bad
    with pytest.raises(InputError, match="finite"):
        ActionCodec(make_spec()).encode(actions)


@pytest.mark.parametrize("shape", [(3, 2), (3, 4), ()])
def test_actions_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(InputError):
        ActionCodec(make_spec()).encode(np.zeros(shape))


def test_levels_that_no_chunk_has_are_refused():
    codec = ActionCodec(make_spec())
    for levels in (
        np.full((3, 3), 101),
        np.full((3, 3), -1),
        np.zeros((3, 3)),
        np.zeros((3, 2), int),
    ):
        with pytest.raises(InputError):
            codec.decode(levels)
    with pytest.raises(InputError):
        codec.write(np.zeros((2, 3), int))


GOOD = "0 1 2 3 4 5 6 7 100"


@pytest.mark.parametrize(
    "text",
    ["", " ", GOOD + " ", " " + GOOD, GOOD + " 1", GOOD[:-4], GOOD.replace("7", "07"), GOOD.replace("100", "101"), GOOD.replace(" ", "  "),
     GOOD.replace("7", "-7"), GOOD.replace("7", "+7"), GOOD.replace("7", "7.0"), GOOD.replace("7", "٧"), GOOD.replace(" ", "\n"), GOOD + "\n",
     GOOD.replace("7", "x"), GOOD.replace("7", "9" * 5000), GOOD.replace("7", "1_0")],
)  # fmt: skip
def test_text_that_is_no_chunk_is_refused(text):
    with pytest.raises(ChunkError, match=r"expected .*; got .*; "):
        ActionCodec(make_spec()).read(text)


@given(st.text(alphabet="0123456789 -.?x", max_size=40))
def test_read_accepts_only_what_write_gives(text):
    codec = ActionCodec(make_spec())
    try:
        levels = codec.read(text)
    except ChunkError:
        return
    assert codec.write(levels) == text


def spelled(grammar, text):
    """Whether the grammar admits the text followed by the end."""
    state = grammar.start
    for symbol in [SYMBOLS.index(c) for c in text] + [END]:
        if symbol not in grammar.allowed(state):
            return False
        state = grammar.advance(state, symbol)
    return grammar.allowed(state) == ()


@given(codecs(), st.data())
def test_the_grammar_admits_every_chunk(codec, data):
    size = codec.chunk_size * codec.dimensions
    numbers = data.draw(st.lists(st.integers(0, codec.bins), min_size=size, max_size=size))
    text = codec.write(np.array(numbers).reshape(codec.chunk_size, -1))
    assert spelled(Grammar(codec.bins, size), text)


@given(codecs(), st.randoms(use_true_random=False))
def test_every_walk_through_the_grammar_is_a_chunk(codec, random):
    grammar = Grammar(codec.bins, codec.chunk_size * codec.dimensions)
    state, text = grammar.start, ""
    while symbols := grammar.allowed(state):
        symbol = random.choice(symbols)
        state = grammar.advance(state, symbol)
        text += "" if symbol == END else SYMBOLS[symbol]
    assert codec.write(codec.read(text)) == text
    assert len(text) + 1 <= grammar.longest


@given(BINS, st.text(alphabet="0123456789 ", max_size=12))
def test_the_grammar_admits_only_what_read_accepts(bins, text):
    codec = ActionCodec(make_spec(low=(0.0,), high=(1.0,), chunk_size=2, bins=bins))
    fine = re.fullmatch(r"(0|[1-9]\d*) (0|[1-9]\d*)", text) and all(
        int(n) <= bins for n in text.split(" ")
    )
    assert spelled(Grammar(bins, 2), text) == bool(fine)
    if fine:
        codec.read(text)


def test_separators_are_forced_where_no_digit_fits():
    grammar = Grammar(1000, 2)
    assert grammar.allowed((0, "0")) == (SPACE,)
    assert grammar.allowed((0, "101")) == (SPACE,)
    assert grammar.allowed((0, "1000")) == (SPACE,)
    assert grammar.allowed((0, "100")) == (0, SPACE)
    assert grammar.allowed((1, "1000")) == (END,)
    with pytest.raises(ChunkError):
        grammar.advance((0, "0"), 3)
