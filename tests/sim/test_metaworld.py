"""The real simulator, its expert, and the dataset they make."""

import importlib.util
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_recipe
from worlds import looked_at

if importlib.util.find_spec("metaworld") is None:
    pytest.skip("Meta-World is an extra: make install", allow_module_level=True)

from vla0 import InputError
from vla0.core.rollout import rollout
from vla0.data.lerobot import DataConfig, Source
from vla0.sim.collect import CollectConfig, NoisyEnv, collect
from vla0.sim.experiment import measured
from vla0.sim.metaworld import FIRST_SEED, MetaWorldEnv, MetaWorldExpert
from vla0.train.config import TrainConfig, build
from vla0.train.run import main

TASK = "coffee-button-v3"


@pytest.fixture(scope="module")
def world():
    env = MetaWorldEnv(TASK, image_size=56)
    yield env
    env.close()


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collected")
    return [
        (
            collect(
                CollectConfig(tasks=(TASK,), episodes=2, image_size=56), folder / name, workers=2
            ),
            folder / name,
        )[1]
        for name in ("one", "same")
    ]


def test_a_seed_names_an_episode(world):
    one, other, same = (world.reset(seed).images["front"].copy() for seed in (0, 1, 0))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_what_nobody_looks_at_is_not_drawn_and_what_is_drawn_late_is_the_same(world, monkeypatch):
    def after_steps(look):
        now = world.reset(4)
        for step in range(6):
            if look:
                dict(now.images)
            now, _ = world.step(np.sin(np.arange(4) + step))
        return now

    each = after_steps(look=True).images["front"]
    draw, drawn = world.renderer.render, []
    monkeypatch.setattr(world.renderer, "render", lambda: drawn.append(1) or draw())
    last = after_steps(look=False)
    assert not drawn
    sent = pickle.loads(pickle.dumps(last))
    np.testing.assert_array_equal(sent.images["front"], each)
    assert (type(sent.images), len(drawn)) == (dict, 1)


def test_a_picture_of_the_past_is_refused(world):
    before = world.reset(4)
    world.step(np.ones(4))
    with pytest.raises(InputError, match="look before you act"):
        before.images["front"]
    before = world.reset(4)
    world.reset(5)
    with pytest.raises(InputError, match="look before you act"):
        before.images["front"]


def test_an_observation_is_what_the_spec_calls_one(world):
    observation = world.reset(0)
    frame = observation.images["front"]
    assert (frame.shape, frame.dtype, frame.std() > 10) == ((56, 56, 3), np.uint8, True)
    assert observation.state.shape == (4,)
    assert observation.instruction == "push the button of the coffee machine"


def test_the_expert_solves_what_random_actions_do_not(world):
    class Random:
        def reset(self):
            self.rng = np.random.default_rng(0)

        def act(self, observation):
            return self.rng.uniform(-1, 1, 4)

    assert [rollout(world, MetaWorldExpert(world), seed).success for seed in range(3)] == [True] * 3
    assert not any(rollout(world, Random(), seed).success for seed in range(2))


def test_noise_disturbs_the_world_and_not_the_label(world):
    noisy = NoisyEnv(world, np.random.default_rng(0), share=1.0, scale=0.5)
    calm, disturbed = (rollout(env, MetaWorldExpert(world), 0) for env in (world, noisy))
    assert (np.abs(disturbed.actions) <= 1).all()
    assert calm.steps != disturbed.steps or (calm.actions != disturbed.actions).any()


def test_a_start_above_places_the_hand_by_the_seed():
    above = MetaWorldEnv(TASK, image_size=56, start="above")
    hands = [above.reset(seed).state[:3] for seed in (0, 1, 0)]
    above.close()
    np.testing.assert_array_equal(hands[0], hands[2])
    assert 0.001 < np.abs(hands[0] - hands[1]).max() < 0.05


def test_a_slower_rate_repeats_the_action(world):
    slow = MetaWorldEnv(TASK, image_size=56, fps=40)
    pushing = np.array([0.3, -0.2, -0.5, 1.0])
    for env in (world, slow):
        env.reset(3)
    world.step(pushing)
    observation, _ = world.step(pushing)
    same = looked_at(slow.step(pushing)[0])
    unseen, _ = slow.step(pushing)
    slow.close()
    with pytest.raises(InputError, match="look before you act"):
        unseen.images["front"]
    np.testing.assert_array_equal(observation.state, same.state)
    np.testing.assert_array_equal(observation.images["front"], same.images["front"])
    assert (world.fps, slow.fps) == (80, 40)
    with pytest.raises(InputError, match="whole part of 80"):
        MetaWorldEnv(TASK, fps=30)


def test_an_unknown_task_is_refused():
    with pytest.raises(InputError, match="start of"):
        MetaWorldEnv(TASK, start="anywhere")
    with pytest.raises(InputError, match="Meta-World task"):
        MetaWorldEnv("make-coffee")


def test_lerobot_itself_opens_what_is_collected(collected):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/one", root=collected[0], video_backend="pyav")
    assert (dataset.num_episodes, dataset.fps, dataset.meta.info.codebase_version) == (
        2,
        80,
        "v3.0",
    )
    item = dataset[0]
    assert item["observation.images.front"].shape == (3, 56, 56)
    assert item["action"].shape == (4,)
    assert item["task"] == "push the button of the coffee machine"
    assert {"min", "max", "q01", "q99"} <= set(dataset.meta.stats["action"])


def test_the_same_arguments_give_the_same_dataset(collected):
    one, same = (
        Source(
            DataConfig(
                dataset=str(folder),
                cameras={"front": "observation.images.front"},
                state="observation.state",
            )
        )
        for folder in collected
    )
    np.testing.assert_array_equal(one.actions, same.actions)
    np.testing.assert_array_equal(one.states, same.states)
    for row in (0, len(one) - 1):
        frames = [source.sample(row, 1, 1).observation.images["front"] for source in (one, same)]
        np.testing.assert_array_equal(*frames)


def test_what_is_stored_is_what_the_expert_saw(collected, world):
    """The first frame of the first episode is the simulator's, pixel for pixel."""
    source = Source(
        DataConfig(dataset=str(collected[0]), cameras={"front": "observation.images.front"})
    )
    np.testing.assert_array_equal(
        source.sample(0, 1, 1).observation.images["front"], world.reset(0).images["front"]
    )


def test_a_recipe_may_ask_for_the_simulator_at_each_save(collected, tmp_path):
    recipe = make_recipe(
        collected[0],
        tmp_path / "run",
        num_steps=2,
        simulator={"tasks": [TASK], "episodes": 1, "max_steps": 3, "image_size": 56},
    )
    recipe["data"] = {
        "dataset": str(collected[0]),
        "cameras": {"front": "observation.images.front"},
    }
    config = build(TrainConfig, recipe, "test")
    main(config, measured(config.simulator))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line == {"step": "step-000002", "success": 0.0}
    assert (tmp_path / "run" / "simulator" / "step-000002" / "episodes.jsonl").exists()


def test_an_episode_that_an_interrupted_run_left_is_not_played_again(tmp_path, monkeypatch):
    from vla0.sim import collect as module

    config = CollectConfig(tasks=(TASK,), episodes=1, image_size=56)
    played = module.demonstrate(config, TASK, 0, tmp_path)
    failed = module.demonstrate(
        replace(config, noise_share=1.0, noise_scale=50.0), TASK, 1, tmp_path
    )
    monkeypatch.setattr(module, "_world", None)
    again = module.demonstrate(config, TASK, 0, tmp_path)
    assert again.instruction == played.instruction
    for one, other in ((again.actions, played.actions), (again.states, played.states)):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(again.images["front"], played.images["front"])
    assert failed is None
    assert module.demonstrate(config, TASK, 1, tmp_path) is None


def test_nothing_is_overwritten_and_evaluation_seeds_are_kept_free(collected, tmp_path):
    with pytest.raises(InputError, match="which exists"):
        collect(CollectConfig(tasks=(TASK,), episodes=1), collected[0])
    with pytest.raises(InputError, match="evaluation"):
        CollectConfig(tasks=(TASK,), episodes=1, seed=FIRST_SEED)
    assert json.loads((collected[0] / "meta" / "info.json").read_text())["total_episodes"] == 2
    assert list(tmp_path.iterdir()) == []
