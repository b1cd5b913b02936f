"""The limits of a robot under a checkpoint: from its demonstrations, and from the user."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vla0.core.spec import Spec
from vla0.errors import InputError, refuse_unknown
from vla0.robot.lerobot_robot import LeRobotBody
from vla0.robot.limits import NEVER, ActionLimits


def limits_of(
    spec: Spec, body: LeRobotBody, overrides: Mapping[str, Any] | None = None
) -> ActionLimits:
    """Return the limits of commands: those of the demonstrations, narrowed or widened by the user.

    Args:
        spec: The Spec of the checkpoint, with the bounds of its demonstrations.
        body: The robot.
        overrides: low, high, step or velocity, each a number for all actions, a list, or a mapping
            of actions' names to numbers.

    Returns:
        The limits.

    Raises:
        InputError: A key or name is not known, a number is missing, a `low` is above its `high`, or
            there is a limit of change although the actions are not positions of the robot.
    """
    if not isinstance(overrides or {}, Mapping):
        raise InputError(
            "limits: low, high, step, velocity", f"{overrides!r}", "see `vla0 robot --help`"
        )
    overrides = dict(overrides or {})
    refuse_unknown(overrides, ("low", "high", "step", "velocity"), "the limits")
    bounds: dict[str, Any] = {
        "low": list(spec.low),
        "high": list(spec.high),
        "periodic": spec.periodic,
    }
    # relative actions are differences, so the bounds of positions are those of the state
    for d in spec.relative_dims:
        state_bounds = spec.state or ((-math.inf,) * (d + 1), (math.inf,) * (d + 1))
        bounds["low"][d], bounds["high"][d] = state_bounds[0][d], state_bounds[1][d]
    if body.absolute and spec.max_step_change is not None:
        bounds["step"] = [max(change, 1e-6) for change in spec.max_step_change]
    for name, value in overrides.items():
        bounds[name] = _each(name, value, body.actions, bounds.get(name))
    if not np.isfinite([*bounds["low"], *bounds["high"]]).all():
        raise InputError(
            "limits",
            f"relative actions {spec.relative_dims} and no state's bounds",
            "give low and high with --limits",
        )
    for action, low, high in zip(body.actions, bounds["low"], bounds["high"], strict=True):
        if low > high:
            raise InputError(
                f"low <= high of '{action}'", f"{low:g} and {high:g}", "correct --limits"
            )
    limits = ActionLimits(**bounds)
    if (limits.step or limits.velocity) and not body.absolute:
        raise InputError(
            "no step or velocity",
            "actions that are no positions of the robot",
            "leave them out of the limits",
        )
    return limits


def _each(name: str, value: Any, actions: list[str], before: list[float] | None) -> list[float]:
    """Return a limit's number for each action; a mapping changes those of `before`."""
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
    body: LeRobotBody, limits: ActionLimits, report: Callable[[str], None]
) -> np.ndarray | None:
    """Return where a robot begins.

    A simulated arm, which nobody can move by hand, first goes to the nearest place within its
    limits, and `report` is called with a line.

    Args:
        body: The robot, which has been observed once.
        limits: Its limits.
        report: Called with lines for the operator.

    Returns:
        The position (D,) in units of actions; None if the robot does not report it.

    Raises:
        InputError: The robot is far outside of its limits.
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
        report(f"the simulated arm went to its limits by itself: expected {expected}; got {got}")
        body.observe()
        # the commanded position; its weight draws the arm a little away from it
        return start


def refuse_elsewhere(start: np.ndarray, limits: ActionLimits, actions: Sequence[str]) -> None:
    """Raise InputError if a robot stands far outside of its limits.

    The reason is most likely other units or another calibration.

    Args:
        start: (D,), where the robot is, in units of actions.
        limits: Its limits.
        actions: The names of its actions.
    """
    low, high = np.array(limits.low), np.array(limits.high)
    # A demonstration may begin about a step outside of where its actions led.
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
    """Raise InputError if neither the data nor --limits bounds how much a position may change."""
    none = np.full(len(actions), NEVER)
    change = np.minimum(limits.step or none, limits.velocity or none)
    if (change >= NEVER).any():
        d = int(np.argmax(change))
        got = f"none of '{actions[d]}': the checkpoint does not say how much its data changed"
        remedy = (
            "--limits FILE with a line `step: {NAME: NUMBER}` or `velocity: ...`, or train "
            "again: vla0 train measures it"
        )
        raise InputError("a limit of change for each action, to move live", got, remedy)
