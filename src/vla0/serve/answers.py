"""What a server says, looked at before anything is done with it: of itself, and of the actions."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vla0.errors import InputError

REMEDY = "look at the server"


def _count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(own, str) for own in value)


def _renamed(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(own, str) for own in (*value, *value.values())
    )


KINDS = {  # what is said → what it must be, where it is said
    "chunk_size": (_count, "a number from 1"), "dimensions": (_count, "a number from 1"),
    "extensions": (_names, "a list of names"), "cameras": (_renamed, "a mapping of names"),
}  # fmt: skip
# by which a policy is known, as far as acting goes
SAME = ("spec", "ensemble", "n_action_steps", *KINDS)


def metadata_of(found: dict[str, Any], before: Mapping[str, Any], url: str) -> dict[str, Any]:
    """What a server says of itself as a client comes; before: what it said the last time, empty at
    the first.

    Raises InputError for what cannot be, and where the policy is another one: the robot's limits
    and pace are of the first.
    """
    for name, (fits, words) in KINDS.items():
        if (value := found.get(name)) is not None and not fits(value):
            raise InputError(f"'{name}' of {url}: {words}", f"{str(value)[:60]!r}", REMEDY)
    if before and (other := [name for name in SAME if found.get(name) != before.get(name)]):
        remedy = "begin anew: limits and pace were those of the policy before"
        raise InputError(
            f"the policy that was at {url}",
            f"another, by its {other[0]}, since the connection was lost",
            remedy,
        )
    return found


def actions_of(found: Any, metadata: Mapping[str, Any], url: str, step: bool) -> np.ndarray:
    """(T, D) float32, or of a step (D,).

    Raises InputError, naming the server, for what could not be executed.
    """
    chunk_size, dimensions = metadata.get("chunk_size"), metadata.get("dimensions")
    try:
        # what is too large becomes infinite, and is refused as that
        with np.errstate(over="ignore"):
            actions = np.asarray(found, np.float32)
    except (TypeError, ValueError):
        actions = np.zeros(0, np.float32)
    fits = (
        actions.ndim == 2 - step
        and actions.size
        and (step or not chunk_size or len(actions) <= chunk_size)
    )
    if (
        not fits
        or (dimensions and list(actions.shape)[-1:] != [dimensions])
        or not np.isfinite(actions).all()
    ):
        most = f"at most {chunk_size} actions" if chunk_size else "actions"
        expected = (
            f"{'an action' if step else most} of {dimensions or 'some'} finite numbers from {url}"
        )
        got = (
            f"shape {actions.shape}"
            if not fits or np.isfinite(actions).all()
            else "numbers that are not finite"
        )
        raise InputError(expected, got, f"{REMEDY}: nothing of it is executed")
    return actions
