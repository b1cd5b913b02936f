"""Read numpy arrays from a pickle without running anything in it.

pickle's own reader is not safe, even when it is told which classes it may find: a stranger's file
can still change those classes, make it allocate what five bytes ask for, and make it expand what it
decodes (CVE-2026-25874 and similar ones). This reader knows only the few opcodes that it needs. It
looks up no class and calls nothing, and the bytes that came bound what it builds.
"""

import math
import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import IO, Any, Literal

import numpy as np

from vla0.errors import InputError

# The most opcodes in a file, where an array takes a dozen whatever its size, and the most objects
# that a walk through the result may meet.
MOST = 200_000
KINDS = "biuf"  # kinds of numbers that an array may hold: booleans, integers, floats
NUMPY = (
    "numpy",
    "numpy.core.multiarray",
    "numpy._core.multiarray",
    "numpy.core.numeric",
    "numpy._core.numeric",
)
# Protocol 2 writes empty bytes, and bytearrays, with names of these modules.
PLAIN = ("builtins", "__builtin__")
# Names of numpy's modules that may occur.
BUILDERS = ("ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer")


@dataclass
class Record:
    """Holds what a pickle says of an object of a known class: its arguments and its fields.

    The class itself is neither looked up nor called.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or the default where the object has no such field."""
        return self.fields.get(name, default)


class _Name(str):
    """The last name of a global in a pickle, whose module is a known one."""


@dataclass
class _Dtype:
    """A dtype, of which the byte order may still change."""

    name: str
    order: Literal["<", ">", "|", "="] = "="

    def made(self) -> np.dtype:
        """Return the numpy dtype, or raise ValueError if it is not one of numbers."""
        made = np.dtype(self.name).newbyteorder(self.order)
        if made.kind not in KINDS:
            raise ValueError(f"numbers of kind {KINDS}, not {made}")
        return made


@dataclass
class _Array:
    """An array whose shape and numbers have not come yet."""

    places: list[int] = field(default_factory=list)  # keys of the memo that hold it


def load_arrays(file: IO[bytes], where: str, also: Collection[tuple[str, str]] = ()) -> Any:
    """Read a pickle of arrays, numbers, strings, lists and dicts.

    Args:
        file: The open file.
        where: Its name, for the error.
        also: (module, name) of further data classes that may occur. Each of their objects becomes
            a Record.

    Returns:
        What the pickle holds.

    Raises:
        InputError: When the pickle holds anything else. Nothing in it has run.
    """
    data = file.read()
    try:
        return _Reader(data, also).read()
    except Exception as error:  # a damaged pickle can raise any error
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        remedy = "fetch the file again from who made it"
        raise InputError(f"a pickle of numpy arrays alone in '{where}'", reason, remedy) from None


class _Reader:
    """Runs the opcodes of a pickle on a stack and a memo of its own."""

    def __init__(self, data: bytes, also: Collection[tuple[str, str]]):
        self.data, self.also = data, also
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.left = len(data) + 4096  # how many bytes may still be made from other bytes

    def read(self) -> Any:
        """Run all opcodes and return the result."""
        for count, (code, argument, _) in enumerate(pickletools.genops(self.data)):
            if count > MOST:
                raise ValueError(f"more than {MOST} opcodes")
            if code.name == "STOP":
                (result,) = self.stack
                _size(result, {})
                return result
            if code.name in _VALUES:
                self.stack.append(argument)
            elif code.name not in ("PROTO", "FRAME"):
                _ACTIONS[code.name](self, argument)

    def since_mark(self) -> list[Any]:
        """Take everything off the stack that lies above the last mark."""
        first = self.marks.pop()
        objects, self.stack[first:] = self.stack[first:], []
        return objects

    def taken(self, count: int) -> tuple[Any, ...]:
        """Take the topmost `count` objects off the stack."""
        if len(self.stack) < count + (self.marks[-1] if self.marks else 0):
            raise ValueError("too little on the stack")
        objects = tuple(self.stack[len(self.stack) - count :])
        self.stack[len(self.stack) - count :] = []
        return objects

    def named(self, module: Any, name: Any) -> None:
        """Push the name of a global, or raise ValueError if it is not a known one."""
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is no text")
        known = (module in NUMPY and name in BUILDERS) or (
            module in PLAIN and name in ("bytes", "bytearray")
        )
        if not known and (module, name) not in (("_codecs", "encode"), *self.also):
            raise ValueError(f"{module}.{name}")
        self.stack.append(_Name(name))

    def called(self, name: Any, arguments: Any) -> Any:
        """Return what a call of a known name would return, without calling it."""
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise ValueError("a call of what is no name")
        if name == "encode":
            text, coding = arguments
            if (
                type(text) is not str
                or type(coding) is not str
                or coding not in ("latin1", "latin-1")
            ):
                raise ValueError("text that is not in latin1")
            return self.paid(text.encode("latin1"))
        if name in ("bytes", "bytearray"):
            raw = (
                b""
                if not arguments
                else arguments[0]
                if len(arguments) == 1
                else self.called(_Name("encode"), arguments)
            )
            if not isinstance(raw, bytes):
                raise ValueError(f"bytes of {type(raw).__name__}")
            return raw if name == "bytes" else bytearray(self.paid(raw))
        if name == "dtype" and type(arguments[0]) is str and len(arguments[0]) <= 16:
            return _Dtype(arguments[0])
        if name == "_reconstruct":
            kind, shape, _ = arguments
            if (
                isinstance(kind, _Name)
                and kind == "ndarray"
                and type(shape) is tuple
                and len(shape) == 1
                and shape[0] == 0
            ):
                return _Array()
        if name == "scalar":
            dtype, raw = arguments
            (value,) = np.frombuffer(raw, dtype.made())
            return value
        if name == "_frombuffer":
            raw, dtype, shape, order = arguments
            return self.array(shape, dtype, order == "F", raw)
        if name in BUILDERS:
            raise ValueError(f"{name} of what it is never made of")
        return Record(str(name), arguments)

    def array(self, shape: tuple[int, ...], dtype: _Dtype, fortran: bool, raw: Any) -> np.ndarray:
        """Return an array whose shape fits its bytes exactly, or raise ValueError."""
        number_type = dtype.made()
        if type(shape) is not tuple or not all(
            type(side) is int and 0 <= side < 1 << 32 for side in shape[:32]
        ):
            # The product of other objects could be anything, and of any size.
            raise ValueError("an array of no shape")
        if not isinstance(raw, bytes | bytearray) or math.prod(
            shape[:32]
        ) * number_type.itemsize != len(raw):
            raise ValueError(f"an array of shape {shape} out of other bytes")
        return np.frombuffer(raw, number_type).reshape(shape, order="F" if fortran else "C")

    def built(self, state: Any) -> None:
        """Set the state of the topmost object, which completes an array."""
        (target,) = self.taken(1)
        if isinstance(target, _Dtype):
            _, order, *parts = state
            if order not in ("<", ">", "|", "=") or any(part is not None for part in parts[:3]):
                raise ValueError("a dtype of parts")
            target.order = order
        elif isinstance(target, _Array):
            _, shape, dtype, fortran, raw = state
            made = self.array(shape, dtype, bool(fortran), raw)
            for place in target.places:
                if self.memo[place] is target:
                    self.memo[place] = made
            target.places.clear()
            target = made
        elif isinstance(target, Record):
            state = state[0] if isinstance(state, tuple) else state
            if type(state) is not dict or any(type(name) is not str for name in state):
                raise ValueError(f"a {target.name} of {type(state).__name__}")
            target.fields.update(state)
        else:
            raise ValueError(f"something made of a {type(target).__name__}")
        self.stack.append(target)

    def paid(self, made: bytes) -> bytes:
        """Return bytes that were made from other bytes, and count them against the limit."""
        self.left -= len(made)
        if self.left < 0:
            raise ValueError("more bytes than came")
        return made

    def remembered(self, place: int | None) -> None:
        """Store the topmost object in the memo."""
        (held,) = self.taken(1)
        place = len(self.memo) if place is None else place
        self.memo[place] = held
        if isinstance(held, _Array):
            held.places.append(place)
        self.stack.append(held)

    def put_in(self, pairs: list[Any]) -> None:
        """Add keys and values, which alternate in `pairs`, to the topmost dict."""
        target = self.stack[-1]
        # Hashing tuples nested in tuples can take for ever, and numbers with equal hashes are each
        # compared with all others.
        if type(target) is not dict or not all(
            type(k) is str or (type(k) is int and abs(k) < 1 << 31) for k in pairs[::2]
        ):
            raise ValueError(
                "entries of what is no mapping, or by what is neither text nor a small number"
            )
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def put_on(self, entries: list[Any]) -> None:
        """Append entries to the topmost list."""
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError("entries of what is no list")
        target.extend(entries)


def _size(value: Any, known: dict[int, int], levels: int = 50) -> int:
    """Count the objects that a walk through `value` meets, or raise ValueError beyond MOST.

    Thirty lists, each of which holds the previous one twice, make a thousand million.
    """
    inside = (
        value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
    )
    inside = (*value.arguments, value.fields) if isinstance(value, Record) else inside
    if inside and id(value) not in known:
        if not levels:
            raise ValueError("things too deep in each other, or one in itself")
        known[id(value)] = sum(_size(part, known, levels - 1) for part in inside)
    size = 1 + (known[id(value)] if inside else 0)
    if size > MOST:
        raise ValueError(f"more than {MOST} things")
    return size


def _push(make: Callable[[_Reader, Any], Any]) -> Callable[[_Reader, Any], None]:
    """Return an action that pushes what `make` returns."""
    return lambda reader, argument: reader.stack.append(make(reader, argument))


_VALUES = {  # opcodes whose argument is the value
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "FLOAT",
    "BINFLOAT",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
}
_ACTIONS: dict[str, Callable[[_Reader, Any], Any]] = {
    "NONE": _push(lambda reader, _: None),
    "NEWTRUE": _push(lambda reader, _: True),
    "NEWFALSE": _push(lambda reader, _: False),
    "MARK": lambda reader, _: reader.marks.append(len(reader.stack)),
    "POP": lambda reader, _: reader.taken(1),
    "EMPTY_TUPLE": _push(lambda reader, _: ()),
    "TUPLE": _push(lambda reader, _: tuple(reader.since_mark())),
    "TUPLE1": _push(lambda reader, _: reader.taken(1)),
    "TUPLE2": _push(lambda reader, _: reader.taken(2)),
    "TUPLE3": _push(lambda reader, _: reader.taken(3)),
    "EMPTY_LIST": _push(lambda reader, _: []),
    "LIST": _push(lambda reader, _: reader.since_mark()),
    "APPEND": lambda reader, _: reader.put_on(list(reader.taken(1))),
    "APPENDS": lambda reader, _: reader.put_on(reader.since_mark()),
    "EMPTY_DICT": _push(lambda reader, _: {}),
    "SETITEM": lambda reader, _: reader.put_in(list(reader.taken(2))),
    "SETITEMS": lambda reader, _: reader.put_in(reader.since_mark()),
    "GLOBAL": lambda reader, argument: reader.named(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda reader, _: reader.named(*reader.taken(2)),
    "REDUCE": _push(lambda reader, _: reader.called(*reader.taken(2))),
    "NEWOBJ": _push(lambda reader, _: reader.called(*reader.taken(2))),
    "BUILD": lambda reader, _: reader.built(*reader.taken(1)),
    "PUT": lambda reader, place: reader.remembered(int(place)),
    "BINPUT": lambda reader, place: reader.remembered(place),
    "LONG_BINPUT": lambda reader, place: reader.remembered(place),
    "MEMOIZE": lambda reader, _: reader.remembered(None),
    "GET": _push(lambda reader, place: reader.memo[int(place)]),
    "BINGET": _push(lambda reader, place: reader.memo[place]),
    "LONG_BINGET": _push(lambda reader, place: reader.memo[place]),
}
