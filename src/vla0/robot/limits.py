"""What a command may be: positions, and how much they may change."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vla0.core.relative import beside, shortest, wrapped
from vla0.core.spec import Spec, tupled
from vla0.errors import InputError

NEVER = 1e9  # a limit that is none


@dataclass(frozen=True, kw_only=True)
class ActionLimits:
    """What a command may be, for each dimension of the action, in its units."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    # most change from one command to the next, of absolute actions
    step: tuple[float, ...] | None = None
    velocity: tuple[float, ...] | None = None  # the same, a second
    # dimensions that wrap: (dimension, low, high) of the Spec
    periodic: tuple[tuple[int, float, float], ...] = ()
    # the nearest allowed action, by whatever you know
    workspace: Callable[[np.ndarray], np.ndarray] | None = None

    def __post_init__(self):
        for name in ("low", "high", "step", "velocity"):
            object.__setattr__(self, name, tupled(getattr(self, name)))
            value = getattr(self, name)
            if value is not None and (len(value) != len(self.low) or not np.isfinite(value).all()):
                raise InputError(
                    f"{name}: {len(self.low)} finite numbers",
                    f"{value}",
                    "one for each dimension of the action",
                )
        if not all(a <= b for a, b in zip(self.low, self.high, strict=True)):
            d = next(d for d, (a, b) in enumerate(zip(self.low, self.high, strict=True)) if a > b)
            raise InputError(
                "low <= high",
                f"{self.low[d]:g} and {self.high[d]:g} of action {d}",
                "exchange them",
            )
        for name in ("step", "velocity"):
            if getattr(self, name) is not None and min(getattr(self, name)) <= 0:
                raise InputError(
                    f"{name} > 0", f"{getattr(self, name)}", "leave it out for no limit"
                )

    @classmethod
    def of(cls, spec: Spec) -> "ActionLimits":
        """What the demonstrations did and no more.

        Relative dimensions have no bounds of their own there: give them.
        """
        if spec.relative_dims:
            raise InputError(
                "limits",
                f"none, and relative dimensions {spec.relative_dims}",
                "give low and high of the robot",
            )
        return cls(low=spec.low, high=spec.high, periodic=spec.periodic)

    def safe(self, action: np.ndarray, last: np.ndarray | None, period_s: float) -> np.ndarray:
        """The nearest action within all limits; last: the command before, if there was one."""
        safe = np.clip(self._turned(np.asarray(action, np.float64)), self.low, self.high)
        if self.workspace is not None:
            safe = np.clip(self.workspace(safe), self.low, self.high)
        if last is not None:
            most = np.full(len(safe), np.inf)
            if self.step is not None:
                most = np.minimum(most, self.step)
            if self.velocity is not None:
                most = np.minimum(most, np.array(self.velocity) * period_s)
            safe = self._changed(safe, last, most)
        return safe

    def _turned(self, action: np.ndarray) -> np.ndarray:
        """(D,): what lies outside of its bounds in a periodic dimension, by whole turns to where it
        is nearest to them.
        """
        low, high = np.array(self.low), np.array(self.high)
        return np.where(
            (low <= action) & (action <= high),
            action,
            beside(action, (low + high) / 2, self.periodic),
        )

    def _changed(self, safe: np.ndarray, last: np.ndarray, most: np.ndarray) -> np.ndarray:
        """(D,): from `last` towards `safe` by `most`; of a periodic dimension over the seam, where
        its bounds meet there.
        """
        near = np.clip(safe, last - most, last + most)
        goal = last + np.clip(shortest(safe - last, self.periodic), -most, most)
        around = wrapped(goal, self.periodic)
        for d, low, high in self.periodic:
            if (high - self.high[d]) + (self.low[d] - low) > most[d]:
                continue  # what lies between the bounds cannot be crossed
            within = self.low[d] <= around[d] <= self.high[d]
            near[d] = around[d] if within else np.clip(goal[d], self.low[d], self.high[d])
        return near
