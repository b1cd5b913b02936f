"""Temporal ensembling: average what all chunks predicted for the present step, as in ACT."""

from collections import deque
from collections.abc import Sequence

import numpy as np

from vla0.core.relative import Turns, beside, wrapped
from vla0.errors import InputError

NONE = "none"  # execute the newest chunk, average nothing


def weights_by_age(name: str | Sequence[float], count: int) -> tuple[float, ...]:
    """Return up to `count` weights, not normalised, by age in queries, the newest chunk first.

    name: "mean" (the paper), "v1" (newest 1, each older one 0.5), "v2:w" (w^age), "none" (only the
    newest counts), or the weights themselves.
    """
    if not isinstance(name, str):
        weights = tuple(float(weight) for weight in name)
        fine = (
            0 < len(weights) <= count
            and all(np.isfinite(w) and w >= 0 for w in weights)
            and weights[0] > 0
        )
        if not fine:
            raise InputError(
                f"1 to {count} finite weights >= 0, the newest > 0",
                f"{weights}",
                "give one weight per age",
            )
        return weights
    if name == NONE:
        return (1.0,)
    if name == "mean":
        return (1.0,) * count
    if name == "v1":
        return (1.0,) + (0.5,) * (count - 1)
    if name.startswith("v2:"):
        try:
            base = float(name[3:])
        except ValueError:
            base = float("nan")
        if 0 < base <= 1:
            return tuple(base**age for age in range(count))
    raise InputError(
        "an ensemble: none, mean, v1 or v2:w with 0 < w <= 1", f"'{name}'", "choose one of those"
    )


def steps_used(chunk_size: int, n_action_steps: int, name: str | Sequence[float]) -> int:
    """Return how many steps of a chunk are ever used: with "none", those up to the next query."""
    return n_action_steps if name == NONE else chunk_size


def ensemble_actions(
    chunks: Sequence[np.ndarray],
    k: int | None = None,
    weights: str | Sequence[float] = "v1",
    periodic: Turns = (),
) -> np.ndarray:
    """Average what several chunks predict for the present step.

    Args:
        chunks: (H, D) chunks that were queried at successive steps, newest last. The chunk of age a
            predicts the present in its row a.
        k: How many of the newest chunks to average. None averages all that reach the present.
        weights: Name or weights, as for `weights_by_age`.
        periodic: `Spec.periodic`.

    Returns:
        (D,) float32 action.
    """
    if len(chunks) == 0:
        raise InputError("one chunk at least", "none", "predict before ensembling")
    if k is not None and k < 1:
        raise InputError("k >= 1", f"{k}", "k is how many of the newest chunks to average")
    rows = [chunk[age] for age, chunk in enumerate(list(chunks)[::-1][:k]) if age < len(chunk)]
    by_age = weights_by_age(
        weights, max(len(rows), 1 if isinstance(weights, str) else len(weights))
    )
    return weighted_mean(rows, by_age, periodic)


def weighted_mean(
    rows: Sequence[np.ndarray], weights: Sequence[float], periodic: Turns = ()
) -> np.ndarray:
    """Return the (D,) float32 weighted mean of (D,) rows; rows without a weight do not count.

    In periodic dimensions the mean of 179 and -179 degrees is 180, not 0: every row is first turned
    to the value that is nearest to the first row.
    """
    pairs = list(zip(rows, weights, strict=False))
    total = sum(weight for _, weight in pairs)
    near = [
        beside(np.asarray(row, np.float64), np.asarray(rows[0], np.float64), periodic)
        for row, _ in pairs
    ]
    mean = (
        np.sum([row * weight for row, (_, weight) in zip(near, pairs, strict=True)], axis=0) / total
    )
    return wrapped(mean, periodic).astype(np.float32)


class TemporalEnsemble:
    """Remembers the chunks that still reach the present, and averages their predictions.

    Args:
        chunk_size: H, steps in a chunk.
        n_action_steps: Steps that are executed per query.
        weights: Name or weights, as for `weights_by_age`.
        k: How many of the newest chunks to average. None averages all that reach the present.
        periodic: `Spec.periodic`.

    Raises:
        InputError: When an argument is out of range, or weights average chunks that never overlap.
    """

    def __init__(
        self,
        chunk_size: int,
        n_action_steps: int = 1,
        weights: str | Sequence[float] = "v1",
        k: int | None = None,
        periodic: Turns | None = None,
    ):
        if not 1 <= n_action_steps <= chunk_size:
            raise InputError(
                f"n_action_steps in 1..{chunk_size} (the chunk's size)",
                f"{n_action_steps}",
                "a chunk holds no more steps than that",
            )
        overlap = -(-chunk_size // n_action_steps)  # chunks that can predict the same step
        overlap = min(overlap, k or overlap)
        self.weights = weights_by_age(weights, overlap)
        if overlap == 1 and weights != NONE:
            # Unnoticed, this cost the public reproductions their points (docs/differences.md).
            newest = f", k {k}," if k else ","
            raise InputError(
                "chunks that overlap",
                f"n_action_steps {n_action_steps} of chunk_size {chunk_size}{newest} where "
                f"ensembling would do nothing",
                f"execute fewer steps per query, or say ensemble={NONE}",
            )
        self.chunk_size, self.periodic = chunk_size, periodic or ()
        self.chunks: deque[tuple[int, np.ndarray]] = deque(maxlen=len(self.weights))

    def add(self, chunk: np.ndarray, step: int) -> None:
        """Add an (H, D) chunk whose first row is for `step`. Steps must rise from call to call."""
        if self.chunks and step <= self.chunks[0][0]:
            raise InputError(
                f"a step after {self.chunks[0][0]}", f"{step}", "reset() between episodes"
            )
        self.chunks.appendleft((step, chunk))

    def reaches(self, step: int) -> bool:
        """Return whether any remembered chunk predicts `step`."""
        return any(
            0 <= step - first < len(chunk) and weight > 0
            for (first, chunk), weight in zip(self.chunks, self.weights, strict=False)
        )

    def action(self, step: int) -> np.ndarray:
        """Return the (D,) float32 weighted mean of all predictions for `step`."""
        reach = [
            (chunk[step - first], weight)
            for (first, chunk), weight in zip(self.chunks, self.weights, strict=False)
            if 0 <= step - first < len(chunk) and weight > 0
        ]
        if not reach:
            raise InputError(f"a chunk that reaches step {step}", "none", "query the policy first")
        return weighted_mean(
            [row for row, _ in reach], [weight for _, weight in reach], self.periodic
        )

    def reset(self) -> None:
        """Forget all chunks."""
        self.chunks.clear()
