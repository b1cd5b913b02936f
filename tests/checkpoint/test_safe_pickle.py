"""Of a pickle, arrays and nothing else: whatever it says, nothing is run, no class changes, and
little is built.
"""

import io
import os
import pickle
import struct
import sys
import tracemalloc
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla0 import InputError
from vla0.checkpoint.safe_pickle import Record, load_arrays

RECORDS = (("somewhere", "Thing"),)


def loaded(data: bytes, also=RECORDS):
    return load_arrays(io.BytesIO(data), "a test", also)


def name(module: str, own: str) -> bytes:
    return b"c" + module.encode() + b"\n" + own.encode() + b"\n"


def text(own: str) -> bytes:
    return b"X" + struct.pack("<I", len(own.encode())) + own.encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


SAME = [1, (2, 3)]
CONTENT = {
    "min": np.arange(7, dtype=np.float32),
    "picture": np.arange(48, dtype=np.uint8).reshape(4, 4, 3)[:, ::-1],
    "column": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big": np.arange(3, dtype=">i4"),
    "flag": np.array([True, False]),
    "nothing": np.zeros((0, 3)),
    "one": np.float64(2.5),
    "whole": np.int64(7),
    "words": ["a", "ä", ""],
    "deep": {"x": (1, None, 2.5)},
    "shared": [SAME, {"a": SAME}, [SAME] * 3],
    "large": 2**70,
    "bytes": b"\x00\xff",
    "more": bytearray(b"xy"),
    "again": [1] * 300,
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_pickle_writes_of_arrays_is_read(protocol):
    found = loaded(pickle.dumps(CONTENT, protocol))
    assert list(found) == list(CONTENT)
    for key, expected in CONTENT.items():
        if isinstance(expected, np.ndarray | np.generic):
            np.testing.assert_array_equal(found[key], expected)
            assert found[key].dtype == expected.dtype
        else:
            assert found[key] == expected


def test_the_same_array_twice_is_read_twice():
    one = np.arange(3.0)
    first, second, inside = loaded(pickle.dumps([one, one, {"x": one}]))
    for found in (first, second, inside["x"]):
        np.testing.assert_array_equal(found, one)


class Thing:
    """What a client would send."""


def test_of_an_object_that_is_known_a_record_comes_and_no_class_is_touched(monkeypatch):
    own = Thing()
    own.step, own.seen = 3, {"front": np.zeros(2)}
    monkeypatch.setitem(sys.modules, "somewhere", SimpleNamespace(Thing=Thing))
    monkeypatch.setattr(Thing, "__module__", "somewhere")
    data = pickle.dumps(own)
    monkeypatch.undo()  # it need not be there to be read
    found = loaded(data)
    assert isinstance(found, Record)
    assert (found.name, found.get("step"), list(found.get("seen"))) == ("Thing", 3, ["front"])


ENCODE, THING = name("_codecs", "encode"), name("somewhere", "Thing")
BUFFER, U1 = name("numpy._core.numeric", "_frombuffer"), call(name("numpy", "dtype"), text("u1"))
RAW = call(
    name("numpy._core.multiarray", "_reconstruct"),
    name("numpy", "ndarray"),
    b"K\x00\x85",
    b"C\x01b",
)


def doubled(times: int) -> bytes:
    """A tuple that holds one twice, which holds one twice, and so on."""
    return b")\x94" + b"".join(
        b"0h" + bytes([n]) + b"h" + bytes([n]) + b"\x86\x94" for n in range(times)
    )


ATTACKS = {
    "a command": call(name("os", "system"), text("touch here")),
    "eval": call(name("builtins", "eval"), text("1")),
    "numpy's own loader": call(name("numpy", "load"), text("x")),
    "an attribute of a name": name("numpy", "ndarray.tofile"),
    "a codec that expands": call(ENCODE, text("x" * 64), text("hex")),
    "a codec that takes long": call(
        ENCODE, text("".join(map(chr, range(0x4E00, 0x5200)))), text("punycode")
    ),
    "many of one text": text("x" * 10_000)
    + b"q\x00"
    + b"0"
    + b"("
    + call(ENCODE, b"h\x00", text("latin1")) * 1000
    + b"t",
    "an array of nothing": call(
        name("numpy", "ndarray"), b"(\x8a\x05" + (1 << 32).to_bytes(5, "little") + b"t", text("u1")
    ),
    "an array of objects": call(
        name("numpy._core.multiarray", "_reconstruct"),
        name("numpy", "ndarray"),
        b"(J" + struct.pack("<i", 1 << 29) + b"t",
        text("O"),
    ),
    "an attribute of a class": THING + b"(N}" + text("__setstate__") + ENCODE + b"stb",
    "an attribute of a function": ENCODE + b"}" + text("x") + b"K\x01sb",
    "a place far away": b"K\x01r\xff\xff\xff\x7f" + b"j\x00\x00\x00\x00",
    "bytes that never come": b"\x96" + struct.pack("<Q", 1 << 40),
    "text that never comes": b"\x8d" + struct.pack("<Q", 1 << 40) + b"x",
    "deep tuples": b"(" * 150_000 + b"t" * 150_000,
    "endless": b"N" * 300_000,
    "objects of numbers": call(name("numpy", "dtype"), text("O"))
    + call(name("numpy._core.multiarray", "scalar"), b"h\x00", b"C\x01x"),
    "a number of digits": b"L" + b"9" * 100_000 + b"L\n",
    "an end without a beginning": b"t",
    "nothing": b"",
    "a shape of text": call(
        BUFFER,
        b"C\x00",
        U1,
        b"(" + text("a") + b"\x8a\x05" + (1 << 32).to_bytes(5, "little") + b"t",
        text("C"),
    ),
    "a shape of fractions": call(
        BUFFER, b"C\x00", U1, b"(G\x3f\xf0\x00\x00\x00\x00\x00\x00t", text("C")
    ),
    "a key that is hashed for ever": b"}" + doubled(40) + b"Ns",
    "a codec that is printed for ever": call(ENCODE, text("a"), doubled(40)),
    "a dtype that is printed for ever": call(name("numpy", "dtype"), doubled(40)),
    "a name that is printed for ever": doubled(40) + text("x") + b"\x93",
    "a field that is printed for ever": THING + b")R}" + doubled(40) + b"Nsb",
    "keys of one hash": b"}("
    + b"".join(
        b"\x8a\x0b" + (n * (2**61 - 1)).to_bytes(11, "little") + b"N" for n in range(1, 30_000)
    )
    + b"u",
    "an array that comes many times": RAW
    + b"\x94" * 30_000
    + b"(N"
    + b"(K\x00tN"
    + b"N"
    + b"C\x00"
    + b"t\x94"
    + b"j\x00\x00\x00\x00" * 30_000
    + b"b",
    "what is walked through for ever": doubled(40),
    "what is in itself": b"]\x94h\x00a",
    "a dtype of thousands": call(
        BUFFER, b"C\x00", call(name("numpy", "dtype"), text("i4," * 50_000)), b")", text("C")
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_and_takes_little(attack):
    data = b"\x80\x04" + ATTACKS[attack] + b"."
    before = (dict(vars(Record)), dict(vars(np.ndarray)), sorted(os.listdir(".")))
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            loaded(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200 * len(data) + (1 << 20)
    assert (dict(vars(Record)), dict(vars(np.ndarray)), sorted(os.listdir("."))) == before


OPCODES = st.one_of(
    st.sampled_from(
        [
            b"(",
            b"t",
            b"\x85",
            b"\x86",
            b"\x87",
            b"]",
            b"}",
            b"a",
            b"e",
            b"s",
            b"u",
            b"R",
            b"b",
            b"\x81",
            b"\x94",
            b"0",
            b"N",
            b"\x88",
            b"\x89",
            b"h\x00",
            b"h\x01",
            b"q\x00",
            b"q\x01",
            b"r\xff\xff\xff\x7f",
            b"\x93",
            b"2",
            b"1",
            b"l",
            b"d",
        ]
    ),
    st.sampled_from(
        [
            ENCODE,
            THING,
            name("numpy", "dtype"),
            name("numpy", "ndarray"),
            name("os", "system"),
            *(
                name("numpy._core.multiarray", own)
                for own in ("_reconstruct", "scalar", "_frombuffer")
            ),
        ]
    ),
    st.sampled_from(["f4", "O", "U99999999", "latin1", "hex", "<", "b", ""]).map(text),
    st.binary(max_size=40).map(lambda own: b"C" + bytes([len(own)]) + own),
    st.integers(0, 255).map(lambda own: b"K" + bytes([own])),
    st.binary(max_size=3),
)


@given(st.lists(OPCODES, max_size=60))
def test_no_opcodes_make_anything_but_data_or_an_error(opcodes):
    data = b"\x80\x04" + b"".join(opcodes) + b"."
    tracemalloc.start()
    try:
        found = loaded(data)
    except InputError:
        found = None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1000 * len(data) + (1 << 20)
    assert type(found).__module__.split(".")[0] in ("builtins", "numpy", "vla0")


@given(
    st.sampled_from([2, 4, 5]),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_a_damaged_pickle_is_data_or_an_error(protocol, changes):
    data = bytearray(pickle.dumps(CONTENT, protocol))
    for place, value in changes:
        data[place % len(data)] = value
    with suppress(InputError):
        loaded(bytes(data))
