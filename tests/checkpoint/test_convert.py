"""A run folder of the official structure becomes a checkpoint that acts; a hostile one does
nothing.
"""

import pickle

import numpy as np
import pytest
import torch
import yaml
from conftest import HIGH, LOW, make_observation
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from vla0 import VLA0, InputError, Observation
from vla0.checkpoint.convert import convert, read_spec


def test_a_run_becomes_a_checkpoint_that_acts(official_run, policy, tmp_path):
    spec = convert(official_run, tmp_path / "out")
    assert (spec.chunk_size, spec.dimensions, spec.bins, spec.crop, spec.image_size) == (
        8,
        7,
        1000,
        0.875,
        224,
    )
    assert (spec.cameras, spec.tile, spec.vision_id) == (("agentview", "wrist"), True, False)
    np.testing.assert_array_equal(np.float32(spec.low), LOW)
    np.testing.assert_array_equal(np.float32(spec.high), HIGH)
    loaded = VLA0.from_pretrained(tmp_path / "out")
    assert loaded.spec == spec
    for name, weight in policy.model.state_dict().items():
        np.testing.assert_array_equal(weight.numpy(), loaded.model.state_dict()[name].numpy())
    frame = make_observation(0).images[policy.spec.cameras[0]]
    assert loaded.predict(
        {"agentview": frame, "wrist": frame}, "open the drawer", num_steps=1
    ).shape == (1, 7)
    assert not [
        file for file in (tmp_path / "out").rglob("*") if file.suffix in (".pkl", ".pth", ".bin")
    ]


def official(processor, frames, instruction, actions):
    """The published pipeline, written down from its description alone: what the model is given, and
    what it must answer.
    """
    # crop 0.875 of 256 is 224
    tiled = Image.fromarray(np.concatenate([frame[16:240, 16:240] for frame in frames], axis=1))
    levels = np.round((actions - LOW) / (HIGH - LOW) * 1000).astype(int)
    numbers = " ".join(str(level) for level in levels.reshape(-1))
    system = (
        "Analyze the input image and predict robot actions for the next 8 timesteps. Each action "
        "has 7 dimensions. Output a single "
        "sequence of 56 integers (0-1000 each), representing the 8 timesteps sequentially. "
        "Provide only space separated numbers. "
        "Nothing else."
    )
    turns = [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instruction}]},
        {"role": "assistant", "content": [{"type": "text", "text": numbers}]},
    ]
    asked, whole = (
        processor.apply_chat_template(turns[:n], add_generation_prompt=n == 2, tokenize=False)
        for n in (2, 3)
    )
    pixels = {"min_pixels": 224 * 448, "max_pixels": 224 * 448}
    inputs, prompt = (
        processor(text=[t], images=[tiled], return_tensors="pt", **pixels) for t in (whole, asked)
    )
    labels = inputs["input_ids"].clone()
    labels[:, : prompt["input_ids"].shape[1]] = -100
    return inputs, labels


def test_the_same_picture_sentence_and_weights_give_the_official_tokens_pixels_and_loss(
    official_run, tmp_path
):
    convert(official_run, tmp_path / "out")
    ours = VLA0.from_pretrained(tmp_path / "out")
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for _ in range(2)]
    actions = rng.uniform(LOW, HIGH, (8, 7)).astype(np.float32)
    inputs, labels = official(
        AutoProcessor.from_pretrained(official_run / "model_last"),
        frames,
        "open the drawer",
        actions,
    )
    # The official answer ends with a newline that decoding never reaches: a row of
    # docs/differences.md.
    inputs, labels = (
        {key: v[:, :-1] if v.shape == labels.shape else v for key, v in inputs.items()},
        labels[:, :-1],
    )
    observation = Observation(
        dict(zip(("agentview", "wrist"), frames, strict=True)), "open the drawer"
    )
    answer = ours.codec.write(ours.codec.encode(actions))
    batch = ours.prompt.observe([observation], [answer])
    torch.testing.assert_close(batch["input_ids"], inputs["input_ids"])
    torch.testing.assert_close(batch["labels"], labels)
    torch.testing.assert_close(batch["pixel_values"], inputs["pixel_values"])
    torch.testing.assert_close(batch["image_grid_thw"], inputs["image_grid_thw"])
    with torch.no_grad():
        theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(official_run / "model_last")
        torch.testing.assert_close(ours.model(**batch).loss, theirs(**inputs, labels=labels).loss)


def test_what_the_config_does_not_say_is_asked_for(official_run, tmp_path):
    assert read_spec(official_run, vision_id=True).vision_id
    config = yaml.safe_load((official_run / "config.yaml").read_text())
    config["DATALOADER"]["ROBOVERSE"]["cfg_opts"] = ""
    (official_run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=r"--crop 0\.875"):
        read_spec(official_run)
    assert read_spec(official_run, crop=0.9).crop == 0.9


def test_a_pickle_that_would_run_code_runs_nothing(official_run, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    (official_run / "dataset_stats.pkl").write_bytes(pickle.dumps({"out_ori_act": Hostile()}))
    with pytest.raises(InputError, match="numpy arrays alone"):
        convert(official_run, tmp_path / "out")
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "gone",
    ["config.yaml", "dataset_stats.pkl", "model_last/model.safetensors", "model_last/config.json"],
)
def test_an_incomplete_run_is_refused_and_leaves_nothing(official_run, gone, tmp_path):
    (official_run / gone).unlink()
    with pytest.raises(InputError):
        convert(official_run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    "change",
    [
        {"num_cam": 3},
        {"rgb_img_size": [224, 448]},
        {"original_action_dim": 6},
        {"horizon": "eight"},
        {"num_bins_actions": 1},
    ],
)
def test_a_config_that_does_not_fit_is_refused(official_run, change):
    config = yaml.safe_load((official_run / "config.yaml").read_text())
    config["MODEL"]["QWEN"] |= change
    (official_run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError):
        read_spec(official_run)


@pytest.mark.parametrize(
    "damage",
    [b"", b"\x80\x04garbage", pickle.dumps([1, 2]), pickle.dumps({"out_ori_act": {"min": LOW}})],
)
def test_damaged_statistics_are_refused(official_run, damage):
    (official_run / "dataset_stats.pkl").write_bytes(damage)
    with pytest.raises(InputError):
        read_spec(official_run)
