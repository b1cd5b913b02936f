import dataclasses
import json

import numpy as np
import pytest
from conftest import TASKS, make_dataset, make_recipe
from transformers import Qwen2_5_VLConfig

from vla0 import InputError
from vla0.adapter import Lora
from vla0.bench.inputs import SHAPE_3B
from vla0.inspect import examine as module
from vla0.inspect.examine import examine, rate, recipe
from vla0.inspect.page import facts, page, screen
from vla0.recipe import ModelConfig, TrainConfig, build
from vla0.source import Source, named
from vla0.tiny import tiny_processor


def config_of(dataset, **data):
    content = make_recipe(dataset, dataset / "run")
    return build(TrainConfig, {**content, "data": content["data"] | data}, "recipe")


@pytest.fixture
def altered(monkeypatch):
    """Changes what a Source reads."""

    def alter(change):
        class Altered(Source):
            def __init__(self, config):
                super().__init__(config)
                change(self)

        monkeypatch.setattr(module, "Source", Altered)

    return alter


def test_a_survey_counts_what_is_there(dataset):
    survey = examine(config_of(dataset))
    assert (survey.episodes, survey.frames, survey.fps, survey.lengths) == (3, 15, 10.0, (4, 5, 6))
    assert survey.sentences == {TASKS[0]: 2, TASKS[1]: 1}
    assert survey.cameras == {"front": "48 x 64 x 3, image"}
    assert [own.high for own in survey.dimensions] == pytest.approx([24, 24.1, 24.2])
    assert survey.idle == 0
    assert survey.problems == ()
    assert survey.prompt_tokens is not None
    assert survey.hours is not None
    assert survey.hours > 0
    assert len(survey.pictures) == 3
    assert survey.pictures[0].shape == (56, 56, 3)


def test_what_is_lost_in_writing_is_at_most_half_a_level(dataset):
    for own in examine(config_of(dataset)).dimensions:
        low, high = own.bounds
        assert 0 < own.error <= (high - low) / 100 / 2
        assert own.clipped == 0


def test_quantiles_clip_and_say_so(dataset):
    survey = examine(config_of(dataset, statistics="quantiles"))
    assert all(own.clipped > 0.05 for own in survey.dimensions)
    assert "statistics: minmax" in survey.problems[0]


def test_a_dimension_that_never_changes_is_named(dataset, altered):
    altered(lambda source: source.actions.__setitem__((slice(None), 1), 3.0))
    assert ["actions [1] never change" in text for text in examine(config_of(dataset)).problems] == [True]


def test_frames_that_ask_for_nothing_new_are_counted_within_episodes_only(dataset, altered):
    altered(lambda source: setattr(source, "actions", np.repeat(source.actions[source.start], 1, axis=0)))
    survey = examine(config_of(dataset))
    assert survey.idle == 1
    assert "learns to wait" in " ".join(survey.problems)


def test_another_frame_rate_than_declared_is_named(dataset, altered):
    altered(lambda source: setattr(source, "timestamps", source.timestamps * 2))
    assert "0.2 s apart" in " ".join(examine(config_of(dataset)).problems)


def test_a_video_that_cannot_be_read_is_refused_by_its_episode(tmp_path):
    folder = make_dataset(tmp_path / "videos", videos=True)
    examine(config_of(folder))
    for file in folder.rglob("*.mp4"):
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match="episode 0"):
        examine(config_of(folder))


def test_without_a_recipe_all_cameras_are_taken_by_their_own_names(dataset):
    config = recipe([str(dataset)])
    assert set(Source(config.data).cameras) == {"hand", "top"}
    twins = ["left.rgb", "right.rgb"]
    assert named(twins, "x") == {name: name for name in twins}
    with pytest.raises(InputError, match="pictures"):
        named([], "x")
    assert config.training.num_epochs == 1
    with pytest.raises(InputError, match="--config"):
        recipe([])


def test_a_recipe_is_changed_by_a_dataset_and_by_keys_and_nothing_given_is_left_out(dataset, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(make_recipe(dataset, tmp_path)))
    assert recipe([], file).data.dataset == str(dataset)
    assert recipe(["elsewhere"], file).data.dataset == "elsewhere"
    assert recipe(["training.batch_size=7"], file).training.batch_size == 7
    both = recipe(["training.batch_size=7", "elsewhere"], file)
    assert (both.training.batch_size, both.data.dataset) == (7, "elsewhere")
    with pytest.raises(InputError, match="batch_size=7"):
        recipe([str(dataset), "batch_size=7"])
    with pytest.raises(InputError, match="one dataset"):
        recipe(["one", "two"], file)


def test_a_model_that_is_not_at_hand_leaves_only_the_hours_unknown(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "locate", lambda *_, **__: tmp_path / "nothing")
    survey = examine(dataclasses.replace(config_of(dataset), model=ModelConfig("someone/Qwen2.5-VL-3B")))
    assert survey.hours is survey.prompt_tokens is None
    assert survey.memory is not None
    assert survey.memory > 40e9
    assert "unknown" in dict(facts(survey))["training here"]


def test_memory_is_that_of_what_a_recipe_trains(dataset, tmp_path):
    """The published size, of its config alone; LoRA's weights as `vla0 train` counted them at full size: 164.3 million."""
    Qwen2_5_VLConfig(**SHAPE_3B).save_pretrained(tmp_path)
    tiny_processor(["push"]).save_pretrained(tmp_path)

    def memory(**model):
        config = config_of(dataset)
        training = dataclasses.replace(config.training, precision="bf16")
        survey = examine(dataclasses.replace(config, training=training, model=ModelConfig(str(tmp_path), **model)))
        assert survey.hours
        return survey.memory, dict(facts(survey))["memory"]

    full, text = memory()
    assert full == pytest.approx(17 * 3.7546e9, rel=1e-3)
    assert "full fine-tuning" in text
    lora, text = memory(lora=Lora(64))
    assert lora == pytest.approx(2 * 3.7546e9 + 17 * 164.3e6, rel=1e-3)
    assert "LoRA of rank 64" in text
    assert memory(lora=Lora(64), quantization="nf4")[0] < lora - 3e9
    assert memory(freeze_vision_encoder=True)[0] < full - 7e9


def test_the_page_shows_each_dimension_and_what_the_model_sees(dataset, tmp_path):
    survey = examine(config_of(dataset))
    page(survey, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<svg") == len(survey.dimensions) == screen(survey).row_count
    assert text.count("data:image/png") == len(survey.pictures)
    assert "Nothing looks wrong." in text
    assert "http" not in text


def test_the_rate_is_that_of_a_machine():
    assert 1e8 < rate("fp32") < 1e16
