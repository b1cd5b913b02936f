"""Compute the bounds of actions and states from data, and report what they lose of it."""

from collections.abc import Sequence

import numpy as np

from vla0.core.codec import to_levels

FEW = 10  # a dimension whose rows mostly share fewer levels than this is reported
WIDE = 20.0  # bounds of a relative dimension wider than this many usual steps are reported
BEYOND = 10.0  # values this many widths outside of the bounds are reported
# Width of a full turn, and its bounds as data.periodic takes them, in degrees and radians.
TURNS = ((360.0, "-180, 180"), (2 * np.pi, "-3.14159265, 3.14159265"))

Bounds = tuple[tuple[float, ...], tuple[float, ...]]


def bounds(values: np.ndarray, statistics: str) -> Bounds:
    """Compute the bounds of each dimension.

    With "quantiles", a dimension that varies may still have two equal quantiles, as a trigger that
    is seldom pulled does. Such bounds would make it constant, so its minimum and maximum are used.

    Args:
        values: (N, D) rows of data.
        statistics: "minmax" for minimum and maximum, "quantiles" for the 1 % and 99 % quantiles.

    Returns:
        (low, high), each of D floats.
    """
    low, high = values.min(axis=0), values.max(axis=0)
    if statistics == "quantiles":
        inner = np.quantile(values, [0.01, 0.99], axis=0)
        kept = inner[0] < inner[1]
        low, high = np.where(kept, inner[0], low), np.where(kept, inner[1], high)
    return tuple(float(v) for v in low), tuple(float(v) for v in high)


def remarks(
    values: np.ndarray,
    data_bounds: Bounds,
    statistics: str,
    bins: int,
    names: Sequence[str],
    relative_dims: Sequence[int] = (),
) -> list[str]:
    """Describe for the user where bounds are not the quantiles and what they lose of the data.

    Args:
        values: (N, D) rows of data.
        data_bounds: The bounds, as `bounds` computed them.
        statistics: How they were computed.
        bins: The number of bins.
        names: D names of the dimensions.
        relative_dims: The relative ones among the dimensions.

    Returns:
        One sentence for each problem.
    """
    low, high = (np.array(end) for end in data_bounds)
    levels = to_levels(values, low, high, bins)
    lowest, highest = values.min(axis=0), values.max(axis=0)
    sentences = []
    for d in np.flatnonzero(highest > lowest).tolist():
        rows, name, width = values[:, d], names[d], float(high[d] - low[d])
        if statistics == "quantiles" and len(set(np.quantile(rows, [0.01, 0.99]).tolist())) == 1:
            sentences.append(
                f"{name} is {np.median(rows):g} in more than 98 % of the rows: its bounds are its "
                f"least and greatest, "
                f"{low[d]:g} and {high[d]:g}, since its quantiles would have made it constant"
            )
        if d in relative_dims and (text := _too_wide(rows, width)):
            sentences.append(f"{name}, relative, has bounds of {low[d]:g} to {high[d]:g} {text}")
        if max(low[d] - lowest[d], highest[d] - high[d]) > BEYOND * max(width, 1e-12):
            sentences.append(
                f"{name} reaches {lowest[d]:g} to {highest[d]:g}, far outside of its bounds, "
                f"{low[d]:g} to {high[d]:g}: what lies "
                "there is cut off; mend those rows, or data.statistics=minmax"
            )
        if (few := _levels_of_most(rows, levels[:, d])) is not None:
            sentences.append(
                f"{name} varies, and most of its rows are written with {few} of {bins + 1} "
                f"levels: its bounds, {low[d]:g} to "
                f"{high[d]:g}, are wide for it; mend its outliers, or data.statistics=quantiles, "
                f"or more action.action_bins"
            )
    return sentences


def _too_wide(differences: np.ndarray, width: float) -> str | None:
    """Describe bounds that are far wider than the usual change, or return None."""
    moved = np.abs(differences)[np.abs(differences) > 1e-6 * max(width, 1e-12)]
    usual = float(np.quantile(moved, 0.9)) if len(moved) else 0.0
    if not usual or width <= WIDE * usual:
        return None
    text = f"where 90 % of its changes are below {usual:.3g}"
    for turn, written in TURNS:
        if 0.9 * turn <= width <= 2.02 * turn:
            return f"{text}: if it is an angle that wraps, data.periodic={{DIMENSION: [{written}]}}"
    return f"{text}: look for jumps of the state or the action"


def _levels_of_most(column: np.ndarray, levels: np.ndarray) -> int | None:
    """Return how many levels more than half of the rows share, or None where that is no loss.

    It is a loss when those levels are few although the rows hold many different numbers.
    """
    kinds, counts = np.unique(levels, return_counts=True)
    order = np.argsort(-counts)
    needed = int(np.searchsorted(np.cumsum(counts[order]), len(levels) / 2, side="right")) + 1
    if needed >= FEW:
        return None
    rows = np.isin(levels, kinds[order[:needed]])
    return needed if len(np.unique(column[rows])) >= FEW else None
