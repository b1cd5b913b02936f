"""The heads that text is compared with: they see what text sees, and they learn."""

from dataclasses import replace
from pathlib import Path

import heads
import numpy as np
import pytest
import torch
from conftest import make_observation, make_recipe
from omegaconf import OmegaConf

from vla0.checkpoint.tiny import tiny_model
from vla0.core.prompt import Prompt
from vla0.core.spec import Spec
from vla0.train.config import TrainConfig, build

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {"width": 48, "layers": 2, "heads": 3, "vision_width": 32, "vision_layers": 1}
SMALL |= {"vision_heads": 2}


@pytest.fixture
def vlm(processor):
    return tiny_model(processor, **SMALL)


def batch_of(prompt: Prompt) -> dict[str, torch.Tensor]:
    """Two rows, of which one is padded."""
    long = replace(make_observation(0), instruction="put the green cube into the blue bowl " * 2)
    return prompt.observe([make_observation(1), long])


def test_what_a_head_adds_is_read_as_if_it_had_stood_in_the_prompt(vlm, processor, spec):
    prompt = Prompt(spec, processor)
    answer = [prompt.ids[character] for character in "12 34"]
    inputs = batch_of(prompt)
    tail = torch.tensor([answer, answer])
    whole = dict(inputs)
    for name, more in {"input_ids": tail, "attention_mask": torch.ones_like(tail),
                       "mm_token_type_ids": torch.zeros_like(tail)}.items():  # fmt: skip
        whole[name] = torch.cat([inputs[name], more], dim=1)
    with torch.no_grad():
        expected = vlm.model(**whole).last_hidden_state[:, -len(answer) :]
        embedded = vlm.get_input_embeddings()(tail)
        given = heads.go_on(vlm, heads.read(vlm, inputs), embedded, causal=True)
    assert not inputs["attention_mask"].bool().all()  # a row is padded
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", heads.HEADS)
def test_a_chunk_does_not_depend_on_the_rows_beside_it(kind, vlm, processor, spec, monkeypatch):
    model = heads.Headed(vlm, heads.HEADS[kind](48, spec)).eval()
    monkeypatch.setattr(torch, "randn", torch.zeros)  # the flow begins alike in both
    prompt = Prompt(spec, processor)
    observations = [
        make_observation(1),
        replace(make_observation(0), instruction="put the green cube into the blue bowl " * 2),
    ]
    predict = heads.predictor(model, prompt)
    together, alone = predict(observations), predict(observations[:1])
    assert together.shape == (2, spec.chunk_size, spec.dimensions)
    np.testing.assert_allclose(together[0], alone[0], atol=1e-4)


def test_tokens_of_bins_are_written_as_they_are_scored(vlm, processor, spec):
    torch.manual_seed(0)
    head = heads.Bins(48, spec)
    inputs = batch_of(Prompt(spec, processor))
    with torch.no_grad():
        chunk = head.act(vlm, heads.read(vlm, inputs))
        levels = ((chunk + 1) / 2 * spec.bins).round().long().flatten(1)
        reading = heads.read(vlm, inputs)
        hidden = heads.go_on(vlm, reading, head.tokens(levels[:, :-1]), causal=True)
        hidden = torch.cat([reading.last[:, None], hidden], dim=1)
    assert ((hidden @ head.tokens.weight.T).argmax(-1) == levels).all()


@pytest.mark.parametrize("kind", heads.HEADS)
@pytest.mark.parametrize("name", ["demo", "libero_tiny"])
def test_what_is_compared_has_as_many_weights_within_five_percent(name, kind, processor, spec):
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    vlm = tiny_model(processor, **config["model"]["tiny"])
    sized = replace(spec, chunk_size=config["action"]["chunk_size"])
    headed = heads.Headed(vlm, heads.HEADS[kind](vlm.config.text_config.hidden_size, sized))
    text = sum(weight.numel() for weight in vlm.parameters())
    whole = sum(weight.numel() for weight in headed.parameters())
    assert 1 < whole / text < 1.05


def test_actions_come_back_from_minus_one_to_one_and_clip_as_in_text(spec):
    actions = np.array([[-1.0, 0.5, 0.25], [3.0, -1.0, 0.5]], np.float32)
    scaled = heads.scaled(actions, spec)
    assert np.abs(scaled).max() <= 1
    expected = np.clip(actions, spec.low, spec.high)
    np.testing.assert_allclose(heads.unscaled(scaled, spec), expected, atol=1e-6)
    still = Spec(**{**vars(spec), "low": (0.0, 0.0, 0.0), "high": (0.0, 1.0, 1.0)})
    assert heads.unscaled(heads.scaled(actions, still), still)[:, 0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", heads.HEADS)
def test_a_head_is_trained_by_the_config_of_the_text_and_learns(kind, dataset, tmp_path):
    recipe = make_recipe(
        dataset, tmp_path / "run", num_steps=40, learning_rate=3e-3, log_every_n_steps=10,
        augmentation={"jitter": [0, 0, 0, 0]}, spec={"image_size": 56, "crop": 1.0},
    )  # fmt: skip
    config = build(TrainConfig, recipe, "config")
    before, prompt, samples = heads.built(config, kind)
    batch = heads.collate([samples[i] for i in range(8)], prompt)
    heads.train(config, kind)
    after, _ = heads.load(config, kind)
    losses = []
    for model in (before.eval(), after):
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(float(model(**batch)))
    assert losses[1] < 0.8 * losses[0], losses
    stamp = (tmp_path / "run" / heads.WEIGHTS).stat().st_mtime_ns
    heads.train(config, kind)  # has ended
    assert (tmp_path / "run" / heads.WEIGHTS).stat().st_mtime_ns == stamp
