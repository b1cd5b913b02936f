"""A checkpoint, tried: with a tiny model in Meta-World, here and on a Ray of this machine."""

import importlib.util
import logging
from dataclasses import replace

import pytest
from conftest import make_spec

if importlib.util.find_spec("metaworld") is None:
    pytest.skip("Meta-World is an extra: make install", allow_module_level=True)

from vla0 import InputError
from vla0.core.spec import Observation
from vla0.policy import VLA0
from vla0.sim.baselines import swapped
from vla0.sim.evaluate import EvalConfig
from vla0.sim.experiment import ROWS, SEPARATE, _load, ablation, trial
from vla0.sim.results import ablation_table, read_episodes

CONFIG = EvalConfig(tasks=("reach-v3",), episodes=2, max_steps=3, image_size=56)


@pytest.fixture(scope="module")
def checkpoints(policy, tmp_path_factory):
    """The tiny policy for Meta-World: tiled, and with separate images."""
    folder = tmp_path_factory.mktemp("checkpoints")
    spec = make_spec(
        low=(-1.0,) * 4,
        high=(1.0,) * 4,
        cameras=("front",),
        state=None,
        fps=80.0,
        action_names=("dx", "dy", "dz", "grip"),
    )
    for name, tile in (("tiled", True), ("separate", False)):
        VLA0(policy.model, policy.processor, replace(spec, tile=tile)).save_pretrained(
            folder / name
        )
    return {name: str(folder / name) for name in ("tiled", "separate")}


def test_the_ablation_has_the_published_rows_in_folders_of_their_own(checkpoints, tmp_path, caplog):
    found = ablation(checkpoints["tiled"], checkpoints["separate"], CONFIG, tmp_path, workers=2)
    assert list(found) == [*ROWS, SEPARATE]
    assert len({path.parent for path in tmp_path.glob("*/report.html")}) == 5
    assert all(">grip<" in path.read_text() for path in tmp_path.glob("*/report.html"))
    queries = {
        row: {(line["seed"], line["steps"]) for line in lines} for row, lines in found.items()
    }
    assert all(len(own) == 2 for own in queries.values())
    assert ablation_table(found).row_count == 5
    with caplog.at_level(logging.WARNING):
        again = ablation(checkpoints["tiled"], None, CONFIG, tmp_path, workers=2)
    assert again == {row: found[row] for row in ROWS}
    assert "trained with tile: false" in caplog.text
    with pytest.raises(InputError, match="whose images are tiled"):
        ablation(checkpoints["tiled"], checkpoints["tiled"], CONFIG, tmp_path)


def test_a_machine_with_another_checkpoint_in_that_folder_is_refused(checkpoints):
    with pytest.raises(InputError, match="copy the same to every machine"):
        _load(checkpoints["tiled"], "cpu", "", "another", None)


@pytest.mark.slow
def test_a_trial_on_ray_is_the_trial_here(checkpoints, tmp_path):
    pytest.importorskip("ray", reason="Ray is an extra: make install")
    found = {}
    for name, ray in (("here", None), ("ray", "local")):
        lines = trial(
            checkpoints["tiled"], CONFIG, tmp_path / name, ["blank", "random"], workers=2, ray=ray
        )
        found[name] = sorted(
            (line["policy"], line["seed"], line["steps"], line["success"]) for line in lines
        )
        assert read_episodes(tmp_path / name / "episodes.jsonl") == lines
        assert (tmp_path / name / "report.html").exists()
    assert found["here"] == found["ray"]


def test_a_policy_that_sees_past_pictures_is_given_them(policy, tmp_path):
    spec = make_spec(
        low=(-1.0,) * 4, high=(1.0,) * 4, cameras=("front",), state=None, fps=80.0,
        action_names=None, history=3,
    )  # fmt: skip
    VLA0(policy.model, policy.processor, spec).save_pretrained(tmp_path / "checkpoint")
    lines = trial(str(tmp_path / "checkpoint"), CONFIG, tmp_path / "out", ["blank"], workers=1)
    assert [(line["error"], line["steps"]) for line in lines] == [(None, 3)] * 4


def test_a_swapped_instruction_is_another_one_of_the_same_suite():
    def told(tasks):
        said = []
        predict = swapped(lambda looks: said.extend(o.instruction for o in looks), tasks)
        for _, instruction in tasks:
            predict([Observation({}, instruction)])
        return said

    assert told([("a/1", "open"), ("a/2", "open"), ("a/3", "shut")]) == ["shut", "shut", "open"]
    assert told([("a/1", "x"), ("a/2", "y"), ("b/1", "v"), ("b/2", "w")]) == ["y", "x", "w", "v"]
    with pytest.raises(InputError, match="'x' in several; evaluate the suites one by one"):
        told([("a/1", "x"), ("a/2", "y"), ("b/1", "x"), ("b/2", "w")])
    with pytest.raises(InputError, match="two tasks of a suite"):
        told([("a/1", "x"), ("a/2", "x")])
