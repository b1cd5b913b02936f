"""Decode faster or in less memory, with tokens that may differ from those of plain decoding.

None of this is used unless it is asked for by name.
"""

from copy import deepcopy
from typing import Any

import torch

from vla0.core.prompt import Prompt
from vla0.decode.probe import unfit
from vla0.decode.speculative import SpeculativeDecoder
from vla0.errors import InputError

ENOUGH = 0.5  # acceptance ratio of "relaxed"
MODES = {
    "relaxed": f"a guess passes that the model finds {ENOUGH} times as likely as its own choice: "
    f"reacts later",
    "int8": "weights of the language model in 8 bits, a scale a row, by torchao: half the memory "
    "of bf16",
    "nf4": "weights of the language model in 4 bits, by bitsandbytes: a quarter of the memory of "
    "bf16",
}


def approximate(model: Any, prompt: Prompt, mode: str) -> tuple[Any, SpeculativeDecoder]:
    """Make a model and a decoder for a mode of MODES.

    Args:
        model: The model. It is not changed.
        prompt: The prompt that makes the batches.
        mode: A key of MODES.

    Returns:
        The model, which may be a smaller copy, and its decoder.

    Raises:
        InputError: When the mode is unknown or cannot run here.
    """
    if mode not in MODES:
        raise InputError(f"a mode of {tuple(MODES)}", f"'{mode}'", "choose one of those")
    if mode != "relaxed":
        model = in_4_bits(model) if mode == "nf4" else in_8_bits(model)
    ratio = ENOUGH if mode == "relaxed" else 1.0
    decoder = SpeculativeDecoder(model, prompt, acceptance_ratio=ratio)
    if reason := unfit(decoder.engine, prompt):
        raise InputError("a model that the fast decoder drives", reason, "decode exactly")
    return model, decoder


def in_4_bits(model: Any) -> Any:
    """Copy a model with the weights of its language model in 4 bits (NF4).

    The embedding and the output layer stay as they are.

    Raises:
        InputError: When bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        raise InputError("bitsandbytes, for nf4", "none installed", "install vla0[qlora]") from None
    model, device, dtype = deepcopy(model), model.device, model.dtype
    for part in list(model.get_decoder().modules()):
        for name, layer in list(part.named_children()):
            if type(layer) is torch.nn.Linear:
                sizes = layer.in_features, layer.out_features, layer.bias is not None
                quantised: Any = Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
                settings: Any = {"requires_grad": False, "quant_type": "nf4"}
                quantised.weight = Params4bit(layer.weight.data.cpu(), **settings)
                quantised.bias = layer.bias
                setattr(part, name, quantised.to(device))  # `to` quantises the weight
    return model


def in_8_bits(model: Any) -> Any:
    """Copy a model with the weights of its language model in 8 bits.

    The embedding and the output layer stay as they are.

    Raises:
        InputError: When torchao is not installed.
    """
    try:
        from torchao import quantization
    except ImportError:
        raise InputError("torchao, for int8", "none installed", "install vla0[int8]") from None
    model = deepcopy(model)
    quantization.quantize_(model.get_decoder(), quantization.Int8WeightOnlyConfig())
    return model
