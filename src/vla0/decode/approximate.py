"""Decoding that may write other tokens than the plain one: faster or smaller, never used unless
asked for by name.
"""

from copy import deepcopy
from typing import Any

import torch

from vla0.core.prompt import Prompt
from vla0.decode.speculative import SpeculativeDecoder
from vla0.decode.support import supported
from vla0.errors import InputError

ENOUGH = 0.5
MODES = {
    "relaxed": f"a guess passes that the model finds {ENOUGH} times as likely as its own choice: "
    f"reacts later",
    "int8": "weights of the language model in 8 bits, a scale a row, by torchao: half the memory "
    "of bf16",
    "nf4": "weights of the language model in 4 bits, by bitsandbytes: a quarter of the memory of "
    "bf16",
}


def approximate(model: Any, prompt: Prompt, mode: str) -> tuple[Any, SpeculativeDecoder]:
    """(model, decoder) of a mode of MODES; the given model is not changed.

    Raises InputError where it cannot run here.
    """
    if mode not in MODES:
        raise InputError(f"a mode of {tuple(MODES)}", f"'{mode}'", "choose one of those")
    if reason := supported(model):
        raise InputError("a model that the fast decoder drives", reason, "decode exactly")
    if mode == "relaxed":
        return model, SpeculativeDecoder(model, prompt, acceptance_ratio=ENOUGH)
    model = in_4_bits(model) if mode == "nf4" else in_8_bits(model)
    return model, SpeculativeDecoder(model, prompt)


def in_4_bits(model: Any) -> Any:
    """A copy of a model whose language model's weights are of 4 bits (NF4); its embedding and
    output layer stay as they are.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        raise InputError("bitsandbytes, for nf4", "none installed", "install vla0[qlora]") from None
    model, device, dtype = deepcopy(model), model.device, model.dtype
    for part in list(model.model.language_model.modules()):
        for name, layer in list(part.named_children()):
            if type(layer) is torch.nn.Linear:
                sizes = layer.in_features, layer.out_features, layer.bias is not None
                fewer: Any = Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
                settings: Any = {"requires_grad": False, "quant_type": "nf4"}
                fewer.weight, fewer.bias = (
                    Params4bit(layer.weight.data.cpu(), **settings),
                    layer.bias,
                )
                setattr(part, name, fewer.to(device))  # where it is quantised
    return model


def in_8_bits(model: Any) -> Any:
    """A copy of a model whose language model's weights are of 8 bits; its embedding and output
    layer stay as they are.
    """
    try:
        from torchao import quantization
    except ImportError:
        raise InputError("torchao, for int8", "none installed", "install vla0[int8]") from None
    model = deepcopy(model)
    quantization.quantize_(model.model.language_model, quantization.Int8WeightOnlyConfig())
    return model
