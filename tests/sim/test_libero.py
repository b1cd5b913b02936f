"""LIBERO by the official protocol, with the real simulator where its meshes are at hand."""

import importlib.util
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

if importlib.util.find_spec("libero") is None:
    pytest.skip("LIBERO is an extra: make install", allow_module_level=True)

from vla0 import InputError
from vla0.sim import libero, libero_files
from vla0.sim.evaluate import EvalConfig, evaluate
from vla0.sim.libero import LiberoEnv

MESHES = Path(
    os.environ.get(libero_files.ASSETS, Path(__file__).parents[3] / "shared" / "libero-assets")
)
TASK = "libero_object/3"
needs_meshes = pytest.mark.skipif(
    not MESHES.is_dir(), reason=f"LIBERO's meshes are not here; {libero_files.ASSETS} may name them"
)


@pytest.fixture(scope="module")
def world():
    """One world for this file: half a minute to build on a busy machine."""
    os.environ[libero_files.ASSETS] = str(MESHES)
    env = LiberoEnv(TASK)
    yield env
    env.close()


@pytest.fixture(scope="module")
def small():
    """The same task drawn quickly, for what does not depend on the pictures."""
    os.environ[libero_files.ASSETS] = str(MESHES)
    env = LiberoEnv(TASK, image_size=64, quick=True)
    yield env
    env.close()


def random_steps(env, count, seed=0):
    rng = np.random.default_rng(seed)
    return [env.step(rng.uniform(-1, 1, 7)) for _ in range(count)]


def looked_at(observation):
    return replace(observation, images=dict(observation.images))


def same(one, other):
    return (
        all((one.images[camera] == other.images[camera]).all() for camera in one.images)
        and (one.state == other.state).all()
    )


def test_a_suite_has_ten_tasks_and_all_has_forty():
    for suite in ("spatial", "object", "goal", "10", "long", "libero_goal"):
        assert len(libero_files.tasks(suite)) == 10
    assert len(set(libero_files.tasks("all"))) == 40
    assert len(libero_files.tasks("90")) == 90
    with pytest.raises(InputError, match="did you mean 'spatial'"):
        libero_files.tasks("special")


def test_a_task_has_a_name_a_number_and_a_sentence():
    milk = "libero_object/pick_up_the_milk_and_place_it_in_the_basket"
    assert milk in libero_files.tasks("object")
    assert (
        libero_files.task_named(milk)
        == libero_files.task_named(f"object/{libero_files.tasks('object').index(milk)}")
        == milk
    )
    assert libero_files.instruction(milk) == "pick up the milk and place it in the basket"
    assert libero_files.instruction(libero_files.task_named("long/0")) == (
        "put both the alphabet soup and the tomato sauce in the basket"
    )
    with pytest.raises(InputError, match="the_milk_and"):
        libero_files.task_named("object/pick_up_the_silk")
    with pytest.raises(InputError, match="below 10"):
        libero_files.task_named("object/10")


def test_evaluation_starts_at_the_first_initial_state_and_has_fifty():
    config = EvalConfig(tasks=("object/0",), env="libero", episodes=50)
    assert (config.first_seed, config.tasks) == (0, (libero_files.tasks("object")[0],))
    with pytest.raises(InputError, match="50 initial states"):
        EvalConfig(tasks=("object/0",), env="libero", episodes=51)


def test_which_tasks_have_an_expert():
    counts = {
        suite: sum(map(libero_files.has_expert, libero_files.tasks(suite)))
        for suite in ("spatial", "object", "goal", "long")
    }
    assert counts == {"spatial": 9, "object": 10, "goal": 7, "long": 6}
    assert libero_files.goals(libero_files.task_named("goal/turn_on_the_stove")) == {"turnon"}


def test_missing_meshes_are_one_clear_message(tmp_path, monkeypatch):
    monkeypatch.setenv(libero_files.ASSETS, str(tmp_path))
    with pytest.raises(InputError, match="LIBERO's meshes"):
        libero_files.assets()


def test_a_file_of_arrays_can_hold_nothing_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "good", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(np.arange(3.0)))
    np.testing.assert_array_equal(libero_files.initial_states(tmp_path / "good"), [0, 1, 2])
    with zipfile.ZipFile(tmp_path / "bad", "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(InputError, match=r"os\.system"):
        libero_files.initial_states(tmp_path / "bad")


@needs_meshes
def test_nothing_is_asked_at_a_prompt(tmp_path):
    """A new machine: no configuration, nobody at the keyboard."""
    code = "from vla0.sim.libero_files import environment; environment(); print('ready')"
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("LIBERO_CONFIG_PATH", "XDG_CACHE_HOME")
    }
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env={**clean, "HOME": str(tmp_path), libero_files.ASSETS: str(MESHES)},
    )  # fmt: skip
    assert done.stdout.strip() == "ready", done.stderr
    assert "torch" not in done.stderr


@needs_meshes
def test_the_command_names_the_nearest_suite_and_task(monkeypatch, capsys):
    from vla0 import cli

    monkeypatch.setenv(libero_files.ASSETS, str(MESHES))
    for words, near in (
        (["--suite", "objekt"], "'object'"),
        (["--task", "goal/turn_on_the_oven"], "'libero_goal/turn_on_the_stove'"),
    ):
        monkeypatch.setattr(
            sys, "argv", ["vla0", "eval", "--checkpoint", "none", "--env", "libero", *words]
        )
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        assert f"did you mean {near}" in capsys.readouterr().err


@needs_meshes
def test_stand_in_meshes_are_recorded_and_warned_about(world, caplog):
    found = libero_files.provenance()
    standins = MESHES / "STANDINS.txt"
    assert found["mujoco"] == libero_files.MUJOCO
    assert (found["stand-in assets"] > 0) == standins.is_file() == ("stand-ins" in caplog.text)


@needs_meshes
def test_an_observation_is_what_the_public_datasets_hold(world):
    observation = world.reset(0)
    assert {camera: frame.shape for camera, frame in observation.images.items()} == {
        "agentview": (256, 256, 3), "wrist": (256, 256, 3),
    }  # fmt: skip
    assert all(
        frame.dtype == np.uint8 and frame.std() > 10 for frame in observation.images.values()
    )
    assert observation.state.shape == (8,)
    assert (world.fps, world.max_steps) == (20.0, 280)


@needs_meshes
def test_an_episode_is_the_official_one(world):
    """Against hf-libero driven by hand as the benchmark's own scripts do."""
    suite, name = world.task.split("/")
    official = libero_files.environment()(
        bddl_file_name=str(libero_files.package() / "bddl_files" / suite / f"{name}.bddl"),
        camera_heights=256,
        camera_widths=256,
    )
    official.seed(7)
    official.reset()
    raw = official.set_init_state(world.states[4])
    for _ in range(10):
        raw, *_ = official.step([0.0] * 6 + [-1.0])
    random_steps(world, 3)
    ours = world.reset(4)
    rng = np.random.default_rng(1)
    for _ in range(4):
        np.testing.assert_array_equal(ours.images["agentview"], raw["agentview_image"][::-1, ::-1])
        np.testing.assert_array_equal(
            ours.images["wrist"], raw["robot0_eye_in_hand_image"][::-1, ::-1]
        )
        np.testing.assert_array_equal(ours.state[:3], raw["robot0_eef_pos"].astype(np.float32))
        action = rng.uniform(-1, 1, 7)
        raw, *_ = official.step([*action[:6], 1.0 if action[6] > 0 else -1.0])
        ours, done = world.step(action)
        assert not done
    official.sim._render_context_offscreen.gl_ctx.make_current()
    official.close()


@needs_meshes
def test_an_episode_does_not_depend_on_those_before(small):
    first = looked_at(small.reset(2))
    after = looked_at(random_steps(small, 5)[-1][0])
    other = looked_at(small.reset(60))
    random_steps(small, 5, seed=1)
    assert same(small.reset(2), first)
    assert same(random_steps(small, 5)[-1][0], after)
    assert not same(other, first)
    assert same(small.reset(60), other)


@needs_meshes
def test_pictures_are_drawn_when_looked_at_and_of_the_present_only(small):
    before = small.reset(2)
    drawn = dict(small.reset(2).images)
    after, _ = small.step(np.ones(7))
    assert not np.array_equal(after.images["wrist"], drawn["wrist"])
    with pytest.raises(InputError, match="look before you act"):
        before.images["wrist"]
    sent = pickle.loads(pickle.dumps(after))
    assert same(sent, after)
    assert type(sent.images) is dict


@needs_meshes
def test_two_worlds_in_one_process_do_not_draw_into_each_other(world, small):
    alone = [looked_at(env.reset(1)) for env in (world, small)]
    together = world.reset(1)
    random_steps(small, 1)
    assert same(together, alone[0])
    assert same(small.reset(1), alone[1])


@needs_meshes
def test_the_gripper_is_open_or_closed(small):
    small.reset(0)
    for value, fingers in ((0.01, "close"), (-0.01, "open")):
        for _ in range(20):
            observation, _ = small.step(np.r_[np.zeros(6), value])
        gap = np.abs(observation.state[6:]).sum()
        assert (gap < 0.01) == (fingers == "close")


@pytest.mark.slow
@needs_meshes
def test_the_episode_of_a_killed_worker_is_run_again_and_counted_once(tmp_path, monkeypatch):
    """Killed while it acts, as the system does where memory runs out."""
    monkeypatch.setenv(libero_files.ASSETS, str(MESHES))
    config = EvalConfig(
        tasks=(TASK,),
        env="libero",
        episodes=3,
        n_action_steps=8,
        ensemble="none",
        max_steps=24,
        image_size=64,
    )
    killed = []

    def still(observations):
        if len(list(tmp_path.glob("videos/*.mp4"))) == 1 and not killed:
            killed.extend(child.pid for child in multiprocessing.active_children()[:1])
            os.kill(killed[0], signal.SIGKILL)
        return np.zeros((len(observations), 8, 7), np.float32)

    lines = evaluate({"policy": still}, 8, config, tmp_path, 1)
    assert killed
    assert [(line["seed"], line["error"] is None) for line in lines if line["error"]] == [
        (1, False)
    ]
    assert sorted((line["seed"], line["steps"]) for line in lines if line["error"] is None) == [
        (0, 24),
        (1, 24),
        (2, 24),
    ]


@pytest.mark.slow
@needs_meshes
def test_demonstrations_have_the_public_schema_and_an_interrupted_collection_goes_on(
    tmp_path, monkeypatch
):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from vla0.sim import collect as module

    monkeypatch.setenv(libero_files.ASSETS, str(MESHES))
    config = module.CollectConfig(
        tasks=(TASK,), env="libero", episodes=2, image_size=64, options={"quick": True}
    )
    stream = module._stream

    def interrupted(*arguments):
        episodes = stream(*arguments)
        yield next(episodes)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.collect(config, tmp_path / "set", 1)
    left = {file: file.stat().st_mtime_ns for file in tmp_path.glob(".set.episodes-*/*.npz")}
    assert left
    monkeypatch.setattr(module, "_stream", stream)
    assert module.collect(config, tmp_path / "set", 1) == {libero_files.task_named(TASK): (2, 0)}
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    dataset = LeRobotDataset("local/set", root=tmp_path / "set", video_backend="pyav")
    shapes = {
        key: tuple(feature["shape"])
        for key, feature in dataset.meta.features.items()
        if "." in key or key == "action"
    }
    assert shapes == {
        "observation.images.image": (64, 64, 3), "observation.images.image2": (64, 64, 3),
        "observation.state": (8,), "action": (7,),
    }  # fmt: skip
    assert (dataset.num_episodes, dataset.fps, dataset.meta.info.codebase_version) == (
        2,
        20,
        "v3.0",
    )
    assert dataset[0]["task"] == libero_files.instruction(libero_files.task_named(TASK))


@needs_meshes
def test_an_action_of_another_length_is_refused(small):
    with pytest.raises(InputError, match="7 numbers"):
        small.step(np.zeros(4))


@needs_meshes
def test_the_expert_solves_a_random_placement(small):
    from vla0.core.rollout import rollout

    episode = rollout(small, libero.SIMULATOR.make_expert(small), 50)
    assert episode.success
    assert episode.steps < 200
