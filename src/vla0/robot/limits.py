"""The limits of commands: bounds, and how much a command may change."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vla0.core.relative import beside, shortest, wrapped
from vla0.core.spec import Spec, tupled
from vla0.errors import InputError

NEVER = 1e9  # a limit that no command reaches


@dataclass(frozen=True, kw_only=True)
class ActionLimits:
    """The limits of commands, for each dimension of the action, in its units.

    Raises:
        InputError: A limit does not have one finite number for each dimension, a `low` is above its
            `high`, or a `step` or `velocity` is not positive.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    # the largest change from one command to the next, for absolute actions
    step: tuple[float, ...] | None = None
    velocity: tuple[float, ...] | None = None  # the largest change in a second
    # dimensions that wrap: (dimension, low, high) of the Spec
    periodic: tuple[tuple[int, float, float], ...] = ()
    # your own rule: takes an action (D,) and returns the nearest that is allowed
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
        """Return the limits within which the demonstrations stayed.

        Raises:
            InputError: The checkpoint has relative dimensions, for which it knows no bounds.
        """
        if spec.relative_dims:
            raise InputError(
                "limits",
                f"none, and relative dimensions {spec.relative_dims}",
                "give low and high of the robot",
            )
        return cls(low=spec.low, high=spec.high, periodic=spec.periodic)

    def safe(self, action: np.ndarray, last: np.ndarray | None, period_s: float) -> np.ndarray:
        """Return the nearest action within all limits.

        Args:
            action: (D,), what the policy wants.
            last: (D,), the command before; None if there was none, which leaves changes unlimited.
            period_s: Seconds since that command.

        Returns:
            The command (D,), float64.
        """
        safe = np.clip(self._turned(np.asarray(action, np.float64)), self.low, self.high)
        if self.workspace is not None:
            safe = np.clip(self.workspace(safe), self.low, self.high)
        if last is not None:
            change = np.full(len(safe), np.inf)
            if self.step is not None:
                change = np.minimum(change, self.step)
            if self.velocity is not None:
                change = np.minimum(change, np.array(self.velocity) * period_s)
            safe = self._changed(safe, last, change)
        return safe

    def _turned(self, action: np.ndarray) -> np.ndarray:
        """Move a value outside of its bounds by whole turns, to where it is nearest to them.

        Only periodic dimensions are moved.
        """
        low, high = np.array(self.low), np.array(self.high)
        return np.where(
            (low <= action) & (action <= high),
            action,
            beside(action, (low + high) / 2, self.periodic),
        )

    def _changed(self, safe: np.ndarray, last: np.ndarray, change: np.ndarray) -> np.ndarray:
        """Return the command (D,) that goes from `last` towards `safe` by at most `change`.

        A periodic dimension goes over its seam if its bounds meet there.
        """
        near = np.clip(safe, last - change, last + change)
        goal = last + np.clip(shortest(safe - last, self.periodic), -change, change)
        around = wrapped(goal, self.periodic)
        for d, low, high in self.periodic:
            if (high - self.high[d]) + (self.low[d] - low) > change[d]:
                continue  # the gap between the bounds is too wide to cross in one command
            within = self.low[d] <= around[d] <= self.high[d]
            near[d] = around[d] if within else np.clip(goal[d], self.low[d], self.high[d])
        return near
