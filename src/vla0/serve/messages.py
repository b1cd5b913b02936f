"""Turns a client's message into a Request: an Observation, and what else the client asks for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla0.core.spec import Observation, Spec
from vla0.errors import InputError

INSTRUCTION = ("prompt", "instruction", "task")
STATE = ("state", "observation/state", "observation.state")
OWN = "vla0/"  # prefix of the keys that extend openpi's protocol


@dataclass(frozen=True, kw_only=True)
class Request:
    """One message of a client."""

    observation: Observation
    stream: bool = False  # whether to send each step as soon as it is certain
    reset: bool | None = None  # whether a new episode begins; None: the client does not say
    number: int | None = None  # sent back with the answer


def request(
    message: Mapping[str, Any], spec: Spec, keys: Mapping[str, str], most_side: int
) -> Request:
    """Read the Request from a message.

    Args:
        message: The message, unpacked.
        spec: The Spec of the checkpoint.
        keys: camera → its name in messages, where that is none of the usual ones.
        most_side: Pixels of a picture's longer side, at most.

    Returns:
        The request.

    Raises:
        InputError: A picture is missing or too large, there is no instruction, the state is not
            numbers, or an extension is not known.
    """
    depth = {camera for camera, *_ in spec.depth}
    images = {}
    for camera in spec.cameras:
        images[camera] = _picture(
            _raw_picture(message, camera, keys), camera, camera in depth, most_side
        )
    instruction = next((message[name] for name in INSTRUCTION if name in message), None)
    if not isinstance(instruction, str) or len(instruction) > 2000:
        got = (
            "none"
            if instruction is None
            else f"{type(instruction).__name__} of {len(str(instruction))} characters"
        )
        raise InputError(
            f"an instruction of at most 2000 characters under one of {INSTRUCTION}",
            got,
            "say what the robot shall do",
        )
    state = next((message[name] for name in STATE if name in message), None)
    if state is not None:
        try:
            state = np.atleast_1d(np.asarray(state, np.float64))
        except (TypeError, ValueError):
            raise InputError("a state of numbers", type(state).__name__, "send an array") from None
    extensions = {
        name.removeprefix(OWN): value for name, value in message.items() if name.startswith(OWN)
    }
    known = {"stream": bool, "reset": bool, "number": int, "action_prefix": np.ndarray}
    for name, value in extensions.items():
        if name not in known or not isinstance(value, known[name]):
            raise InputError(
                f"one of {[OWN + n for n in known]}, of its kind",
                f"'{OWN}{name[:40]}'",
                "leave it out",
            )
    action_prefix = extensions.pop("action_prefix", None)
    observation = Observation(
        images,
        instruction,
        state if spec.state or spec.relative_dims else None,
        action_prefix=action_prefix,
    )
    return Request(observation=observation, **extensions)


def refuse_other_cameras(keys: Mapping[str, str], spec: Spec) -> None:
    """Raise InputError if `keys` names a camera that the checkpoint does not have."""
    if unknown := [camera for camera in keys if camera not in spec.cameras]:
        raise InputError(
            f"cameras of {spec.cameras}", f"'{unknown[0]}'", "name those of the checkpoint"
        )


def names(camera: str) -> Iterator[str]:
    """Yield the names that a camera's picture may have in a message."""
    for pattern in (
        "observation/{}",
        "observation/{}_image",
        "observation.images.{}",
        "observation/images/{}",
        "{}",
    ):
        yield pattern.format(camera)


def _raw_picture(message: Mapping[str, Any], camera: str, keys: Mapping[str, str]) -> Any:
    """Return a camera's picture from a message, or raise InputError if there is none."""
    nested = message.get("images")
    if camera not in keys and isinstance(nested, Mapping) and camera in nested:
        return nested[camera]
    for name in [keys[camera]] if camera in keys else names(camera):
        if name in message:
            return message[name]
    arrays = [
        name for name, value in message.items() if isinstance(value, np.ndarray) and value.ndim >= 2
    ]
    arrays += [f"images/{name}" for name in nested] if isinstance(nested, Mapping) else []
    expected = (
        f"'{keys[camera]}'" if camera in keys else f"camera '{camera}' ({', '.join(names(camera))})"
    )
    raise InputError(
        expected,
        f"pictures {[name[:60] for name in arrays[:8]]}",
        "rename it, or serve with --key CAMERA=NAME",
    )


def _picture(value: Any, camera: str, depth: bool, most_side: int) -> np.ndarray:
    """Check a picture (h, w, 3) or (history, h, w, 3); channels may come first, as in openpi."""
    if not isinstance(value, np.ndarray) or value.ndim not in ((2, 3) if depth else (3, 4)):
        got = f"shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise InputError(f"a picture (h, w, 3) of '{camera}'", got, "send an array")
    if max(value.shape) > most_side:
        raise InputError(
            f"pictures of at most {most_side} pixels a side",
            f"shape {value.shape}",
            "make them smaller first",
        )
    if not depth and value.shape[-1] != 3 and value.shape[-3] == 3:
        value = np.moveaxis(value, -3, -1)
    return value
