"""The simulated arm in simulated time: its expert, its demonstrations, and that `vla0 robot --robot
sim` is the same world.
"""

import importlib.util
import time

import numpy as np
import pytest

if importlib.util.find_spec("mujoco") is None:
    pytest.skip("MuJoCo is an extra: make install", allow_module_level=True)

from worlds import looked_at

from vla0 import InputError
from vla0.core.rollout import rollout
from vla0.data.lerobot import DataConfig, Source
from vla0.robot.lerobot_robot import make_robot
from vla0.sim.arm import CAMERAS, FPS, RANGES, STATES, TASKS, UP, ArmEnv, ArmExpert
from vla0.sim.collect import CollectConfig, collect
from vla0.sim.evaluate import EvalConfig, make_env


@pytest.fixture(scope="module", params=TASKS)
def world(request):
    env = ArmEnv(request.param, image_size=56)
    yield env
    env.close()


def test_a_seed_names_an_episode(world):
    one, other, same = (looked_at(world.reset(seed)) for seed in (0, 1, 0))
    for camera in CAMERAS:
        np.testing.assert_array_equal(one.images[camera], same.images[camera])
        assert (one.images[camera] != other.images[camera]).any()
    np.testing.assert_array_equal(one.state, same.state)
    assert np.abs(one.state - other.state).max() > 1


def test_the_expert_touches_what_random_goals_seldom_do(world):
    class Random:
        def reset(self):
            self.rng = np.random.default_rng(0)

        def act(self, observation):
            return self.rng.uniform(*np.array(RANGES).T)

    assert sum(rollout(world, ArmExpert(world), seed).success for seed in range(10)) >= 9
    assert sum(rollout(world, Random(), seed).success for seed in range(10)) <= 4


def test_the_arm_goes_where_it_is_told(world):
    world.reset(2)
    goal = np.array([10.0, 5.0, 20.0, -20.0, 5.0, 30.0])
    for _ in range(15):
        observation, _ = world.step(goal)
    assert np.abs(observation.state - goal).max() < 1.5
    world.step(np.full(6, 1e9))
    np.testing.assert_allclose(
        np.degrees(world.world.data.ctrl[:5]), [high for _, high in RANGES[:5]]
    )


def test_the_expert_knows_which_joints_reach_a_place(world):
    world.reset(3)
    expert = ArmExpert(world)
    for place in ([0.2, 0.05, 0.1], [0.16, -0.1, 0.08], [0.22, 0.0, 0.12]):
        for _ in range(25):
            world.step(expert.reach(np.array(place)))
        assert np.linalg.norm(world.world.data.site("tip").xpos - place) < 0.01
    # under its shoulder, and out of reach: as near as it can
    for place in ([0.065, 0.0, 0.0074], [5.0, 0.0, 0.0]):
        assert np.isfinite(expert.reach(np.array(place))).all()


def test_demonstrations_name_what_the_robot_has(tmp_path):
    found = collect(
        CollectConfig(tasks=tuple(TASKS), env="arm", episodes=1, image_size=56),
        tmp_path / "arm",
        workers=1,
    )
    assert found == dict.fromkeys(TASKS, (1, 0))
    source = Source(
        DataConfig(dataset=str(tmp_path / "arm"), cameras=CAMERAS, state="observation.state")
    )
    fields = source.spec_fields(8)
    robot = make_robot(["--robot.type=sim"])
    assert fields["action_names"] == fields["state_names"] == STATES == tuple(robot.action_features)
    assert fields["fps"] == FPS
    assert set(fields["cameras"]) <= set(robot.observation_features)


def test_the_robot_of_a_seed_begins_as_its_episode_does(caplog):
    caplog.set_level("INFO", "vla0")
    env = make_env(EvalConfig(tasks=("touch-cube",), env="arm", image_size=112), "touch-cube")
    begun = looked_at(env.reset(10_003))
    robot = make_robot(
        ["--robot.type=sim", "--robot.width=112", "--robot.height=112", "--robot.seed=10003"]
    )
    robot.connect()
    seen = robot.get_observation()
    env.close()
    assert begun.state is not None
    # some milliseconds of gravity
    np.testing.assert_allclose([seen[name] for name in STATES], begun.state, atol=0.5)
    for camera in CAMERAS:
        assert np.abs(seen[camera].astype(int) - begun.images[camera]).mean() < 1
    expert = ArmExpert(env)
    goal = expert.reach(env.world.top("touch-cube"))
    above = expert.reach(env.world.top("touch-cube") + expert.ABOVE * UP)
    for place, seconds in ((above, 2.0), (goal, 2.0)):
        robot.send_action(dict(zip(STATES, place, strict=True)))
        until = time.monotonic() + seconds
        while time.monotonic() < until and "touch-cube" not in robot.touched:
            time.sleep(0.01)
    assert robot.touched == {"touch-cube"}
    robot.disconnect()
    assert caplog.text.count("touch-cube: done") == 1


def test_an_unknown_task_is_refused():
    with pytest.raises(InputError, match="touch-cube"):
        ArmEnv("touch-cubes")
