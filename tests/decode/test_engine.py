import logging

import numpy as np
import pytest
import torch
from conftest import make_observation, make_spec
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vla0 import InputError
from vla0.checkpoint.tiny import tiny_model
from vla0.decode import SpeculativeDecoder, decode, engine
from vla0.decode.vision_tower import VisionTower
from vla0.policy import VLA0

SMALL = {
    "width": 48,
    "layers": 2,
    "heads": 3,
    "vision_width": 32,
    "vision_layers": 1,
    "vision_heads": 2,
}


@pytest.fixture(scope="module")
def small(processor):
    return VLA0(
        tiny_model(processor, **SMALL, seed=3), processor, make_spec(bins=100, chunk_size=2)
    )


def of_fixed_size(policy: VLA0, width: int = 12) -> SpeculativeDecoder:
    """As on a GPU, where passes are captured."""
    fast = SpeculativeDecoder(policy.model, policy.prompt, width)
    fast.engine.fixed = True
    return fast


def test_the_tower_sees_what_the_unmodified_one_sees(processor):
    config = tiny_model(processor, **(SMALL | {"vision_layers": 3})).config.to_dict()
    config["vision_config"] |= {"fullatt_block_indexes": [1], "window_size": 56}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).eval()
    grids = ((1, 8, 12), (1, 4, 6), (1, 6, 6))
    patches = torch.randn(sum(h * w for _, h, w in grids), 1176)
    with torch.inference_mode():
        expected = torch.cat(
            list(model.model.get_image_features(patches, torch.tensor(grids)).pooler_output)
        )
        sight = VisionTower(model.model.visual, grids, model.device)
        windows, whole, _ = (len(told["cu_seqlens"].tolist()) for told in sight.told)
        assert windows > whole == len(grids)
        torch.testing.assert_close(sight(patches), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
def test_passes_of_a_fixed_size_write_the_same_tokens(small, rows):
    fast = of_fixed_size(small)
    for seed in range(3):
        batch = small.prompt.observe([make_observation(10 * seed + row) for row in range(rows)])
        np.testing.assert_array_equal(fast.decode(batch), decode(small.model, batch, small.prompt))
    assert len(fast.engine.caches) == 1


# fake: tensors without content, which would refuse to be looked at
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_captured_pass_is_a_function_of_its_tensors_and_asks_nothing_of_the_device(
    small, monkeypatch, mode
):
    captured = []

    class Recorded:
        """Records a function's operations, the host's numbers as they are then, and does them
        again: as a CUDA graph does.
        """

        def __init__(self, function, pool, *inputs):
            captured.append(self)
            self.graph = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)

        def __call__(self, *inputs):
            return self.graph(*inputs)

    monkeypatch.setattr(engine, "CudaGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 1)
    fast = of_fixed_size(small)
    fast.engine.capturing = True
    for seed in range(4):
        observations = [make_observation(10 * seed + row) for row in range(3 if seed % 2 else 4)]
        batch = small.prompt.observe(observations)
        np.testing.assert_array_equal(fast.decode(batch), decode(small.model, batch, small.prompt))
    assert len(captured) == 2  # the first pass and the others, of four rows: three are filled up


def test_without_memory_to_capture_decoding_goes_on_and_says_so(small, monkeypatch, caplog):
    def full(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(engine, "CudaGraph", full)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 1)
    fast = of_fixed_size(small)
    fast.engine.capturing = True
    batch = small.prompt.observe([make_observation(0)])
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(fast.decode(batch), decode(small.model, batch, small.prompt))
    assert caplog.text.count("no memory to capture") == 1


def test_a_prompt_longer_than_the_model_can_read_is_refused(processor):
    model = tiny_model(processor, **SMALL)
    model.config.text_config.max_position_embeddings = 60
    policy = VLA0(model, processor, make_spec(bins=100, chunk_size=2))
    with pytest.raises(InputError, match="60 tokens at most"):
        policy.predict_batch([make_observation(0)])
