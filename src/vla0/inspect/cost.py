"""Estimate what training a config's model takes: weights, memory and arithmetic."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vla0.bench.inputs import product_rate
from vla0.checkpoint.io import default_device
from vla0.checkpoint.location import locate
from vla0.checkpoint.tiny import family_of
from vla0.core.spec import MAIN, Spec
from vla0.data.lerobot import Source
from vla0.doctor import MODELS, TRAINING
from vla0.errors import InputError
from vla0.train.config import TrainConfig
from vla0.train.lora import adapted, lora_layers
from vla0.train.run import tiny_of

NF4 = 0.52  # bytes of a weight in 4 bits, including its share of the scales
ALL = "full fine-tuning"
# The approximate share that training reaches of the rate of large matrix products, by type of
# device (docs/results.md).
SHARE = {"cpu": 0.6, "cuda": 0.2}


@dataclass(frozen=True)
class Size:
    """The size of a model, and of what training it keeps in memory."""

    weights: float  # number of all weights
    trained: float  # number of the weights that are trained
    memory: float  # bytes for weights, gradients and moments


def size_of(config: TrainConfig, spec: Spec, source: Source) -> tuple[Size | None, Any]:
    """Return the size and the processor of a config's model.

    Each is None when it is not known, or when the model's files are not at hand.
    """
    if family_of(config.model.name) is not None:
        model, processor = tiny_of(config, {MAIN: spec}, {MAIN: source})
        return _counted(config, model), processor
    try:
        folder = locate(config.model.name, weights=False)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
        return _counted(config, model), AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, InputError):
        count = next((count for name, count in MODELS.items() if name in config.model.name), None)
        return None if count is None or trained_of(config) != ALL else Size(
            count, count, TRAINING * count
        ), None


def _counted(config: TrainConfig, model: Any) -> Size:
    """Count the weights of a model and the memory that training it takes."""
    layers = lora_layers(model, freeze_vision=True) if config.model.quantization else []
    in_4_bits = tuple(f"{name}.base_layer.weight" for name in layers)
    model = adapted(model, config.model.lora, config.model.freeze_vision_encoder)
    # Bytes of a weight that is neither trained nor packed into 4 bits.
    frozen_bytes = 2.0 if config.model.lora.rank and config.training.precision == "bf16" else 4.0
    weights = trained = memory = 0.0
    for name, weight in model.named_parameters():
        weights += weight.numel()
        trained += weight.numel() * weight.requires_grad
        packed = name.endswith(in_4_bits)
        memory += weight.numel() * (
            TRAINING if weight.requires_grad else NF4 if packed else frozen_bytes
        )
    return Size(weights, trained, memory)


def trained_of(config: TrainConfig) -> str:
    """Say in words which part of the model a config trains."""
    lora = config.model.lora.rank
    tower = "" if not config.model.freeze_vision_encoder else ", the vision tower frozen"
    kind = f"{'Q' if config.model.quantization else ''}LoRA of rank {lora}" if lora else ALL
    return kind + tower


def rate(precision: str) -> float:
    """Estimate the FLOP per second that training reaches on this machine."""
    return SHARE.get(default_device().type, SHARE["cuda"]) * product_rate(precision == "bf16")
