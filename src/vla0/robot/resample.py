"""A policy of one control rate, executed by a loop of another."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from vla0.core.relative import Turns, shortest, wrapped
from vla0.core.spec import Observation


class Resampled:
    """predict: (observation) → chunk (H, D) at `fps`; called, it gives the chunk at `loop_fps`,
    between the actions linear.

    For actions that are positions: those that are changes would be executed more often, or less.
    The last one is kept for as long as it was meant to last. What is committed is asked about at
    the policy's own instants.
    """

    def __init__(
        self,
        predict: Callable[[Observation], np.ndarray],
        fps: float,
        loop_fps: float,
        chunk_size: int,
        periodic: Turns = (),
    ):
        """periodic: of the Spec."""
        self.periodic = periodic
        self.predict, self.fps, self.loop_fps = predict, fps, loop_fps
        # steps of the loop that a chunk lasts
        self.chunk_size = max(1, math.ceil(chunk_size * loop_fps / fps - 1e-6))

    def __call__(self, observation: Observation) -> np.ndarray:
        """(chunk_size, D) at the loop's rate."""
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
    """(count, D): actions (T, D) of one rate as they are at the instants of another; after the
    last, the last.
    """
    place = np.minimum(np.arange(count) * fps / other_fps, len(actions) - 1)
    before = np.minimum(np.floor(place + 1e-6).astype(int), len(actions) - 1)
    after = np.minimum(before + 1, len(actions) - 1)
    share = np.clip(place - before, 0, 1)[:, None]
    between = actions[before] + shortest(actions[after] - actions[before], periodic) * share
    return wrapped(between, periodic).astype(np.asarray(actions).dtype)
