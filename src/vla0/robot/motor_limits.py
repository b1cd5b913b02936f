"""The limits of a robot under a checkpoint: what its demonstrations did, and what a user makes of
that.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vla0.core.spec import Spec
from vla0.errors import InputError, refuse_unknown
from vla0.robot.lerobot_robot import LeRobotBody
from vla0.robot.limits import NEVER, ActionLimits


def limits_of(
    spec: Spec, body: LeRobotBody, given: Mapping[str, Any] | None = None
) -> ActionLimits:
    """What commands may be: what the demonstrations did, and of that what `given` narrows or
    widens.

    given: low, high, step or velocity, each a number for all, a list, or {name of the action:
    number}.
    """
    if not isinstance(given or {}, Mapping):
        raise InputError(
            "limits: low, high, step, velocity", f"{given!r}", "see `vla0 robot --help`"
        )
    given = dict(given or {})
    refuse_unknown(given, ("low", "high", "step", "velocity"), "the limits")
    found: dict[str, Any] = {
        "low": list(spec.low),
        "high": list(spec.high),
        "periodic": spec.periodic,
    }
    # bounds of differences say nothing of positions: those of the state do
    for d in spec.relative_dims:
        bounds = spec.state or ((-math.inf,) * (d + 1), (math.inf,) * (d + 1))
        found["low"][d], found["high"][d] = bounds[0][d], bounds[1][d]
    if body.absolute and spec.max_step_change is not None:
        found["step"] = [max(change, 1e-6) for change in spec.max_step_change]
    for name, value in given.items():
        found[name] = _each(name, value, body.actions, found.get(name))
    if not np.isfinite([*found["low"], *found["high"]]).all():
        raise InputError(
            "limits",
            f"relative actions {spec.relative_dims} and no state's bounds",
            "give low and high with --limits",
        )
    for action, low, high in zip(body.actions, found["low"], found["high"], strict=True):
        if low > high:
            raise InputError(
                f"low <= high of '{action}'", f"{low:g} and {high:g}", "correct --limits"
            )
    limits = ActionLimits(**found)
    if (limits.step or limits.velocity) and not body.absolute:
        raise InputError(
            "no step or velocity",
            "actions that are no positions of the robot",
            "leave them out of the limits",
        )
    return limits


def _each(name: str, value: Any, actions: list[str], before: list[float] | None) -> list[float]:
    if isinstance(value, Mapping):
        refuse_unknown(value, actions, f"the limits' {name}")
        before = before or [math.inf if name in ("step", "velocity") else math.nan] * len(actions)
        value = [value.get(action, old) for action, old in zip(actions, before, strict=True)]
    elif not isinstance(value, list | tuple):
        value = [value] * len(actions)
    if len(value) != len(actions) or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in value
    ):
        raise InputError(
            f"{name}: a number, {len(actions)} numbers, or numbers by name",
            f"{value}",
            f"names are {actions}",
        )
    return [NEVER if v == math.inf else float(v) for v in value]


def start_of(
    body: LeRobotBody, limits: ActionLimits, told: Callable[[str], None]
) -> np.ndarray | None:
    """(D,) where a body that has been looked at begins, in the terms of actions; None where it
    reports no such thing.

    Raises InputError where it stands far outside of its limits. Only an arm that nobody can move by
    hand, a simulated one, goes to the nearest place within them first, and `told` gets a line.
    """
    start = body.position()
    if start is None:
        return None
    try:
        refuse_elsewhere(start, limits, body.actions)
        return start
    except InputError as error:
        start = np.clip(start, limits.low, limits.high)
        if not body.went_itself(start):
            raise
        expected, got, _ = error.args
        told(f"the simulated arm went to its limits by itself: expected {expected}; got {got}")
        body.observe()
        # as it was asked to go; where it weighs down on its servos, it stands a little beside
        return start


def refuse_elsewhere(start: np.ndarray, limits: ActionLimits, actions: Sequence[str]) -> None:
    """Raises InputError where a robot stands far outside of what was demonstrated: most likely
    other units or calibration.
    """
    low, high = np.array(limits.low), np.array(limits.high)
    # A demonstration may begin outside of where its actions led, by a step or so.
    beyond = (
        np.maximum(low - start, start - high)
        > 0.5 * (high - low) + np.array(limits.step or 0.0) + 1e-6
    )
    if beyond.any():
        d = int(np.argmax(beyond))
        expected = f"'{actions[d]}' near {low[d]:.4g}..{high[d]:.4g}, its limits"
        raise InputError(
            expected,
            f"{round(float(start[d]), 3):g}",
            "move it there; look at units, calibration and --limits",
        )


def refuse_unlimited(limits: ActionLimits, actions: Sequence[str]) -> None:
    """Raises InputError where nothing limits how much a position may change at once: neither data
    nor --limits.
    """
    none = np.full(len(actions), NEVER)
    most = np.minimum(limits.step or none, limits.velocity or none)
    if (most >= NEVER).any():
        d = int(np.argmax(most))
        got = f"none of '{actions[d]}': the checkpoint does not say how much its data changed"
        remedy = (
            "--limits FILE with a line `step: {NAME: NUMBER}` or `velocity: ...`, or train "
            "again: vla0 train measures it"
        )
        raise InputError("a limit of change for each action, to move live", got, remedy)
