"""Checks of what a server sends, its metadata and its actions, before anything is done with it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vla0.errors import InputError

REMEDY = "look at the server"


def _count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _renamed(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) for name in (*value, *value.values())
    )


KINDS = {  # key of the metadata → what its value must be, if it is there
    "chunk_size": (_count, "a number from 1"), "dimensions": (_count, "a number from 1"),
    "extensions": (_names, "a list of names"), "cameras": (_renamed, "a mapping of names"),
}  # fmt: skip
# the metadata that must not change while a robot acts
SAME = ("spec", "checkpoint", "ensemble", "n_action_steps", *KINDS)


def metadata_of(metadata: dict[str, Any], previous: Mapping[str, Any], url: str) -> dict[str, Any]:
    """Check the metadata that a server sends as a client connects.

    Args:
        metadata: What the server sent.
        previous: What it sent at the connection before; empty at the first.
        url: The server's address, for error messages.

    Returns:
        The same metadata.

    Raises:
        InputError: A value is not of its kind, or the policy is not the one of the connection
            before: the robot's limits and pace belong to that one.
    """
    for name, (fits, words) in KINDS.items():
        if (value := metadata.get(name)) is not None and not fits(value):
            raise InputError(f"'{name}' of {url}: {words}", f"{str(value)[:60]!r}", REMEDY)
    if previous and (
        changed := [name for name in SAME if metadata.get(name) != previous.get(name)]
    ):
        remedy = "begin anew: limits and pace were those of the policy before"
        raise InputError(
            f"the policy that was at {url}",
            f"another, by its {changed[0]}, since the connection was lost",
            remedy,
        )
    return metadata


def actions_of(content: Any, metadata: Mapping[str, Any], url: str, step: bool) -> np.ndarray:
    """Check the actions that a server sends.

    Args:
        content: What the server sent.
        metadata: The server's metadata, which may tell `chunk_size` and `dimensions`.
        url: The server's address, for error messages.
        step: Whether it is a single step of a stream.

    Returns:
        The actions (T, D), float32; for a single step (D,).

    Raises:
        InputError: The shape is wrong, or a number is not finite.
    """
    chunk_size, dimensions = metadata.get("chunk_size"), metadata.get("dimensions")
    try:
        # a number too large for float32 becomes infinite, and is refused as such
        with np.errstate(over="ignore"):
            actions = np.asarray(content, np.float32)
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
        count = f"at most {chunk_size} actions" if chunk_size else "actions"
        expected = (
            f"{'an action' if step else count} of {dimensions or 'some'} finite numbers from {url}"
        )
        got = (
            f"shape {actions.shape}"
            if not fits or np.isfinite(actions).all()
            else "numbers that are not finite"
        )
        raise InputError(expected, got, f"{REMEDY}: nothing of it is executed")
    return actions
