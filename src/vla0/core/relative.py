"""Convert actions to the values that are written, for relative and periodic dimensions."""

from collections.abc import Sequence

import numpy as np

from vla0.core.spec import Observation, Spec
from vla0.errors import InputError

Turns = Sequence[tuple[int, float, float]]  # (dimension, low, high) of Spec.periodic


def state_of(observation: Observation, spec: Spec, needed: int) -> np.ndarray:
    """Return the observation's state as (S,) float64.

    Raises InputError when it is missing, not finite or of another length than `needed`. Where the
    Spec has no state of its own, it may be longer.
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
    """Return the (D,) float64 state in relative dimensions and zero in all others."""
    zero = np.zeros(spec.dimensions)
    if spec.relative_dims:
        dims = list(spec.relative_dims)
        needed = len(spec.state[0]) if spec.state else max(dims) + 1
        zero[dims] = state_of(observation, spec, needed)[dims]
    return zero


def to_written(actions: np.ndarray, observation: Observation, spec: Spec) -> np.ndarray:
    """Turn (..., D) actions into the (..., D) float64 values that are written.

    Relative dimensions become differences from the state; periodic ones go the shorter way round.
    """
    values = actions - offset(observation, spec)
    return shortest(values, [turn for turn in spec.periodic if turn[0] in spec.relative_dims])


def from_written(values: np.ndarray, observation: Observation, spec: Spec) -> np.ndarray:
    """Undo `to_written`; periodic dimensions come back between their low and high."""
    return wrapped(values + offset(observation, spec), spec.periodic)


def shortest(differences: np.ndarray, periodic: Turns) -> np.ndarray:
    """Bring (..., D) differences in periodic dimensions between minus and plus half a turn."""
    return _each(
        differences,
        periodic,
        lambda values, low, high: (values + (high - low) / 2) % (high - low) - (high - low) / 2,
    )


def wrapped(values: np.ndarray, periodic: Turns) -> np.ndarray:
    """Bring (..., D) values in periodic dimensions between their low (included) and their high."""
    return _each(values, periodic, lambda values, low, high: (values - low) % (high - low) + low)


def beside(values: np.ndarray, near: np.ndarray, periodic: Turns) -> np.ndarray:
    """Turn periodic dimensions of (..., D) values as close as possible to `near`, for averaging."""
    return near + shortest(values - near, periodic) if len(periodic) else values


def _each(values: np.ndarray, periodic: Turns, change) -> np.ndarray:
    """Apply change(values, low, high) to each periodic dimension of a copy of the values."""
    if not len(periodic):
        return values
    changed = np.array(values, np.float64)
    for dimension, low, high in periodic:
        changed[..., dimension] = change(changed[..., dimension], low, high)
    return changed
