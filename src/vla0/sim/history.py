"""A world that remembers: for policies that see past pictures beside the present ones."""

from collections import deque
from dataclasses import replace

import numpy as np

from vla0.core.rollout import Env
from vla0.core.spec import Observation


class Remembering:
    """An Env whose observations hold the last pictures too, the oldest first.

    At an episode's start the first picture stands for those before it, as on a robot.

    Args:
        env: The Env.
        count: Pictures of each camera, the present one included.
        states: Whether the last states are given too, (count, S) in place of (S,).
    """

    def __init__(self, env: Env, count: int, states: bool):
        self.env, self.states = env, states
        self.fps, self.max_steps = env.fps, env.max_steps
        self.last: deque[Observation] = deque(maxlen=count)

    def reset(self, seed: int) -> Observation:
        """Start the episode of a seed."""
        first = self._kept(self.env.reset(seed))
        self.last.extend([first] * (self.last.maxlen or 1))
        return self._together()

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Execute a (D,) action for a tick."""
        observation, done = self.env.step(action)
        self.last.append(self._kept(observation))
        return self._together(), done

    def close(self) -> None:
        """Release what the world holds."""
        self.env.close()

    def _kept(self, observation: Observation) -> Observation:
        """Look at the pictures now: a simulator may draw them as long as they are the present."""
        return replace(observation, images=dict(observation.images))

    def _together(self) -> Observation:
        """Return the present observation with the pictures of all."""
        now = self.last[-1]
        images = {camera: np.stack([o.images[camera] for o in self.last]) for camera in now.images}
        if now.state is None or not self.states:
            return replace(now, images=images)
        return replace(now, images=images, state=np.stack([np.asarray(o.state) for o in self.last]))
