import numpy as np
import pytest

from vla0 import InputError, Observation
from vla0.core.rollout import ChunkPolicy, rollout


class Corridor:
    """A world of one number: done when it passes 3."""

    fps, max_steps = 10.0, 6

    def reset(self, seed):
        self.place = float(seed)
        return self._observe()

    def step(self, action):
        self.place += float(action[0])
        return self._observe(), self.place > 3

    def close(self):
        pass

    def _observe(self):
        return Observation({}, "go", np.array([self.place]))


def steady(value, chunk_size=4):
    asked = []

    def predict(observation):
        asked.append(float(observation.state[0]))
        return np.full((chunk_size, 1), value, np.float32)

    return predict, asked


def test_an_episode_ends_with_success_or_with_its_steps():
    predict, _ = steady(1.0)
    episode = rollout(Corridor(), ChunkPolicy(predict, 4), 0)
    assert (episode.success, episode.steps) == (True, 4)
    predict, _ = steady(0.1)
    episode = rollout(Corridor(), ChunkPolicy(predict, 4), 0)
    assert (episode.success, episode.steps) == (False, 6)


@pytest.mark.parametrize(("n_action_steps", "queries"), [(1, 6), (2, 3), (3, 2)])
def test_a_query_comes_every_replan_steps(n_action_steps, queries):
    predict, asked = steady(0.1)
    episode = rollout(Corridor(), ChunkPolicy(predict, 4, n_action_steps), 0)
    assert len(asked) == queries
    assert [step for step, _ in episode.chunks] == list(range(0, 6, n_action_steps))


def test_an_episode_starts_from_nothing():
    predict, _ = steady(0.5)
    policy = ChunkPolicy(predict, 4)
    first, second = (rollout(Corridor(), policy, 0) for _ in range(2))
    np.testing.assert_array_equal(first.actions, second.actions)
    assert len(first.chunks) == len(second.chunks)


def test_an_action_that_is_not_finite_is_never_executed():
    predict, _ = steady(np.nan)
    world = Corridor()
    with pytest.raises(InputError, match="nothing was executed"):
        rollout(world, ChunkPolicy(predict, 4), 0)
    assert world.place == 0


def test_what_is_recorded_is_what_was_seen_and_done():
    predict, _ = steady(1.0)
    seen = []
    episode = rollout(
        Corridor(),
        ChunkPolicy(predict, 4),
        0,
        lambda o, a: seen.append((float(o.state[0]), float(a[0]))),
    )
    assert seen == [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (3.0, 1.0)]
    assert episode.actions.ravel().tolist() == [1.0] * 4
