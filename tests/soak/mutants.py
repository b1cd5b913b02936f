"""Messages that are nearly right: of msgpack by their content and their bytes, of pickle by their
opcodes and their bytes.
"""

import pickletools
from itertools import pairwise
from typing import Any

import msgpack
import numpy as np

ODD: list[Any] = [
    None,
    True,
    -1,
    2**63,
    -(2**63),
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x" * 3000,
    "\x00\u202e\ud7ff<|im_end|><|image_pad|>",
    b"",
    b"\xff" * 70_000,
    [],
    {},
    [[[[[[]]]]]],
    [None] * 500,
    {"a": {"b": {"c": {"d": {}}}}},
    {1: 2},
    {b"x": b"y"},
    msgpack.ExtType(5, b"abc"),
    msgpack.Timestamp(1, 2),
    [1e308] * 3,
    ["1"],
    10**18,
]
NAMES = [
    "prompt",
    "images",
    "state",
    "observation/front",
    "vla0/stream",
    "vla0/action_prefix",
    "vla0/number",
    "vla0/reset",
    "payload",
    "seq",
]
DTYPES = [
    "|u1",
    "<f4",
    "<f8",
    ">f8",
    "|O",
    "<U9",
    "<M8[s]",
    "V8",
    "<c16",
    "<f2",
    "(2,)<f8",
    "i4,i4",
    "float128",
    "",
    "x" * 4000,
    "|b1",
]


def message(content: Any, rng: np.random.Generator) -> bytes:
    """A msgpack message, of a content that is packed already to plain values, with something wrong
    here and there.
    """
    for _ in range(rng.integers(0, 4)):
        content = _changed(content, rng)
    try:
        packed = msgpack.packb(content, use_bin_type=bool(rng.random() < 0.9), strict_types=False)
    except (ValueError, OverflowError, TypeError, UnicodeEncodeError):
        packed = msgpack.packb(None)
    return spoilt(packed, rng) if rng.random() < 0.4 else packed


def _changed(content: Any, rng: np.random.Generator) -> Any:
    """With one thing in it changed."""
    draw = rng.random()
    if isinstance(content, dict) and content and draw < 0.85:
        content, name = dict(content), list(content)[rng.integers(len(content))]
        what = rng.integers(6)
        if what == 0:
            del content[name]
        elif what == 1:
            content[NAMES[rng.integers(len(NAMES))]] = content[name]
        elif what == 2 and isinstance(content[name], str):
            content[name] = DTYPES[rng.integers(len(DTYPES))]
        else:
            content[name] = _changed(content[name], rng)
        return content
    if isinstance(content, list) and content and draw < 0.85:
        content = list(content)
        place = int(rng.integers(len(content)))
        content[place] = (
            int(rng.integers(-5, 5000)) if rng.random() < 0.5 else _changed(content[place], rng)
        )
        return content
    return ODD[rng.integers(len(ODD))]


def spoilt(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, put in, taken out, doubled or cut off."""
    raw = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        place, what = int(rng.integers(len(raw) + 1)), rng.integers(5)
        if what == 0 and place < len(raw):
            raw[place] = rng.integers(256)
        elif what == 1:
            raw[place:place] = rng.bytes(rng.integers(1, 9))
        elif what == 2:
            del raw[place : place + int(rng.integers(1, 9))]
        elif what == 3:
            raw[place:place] = raw[max(0, place - int(rng.integers(1, 200))) : place]
        elif rng.random() < 0.3:
            del raw[place:]
    return bytes(raw)


def pickled(data: bytes, rng: np.random.Generator) -> bytes:
    """A pickle whose opcodes were taken out, doubled, swapped, or given other arguments."""
    if rng.random() < 0.3:
        return spoilt(data, rng)
    starts = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    codes = [data[a:b] for a, b in pairwise(starts)]
    for _ in range(rng.integers(1, 5)):
        place, what = int(rng.integers(len(codes))), rng.integers(6)
        if what == 0 and len(codes) > 1:
            del codes[place]
        elif what == 1:
            codes.insert(place, codes[rng.integers(len(codes))])
        elif what == 2:
            other = int(rng.integers(len(codes)))
            codes[place], codes[other] = codes[other], codes[place]
        elif what == 3:
            codes.insert(place, NASTY[rng.integers(len(NASTY))])
        elif what == 4:
            codes[place : place + 1] = [codes[place]] * int(rng.integers(2, 2000))
        else:
            codes[place] = spoilt(codes[place], rng)
    return b"".join(codes)


NASTY = [  # opcodes with which pickles have been made to do what they should not
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"c_codecs\nencode\n",
    b"cnumpy\nzeros\n",
    b"cnumpy\nndarray\n",
    b"R",
    b"b",
    b"\x81",
    b"\x92",
    b"o",
    b"i",
    b"cnumpy.core.multiarray\n_reconstruct\n",
    b"clerobot.async_inference.helpers\nTimedObservation\n",
    b"}",
    b"]",
    b")",
    b"N",
    b"(",
    b"t",
    b"0",
    b"2",
    b"\x8a\xff" + b"\x7f" * 255,
    b"B\xff\xff\xff\x7f",
    b"\x8e" + b"\xff" * 8,
    b"X\x05\x00\x00\x00slots",
    b"\x93",
    b"\x94",
    b"h\x00",
    b"j\xff\xff\xff\x7f",
    b"r\xff\xff\xff\xff",
    b"I9" + b"9" * 5000 + b"\n",
    b"V\\ud800\n",
    b"Pxx\n",
    b"Q",
    b"\x82\x01",
    b"\x80\x05",
    b"\x95\x00\x00\x00\x00\x00\x00\x00\x00",
    b"\x97",
    b"\x98",
]
