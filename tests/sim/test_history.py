"""Laws of a world that remembers."""

import numpy as np
import pytest

from vla0.core.spec import Observation
from vla0.sim.history import Remembering


class Counting:
    """A world whose pictures and states say how many steps have passed."""

    fps, max_steps = 10.0, 5

    def _look(self):
        return Observation(
            {"front": np.full((2, 2, 3), self.now, np.uint8)}, "count", np.full(3, self.now, float)
        )

    def reset(self, seed):
        self.now = seed
        return self._look()

    def step(self, action):
        self.now += 1
        return self._look(), self.now > 12

    def close(self):
        self.now = -1


@pytest.mark.parametrize("states", [False, True])
def test_the_past_comes_oldest_first_and_the_first_picture_stands_for_what_was_before(states):
    world = Counting()
    env = Remembering(world, 3, states)
    assert (env.fps, env.max_steps) == (10.0, 5)
    for seed, expected in ((10, [10, 10, 10]), (20, [20, 20, 20])):  # nothing is left of before
        observation = env.reset(seed)
        assert observation.images["front"][:, 0, 0, 0].tolist() == expected
        for last in (
            [seed, seed, seed + 1],
            [seed, seed + 1, seed + 2],
            [seed + n for n in (1, 2, 3)],
        ):
            observation, done = env.step(np.zeros(2))
            assert observation.images["front"][:, 0, 0, 0].tolist() == last
            assert observation.images["front"].shape == (3, 2, 2, 3)
            assert done == (last[-1] > 12)
            state = observation.state
            assert state[..., 0].tolist() == (last if states else last[-1])
    env.close()
    assert world.now == -1
