"""A recipe in the spelling of the method's public write-up trains as it is."""

import logging

import pytest
import yaml
from conftest import RECIPE

from vla0 import VLA0, InputError
from vla0.train.config import TrainConfig, read_config
from vla0.train.published_config import ours
from vla0.train.run import main

WRITE_UP = """
MODEL: {{name: tiny, freeze_vision_encoder: false}}
TRAINING:
  batch_size: 2
  learning_rate: 5e-6
  num_epochs: 0.2
  warmup_ratio: 0.03
  weight_decay: 0.01
  gradient_checkpointing: true
  fp16: true
ACTION: {{chunk_size: 3, action_bins: 1000, ensemble_k: 3}}
DATALOADER:
  num_workers: 0
  ROBOVERSE:
    data_path: {dataset}
    cfg_path: libs/roboverse/img_libero_aug.yaml
    cfg_opts: "IMAGE.crop_img:0.9:IMAGE.cam_list:('3p1','3p2')"
LOGGING:
  output_dir: {out}
  save_every_n_epochs: 1
  eval_every_n_epochs: 1
  wandb: false
"""


def test_the_write_ups_own_recipe_trains(dataset, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file = tmp_path / "theirs.yaml"
    file.write_text(WRITE_UP.format(dataset=dataset, out=tmp_path / "run"))
    small = yaml.safe_dump(RECIPE["model"]["tiny"], default_flow_style=True, width=1000).strip()
    config = read_config(
        TrainConfig, file, [f"model.tiny={small}", "spec.image_size=56", "TRAINING.batch_size=4"]
    )
    policy = VLA0.from_pretrained(main(config))
    assert (policy.spec.chunk_size, policy.spec.bins, policy.spec.ensemble_k, policy.spec.crop) == (
        3,
        1000,
        3,
        0.9,
    )
    assert set(policy.spec.cameras) == {"hand", "top"}
    assert (config.training.batch_size, config.training.precision) == (4, "bf16")
    said = [record.getMessage() for record in caplog.records]
    assert sum("fp16 is taken as mixed precision, in bf16" in text for text in said) == 1
    assert (
        "DATALOADER.ROBOVERSE.cfg_path has no meaning here: its data are a LeRobot dataset, "
        "data.dataset" in said
    )
    assert "DATALOADER.ROBOVERSE.data_path is taken for data.dataset" in said
    assert "DATALOADER.ROBOVERSE.cfg_opts: IMAGE.cam_list has no meaning here" in said


def test_what_is_unknown_in_a_section_of_capitals_is_an_error_all_the_same(tmp_path):
    file = tmp_path / "theirs.yaml"
    file.write_text(
        "TRAINING: {num_steps: 2, learning_rte: 1e-5}\nDATA: {dataset: x}\nLOGGING: {output_dir: "
        "y}\n"
    )
    with pytest.raises(InputError, match=r"learning_rte.*did you mean 'learning_rate'"):
        read_config(TrainConfig, file)


def test_two_sections_that_become_one_may_not_differ():
    assert ours({"data": {"dataset": "x"}, "DATALOADER": {"dataset": "x", "num_workers": 2}}) == {
        "data": {"dataset": "x", "num_workers": 2}
    }
    with pytest.raises(InputError, match=r"one value of data\.dataset"):
        ours({"data": {"dataset": "x"}, "DATALOADER": {"dataset": "y"}})


@pytest.mark.parametrize(
    ("given", "precision"),
    [({"fp16": True}, "bf16"), ({"bf16": True}, "bf16"), ({"fp16": False}, "fp32"), ({}, None), ({"fp16": True, "precision": "fp32"}, "fp32")],
)  # fmt: skip
def test_precision_is_what_transformers_words_for_it_mean(given, precision):
    assert ours({"TRAINING": given})["training"].get("precision") == precision


def test_options_of_their_loader_that_mean_something_here_are_taken():
    options = (
        "LEROBOT.repo_id:you/data:LEROBOT.action_key:actions:IMAGE.img_size:112:IMAGE.crop_img:0.5"
    )
    found = ours({"DATALOADER": {"batch_size": 8, "ROBOVERSE": {"cfg_opts": options}}})
    assert found["data"] == {"dataset": "you/data", "action": "actions"}
    assert found["spec"] == {"image_size": 112, "crop": 0.5}
    assert found["training"] == {"batch_size": 8}
    with pytest.raises(InputError, match="crop_img as float"):
        ours({"DATALOADER": {"ROBOVERSE": {"cfg_opts": "IMAGE.crop_img:wide"}}})


def test_our_own_recipes_are_left_as_they_are():
    own = {
        "data": {"dataset": "x", "cameras": {"LEFT": "KEY"}},
        "training": {"num_steps": 3},
        "spec": {"crop": 1.0},
    }
    assert ours(own) == own
