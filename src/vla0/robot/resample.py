"""Converts a policy's chunks from its control rate to that of the loop."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from vla0.core.relative import Turns, shortest, wrapped
from vla0.core.spec import Observation


class Resampled:
    """A policy at the loop's control rate: it interpolates between actions linearly.

    Actions must be positions: changes would be executed more or fewer times than they should. The
    last action is kept for its full period. An action prefix is sampled at the policy's own rate
    before it is passed on.

    Args:
        predict: Takes an observation and returns a chunk (H, D) at `fps`.
        fps: Control rate of the policy, Hz.
        loop_fps: Control rate of the loop, Hz.
        chunk_size: Steps of the policy's chunk.
        periodic: Dimensions that wrap, of the Spec.
    """

    def __init__(
        self,
        predict: Callable[[Observation], np.ndarray],
        fps: float,
        loop_fps: float,
        chunk_size: int,
        periodic: Turns = (),
    ):
        self.periodic = periodic
        self.predict, self.fps, self.loop_fps = predict, fps, loop_fps
        # steps of the loop for which a chunk lasts
        self.chunk_size = max(1, math.ceil(chunk_size * loop_fps / fps - 1e-6))

    def __call__(self, observation: Observation) -> np.ndarray:
        """Return the chunk (chunk_size, D) at the loop's rate."""
        if observation.action_prefix is not None and len(observation.action_prefix):
            held = (
                math.floor((len(observation.action_prefix) - 1) * self.fps / self.loop_fps + 1e-6)
                + 1
            )
            action_prefix = sampled(
                observation.action_prefix, self.loop_fps, self.fps, held, self.periodic
            )
            observation = replace(observation, action_prefix=action_prefix)
        return sampled(
            self.predict(observation), self.fps, self.loop_fps, self.chunk_size, self.periodic
        )


def sampled(
    actions: np.ndarray, fps: float, other_fps: float, count: int, periodic: Turns = ()
) -> np.ndarray:
    """Sample actions at the instants of another rate, linearly; the last one is repeated.

    Args:
        actions: (T, D).
        fps: Their rate, Hz.
        other_fps: The other rate, Hz.
        count: Instants of the other rate, from the first action on.
        periodic: Dimensions that wrap, of the Spec.

    Returns:
        The actions (count, D), of the same dtype.
    """
    place = np.minimum(np.arange(count) * fps / other_fps, len(actions) - 1)
    before = np.minimum(np.floor(place + 1e-6).astype(int), len(actions) - 1)
    after = np.minimum(before + 1, len(actions) - 1)
    share = np.clip(place - before, 0, 1)[:, None]
    between = actions[before] + shortest(actions[after] - actions[before], periodic) * share
    return wrapped(between, periodic).astype(np.asarray(actions).dtype)
