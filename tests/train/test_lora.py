import copy

import numpy as np
import pytest
import torch
from conftest import make_recipe

from vla0 import InputError
from vla0.checkpoint.tiny import tiny_model
from vla0.data.lerobot import Source
from vla0.decode import SpeculativeDecoder
from vla0.policy import VLA0
from vla0.train.config import Lora, TrainConfig, build
from vla0.train.lora import adapted, merged, plain
from vla0.train.run import main

LORA = {"lora": {"rank": 4}, "learning_rate": 1e-2}


def config_of(dataset, output, **changes) -> TrainConfig:
    return build(TrainConfig, make_recipe(dataset, output, **changes), "test")


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def fresh(processor):
    small = {
        "width": 48,
        "layers": 2,
        "heads": 3,
        "vision_width": 32,
        "vision_layers": 1,
        "vision_heads": 2,
    }
    return tiny_model(processor, **small)


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("freeze_vision", [True, False])
def test_merged_weights_are_an_ordinary_model_that_does_the_same(processor, freeze_vision):
    model = adapted(fresh(processor), Lora(rank=4), freeze_vision)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)  # at first it is zero: the model as it was
    before = copy.deepcopy(model.state_dict())
    weights = merged(model)
    assert not changed(before, model.state_dict())
    other = fresh(processor)
    other.load_state_dict(weights)
    touched = changed(fresh(processor).state_dict(), weights)
    assert any("visual" in name for name in touched) is not freeze_vision
    assert all(
        "embed" not in name and "norm" not in name and "bias" not in name for name in touched
    )
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        torch.testing.assert_close(
            plain(model)(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5
        )
        assert not torch.allclose(fresh(processor)(ids).logits, other(ids).logits)


def test_lora_leaves_an_ordinary_checkpoint_that_acts(dataset, tmp_path):
    last = main(config_of(dataset, tmp_path / "run", **LORA))
    assert {file.suffix for file in last.iterdir()} <= {
        ".json",
        ".safetensors",
        ".jinja",
        ".txt",
        ".md",
        ".png",
    }
    start = weights_of(
        main(
            config_of(
                dataset, tmp_path / "start", num_steps=1, save_every_n_steps=1, learning_rate=1e-12
            )
        )
    )
    moved = {
        name
        for name in changed(start, weights_of(last))
        if (start[name] - weights_of(last)[name]).abs().max() > 1e-6
    }
    assert any("q_proj" in name for name in moved)
    assert not any("embed" in name or "norm" in name for name in moved)
    policy = VLA0.from_pretrained(last)
    assert isinstance(policy.decoder, SpeculativeDecoder)
    sample = Source(config_of(dataset, tmp_path / "run").data).sample(0, 2, 1)
    assert policy.predict_batch([sample.observation]).shape == (1, 2, 3)
    assert (tmp_path / "run" / "state" / "checkpoint-4" / "adapter_model.safetensors").is_file()


def test_a_resumed_lora_run_ends_in_the_weights_of_an_uninterrupted_one(dataset, tmp_path):
    class KilledError(Exception):
        pass

    def stop(policy, folder):
        # what is tried during training is decoded fast too
        assert isinstance(policy.decoder, SpeculativeDecoder)
        raise KilledError

    whole = main(config_of(dataset, tmp_path / "whole", **LORA))
    with pytest.raises(KilledError):
        main(config_of(dataset, tmp_path / "parts", **LORA), stop)
    resumed = main(config_of(dataset, tmp_path / "parts", **LORA))
    assert not changed(weights_of(whole), weights_of(resumed))


def test_qlora_leaves_an_ordinary_checkpoint_that_acts_as_the_trained_model_did(dataset, tmp_path):
    """4 bits are gone from what is saved; and a run that was stopped ends in the weights of one
    that was not.
    """
    from bitsandbytes.nn import Linear4bit

    class KilledError(Exception):
        pass

    seen = {}
    observation = Source(config_of(dataset, tmp_path / "run").data).sample(3, 2, 1).observation

    def look(policy, folder):
        assert sum(type(part) is Linear4bit for part in policy.model.modules()) == 7
        seen[folder.name] = policy.model(**policy.prompt.observe([observation])).logits.detach()
        return {"success": 0.0}

    def stop(policy, folder):
        raise KilledError

    settings = {**LORA, "quantization": "nf4"}
    last = main(config_of(dataset, tmp_path / "run", **settings), look)
    assert "quantization_config" not in (last / "config.json").read_text()
    policy = VLA0.from_pretrained(last)
    assert isinstance(policy.decoder, SpeculativeDecoder)
    with torch.inference_mode():
        logits = policy.model(**policy.prompt.observe([observation])).logits
    torch.testing.assert_close(logits, seen["step-000004"], rtol=1e-3, atol=1e-4)
    with pytest.raises(KilledError):
        main(config_of(dataset, tmp_path / "parts", **settings), stop)
    assert not changed(
        weights_of(last), weights_of(main(config_of(dataset, tmp_path / "parts", **settings)))
    )
    with pytest.raises(InputError, match="cannot learn"):
        config_of(dataset, tmp_path, quantization="nf4")


def test_a_frozen_vision_tower_stays_as_it_was(dataset, tmp_path):
    start = weights_of(
        main(
            config_of(
                dataset, tmp_path / "start", num_steps=1, save_every_n_steps=1, learning_rate=1e-12
            )
        )
    )
    frozen = weights_of(main(config_of(dataset, tmp_path / "frozen", freeze_vision_encoder=True)))
    touched = {
        name for name in changed(start, frozen) if (start[name] - frozen[name]).abs().max() > 1e-6
    }
    assert touched
    assert not any("visual" in name for name in touched)
    assert any(
        "visual" in name
        for name in changed(start, weights_of(main(config_of(dataset, tmp_path / "all"))))
    )


@pytest.mark.parametrize("changes", [{}, LORA])
def test_checkpointing_gradients_changes_no_weight(dataset, tmp_path, changes):
    one = weights_of(main(config_of(dataset, tmp_path / "one", **changes)))
    other = weights_of(
        main(config_of(dataset, tmp_path / "other", gradient_checkpointing=True, **changes))
    )
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-4, atol=1e-6)


def test_an_optimiser_that_there_is_not_is_refused(dataset, tmp_path):
    with pytest.raises(InputError, match="sgdd"):
        main(config_of(dataset, tmp_path / "run", optimizer="sgdd"))


@pytest.mark.parametrize(
    "wrong", [{"rank": -1}, {"rank": 4, "alpha": 0}, {"rank": 4, "dropout": 1.0}]
)
def test_adapters_that_mean_nothing_are_refused(wrong):
    with pytest.raises(InputError):
        Lora(**wrong)


def test_a_checkpoint_of_lora_predicts_what_the_trained_model_predicted(dataset, tmp_path):
    seen = {}

    def look(policy, folder):
        observation = Source(config_of(dataset, tmp_path / "run").data).sample(3, 2, 1).observation
        seen[folder.name] = policy.predict_batch([observation])
        return {"success": 0.0}

    last = main(config_of(dataset, tmp_path / "run", **LORA), look)
    observation = Source(config_of(dataset, tmp_path / "run").data).sample(3, 2, 1).observation
    np.testing.assert_allclose(
        VLA0.from_pretrained(last).predict_batch([observation]), seen["step-000004"], atol=0.3
    )
