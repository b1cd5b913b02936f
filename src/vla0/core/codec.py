"""Convert between actions, levels and text, and define the grammar of that text."""

import re
from functools import lru_cache

import numpy as np

from vla0.core.spec import Spec
from vla0.errors import InputError

SYMBOLS = "0123456789 "  # symbol i is SYMBOLS[i]; symbol END closes the answer
SPACE, END = 10, 11
_NUMBER = re.compile(r"0|[1-9][0-9]*")


class ChunkError(InputError):
    """Raised for text that is not a chunk of actions."""


class ActionCodec:
    """Converts chunks between actions, levels and text.

    Actions are floats in the dataset's units, levels are integers in 0..bins, and text is what the
    model writes. Every method raises InputError for a wrong shape or a value out of range.

    Args:
        spec: Gives the bounds of the actions, the number of bins and the shape (H, D) of a chunk.
    """

    def __init__(self, spec: Spec):
        self.chunk_size, self.dimensions, self.bins = spec.chunk_size, spec.dimensions, spec.bins
        self.low, self.high = np.array(spec.low, np.float64), np.array(spec.high, np.float64)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Encode actions as integer levels, rounding half to even as the published code does.

        Actions outside the bounds are clipped; `outside` counts them. A dimension with low == high
        becomes level 0.

        Args:
            actions: (..., D) finite floats in the dataset's units.

        Returns:
            (..., D) int64 levels in 0..bins.
        """
        return to_levels(self._checked(actions), self.low, self.high, self.bins)

    def outside(self, actions: np.ndarray) -> np.ndarray:
        """Count, for each dimension, the values that `encode` would clip: (D,) int64."""
        actions = self._checked(actions).reshape(-1, self.dimensions)
        return ((actions < self.low) | (actions > self.high)).sum(axis=0)

    def decode(self, levels: np.ndarray) -> np.ndarray:
        """Decode (..., D) levels into (..., D) float32 actions.

        An action that was encoded inside the bounds comes back within half a level.
        """
        levels = self._in_range(levels)
        return (self.low + levels / self.bins * (self.high - self.low)).astype(np.float32)

    def write(self, levels: np.ndarray) -> str:
        """Write (H, D) levels as text: one time step after another, separated by single spaces."""
        levels = self._in_range(levels)
        if levels.shape != (self.chunk_size, self.dimensions):
            raise InputError(
                f"levels of shape {(self.chunk_size, self.dimensions)}",
                f"{levels.shape}",
                "write one chunk",
            )
        return " ".join(str(level) for level in levels.ravel().tolist())

    def read(self, text: str) -> np.ndarray:
        """Read (H, D) int64 levels from text.

        Raises:
            ChunkError: When the text is not exactly what `write` would give.
        """
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
        """Return the actions as float64, or raise InputError: wrong D, or not finite."""
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
        """Return the levels as an array, or raise InputError: wrong type, D or range."""
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
    """Scale finite (..., N) values to (..., N) int64 levels in 0..bins.

    Values outside the bounds are clipped. The level is 0 where low == high.
    """
    span = np.where(high > low, high - low, 1.0)
    scaled = (np.clip(values, low, high) - low) / span * bins
    return np.rint(scaled).astype(np.int64)


def written(levels: np.ndarray) -> str:
    """Write the first (n, D) levels of an unfinished chunk, with a space after each number."""
    return "".join(f"{level} " for level in levels.ravel().tolist())


def numerals(bins: int) -> list[list[tuple[int, int]]]:
    """List patterns that match the numerals of 0..bins: each is a (first, last) range per digit."""
    digits = [int(digit) for digit in str(bins)]
    patterns = [[(0, 0)]] + [[(1, 9)] + [(0, 9)] * more for more in range(len(digits) - 1)]
    # Numerals as long as `bins`: equal to it before this place, less at it, any digits after it.
    for place, digit in enumerate(digits):
        last = place == len(digits) - 1
        low, high = int(place == 0), digit if last else digit - 1
        if low <= high:
            patterns.append(
                [(d, d) for d in digits[:place]]
                + [(low, high)]
                + [(0, 9)] * (len(digits) - place - 1)
            )
    return patterns


class Grammar:
    """The language of answers: `count` numbers in 0..bins separated by single spaces, then END.

    Numbers have no leading zeros. A state is (numbers finished, digits of the current number).
    Symbols are 0..9, SPACE and END.
    """

    def __init__(self, bins: int, count: int):
        self.bins, self.count = bins, count
        self.start: tuple[int, str] = (0, "")
        self.longest = count * (len(str(bins)) + 1)  # symbols in the longest answer, with END

    def allowed(self, state: tuple[int, str]) -> tuple[int, ...]:
        """Return the symbols that may follow, in ascending order; none may follow END."""
        finished, digits = state
        if finished == self.count:
            return ()
        closing = END if finished == self.count - 1 else SPACE
        return _continuations(self.bins, digits) + ((closing,) if digits else ())

    def advance(self, state: tuple[int, str], symbol: int) -> tuple[int, str]:
        """Return the state after a symbol, or raise ChunkError when it is not allowed."""
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
    """Return the digits that may follow the digits of an unfinished number."""
    if digits == "0":
        return ()
    return tuple(d for d in range(10) if int(digits + str(d)) <= bins)
