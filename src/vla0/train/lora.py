"""Train few weights, by LoRA or a frozen vision tower, and merge them into an ordinary model."""

import logging
from typing import Any

import torch

from vla0.errors import InputError
from vla0.train.config import Lora

logger = logging.getLogger(__name__)


def adapted(model: Any, lora: Lora, freeze_vision: bool) -> Any:
    """Prepare a model so that only the weights that a config chooses are trained.

    Args:
        model: The model; its vision tower may be frozen in place.
        lora: The LoRA settings. Rank 0 trains all weights.
        freeze_vision: Leave the weights of the vision tower as they are.

    Returns:
        The model, inside peft's wrapping where there is LoRA.
    """
    if lora.rank:
        from peft import LoraConfig, get_peft_model

        settings: dict[str, Any] = {
            "lora_alpha": 2 * lora.rank if lora.alpha is None else lora.alpha
        }
        layers = lora_layers(model, freeze_vision)
        logger.info("LoRA of rank %d beside %d linear layers", lora.rank, len(layers))
        return get_peft_model(
            model,
            LoraConfig(r=lora.rank, lora_dropout=lora.dropout, target_modules=layers, **settings),
        )
    if freeze_vision:
        vision_part(model).requires_grad_(False)
    return model


def vision_part(model: Any) -> torch.nn.Module:
    """Return the vision tower of a model.

    Raises:
        InputError: When the model has none apart from its language model.
    """
    part = model.get_encoder(modality="image")
    if model.get_decoder() in part.modules():
        got = f"none in {type(model).__name__}"
        raise InputError("a vision tower apart from the language model", got, "train all weights")
    return part


def lora_layers(model: Any, freeze_vision: bool) -> list[str]:
    """Return the names of all linear layers of the language model, and of the vision tower.

    Args:
        model: The model.
        freeze_vision: Leave the tower's out.

    Raises:
        InputError: When there is none, or no vision tower.
    """
    parts = [model.get_decoder()] + ([] if freeze_vision else [vision_part(model)])
    wanted = {
        part
        for module in parts
        for part in module.modules()
        if isinstance(part, torch.nn.Linear) and part is not model.get_output_embeddings()
    }
    inside = sum(part.weight.numel() for part in wanted if part in set(parts[0].modules()))
    every = sum(weight.numel() for weight in parts[0].parameters())
    every -= model.get_input_embeddings().weight.numel()
    if inside < every / 2:
        logger.warning(
            "LoRA lies beside %.0f %% of the language model's weights: the others, such as stacked "
            "experts, are no linear layers, and stay as they are",
            100 * inside / every,
        )
    names = [name for name, part in model.named_modules() if part in wanted]
    if not names:
        raise InputError("linear layers for LoRA", "none", "leave model.lora out")
    return names


def plain(model: Any) -> Any:
    """Return the transformers model inside peft's wrapping, or the model itself without one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def merged(model: Any) -> dict[str, torch.Tensor] | None:
    """Merge LoRA into the weights of an ordinary model, or return None where there is no LoRA.

    The model itself is not changed, because subtracting the products again would not restore its
    weights exactly. Weights of 4 bits are taken as quantised, which is what the products were
    trained with, and not as they were before.
    """
    if (base := plain(model)) is model:
        return None
    from peft.tuners.lora import LoraLayer

    layers = {name: part for name, part in base.named_modules() if isinstance(part, LoraLayer)}
    weights = {}
    for name, weight in base.state_dict().items():
        if ".lora_" in name or ".weight." in name:  # ".weight." says how to read 4 bits
            continue
        layer = layers.get(name.removesuffix(".base_layer.weight"))
        if layer is not None:
            delta: Any = layer.get_delta_weight("default")  # type: ignore[operator]
            weight = whole(layer.base_layer)  # type: ignore[arg-type]
            weight = (weight.float() + delta.float()).to(weight.dtype)
        weights[name.replace(".base_layer.", ".")] = weight
    return weights


def whole(layer: Any) -> torch.Tensor:
    """Return the weight of a linear layer as numbers, dequantised where it has 4 bits."""
    if hasattr(layer.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight
