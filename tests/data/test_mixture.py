"""Several datasets, several robots, one model; and what a Spec of each has to do with it."""

import json

import numpy as np
import pytest
import torch
from conftest import TASKS, make_dataset, make_recipe, make_spec

from vla0 import InputError, Observation, Spec
from vla0.core.prompt import Prompt
from vla0.data.dataset import Mixture, Samples, collator
from vla0.data.lerobot import DataConfig, Source, sources_of
from vla0.policy import VLA0
from vla0.train.config import TrainConfig, build
from vla0.train.run import main

CAMERAS = {"front": "observation.images.top"}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A robot of two dimensions."""
    return make_dataset(tmp_path_factory.mktemp("data") / "other", lengths=(5, 7), dimensions=2)


def parts_of(dataset, other, **changes):
    sources = [
        Source(DataConfig(dataset=str(d), cameras=CAMERAS, state="observation.state", **changes))
        for d in (dataset, other)
    ]
    common = {
        "cameras": ("front",),
        "chunk_size": 2,
        "bins": 100,
        "image_size": 56,
        "system": "Write {numbers} integers.",
    }
    return [Samples(s, make_spec(**{**s.spec_fields(2), **common}), seed=3) for s in sources]


def drawn(mixture):
    """(part, row) of each place."""
    return [
        (which, sample.actions[0, 0].item())
        for sample, _, which in (mixture[i] for i in range(len(mixture)))
    ]


def test_each_row_comes_as_often_as_its_weight_says(dataset, other):
    parts = parts_of(dataset, other)
    found = drawn(Mixture(parts, [1, 2], seed=0))
    assert len(found) == 15 + 2 * 12
    assert all(found.count((1, row)) == 2 for row in {row for which, row in found if which == 1})
    assert len({row for which, row in found if which == 0}) == 15


def test_a_weight_that_is_not_whole_draws_other_rows_each_epoch(dataset, other):
    mixture = Mixture(parts_of(dataset, other), [0.5, 1.5], seed=0)
    epochs = []
    for epoch in range(4):
        mixture.epoch = epoch
        found = drawn(mixture)
        assert [sum(which == part for which, _ in found) for part in (0, 1)] == [8, 18]
        assert len({row for which, row in found if which == 0}) == 8  # none twice
        assert len({row for which, row in found if which == 1}) == 12  # each once at least
        epochs.append({row for which, row in found if which == 0})
    assert epochs[0] != epochs[1]
    assert len(set.union(*epochs)) > 12
    again = Mixture(parts_of(dataset, other), [0.5, 1.5], seed=0)
    assert drawn(again) == drawn(Mixture(parts_of(dataset, other), [0.5, 1.5], seed=0))
    assert drawn(again) != drawn(Mixture(parts_of(dataset, other), [0.5, 1.5], seed=1))


def test_a_rows_augmentation_differs_when_it_comes_again(dataset, other):
    mixture = Mixture(parts_of(dataset, other), [1, 2], seed=0)
    seeds = [tuple(mixture[i][1]) for i in range(len(mixture))]
    assert len(set(seeds)) == len(seeds)


def test_a_batch_of_two_robots_has_the_rows_of_each(dataset, other, processor):
    """Each row of a mixed batch is token for token and pixel for pixel that of a batch of its robot
    alone.
    """
    parts = parts_of(dataset, other)
    prompts = [Prompt(part.spec, processor) for part in parts]
    mixture = Mixture(parts, [1, 1], seed=0)
    mixed = collator(prompts, None)([mixture[0], mixture[20]])
    for row, (part, prompt, index) in enumerate(zip(parts, prompts, (0, 5), strict=True)):
        alone = collator([prompt], None)([part[index]])
        keep = mixed["attention_mask"][row].bool()
        assert torch.equal(mixed["input_ids"][row][keep], alone["input_ids"][0])
        assert torch.equal(mixed["labels"][row][keep], alone["labels"][0])
        assert torch.equal(mixed["pixel_values"].chunk(2)[row], alone["pixel_values"])
    assert "Write 6" in processor.tokenizer.decode(mixed["input_ids"][0])
    assert "Write 4" in processor.tokenizer.decode(mixed["input_ids"][1])


def recipe_of(dataset, other, output, **changes):
    recipe = make_recipe(dataset, output, **changes)
    recipe["data"] |= {"held_out": 1, "mixture": {"gantry": {"dataset": str(other), "weight": 0.5}}}
    return recipe


def test_one_checkpoint_acts_as_each_robot(dataset, other, tmp_path):
    config = build(TrainConfig, recipe_of(dataset, other, tmp_path / "run"), "test")
    last = main(config)
    for name, file, count in (("", dataset, 3), ("gantry", other, 2)):
        policy = VLA0.from_pretrained(last, embodiment=name)
        source = Source(config.data.all()[name])
        assert policy.predict_batch([source.sample(0, 2, 1).observation]).shape == (1, 2, count), (
            file
        )
        fields = source.spec_fields(2)
        assert (policy.spec.low, policy.spec.state) == (fields["low"], fields["state"])
    with pytest.raises(InputError, match="gantry"):
        VLA0.from_pretrained(last, embodiment="gantri")
    policy.save_pretrained(tmp_path / "copy")
    assert {file.name for file in (tmp_path / "copy").glob("vla0*")} == {
        "vla0.json",
        "vla0.gantry.json",
    }
    (line,) = [
        json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ][-1:]
    assert {"held_out_loss", "error/2", "gantry/error/1"} <= set(line)
    assert 'embodiment="gantry"' in (last / "README.md").read_text()


def test_a_resumed_mixture_ends_in_the_weights_of_an_uninterrupted_one(dataset, other, tmp_path):
    from safetensors.torch import load_file

    class KilledError(Exception):
        pass

    def stop(policy, folder):
        raise KilledError

    whole = main(build(TrainConfig, recipe_of(dataset, other, tmp_path / "whole"), "test"))
    parts = build(TrainConfig, recipe_of(dataset, other, tmp_path / "parts"), "test")
    with pytest.raises(KilledError):
        main(parts, stop)
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, main(parts)))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_mixture_that_names_one_dataset_twice_goes_on(dataset, tmp_path):
    """Seen by another camera: the fingerprint of one is not that of the other."""
    recipe = make_recipe(dataset, tmp_path / "run")
    hand = {"dataset": str(dataset), "cameras": {"front": "observation.images.hand"}}
    recipe["data"] |= {"mixture": {"hand": hand}, "held_out": 1}
    config = build(TrainConfig, recipe, "test")

    def stop(policy, folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        main(config, stop)
    main(config)
    assert (tmp_path / "run" / "last").resolve().name == "step-000004"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"weight": 2.0}, "a dataset in mixture"),
        ({"dataset": "x", "weights": 1}, "did you mean 'weight'"),
        ({"dataset": "x", "weight": 0.0}, "weight > 0"),
        ({"dataset": "x", "num_workers": 2}, "unknown key 'num_workers'"),
        ({"dataset": "x", "cameras": {"wrist": "k"}}, "the cameras"),
        ("x", "a dataset in mixture"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(dataset, entry, message):
    with pytest.raises(InputError, match=message):
        DataConfig(dataset=str(dataset), cameras=CAMERAS, mixture={"other": entry})
    with pytest.raises(InputError, match="letters"):
        DataConfig(dataset=str(dataset), cameras=CAMERAS, mixture={"../x": {"dataset": "y"}})


def test_guessed_cameras_of_a_mixture_have_one_order(dataset, tmp_path):
    """Two datasets with the same views, recorded in another order."""
    import json
    import shutil

    turned = shutil.copytree(dataset, tmp_path / "turned")
    info = json.loads((turned / "meta" / "info.json").read_text())
    info["features"] = {
        key: info["features"][key] for key in sorted(info["features"], key=lambda key: "top" in key)
    }
    (turned / "meta" / "info.json").write_text(json.dumps(info))
    found = sources_of(
        DataConfig(dataset=str(dataset), mixture={"other": {"dataset": str(turned)}})
    )
    assert [list(source.cameras) for source in found.values()] == [["top", "hand"]] * 2
    assert [source.spec_fields(2)["cameras"] for source in found.values()] == [("top", "hand")] * 2
    one, other = (source.sample(0, 2, 1).observation.images for source in found.values())
    assert all((one[camera] == other[camera]).all() for camera in ("top", "hand"))


def test_a_revision_is_of_one_dataset():
    config = DataConfig(
        dataset="owner/name", revision="v1", mixture={"other": {"dataset": "owner/other"}}
    )
    assert config.all()["other"].revision is None


def test_the_ks_newest_chunks_are_averaged(processor, policy):
    """`ensemble_k` of the Spec is what `act` and `ensemble_actions` average, where nothing else is
    said.
    """
    spec = make_spec(ensemble_k=2)
    own = VLA0(policy.model, processor, spec)
    chunks = [np.full((3, 3), float(n), np.float32) for n in range(3)]
    np.testing.assert_allclose(own.ensemble_actions(chunks, weights="mean"), 1.5)
    np.testing.assert_allclose(policy.ensemble_actions(chunks, weights="mean"), 1.0)
    np.testing.assert_allclose(own.ensemble_actions(chunks, k=1, weights="mean"), 2.0)
    assert len(own.acting(1, "mean")._acting.ensemble.weights) == 2
    with pytest.raises(InputError, match="do nothing"):
        VLA0(policy.model, processor, make_spec(ensemble_k=1)).acting(1, "v1")
    assert VLA0(policy.model, processor, make_spec(ensemble_k=1)).settings == (1, "none")
    with pytest.raises(InputError, match="ensemble_k"):
        make_spec(ensemble_k=4)


def test_a_depth_map_is_one_more_picture_in_training_and_acting(tmp_path, processor):
    """What a LeRobot dataset of depth maps gives is what the sensor gives when acting."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {
        "observation.images.top": {
            "dtype": "image",
            "shape": (48, 64, 3),
            "names": ["height", "width", "channels"],
        },
        "observation.images.depth": {
            "dtype": "image",
            "shape": (48, 64, 1),
            "names": ["height", "width", "channels"],
            "info": {"is_depth_map": True, "depth_unit": "mm"},
        },
        "action": {"dtype": "float32", "shape": (2,), "names": None},
    }
    dataset = LeRobotDataset.create(
        "local/depth", 10, features, root=tmp_path / "d", use_videos=False
    )
    rng = np.random.default_rng(0)
    maps = rng.integers(100, 3000, (4, 48, 64), dtype=np.uint16)
    maps[:, 0, :8] = 0  # nothing measured
    for depth in maps:
        frame = {
            "observation.images.top": np.zeros((48, 64, 3), np.uint8),
            "observation.images.depth": depth[..., None],
        }
        dataset.add_frame({**frame, "action": rng.random(2).astype(np.float32), "task": TASKS[0]})
    dataset.save_episode()
    dataset.finalize()
    cameras = {"top": "observation.images.top", "far": "observation.images.depth"}
    source = Source(
        DataConfig(dataset=str(tmp_path / "d"), cameras=cameras, depth={"far": [0.2, 1.2]})
    )
    spec = Spec(base_model="tiny", **source.spec_fields(2), chunk_size=2, image_size=56, crop=1.0)
    assert spec.depth == (("far", 0.2, 1.2),)
    prompt = Prompt(spec, processor)
    recorded = prompt.observe([source.sample(2, 2, 1).observation])
    for sensor in (maps[2], maps[2][..., None], maps[2].astype(np.float32) / 1000):
        seen = prompt.observe(
            [Observation({"top": np.zeros((48, 64, 3), np.uint8), "far": sensor}, TASKS[0])]
        )
        for key, value in recorded.items():
            assert torch.equal(value, seen[key]), key
    picture = np.zeros((48, 64, 3), np.uint8)
    with pytest.raises(InputError, match="depth maps"):
        prompt.observe([Observation({"top": picture, "far": picture}, TASKS[0])])
