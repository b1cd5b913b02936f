"""The words before the first picture: the same in every prompt, so that they are read once and not at each query."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vla0.decode.slots import Slots

KEPT = 8  # beginnings, of which each robot of a mixture has its own
BUCKET = 32  # tokens of a first pass that is captured come in multiples of this


class Prefix:
    """Keys and values of beginnings that were read before, as long as no weight has changed since.

    read: gives the Slots of tokens and their positions, (P,) and (3, P).
    """

    def __init__(self, model: Any, image: int, read: Callable[[np.ndarray, np.ndarray], Slots]):
        self.weights, self.image, self.read = list(model.parameters()), image, read
        # What is changed in inference mode leaves no trace by which one could tell.
        self.works = not any(weight.is_inference() for weight in self.weights)
        self.known: dict[bytes, torch.Tensor] = {}
        self.stamp: tuple[int, int] | None = None

    def put(self, cache: Slots, ids: np.ndarray, seen: np.ndarray, places: np.ndarray, fixed: bool) -> int:
        """Writes the beginning that all rows have in common into a cache; the first column that is left to read.

        ids, seen: (B, L) of the prompts without their last token; places: (3, B, L). fixed: the rest's length is one of few.
        """
        starts = seen.argmax(1)  # of the rows, behind their padding
        tokens = self._common(ids, seen, starts)
        begin = int(starts.min()) + len(tokens)
        if fixed:
            begin = max(0, ids.shape[1] + -(ids.shape[1] - begin) // BUCKET * BUCKET)
        if not len(tokens) or begin <= starts.min():
            return begin if fixed else 0
        own = self._content(tokens, places[:, 0, starts[0] : starts[0] + len(tokens)])
        for start in dict.fromkeys(starts.tolist()):  # rows of one length at once
            count = min(begin - start, len(tokens))
            if count > 0:
                rows = torch.from_numpy(np.flatnonzero(starts == start)).to(own.device)
                cache.content[:, :, rows, :, start : start + count] = own[:, :, None, :, :count]
        return begin

    def _common(self, ids: np.ndarray, seen: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The tokens before the first picture; none where rows do not agree."""
        pictures = (ids == self.image) & seen
        if not self.works or not pictures.any(1).all():
            return ids[0, :0]
        ends = pictures.argmax(1)
        first, *others = (row[start:end] for row, start, end in zip(ids, starts, ends, strict=True))
        return first if all(np.array_equal(first, other) for other in others) else first[:0]

    def _content(self, tokens: np.ndarray, places: np.ndarray) -> torch.Tensor:
        """(layers, 2, heads, P, width)."""
        # What is changed in place counts up, what is replaced lies elsewhere.
        stamp = sum(weight._version for weight in self.weights), hash(tuple(weight.data_ptr() for weight in self.weights))
        if stamp != self.stamp:
            self.known.clear()
            self.stamp = stamp
        key = tokens.tobytes()
        if key not in self.known:
            while len(self.known) >= KEPT:
                del self.known[next(iter(self.known))]
            self.known[key] = self.read(tokens, places).content[:, :, 0]
        return self.known[key]
