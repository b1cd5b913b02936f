import dataclasses
import html
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TASKS, make_dataset, make_recipe
from transformers import Qwen2_5_VLConfig

from vla0 import InputError
from vla0.bench.inputs import SHAPE_3B
from vla0.checkpoint.tiny import tiny_processor
from vla0.data.lerobot import Source, named
from vla0.inspect import cost
from vla0.inspect import examine as module
from vla0.inspect.cost import rate
from vla0.inspect.examine import examine
from vla0.inspect.own import config_to_inspect, write_own_config
from vla0.inspect.page import duration, facts, page, survey_table
from vla0.train.config import Lora, ModelConfig, TrainConfig, build, read_config, read_yaml
from vla0.train.run import main


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
    assert survey.instructions == {TASKS[0]: 2, TASKS[1]: 1}
    assert survey.cameras == {"front": "64 x 48, image"}
    assert [own.high for own in survey.dimensions] == pytest.approx([24, 24.1, 24.2])
    assert survey.idle == 0
    assert survey.problems == ()
    assert survey.prompt_tokens is not None
    assert survey.seconds is not None
    assert survey.seconds > 0
    assert len(survey.pictures) == 3
    assert survey.pictures[0].pixels.shape == (56, 56, 3)


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
    assert [
        "actions [1] never change" in text for text in examine(config_of(dataset)).problems
    ] == [True]


def test_frames_that_ask_for_nothing_new_are_counted_within_episodes_only(dataset, altered):
    altered(
        lambda source: setattr(
            source, "actions", np.repeat(source.actions[source.start], 1, axis=0)
        )
    )
    survey = examine(config_of(dataset))
    assert survey.idle == 1
    assert "learns to wait" in " ".join(survey.problems)


def test_another_frame_rate_than_declared_is_named(dataset, altered):
    altered(lambda source: setattr(source.dataset, "times", source.dataset.times * 2))
    assert "0.2 s apart" in " ".join(examine(config_of(dataset)).problems)


def test_a_video_that_cannot_be_read_is_refused_by_its_episode(tmp_path):
    folder = make_dataset(tmp_path / "videos", videos=True)
    examine(config_of(folder))
    for file in folder.rglob("*.mp4"):
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match="episode 0"):
        examine(config_of(folder))


def test_without_a_recipe_all_cameras_are_taken_by_their_own_names(dataset):
    config = config_to_inspect([str(dataset)])
    assert set(Source(config.data).cameras) == {"hand", "top"}
    twins = ["left.rgb", "right.rgb"]
    assert named(twins, "x") == {name: name for name in twins}
    with pytest.raises(InputError, match="pictures"):
        named([], "x")
    assert config.training.num_epochs == 1
    with pytest.raises(InputError, match="--config"):
        config_to_inspect([])


def test_a_recipe_is_changed_by_a_dataset_and_by_keys_and_nothing_given_is_left_out(
    dataset, tmp_path
):
    file = tmp_path / "train_config.json"
    file.write_text(json.dumps(make_recipe(dataset, tmp_path)))
    assert config_to_inspect([], file).data.dataset == str(dataset)
    assert config_to_inspect(["elsewhere"], file).data.dataset == "elsewhere"
    assert config_to_inspect(["training.batch_size=7"], file).training.batch_size == 7
    both = config_to_inspect(["training.batch_size=7", "elsewhere"], file)
    assert (both.training.batch_size, both.data.dataset) == (7, "elsewhere")
    with pytest.raises(InputError, match="batch_size=7"):
        config_to_inspect([str(dataset), "batch_size=7"])
    with pytest.raises(InputError, match="one dataset"):
        config_to_inspect(["one", "two"], file)


def test_a_model_that_is_not_at_hand_leaves_only_the_hours_unknown(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "locate", lambda *_, **__: tmp_path / "nothing")
    survey = examine(
        dataclasses.replace(config_of(dataset), model=ModelConfig(name="someone/Qwen2.5-VL-3B"))
    )
    assert survey.seconds is survey.prompt_tokens is None
    assert survey.memory is not None
    assert survey.memory > 40e9
    assert "unknown" in dict(facts(survey))["training here"]


def test_memory_is_that_of_what_a_recipe_trains(dataset, tmp_path):
    """The published size, of its config alone; LoRA beside all linear layers of both parts:
    164.3 million weights as `vla0 train` counted them at full size, and 1.1 of the merger.
    """
    Qwen2_5_VLConfig(**SHAPE_3B).save_pretrained(tmp_path)
    tiny_processor(["push"]).save_pretrained(tmp_path)

    def memory(**model):
        config = config_of(dataset)
        training = dataclasses.replace(config.training, precision="bf16")
        survey = examine(
            dataclasses.replace(
                config, training=training, model=ModelConfig(name=str(tmp_path), **model)
            )
        )
        assert survey.seconds
        return survey.memory, dict(facts(survey))["memory"]

    full, text = memory()
    assert full == pytest.approx(17 * 3.7546e9, rel=1e-3)
    assert "full fine-tuning" in text
    lora, text = memory(lora=Lora(64))
    assert lora == pytest.approx(2 * 3.7546e9 + 17 * 165.4e6, rel=1e-3)
    assert "LoRA of rank 64" in text
    assert memory(lora=Lora(64), quantization="nf4")[0] < lora - 3e9
    assert memory(freeze_vision_encoder=True)[0] < full - 7e9


def test_the_page_shows_each_dimension_and_what_the_model_sees(dataset, tmp_path):
    survey = examine(config_of(dataset))
    page(survey, tmp_path / "a" / "new" / "page.html")
    text = (tmp_path / "a" / "new" / "page.html").read_text()
    assert text.count("<svg") == len(survey.dimensions) == survey_table(survey).row_count
    assert text.count("data:image/png") == len(survey.pictures)
    assert "Nothing looks wrong." in text
    assert "http" not in text


def test_the_rate_is_that_of_a_machine():
    assert 1e8 < rate("fp32") < 1e16


def test_a_survey_says_what_it_is_an_estimate_of_and_how_to_get_another(dataset, tmp_path):
    published = dict(facts(examine(config_to_inspect([str(dataset)]))))["estimate for"]
    assert all(
        word in published for word in ("Qwen/Qwen2.5-VL-3B-Instruct", "published", "--config")
    )
    assert (
        "model tiny, config mine.yaml"
        in dict(facts(examine(config_of(dataset), Path("mine.yaml"))))["estimate for"]
    )


def test_a_picture_says_where_it_is_from_and_what_was_squeezed(dataset, tmp_path):
    cameras = {"front": "observation.images.top", "wrist": "observation.images.hand"}
    survey = examine(config_of(dataset, cameras=cameras))
    caption = f"episode 1, frame 2: “{TASKS[1]}” (front 64 x 48, wrist 64 x 48)"
    assert survey.pictures[1].caption == caption
    assert "56 x 56" in survey.squeezed
    assert "front (64 x 48), wrist (64 x 48)" in survey.squeezed
    page(survey, tmp_path / "page.html")
    text = html.unescape((tmp_path / "page.html").read_text())
    assert all(line in text for line in (caption, survey.squeezed, survey.prompt, survey.answer))
    separate = dataclasses.replace(
        config_of(dataset, cameras=cameras), spec={"image_size": 56, "tile": False}
    )
    assert np.array_equal(examine(separate).pictures[0].pixels, survey.pictures[0].pixels)


def test_squares_are_not_said_to_be_squeezed(tmp_path):
    assert examine(config_of(make_dataset(tmp_path / "square", sides=(48, 48)))).squeezed == ""


def test_a_survey_holds_what_the_model_reads_and_what_it_is_to_write(
    dataset, tmp_path, monkeypatch
):
    survey = examine(config_of(dataset))
    assert "Write 6 integers." in survey.prompt
    assert "<|im_start|>user" in survey.prompt
    assert survey.prompt.index("State: ") < survey.prompt.index(TASKS[0])
    levels = [round((3 + step) / 24 * 100) for step in range(2) for _ in range(3)]
    assert survey.answer == " ".join(map(str, levels))
    monkeypatch.setattr(cost, "locate", lambda *_, **__: tmp_path / "nothing")
    bare = examine(
        dataclasses.replace(config_of(dataset), model=ModelConfig(name="someone/unknown"))
    )
    assert bare.prompt.splitlines()[0] == "system: Write 6 integers."
    assert bare.prompt.splitlines()[1].startswith("user: [picture] State: ")
    assert bare.answer == survey.answer


def test_a_duration_is_given_in_the_unit_that_suits_it():
    said = [duration(seconds) for seconds in (0.04, 1.5, 99, 101, 3600, 7000, 360_000)]
    assert said == ["0.04 s", "1.5 s", "99 s", "1.7 min", "60 min", "1.9 h", "100 h"]


OWN = Path(__file__).parents[2] / "configs" / "own.yaml"
TINY = (
    ("name", "tiny"),
    (
        "tiny",
        {
            "width": 48,
            "layers": 1,
            "heads": 3,
            "vision_width": 32,
            "vision_layers": 1,
            "vision_heads": 2,
        },
    ),
)


def test_a_written_recipe_trains_as_it_is_and_is_never_written_over(dataset, tmp_path):
    file = tmp_path / "new" / "mine.yaml"
    write_own_config([str(dataset)], file)
    small = [f"model.{name}={value}" for name, value in TINY]
    small += [
        "spec.image_size=56",
        "training.num_steps=2",
        "training.batch_size=2",
        "training.precision=fp32",
    ]
    config = read_config(TrainConfig, file, [*small, f"logging.output_dir={tmp_path / 'run'}"])
    assert config.data.cameras == {
        "top": "observation.images.top",
        "hand": "observation.images.hand",
    }
    assert (config.data.action, config.data.state) == ("action", "observation.state")
    assert (main(config) / "vla0.json").is_file()
    before = file.read_text()
    with pytest.raises(InputError, match="which is there"):
        write_own_config([str(dataset)], file)
    assert file.read_text() == before
    for words in ([], ["a", "b"], [str(dataset), "training.batch_size=2"]):
        with pytest.raises(InputError, match="nothing else"):
            write_own_config(words, tmp_path / "other.yaml")


def test_a_written_recipe_says_what_own_yaml_says_but_for_the_data(dataset, tmp_path):
    write_own_config([str(dataset)], tmp_path / "mine.yaml")
    written, own = (
        read_yaml(file, ["data.dataset=here"]) for file in (tmp_path / "mine.yaml", OWN)
    )
    assert list(written["data"]) == list(own["data"])
    for content in (written, own):
        for name in ("cameras", "state", "held_out"):
            del content["data"][name]
    assert written == own
    lines = (tmp_path / "mine.yaml").read_text().splitlines()
    assert [line for line in OWN.read_text().splitlines() if " #" in line and line not in lines][
        2:
    ] == [
        "  state: null # observation.state writes it into the prompt; relative actions need it",
        "  held_out: 5 # episodes kept back for the loss on unseen data, which decides what "
        "`best` is",
    ]


def test_cameras_of_one_number_a_pixel_are_left_out_of_a_written_recipe_and_named_in_it(tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    def picture(channels, **more):
        return {
            "dtype": "image",
            "shape": (48, 64, channels),
            "names": ["height", "width", "channels"],
            **more,
        }

    features = {
        "observation.images.top": picture(3),
        "observation.images.deep": picture(1, info={"is_depth_map": True, "depth_unit": "mm"}),
        "observation.images.bare": picture(1),
        "joints.action": {"dtype": "float32", "shape": (2,), "names": None},
    }
    folder = tmp_path / "a folder: # odd"
    recorded = LeRobotDataset.create("local/depth", 10, features, root=folder, use_videos=False)
    for step in range(3):
        depth = np.full((48, 64, 1), 500 + step, np.uint16)
        frames = {
            "observation.images.top": np.zeros((48, 64, 3), np.uint8),
            "observation.images.deep": depth,
            "observation.images.bare": depth,
        }
        recorded.add_frame(
            {**frames, "joints.action": np.arange(2, dtype=np.float32) + step, "task": TASKS[0]}
        )
    recorded.save_episode()
    recorded.finalize()
    file = tmp_path / "mine.yaml"
    write_own_config([str(folder)], file)
    config = read_config(TrainConfig, file).data
    assert (config.dataset, config.action, config.state, config.held_out) == (
        str(folder),
        "joints.action",
        None,
        0,
    )
    assert config.cameras == {"top": "observation.images.top"}
    assert config.depth == {}
    file.write_text(
        file.read_text()
        .replace("    # deep", "    deep")
        .replace("    # bare", "    bare")
        .replace("  # depth", "  depth")
    )
    config = read_config(TrainConfig, file).data
    assert set(config.cameras) == {"top", "deep", "bare"}
    assert set(config.depth) == {"deep", "bare"}
    assert Source(config).sample(0, 1, 1).observation.images["deep"].shape == (48, 64)
