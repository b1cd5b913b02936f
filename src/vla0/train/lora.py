"""Few weights to train: LoRA, or a frozen vision tower; and the ordinary model that comes of it."""

from typing import Any

import torch

from vla0.train.config import Lora

LANGUAGE = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
VISION = r".*visual\.blocks\..*\.(attn\.qkv|attn\.proj|gate_proj|up_proj|down_proj)"


def adapted(model: Any, lora: Lora, freeze_vision: bool) -> Any:
    """The model, ready to train what a config lets change; in peft's wrapping where that is
    LoRA.
    """
    if lora.rank:
        from peft import LoraConfig, get_peft_model

        layers = LANGUAGE if freeze_vision else f"({LANGUAGE})|({VISION})"
        settings: dict[str, Any] = {
            "lora_alpha": 2 * lora.rank if lora.alpha is None else lora.alpha
        }
        return get_peft_model(
            model,
            LoraConfig(r=lora.rank, lora_dropout=lora.dropout, target_modules=layers, **settings),
        )
    if freeze_vision:
        model.model.visual.requires_grad_(False)
    return model


def plain(model: Any) -> Any:
    """The transformers model inside peft's wrapping; the model itself where there is none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def merged(model: Any) -> dict[str, torch.Tensor] | None:
    """The weights of an ordinary model that does what an adapted one does; None where there is no
    LoRA to merge.

    The model is not touched: taking a product off again would leave other weights than before.
    Weights of 4 bits are those that the products were learned beside, not the ones that they were
    made of.
    """
    if (base := plain(model)) is model:
        return None
    from peft.tuners.lora import LoraLayer

    layers = {name: part for name, part in base.named_modules() if isinstance(part, LoraLayer)}
    weights = {}
    for name, weight in base.state_dict().items():
        if ".lora_" in name or ".weight." in name:  # the latter say how 4 bits are read
            continue
        layer = layers.get(name.removesuffix(".base_layer.weight"))
        if layer is not None:
            delta: Any = layer.get_delta_weight("default")  # type: ignore[operator]
            weight = whole(layer.base_layer)  # type: ignore[arg-type]
            weight = (weight.float() + delta.float()).to(weight.dtype)
        weights[name.replace(".base_layer.", ".")] = weight
    return weights


def whole(layer: Any) -> torch.Tensor:
    """The weight of a linear layer as numbers; of 4 bits what they stand for."""
    if hasattr(layer.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight
