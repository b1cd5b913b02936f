"""Bounds of actions and states out of data, and what is lost between them."""

from collections.abc import Sequence

import numpy as np

from vla0.core.codec import to_levels

FEW = 10  # levels below which most of a dimension's rows should not share
WIDE = 20.0  # times the usual step above which the bounds of a relative dimension are far too wide
BEYOND = 10.0  # times its bounds' width that a dimension has to reach to be told of
# what a full turn is, and how it is given
TURNS = ((360.0, "-180, 180"), (2 * np.pi, "-3.14159265, 3.14159265"))

Bounds = tuple[tuple[float, ...], tuple[float, ...]]


def bounds(values: np.ndarray, statistics: str) -> Bounds:
    """(low, high) of values (N, D): their least and greatest by "minmax", their 1 % and 99 % by
    "quantiles".

    A dimension of which both quantiles are one number although it varies, as of a trigger that is
    seldom pulled, would be that number for ever: its bounds are its least and greatest.
    """
    low, high = values.min(axis=0), values.max(axis=0)
    if statistics == "quantiles":
        inner = np.quantile(values, [0.01, 0.99], axis=0)
        kept = inner[0] < inner[1]
        low, high = np.where(kept, inner[0], low), np.where(kept, inner[1], high)
    return tuple(float(v) for v in low), tuple(float(v) for v in high)


def remarks(
    values: np.ndarray,
    found: Bounds,
    statistics: str,
    bins: int,
    names: Sequence[str],
    relative_dims: Sequence[int] = (),
) -> list[str]:
    """What a user should know of bounds: where they are not the quantiles, and what they lose of
    values (N, D).
    """
    low, high = (np.array(end) for end in found)
    levels = to_levels(values, low, high, bins)
    least, most = values.min(axis=0), values.max(axis=0)
    told = []
    for d in np.flatnonzero(most > least).tolist():
        own, name, width = values[:, d], names[d], float(high[d] - low[d])
        if statistics == "quantiles" and len(set(np.quantile(own, [0.01, 0.99]).tolist())) == 1:
            told.append(
                f"{name} is {np.median(own):g} in more than 98 % of the rows: its bounds are its "
                f"least and greatest, "
                f"{low[d]:g} and {high[d]:g}, since its quantiles would have made it constant"
            )
        if d in relative_dims and (text := _too_wide(own, width)):
            told.append(f"{name}, relative, has bounds of {low[d]:g} to {high[d]:g} {text}")
        if max(low[d] - least[d], most[d] - high[d]) > BEYOND * max(width, 1e-12):
            told.append(
                f"{name} reaches {least[d]:g} to {most[d]:g}, far outside of its bounds, "
                f"{low[d]:g} to {high[d]:g}: what lies "
                "there is cut off; mend those rows, or data.statistics=minmax"
            )
        if (few := _levels_of_most(own, levels[:, d])) is not None:
            told.append(
                f"{name} varies, and most of its rows are written with {few} of {bins + 1} "
                f"levels: its bounds, {low[d]:g} to "
                f"{high[d]:g}, are wide for it; mend its outliers, or data.statistics=quantiles, "
                f"or more action.action_bins"
            )
    return told


def _too_wide(own: np.ndarray, width: float) -> str | None:
    """What is said of differences whose bounds are far wider than they usually are."""
    moved = np.abs(own)[np.abs(own) > 1e-6 * max(width, 1e-12)]
    usual = float(np.quantile(moved, 0.9)) if len(moved) else 0.0
    if not usual or width <= WIDE * usual:
        return None
    text = f"where 90 % of its changes are below {usual:.3g}"
    for turn, written in TURNS:
        if 0.9 * turn <= width <= 2.02 * turn:
            return f"{text}: if it is an angle that wraps, data.periodic={{DIMENSION: [{written}]}}"
    return f"{text}: look for jumps of the state or the action"


def _levels_of_most(own: np.ndarray, levels: np.ndarray) -> int | None:
    """How many levels more than half of the rows share, where those are few and the rows' numbers
    are not.
    """
    kinds, counts = np.unique(levels, return_counts=True)
    order = np.argsort(-counts)
    needed = int(np.searchsorted(np.cumsum(counts[order]), len(levels) / 2, side="right")) + 1
    if needed >= FEW:
        return None
    rows = np.isin(levels, kinds[order[:needed]])
    return needed if len(np.unique(own[rows])) >= FEW else None
