"""Make the policies and the episodes on which decoding is measured."""

import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vla0.checkpoint import io as models
from vla0.checkpoint.tiny import FAMILY, TINY, family_of, tiny_model, tiny_processor
from vla0.checkpoint.tiny_families import FAMILIES
from vla0.core.spec import Observation, Spec
from vla0.data.lerobot import DataConfig, Source
from vla0.decode.window_attention import in_windows
from vla0.policy import VLA0

# Turns the number of an episode into its observations, step by step and without an end.
Episodes = Callable[[int], Iterator[Observation]]

SHAPE_3B: dict[str, Any] = {  # the configuration of Qwen2.5-VL-3B
    "text_config": {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128_000,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
    },
    "tie_word_embeddings": True,
}


def moving_pictures(spec: Spec) -> Callable[[int], Iterator[Observation]]:
    """Return made-up episodes, in which a soft picture drifts before the cameras.

    The state changes with it.
    """

    def episode(number: int) -> Iterator[Observation]:
        rng = np.random.default_rng(number)
        waves = rng.normal(0, 1, (len(spec.cameras), 3, 4))
        side = np.linspace(0, 1, max(64, spec.image_size))
        across, down = np.meshgrid(side, side)
        step = 0
        while True:
            images = {}
            for camera, parts in zip(spec.cameras, waves, strict=True):
                phases = [a * 9 * across + b * 9 * down + c + d * step / 40 for a, b, c, d in parts]
                frame = np.stack([127 + 120 * np.sin(phase) for phase in phases], -1).astype(
                    np.uint8
                )
                images[camera] = frame if spec.history == 1 else np.stack([frame] * spec.history)
            state = None
            if spec.state is not None:
                low, high = map(np.array, spec.state)
                state = low + (high - low) * (
                    0.5 + 0.4 * np.sin(step / 40 + np.arange(len(low)) + number)
                )
            yield Observation(
                images, f"move the {('red', 'blue', 'green')[number % 3]} block", state
            )
            step += 1

    return episode


def recorded(config: DataConfig, spec: Spec) -> Episodes:
    """Return the episodes of a dataset, each of which repeats without an end."""
    source = Source(config)
    starts = np.flatnonzero(np.r_[True, source.episode_of[1:] != source.episode_of[:-1]])

    def episode(number: int) -> Iterator[Observation]:
        first = int(starts[number % len(starts)])
        for row in cycle(range(first, int(source.end[first]))):
            yield source.sample(row, spec.chunk_size, spec.history).observation

    return episode


def chosen(name: str, device: str | None = None) -> VLA0:
    """Return the policy that is measured.

    Args:
        name: "tiny", "tiny:FAMILY" or "3b" for random weights, or a checkpoint's folder or Hub id.
            "3b" has the shape of Qwen2.5-VL-3B, in bf16.
        device: Where the model runs. None takes the GPU where there is one.
    """
    family = family_of(name)
    if family is None and name != "3b":
        return VLA0.from_pretrained(name, device)
    looks = (
        {} if name in (TINY, "3b") else {"image_size": FAMILIES[str(family)].side, "tile": False}
    )
    spec = Spec(
        low=(-1.0,) * 7, high=(1.0,) * 7, fps=20.0, cameras=("agentview", "wrist"), base_model=name,
        **looks,
    )  # fmt: skip
    words = [spec.system_text(), "move the red blue green block"]
    processor: Any = tiny_processor(words, family=family or FAMILY)
    torch_device = models.device_of(device)
    if family is not None:
        tiny: Any = tiny_model(processor)
        return VLA0(tiny.to(torch_device), processor, spec)
    return VLA0(build_3b(processor, torch_device, torch.bfloat16), processor, spec)


def build_3b(processor: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Build a model of random weights with the shape of Qwen2.5-VL-3B."""
    config = Qwen2_5_VLConfig(**SHAPE_3B)
    for key, token in {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }.items():
        setattr(config, key, processor.tokenizer.convert_tokens_to_ids(token))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return in_windows(Qwen2_5_VLForConditionalGeneration(config))
    finally:
        torch.set_default_dtype(before)


def product_rate(bf16: bool) -> float:
    """Measure the FLOP per second of large matrix products on this machine."""
    device = models.default_device()
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(
        size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" and bf16 else None
    )
    best = np.inf
    for _ in range(4):
        started = time.perf_counter()
        (left @ left).sum().item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
