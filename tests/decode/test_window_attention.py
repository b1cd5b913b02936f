"""Windows of one size at once: the tower sees what it sees one window after another."""

import numpy as np
import pytest
import torch
from conftest import make_observation
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vla0.checkpoint.tiny import tiny_model
from vla0.decode import window_attention as windows
from vla0.decode.vision_tower import VisionTower
from vla0.decode.window_attention import NAME, in_windows

SMALL = {
    "width": 48,
    "layers": 1,
    "heads": 3,
    "vision_width": 32,
    "vision_layers": 3,
    "vision_heads": 2,
}


def windowed(processor):
    config = tiny_model(processor, **SMALL).config.to_dict()
    config["vision_config"] |= {"fullatt_block_indexes": [1], "window_size": 56}
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).eval()


@pytest.mark.parametrize(
    "grids", [((1, 8, 12),), ((1, 8, 12), (1, 8, 12)), ((1, 8, 12), (1, 6, 10), (1, 4, 6))]
)
def test_windows_at_once_give_what_each_gives_alone(processor, grids):
    patches = torch.randn(sum(h * w for _, h, w in grids), 1176, requires_grad=True)
    results = []
    for model in (windowed(processor), in_windows(windowed(processor))):
        out = torch.cat(
            list(model.model.get_image_features(patches, torch.tensor(grids)).pooler_output)
        )
        (gradient,) = torch.autograd.grad(out.square().sum(), patches)
        results.append((out, gradient))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(
            VisionTower(model.model.visual, grids, model.device)(patches),
            results[0][0],
            rtol=1e-4,
            atol=1e-5,
        )


def test_all_windows_of_a_size_are_one_call(processor, monkeypatch):
    calls = []
    monkeypatch.setattr(
        windows, "scaled_dot_product_attention", lambda q, *_, **__: calls.append(q.shape[0]) or q
    )
    model = in_windows(windowed(processor))
    with torch.inference_mode():
        model.model.get_image_features(
            torch.randn(64 + 64, 1176), torch.tensor([[1, 8, 8], [1, 8, 8]])
        )
    assert calls == [8, 2, 8]  # windows of 4 x 4, whole pictures, windows


def test_every_model_of_ours_attends_so_and_no_checkpoint_knows(policy, tmp_path):
    def attends_so(model):
        return all(
            block.attn.config._attn_implementation == NAME for block in model.model.visual.blocks
        )

    assert attends_so(policy.model)
    policy.save_pretrained(tmp_path / "saved")
    assert NAME not in (tmp_path / "saved" / "config.json").read_text()
    again = type(policy).from_pretrained(tmp_path / "saved")
    assert attends_so(again.model)
    np.testing.assert_array_equal(
        again.predict_batch([make_observation(3)]), policy.predict_batch([make_observation(3)])
    )
    assert not attends_so(type(policy.model)(policy.model.config))  # a plain one can be made of it


def test_eager_attention_stays_eager(processor):
    model = windowed(processor)
    model.set_attn_implementation("eager")
    in_windows(model)
    assert all(
        block.attn.config._attn_implementation == "eager" for block in model.model.visual.blocks
    )
