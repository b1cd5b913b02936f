import json
import shutil

import numpy as np
import pytest
from conftest import make_observation, make_spec
from transformers import AutoModelForImageTextToText, AutoProcessor

from vla0 import InputError
from vla0.checkpoint import io as models
from vla0.checkpoint.tiny import family_of, tiny_model
from vla0.policy import VLA0


@pytest.fixture
def checkpoint(policy, tmp_path):
    policy.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_from_pretrained_inverts_save_pretrained(policy, checkpoint):
    loaded = VLA0.from_pretrained(checkpoint)
    assert loaded.spec == policy.spec
    observations = [make_observation(seed) for seed in range(2)]
    np.testing.assert_array_equal(
        loaded.predict_batch(observations), policy.predict_batch(observations)
    )


def test_a_checkpoint_is_an_ordinary_transformers_folder_without_pickle(policy, checkpoint):
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(checkpoint),
        AutoProcessor.from_pretrained(checkpoint),
    )
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert {file.suffix for file in checkpoint.iterdir()} <= {
        ".json",
        ".safetensors",
        ".jinja",
        ".txt",
    }


def test_a_checkpoint_is_replaced_whole_and_leaves_nothing_behind(policy, checkpoint):
    policy.save_pretrained(checkpoint)
    assert [p.name for p in checkpoint.parent.iterdir()] == ["checkpoint"]
    VLA0.from_pretrained(checkpoint)


def test_saving_never_overwrites_other_files(policy, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("words")
    with pytest.raises(InputError):
        policy.save_pretrained(tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "words"
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def cut(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.999])
def test_truncated_weights_are_refused(checkpoint, share):
    cut(checkpoint / "model.safetensors", share)
    with pytest.raises(InputError, match="complete transformers checkpoint"):
        VLA0.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "vla0.json"]
)
def test_a_checkpoint_that_lacks_a_file_is_refused(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(InputError):
        VLA0.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "processor_config.json", "vla0.json"]
)
def test_a_checkpoint_with_a_cut_file_is_refused(checkpoint, name):
    cut(checkpoint / name, 0.5)
    with pytest.raises(InputError):
        VLA0.from_pretrained(checkpoint)


def test_a_weight_that_is_missing_is_refused_and_not_made_up(checkpoint):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights.pop(next(name for name in weights if "q_proj.weight" in name))
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="1 missing"):
        VLA0.from_pretrained(checkpoint)


def test_a_weight_of_another_shape_is_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        VLA0.from_pretrained(checkpoint)


def test_a_hub_id_that_cannot_be_had_is_refused():
    with pytest.raises(InputError, match="folder or Hub id"):
        VLA0.from_pretrained("nobody/nothing")
    with pytest.raises(InputError, match="folder or Hub id"):
        VLA0.from_pretrained("/no/such/folder")


def test_a_hub_id_works_as_a_path_does(policy, checkpoint, tmp_path, monkeypatch):
    """The Hub's cache as a download leaves it; nothing is fetched."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = tmp_path / "cache" / "models--lab--arm" / "snapshots" / ("a" * 40)
    shutil.copytree(checkpoint, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    assert VLA0.from_pretrained("lab/arm").spec == policy.spec


def test_the_tiny_tokenizer_keeps_digits_and_spaces_apart(processor):
    tokenizer = processor.tokenizer
    text = "push 100 27  blocks ünïcode 你好\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("10 27")["input_ids"]) == 5
    assert len(tokenizer("push the red block")["input_ids"]) == 4


def test_the_tiny_model_is_a_function_of_its_seed(processor):
    small = {
        "width": 48,
        "layers": 1,
        "heads": 3,
        "vision_width": 32,
        "vision_layers": 1,
        "vision_heads": 2,
    }
    one, same, other = (tiny_model(processor, **small, seed=seed) for seed in (0, 0, 1))
    weights = [next(m.model.language_model.layers[0].parameters()) for m in (one, same, other)]
    assert (weights[0] == weights[1]).all()
    assert (weights[0] != weights[2]).any()
    assert (
        next(models.untrained(other).model.language_model.layers[0].parameters()) != weights[2]
    ).any()


def test_qwens_own_processor_serves_the_policy(real_processor):
    """The real tokenizer and chat template over a small body of the same architecture."""
    model = tiny_model(
        real_processor,
        width=48,
        layers=1,
        heads=3,
        vision_width=32,
        vision_layers=1,
        vision_heads=2,
    )
    policy = VLA0(model, real_processor, make_spec(chunk_size=2, bins=1000))
    assert policy.predict_batch([make_observation(0)]).shape == (1, 2, 3)


@pytest.mark.parametrize("device", ["gpuu", "cuda:99", "meta:x"])
def test_a_device_that_is_not_there_is_refused(policy, tmp_path, device):
    policy.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(InputError, match="a torch device of this machine"):
        VLA0.from_pretrained(tmp_path / "checkpoint", device)


@pytest.mark.parametrize(
    ("name", "remedy"), [("qwen3vl", "did you mean 'qwen3_vl'?"), ("nope", "take one of those")]
)
def test_an_unknown_family_gets_a_suggestion_only_where_one_is_near(name, remedy):
    with pytest.raises(InputError) as caught:
        family_of(f"tiny:{name}")
    assert str(caught.value).endswith(f"got 'tiny:{name}'; {remedy}")
