"""LeRobot's policies in our evaluator: the same chunks as LeRobot's own, and what does not fit."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch

if importlib.util.find_spec("metaworld") is None or importlib.util.find_spec("lerobot") is None:
    pytest.skip("Meta-World and LeRobot are extras: make install", allow_module_level=True)

from conftest import make_spec
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.factory import make_pre_post_processors

from vla0 import InputError, cli
from vla0.core.spec import Observation
from vla0.policy import VLA0
from vla0.sim import foreign
from vla0.sim.compare import compare
from vla0.sim.evaluate import EvalConfig, Past
from vla0.sim.experiment import trial
from vla0.sim.results import read_episodes
from vla0.sim.simulator import simulator

FRONT, SIDE = "observation.images.front", 56
CONFIG = EvalConfig(tasks=("reach-v3",), episodes=2, max_steps=5, image_size=SIDE)
OWN = ["n_action_steps", "ensemble"]
WORLD = simulator("metaworld")


def features(actions=4, states=4, pictures=(FRONT,)):
    given = {name: PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)) for name in pictures}
    if states:
        given["observation.state"] = PolicyFeature(FeatureType.STATE, (states,))
    return {
        "input_features": given,
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (actions,))},
        "device": "cpu",
    }


def act(folder, **changes):
    """The folder of a tiny ACT, as lerobot-train leaves it."""
    config = ACTConfig(
        **features(**changes), chunk_size=6, n_action_steps=3, dim_model=32, n_heads=2,
        dim_feedforward=32, n_encoder_layers=1, use_vae=False, pretrained_backbone_weights=None,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = ACTPolicy(config)
    spread = {"mean": torch.full((4,), 0.5), "std": torch.full((4,), 2.0)}
    pictures = {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}
    statistics = dict.fromkeys(config.image_features, pictures)
    statistics |= {"action": spread, "observation.state": spread}
    policy.save_pretrained(folder)
    for part in make_pre_post_processors(config, dataset_stats=statistics):
        part.save_pretrained(folder)
    return f"lerobot:{folder}"


@pytest.fixture(scope="module")
def tiny_act(tmp_path_factory):
    return act(tmp_path_factory.mktemp("act") / "policy")


def looks(count):
    rng = np.random.default_rng(0)
    return [
        Observation(
            {"front": rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)},
            "reach the goal",
            rng.normal(size=4).astype(np.float32),
        )
        for _ in range(count)
    ]


def test_its_chunks_are_those_of_lerobot(tiny_act):
    folder = tiny_act.removeprefix("lerobot:")
    loaded = foreign.load(tiny_act, WORLD, {}, "cpu")
    assert (loaded.chunk_size, loaded.n_action_steps, loaded.image_size) == (6, 3, SIDE)
    chunks = loaded.predict(looks(3))
    assert chunks.shape == (3, 6, 4)
    policy = ACTPolicy.from_pretrained(folder)
    before, after = make_pre_post_processors(policy.config, folder)
    for look, chunk in zip(looks(3), chunks, strict=True):
        policy.reset()
        frame = torch.from_numpy(look.images["front"]).permute(2, 0, 1).float() / 255
        batch = {FRONT: frame[None], "observation.state": torch.from_numpy(look.state)[None]}
        batch["task"] = [look.instruction]
        for step in range(3):  # as lerobot-eval acts
            action = after(policy.select_action(before(dict(batch))))[0]
            np.testing.assert_allclose(chunk[step], action.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_an_evaluation_is_by_its_own_recipe_beside_baselines_and_goes_on(tiny_act, tmp_path):
    loaded = foreign.load(tiny_act, WORLD, {}, "cpu")
    lines = foreign.trial(loaded, "act", CONFIG, tmp_path, OWN, ["blank", "random"], 1)
    assert sorted({line["policy"] for line in lines}) == ["blank", "policy", "random"]
    settings = json.loads((tmp_path / "evaluation.json").read_text())
    assert (settings["n_action_steps"], settings["ensemble"]) == (3, "none")
    assert (tmp_path / "report.html").is_file()
    again = foreign.trial(loaded, "act", CONFIG, tmp_path, OWN, ["blank", "random"], 1)
    assert again == lines == read_episodes(tmp_path / "episodes.jsonl")


def test_a_checkpoint_of_ours_acts_the_same_through_lerobot(policy, tmp_path):
    spec = make_spec(
        low=(-1.0,) * 4, high=(1.0,) * 4, cameras=("front",), state=None, fps=80.0, action_names=None
    )  # fmt: skip
    VLA0(policy.model, policy.processor, spec).save_pretrained(tmp_path / "checkpoint")
    name = f"lerobot:{tmp_path / 'checkpoint'}"
    loaded = foreign.load(name, WORLD, {}, "cpu")
    ours = VLA0.from_pretrained(tmp_path / "checkpoint")
    looked = looks(2)
    np.testing.assert_allclose(loaded.predict(looked), ours.predict_batch(looked), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "keys", "message"),
    [
        ({"actions": 7}, {}, "actions of 4 numbers, as the simulator has; got 7"),
        ({"states": 8}, {}, "a state of 4 numbers"),
        ({"pictures": ("observation.image",)}, {}, "name them: --key CAMERA=PICTURE"),
        ({"pictures": (FRONT, "observation.images.wrist")}, {}, "observation.images.wrist"),
        ({}, {"front": "observation.image"}, "name them"),
        ({}, {"back": FRONT}, "cameras of .*; got 'back'"),
    ],
)
def test_what_does_not_fit_the_simulator_is_refused(tmp_path, changes, keys, message):
    name = act(tmp_path / "policy", **changes)
    with pytest.raises(InputError, match=message):
        foreign.load(name, WORLD, keys, "cpu")


def test_a_picture_of_another_name_is_found_by_its_key(tmp_path):
    name = act(tmp_path / "policy", pictures=("observation.image",))
    loaded = foreign.load(name, WORLD, {"front": "observation.image"}, "cpu")
    assert loaded.predict(looks(1)).shape == (1, 6, 4)


def test_two_pictures_never_share_a_name(monkeypatch, tmp_path):
    """The wrist's own default is that of the picture that the view from outside is given as."""
    monkeypatch.setattr(WORLD.__class__, "cameras", {"front": FRONT, "wrist": "observation.image"})
    name = act(tmp_path / "policy", pictures=("observation.image",))
    loaded = foreign.load(name, WORLD, {"front": "observation.image"}, "cpu")
    looked = looks(1)
    dark = {"wrist": np.zeros((SIDE, SIDE, 3), np.uint8)}
    both = [Observation({**looked[0].images, **dark}, looked[0].instruction, looked[0].state)]
    np.testing.assert_array_equal(loaded.predict(both), loaded.predict(looked))


def test_statistics_config_and_cameras_tell_policies_apart(tiny_act, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(tiny_act.removeprefix("lerobot:"), folder)
    name, marks = f"lerobot:{folder}", []
    marks.append(foreign.load(name, WORLD, {}, "cpu").mark)
    assert marks[0] == foreign.load(tiny_act, WORLD, {}, "cpu").mark
    for file in ("policy_postprocessor.json", "config.json"):
        (folder / file).write_text((folder / file).read_text() + " ")
        marks.append(foreign.load(name, WORLD, {}, "cpu").mark)
    assert len(set(marks)) == 3


def test_a_policy_that_averages_its_chunks_is_not_tried_without(tmp_path):
    name = act(tmp_path / "policy")
    file = tmp_path / "policy" / "config.json"
    config = json.loads(file.read_text()) | {"temporal_ensemble_coeff": 0.01, "n_action_steps": 1}
    file.write_text(json.dumps(config))
    loaded = foreign.load(name, WORLD, {}, "cpu")
    with pytest.raises(InputError, match="--ensemble for a policy that averages"):
        foreign.trial(loaded, "act", CONFIG, tmp_path / "out", OWN)


def test_what_cannot_be_loaded_is_refused_in_words(tmp_path):
    (tmp_path / "nothing").mkdir()
    for name, message in (
        (f"lerobot:{tmp_path / 'nothing'}", "a policy that LeRobot loads"),
        (f"lerobot:{tmp_path / 'missing'}", "a checkpoint folder or Hub id"),
        ("lerobot:", "--policy lerobot:DIR_OR_ID"),
        ("act:x", "--policy lerobot:DIR_OR_ID"),
    ):
        with pytest.raises(InputError, match=message):
            foreign.load(name, WORLD, {}, "cpu")
    loaded = foreign.load(act(tmp_path / "act"), WORLD, {}, "cpu")
    with pytest.raises(InputError, match=r"a baseline of .* with --policy; got 'untrained'"):
        foreign.trial(loaded, "x", CONFIG, tmp_path, [], ["untrained"])


def test_a_policy_that_sees_the_past_is_given_it(tmp_path):
    """Diffusion Policy: two pictures and two states, and eight of sixteen steps."""
    pytest.importorskip("diffusers", reason="pip install 'lerobot[diffusion]'")
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    config = DiffusionConfig(
        **features(), horizon=16, n_action_steps=8, crop_shape=None, down_dims=(16,), num_inference_steps=2,
        spatial_softmax_num_keypoints=4, diffusion_step_embed_dim=16, pretrained_backbone_weights=None,
    )  # fmt: skip
    DiffusionPolicy(config).save_pretrained(tmp_path / "policy")
    bounds = {"min": torch.full((4,), -1.0), "max": torch.ones(4)}
    statistics = {"action": bounds, "observation.state": bounds}
    statistics[FRONT] = {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}
    for part in make_pre_post_processors(config, dataset_stats=statistics):
        part.save_pretrained(tmp_path / "policy")
    loaded = foreign.load(f"lerobot:{tmp_path / 'policy'}", WORLD, {}, "cpu")
    assert (loaded.chunk_size, loaded.past) == (8, Past(2, True))
    lines = foreign.trial(loaded, "diffusion", CONFIG, tmp_path / "out", OWN, workers=1)
    assert [line["error"] for line in lines] == [None, None]
    settings = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert settings["past"] == {"count": 2, "states": True}


def test_the_command_evaluates_it_and_refuses_what_would_do_nothing(
    tiny_act, tmp_path, monkeypatch, capsys
):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["vla0", "eval", "--task", "reach-v3", *map(str, words)])
        try:
            cli.main()
        except SystemExit as ended:
            return ended.code or 0
        return 0

    sizes = ["--episodes", 1, "--max-steps", 3, "--workers", 1]
    assert run("--policy", tiny_act, *sizes, "--out", tmp_path / "out") == 0
    assert "0 of 1" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert settings["image_size"] == SIDE
    for words, message in (
        ([], "give one of them"),
        (["--policy", tiny_act, "--checkpoint", "x"], "give one of them"),
        (["--policy", tiny_act, "--ablation"], "--checkpoint for --ablation"),
        (["--checkpoint", "x", "--key", "front=y"], "--policy for --key"),
    ):
        assert run(*words) == 2
        assert message in capsys.readouterr().err


def test_ours_and_lerobots_are_compared_on_the_same_episodes(tiny_act, policy, tmp_path):
    spec = make_spec(
        low=(-1.0,) * 4, high=(1.0,) * 4, cameras=("front",), state=None, fps=WORLD.fps,
        action_names=None,
    )  # fmt: skip
    VLA0(policy.model, policy.processor, spec).save_pretrained(tmp_path / "checkpoint")
    loaded = foreign.load(tiny_act, WORLD, {}, "cpu")
    foreign.trial(loaded, "act", CONFIG, tmp_path / "act", OWN, workers=1)
    trial(str(tmp_path / "checkpoint"), CONFIG, tmp_path / "ours", workers=1, device="cpu")
    (pair,) = compare([tmp_path / "act", tmp_path / "ours"]).pairs
    assert pair.both + pair.first + pair.second + pair.neither == 2
