"""Actions relative to where the robot is, and dimensions that wrap: what is written of an action,
and back.
"""

from collections.abc import Sequence

import numpy as np

from vla0.core.spec import Observation, Spec
from vla0.errors import InputError

Turns = Sequence[tuple[int, float, float]]  # (dimension, low, high) of Spec.periodic


def state_of(observation: Observation, spec: Spec, needed: int) -> np.ndarray:
    """(S,) float64: the observation's state.

    Raises InputError where it is missing, not finite or of another length.
    """
    if observation.state is None:
        raise InputError(
            f"a state of {needed} numbers",
            "no state",
            "this checkpoint was trained with one: pass state=",
        )
    state = np.asarray(observation.state, dtype=np.float64)
    exact = spec.state is not None
    if state.ndim != 1 or (len(state) != needed if exact else len(state) < needed):
        raise InputError(
            f"a state of {needed} numbers",
            f"shape {state.shape}",
            "pass the dataset's state vector",
        )
    if not np.isfinite(state).all():
        raise InputError("a finite state", f"{state.tolist()}", "check the sensors")
    return state


def offset(observation: Observation, spec: Spec) -> np.ndarray:
    """(D,) float64: what relative dimensions are relative to, zero elsewhere."""
    zero = np.zeros(spec.dimensions)
    if spec.relative_dims:
        dims = list(spec.relative_dims)
        needed = len(spec.state[0]) if spec.state else max(dims) + 1
        zero[dims] = state_of(observation, spec, needed)[dims]
    return zero


def to_written(actions: np.ndarray, observation: Observation, spec: Spec) -> np.ndarray:
    """(..., D) float64 of actions (..., D): relative dimensions as differences from the state, by
    the shorter way round.
    """
    values = actions - offset(observation, spec)
    return shortest(values, [turn for turn in spec.periodic if turn[0] in spec.relative_dims])


def from_written(values: np.ndarray, observation: Observation, spec: Spec) -> np.ndarray:
    """(..., D) float64: the actions that `to_written` made the values of; periodic dimensions
    between their low and high.
    """
    return wrapped(values + offset(observation, spec), spec.periodic)


def shortest(differences: np.ndarray, periodic: Turns) -> np.ndarray:
    """(..., D) of differences (..., D): those of periodic dimensions between minus and plus half a
    turn.
    """
    return _each(
        differences,
        periodic,
        lambda values, low, high: (values + (high - low) / 2) % (high - low) - (high - low) / 2,
    )


def wrapped(values: np.ndarray, periodic: Turns) -> np.ndarray:
    """(..., D) of values (..., D): those of periodic dimensions between their low, included, and
    their high.
    """
    return _each(values, periodic, lambda values, low, high: (values - low) % (high - low) + low)


def beside(values: np.ndarray, near: np.ndarray, periodic: Turns) -> np.ndarray:
    """(..., D) of values (..., D): periodic dimensions turned to where they are nearest to `near`,
    to be averaged with it.
    """
    return near + shortest(values - near, periodic) if len(periodic) else values


def _each(values: np.ndarray, periodic: Turns, change) -> np.ndarray:
    if not len(periodic):
        return values
    found = np.array(values, np.float64)
    for dimension, low, high in periodic:
        found[..., dimension] = change(found[..., dimension], low, high)
    return found
