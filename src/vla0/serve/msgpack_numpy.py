"""Packs and unpacks messages: msgpack with numpy arrays, as openpi's clients write them.

What a stranger sends is checked before it is used.
"""

import math
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from vla0.errors import InputError

KINDS = "biuf"  # of dtypes: booleans, integers, floats; never objects
DEEPEST = 4  # mappings and lists inside each other
MOST = 10_000  # entries of all mappings and lists together; an array is one entry
_REMEDY = "send what openpi-client packs, or use vla0.serve.client"


def pack(content: Any) -> Any:
    """Pack a message.

    Args:
        content: Numbers, strings, numpy arrays, lists and mappings.

    Returns:
        The message, bytes.

    Raises:
        InputError: The content holds anything else, or an array of a dtype that is no number.
    """
    return msgpack.packb(content, default=_array)


def unpack(
    message: bytes | str,
    most_bytes: int | None = None,
    read: Callable[[dict[Any, Any]], Any] | None = None,
) -> dict[str, Any]:
    """Unpack a message, without running anything of it.

    Args:
        message: The message. A text is an error that a server sends; it is raised.
        most_bytes: Bytes of the message at most; None for no limit.
        read: For another protocol: turns each mapping in the message into what it stands for.

    Returns:
        The mapping that the message holds.

    Raises:
        InputError: The message is a text, too large, too deep, damaged, or no mapping.
    """
    if isinstance(message, str):
        raise InputError(message[-2000:])
    size = len(message) if most_bytes is None else most_bytes
    if len(message) > size:
        raise InputError(
            f"a message of {size} bytes at most", f"{len(message)}", "send smaller pictures"
        )
    _bounded(message)
    try:
        content = msgpack.unpackb(
            message,
            object_hook=read or _read,
            strict_map_key=False,
            max_str_len=1 << 16,
            max_bin_len=size,
            max_array_len=1 << 16,
            max_map_len=256,
            max_ext_len=0,
        )
    except InputError:
        raise
    except Exception as error:  # msgpack raises a dozen kinds for what is damaged
        raise InputError(
            "a msgpack message", f"{type(error).__name__}: {str(error)[:100]}", _REMEDY
        ) from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError("a mapping with names as keys", type(content).__name__, _REMEDY)
    _shallow(content, DEEPEST)
    return content


def _bounded(message: bytes) -> None:
    """Raise InputError for too many or too deep entries, before any object is built.

    Thirty megabytes of empty lists are thirty million objects, which take half a minute to build.
    """
    # for each list or mapping that is open, the number of entries still to come
    place, count, open_ = 0, 0, [1]
    while open_:
        if open_[-1] == 0:
            open_.pop()
            continue
        open_[-1] -= 1
        count += 1
        if count > MOST or len(open_) > DEEPEST + 3:  # an array is a mapping with a list in it
            raise InputError(f"at most {MOST} entries, {DEEPEST} levels deep", "more", _REMEDY)
        if place >= len(message):
            return  # the message is cut off; msgpack raises an error for that
        entries, place = _skipped(message, place)
        if entries:
            open_.append(entries)


def _skipped(message: bytes, place: int) -> tuple[int, int]:
    """Return (entries that follow, where the next object begins) for the object at a place.

    It follows msgpack's specification.
    """
    kind = message[place]
    # small numbers, nil, true and false
    if kind < 0x80 or kind >= 0xE0 or kind in (0xC0, 0xC1, 0xC2, 0xC3):
        return 0, place + 1
    if kind < 0x90:
        return 2 * (kind & 0x0F), place + 1
    if kind < 0xA0:
        return kind & 0x0F, place + 1
    if kind < 0xC0:
        return 0, place + 1 + (kind & 0x1F)
    if kind in FIXED:
        return 0, place + 1 + FIXED[kind]
    width, each, more = SIZED[kind]
    size = int.from_bytes(message[place + 1 : place + 1 + width])
    return each * size, place + 1 + width + more + (0 if each else size)


FIXED = {  # kind → bytes that follow: numbers and extensions of fixed size
    0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
    0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17,
}  # fmt: skip
# kind → (bytes of its size, entries for each unit of the size, further bytes): texts, bytes,
# extensions, lists, mappings
SIZED = {
    0xC4: (1, 0, 0),
    0xC5: (2, 0, 0),
    0xC6: (4, 0, 0),
    0xC7: (1, 0, 1),
    0xC8: (2, 0, 1),
    0xC9: (4, 0, 1),
    0xD9: (1, 0, 0),
    0xDA: (2, 0, 0),
    0xDB: (4, 0, 0),
    0xDC: (2, 1, 0),
    0xDD: (4, 1, 0),
    0xDE: (2, 2, 0),
    0xDF: (4, 2, 0),
}


def _array(value: Any) -> Any:
    """Return the mapping that stands for an array or a numpy scalar in a message."""
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in KINDS:
            raise InputError("arrays of numbers", f"{value.dtype}", "convert it")
        if isinstance(value, np.ndarray):
            return {
                b"__ndarray__": True,
                b"data": value.tobytes(),
                b"dtype": value.dtype.str,
                b"shape": value.shape,
            }
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise InputError(
        "numbers, strings, arrays, lists and mappings", type(value).__name__, "convert it"
    )


def _read(mapping: dict[Any, Any]) -> Any:
    """Return the array or numpy scalar that a mapping stands for, or else the mapping."""
    if b"__ndarray__" not in mapping and b"__npgeneric__" not in mapping:
        return mapping
    name, data = mapping.get(b"dtype"), mapping.get(b"data")
    if b"__npgeneric__" in mapping:
        if not isinstance(data, int | float | bool):
            raise InputError("a number", type(data).__name__, _REMEDY)
        return dtype_of(name).type(data)
    return array_of(name, mapping.get(b"shape"), data)


def dtype_of(name: Any) -> np.dtype:
    """Return the dtype of numbers that has a name.

    Raises:
        InputError: No dtype of booleans, integers or floats of at most 8 bytes has that name.
    """
    try:
        dtype = np.dtype(name if isinstance(name, str) and len(name) <= 16 else "O")
    except (TypeError, ValueError):
        dtype = np.dtype("O")
    if dtype.kind not in KINDS or dtype.itemsize > 8:
        raise InputError("arrays of numbers", f"dtype {str(name)[:40]}", _REMEDY)
    return dtype


def array_of(name: Any, shape: Any, data: Any) -> np.ndarray:
    """Build an array from the parts that a message holds.

    Args:
        name: The name of its dtype.
        shape: Its shape, at most 5 dimensions.
        data: Its bytes.

    Returns:
        The array, read-only.

    Raises:
        InputError: The parts do not agree.
    """
    dtype = dtype_of(name)
    fine = (
        isinstance(data, bytes)
        and isinstance(shape, list | tuple)
        and len(shape) <= 5
        and all(
            isinstance(side, int) and not isinstance(side, bool) and 0 <= side < 1 << 24
            for side in shape
        )
        and math.prod(shape) * dtype.itemsize == len(data)
    )
    if not fine:
        raise InputError(
            "an array whose shape and bytes agree", f"shape {str(shape)[:60]}", _REMEDY
        )
    assert isinstance(data, bytes)
    return np.frombuffer(data, dtype).reshape(shape)


def _shallow(content: Any, left: int) -> None:
    """Raise InputError if the content has more levels than are left."""
    if left < 0:
        raise InputError(f"a message at most {DEEPEST} levels deep", "a deeper one", _REMEDY)
    inside = (
        content.values()
        if isinstance(content, dict)
        else content
        if isinstance(content, list | tuple)
        else ()
    )
    for value in inside:
        _shallow(value, left - 1)
