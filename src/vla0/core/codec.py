"""Actions ↔ levels ↔ text, and the grammar of that text."""

import re
from functools import lru_cache

import numpy as np

from vla0.core.spec import Spec
from vla0.errors import InputError

SYMBOLS = "0123456789 "  # symbol i is SYMBOLS[i]; symbol END closes the answer
SPACE, END = 10, 11
_NUMBER = re.compile(r"0|[1-9][0-9]*")


class ChunkError(InputError):
    """Text that is not a chunk of actions."""


class ActionCodec:
    """The three forms of a chunk: actions (float, the dataset's units), levels (int, 0..bins) and
    text.
    """

    def __init__(self, spec: Spec):
        self.chunk_size, self.dimensions, self.bins = spec.chunk_size, spec.dimensions, spec.bins
        self.low, self.high = np.array(spec.low, np.float64), np.array(spec.high, np.float64)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Levels (..., D) int64 of actions (..., D).

        Outside the bounds they clip (count them with `outside`).

        Rounds half to even, as the published code does. A dimension with low == high is level 0.
        Raises InputError for a wrong D or a value that is not finite.
        """
        return to_levels(self._checked(actions), self.low, self.high, self.bins)

    def outside(self, actions: np.ndarray) -> np.ndarray:
        """(D,) int64: how many values of each dimension `encode` would clip."""
        actions = self._checked(actions).reshape(-1, self.dimensions)
        return ((actions < self.low) | (actions > self.high)).sum(axis=0)

    def decode(self, levels: np.ndarray) -> np.ndarray:
        """Actions (..., D) float32 of levels (..., D); at most half a level from what was encoded
        inside the bounds.
        """
        levels = self._in_range(levels)
        return (self.low + levels / self.bins * (self.high - self.low)).astype(np.float32)

    def write(self, levels: np.ndarray) -> str:
        """The text of levels (H, D): time-major, single spaces."""
        levels = self._in_range(levels)
        if levels.shape != (self.chunk_size, self.dimensions):
            raise InputError(
                f"levels of shape {(self.chunk_size, self.dimensions)}",
                f"{levels.shape}",
                "write one chunk",
            )
        return " ".join(str(level) for level in levels.ravel().tolist())

    def read(self, text: str) -> np.ndarray:
        """The levels (H, D) int64 of a text. Strict: exactly what `write` gives, or ChunkError."""
        shape = (self.chunk_size, self.dimensions)
        remedy = "decode with the grammar (vla0.decode), which cannot write anything else"
        words = text.split(" ")
        for word in words:
            if (
                not _NUMBER.fullmatch(word)
                or len(word) > len(str(self.bins))
                or int(word) > self.bins
            ):
                raise ChunkError(
                    f"whole numbers in 0..{self.bins}, single spaces",
                    f"{word[:20]!r} in {text[:60]!r}",
                    remedy,
                )
        if len(words) != shape[0] * shape[1]:
            raise ChunkError(
                f"{shape[0]} x {shape[1]} = {shape[0] * shape[1]} numbers", f"{len(words)}", remedy
            )
        return np.array([int(word) for word in words], np.int64).reshape(shape)

    def _checked(self, actions: np.ndarray) -> np.ndarray:
        actions = np.asarray(actions, dtype=np.float64)
        if actions.ndim < 1 or actions.shape[-1] != self.dimensions:
            raise InputError(
                f"actions of {self.dimensions} dimensions",
                f"shape {actions.shape}",
                "check the action key",
            )
        if not np.isfinite(actions).all():
            where = np.argwhere(~np.isfinite(actions))[0].tolist()
            raise InputError(
                "finite actions",
                f"{actions[tuple(where)]} at {where}",
                "mend or drop those rows of the dataset",
            )
        return actions

    def _in_range(self, levels: np.ndarray) -> np.ndarray:
        levels = np.asarray(levels)
        if not np.issubdtype(levels.dtype, np.integer):
            raise InputError("integer levels", f"dtype {levels.dtype}", "encode actions first")
        if levels.ndim < 1 or levels.shape[-1] != self.dimensions:
            raise InputError(
                f"levels of {self.dimensions} dimensions",
                f"shape {levels.shape}",
                "check the shape",
            )
        if levels.size and (levels.min() < 0 or levels.max() > self.bins):
            raise InputError(
                f"levels in 0..{self.bins}",
                f"{levels.min()}..{levels.max()}",
                "check the checkpoint's bins",
            )
        return levels


def to_levels(values: np.ndarray, low: np.ndarray, high: np.ndarray, bins: int) -> np.ndarray:
    """Min-max levels (..., N) int64 of finite values (..., N), clipped to 0..bins; 0 where low ==
    high.
    """
    span = np.where(high > low, high - low, 1.0)
    scaled = (np.clip(values, low, high) - low) / span * bins
    return np.rint(scaled).astype(np.int64)


def written(levels: np.ndarray) -> str:
    """The text of the first levels (n, D) of a chunk that goes on: a space ends it; nothing of
    none.
    """
    return "".join(f"{level} " for level in levels.ravel().tolist())


def numerals(bins: int) -> list[list[tuple[int, int]]]:
    """The decimal numerals of 0..bins: alternatives of digits, each digit from one to another."""
    digits = [int(digit) for digit in str(bins)]
    found = [[(0, 0)]] + [[(1, 9)] + [(0, 9)] * more for more in range(len(digits) - 1)]
    # those as long as `bins`: alike so far, less here, anything after
    for place, digit in enumerate(digits):
        last = place == len(digits) - 1
        low, high = int(place == 0), digit if last else digit - 1
        if low <= high:
            found.append(
                [(d, d) for d in digits[:place]]
                + [(low, high)]
                + [(0, 9)] * (len(digits) - place - 1)
            )
    return found


class Grammar:
    """The language of answers: `count` numbers in 0..bins without leading zeros, single spaces,
    then the end.

    A state is (numbers finished, digits of the current one); symbols are 0..9, SPACE and END.
    """

    def __init__(self, bins: int, count: int):
        self.bins, self.count = bins, count
        self.start: tuple[int, str] = (0, "")
        self.longest = count * (len(str(bins)) + 1)  # symbols, END included

    def allowed(self, state: tuple[int, str]) -> tuple[int, ...]:
        """The symbols that may follow, ascending. Empty after the end."""
        finished, digits = state
        if finished == self.count:
            return ()
        closing = END if finished == self.count - 1 else SPACE
        return _continuations(self.bins, digits) + ((closing,) if digits else ())

    def advance(self, state: tuple[int, str], symbol: int) -> tuple[int, str]:
        """The state after an allowed symbol. Raises ChunkError for another."""
        if symbol not in self.allowed(state):
            name = "the end" if symbol == END else repr(SYMBOLS[symbol])
            raise ChunkError(
                f"one of symbols {self.allowed(state)} after {state}",
                name,
                "follow Grammar.allowed",
            )
        finished, digits = state
        return (
            (finished + 1, "") if symbol in (SPACE, END) else (finished, digits + SYMBOLS[symbol])
        )


@lru_cache(maxsize=200_000)
def _continuations(bins: int, digits: str) -> tuple[int, ...]:
    if digits == "0":
        return ()
    return tuple(d for d in range(10) if int(digits + str(d)) <= bins)
