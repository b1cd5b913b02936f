import logging

import numpy as np
import pytest
import torch
from conftest import make_observation, make_spec
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vla0 import InputError
from vla0.decode import Fast, decode, engine
from vla0.decode.sight import Sight
from vla0.policy import VLA0
from vla0.tiny import tiny_model

SMALL = {"width": 48, "layers": 2, "heads": 3, "vision_width": 32, "vision_layers": 1, "vision_heads": 2}


@pytest.fixture(scope="module")
def small(processor):
    return VLA0(tiny_model(processor, **SMALL, seed=3), processor, make_spec(bins=100, horizon=2))


def of_fixed_size(policy: VLA0, width: int = 12) -> Fast:
    """As on a GPU, where passes are captured."""
    fast = Fast(policy.model, policy.prompt, width)
    fast.engine.fixed = True
    return fast


def test_the_tower_sees_what_the_unmodified_one_sees(processor):
    config = tiny_model(processor, **(SMALL | {"vision_layers": 3})).config.to_dict()
    config["vision_config"] |= {"fullatt_block_indexes": [1], "window_size": 56}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).eval()
    grids = ((1, 8, 12), (1, 4, 6), (1, 6, 6))
    patches = torch.randn(sum(h * w for _, h, w in grids), 1176)
    with torch.inference_mode():
        expected = torch.cat(list(model.model.get_image_features(patches, torch.tensor(grids)).pooler_output))
        sight = Sight(model.model.visual, grids, model.device)
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


@pytest.mark.parametrize("mode", ["real", "fake"])  # fake: tensors without content, which would refuse to be looked at
def test_a_captured_pass_is_a_function_of_its_tensors_and_asks_nothing_of_the_device(small, monkeypatch, mode):
    captured = []

    class Recorded:
        """Records a function's operations, the host's numbers as they are then, and does them again: as a CUDA graph does."""

        def __init__(self, function, pool, *inputs):
            captured.append(self)
            self.graph = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)

        def __call__(self, *inputs):
            return self.graph(*inputs)

    monkeypatch.setattr(engine, "Replay", Recorded)
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

    monkeypatch.setattr(engine, "Replay", full)
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
    policy = VLA0(model, processor, make_spec(bins=100, horizon=2))
    with pytest.raises(InputError, match="60 tokens at most"):
        policy.predict_batch([make_observation(0)])


def test_the_words_before_the_picture_are_read_once_and_change_no_token(small, monkeypatch):
    fast, read, calls = Fast(small.model, small.prompt, 12), [], []
    inner = fast.engine._read
    fast.engine.prefix.read = lambda tokens, places: read.append(len(tokens)) or inner(tokens, places)
    hook = small.model.model.language_model.register_forward_pre_hook(
        lambda _, __, told: calls.append(told["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for seed in (0, 1, 2, 5):  # two instructions
        batch = small.prompt.observe([make_observation(seed)])
        calls.clear()
        np.testing.assert_array_equal(fast.decode(batch), decode(small.model, batch, small.prompt))
        first = calls[1] if seed == 0 else calls[0]  # before it, the beginning alone
        assert first < batch["input_ids"].shape[1] - read[0] + 12
    hook.remove()
    assert len(read) == 1
    assert read[0] > 5


def test_rows_that_begin_differently_are_read_whole(small, processor):
    from vla0.prompt import Prompt

    other = Prompt(make_spec(bins=100, horizon=2, system="Now, please write {numbers} integers."), processor)
    both = small.prompt.gather([small.prompt.see(make_observation(0)), other.see(make_observation(1))])
    fast = Fast(small.model, small.prompt, 12)
    np.testing.assert_array_equal(fast.decode(both), decode(small.model, both, small.prompt))
    assert not fast.engine.prefix.known


def test_the_beginning_is_read_anew_when_a_weight_has_changed(processor):
    model = tiny_model(processor, **SMALL, seed=3)
    policy = VLA0(model, processor, make_spec(bins=100, horizon=2))
    batch = policy.prompt.observe([make_observation(0)])
    before = policy.decoder.decode(batch)
    with torch.no_grad():
        model.model.language_model.layers[0].self_attn.v_proj.weight.normal_(0, 0.3)
    first = decode(model, batch, policy.prompt)
    np.testing.assert_array_equal(policy.decoder.decode(batch), first)
    model.load_state_dict(tiny_model(processor, **SMALL, seed=8).state_dict())
    np.testing.assert_array_equal(policy.decoder.decode(batch), decode(model, batch, policy.prompt))
    assert not np.array_equal(before, first)
