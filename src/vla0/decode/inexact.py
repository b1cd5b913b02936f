"""Decoding that may write other tokens than the plain one: faster, never used unless asked for by name."""

from copy import deepcopy
from typing import Any

import torch

from vla0.decode.fast import Fast
from vla0.decode.support import supported
from vla0.errors import InputError
from vla0.prompt import Prompt

ENOUGH = 0.5
MODES = {
    "relaxed": f"a guess passes that the model finds {ENOUGH} times as likely as its own choice: reacts later",
    "fp8": "weights and activations of the language model in 8 bits, by torchao",
    "fp8-weights": "its weights only: on any device, and no faster there",
}
FIRST = (8, 9)  # compute capability that multiplies in fp8


def inexact(model: Any, prompt: Prompt, mode: str) -> tuple[Any, Fast]:
    """(model, decoder) of a mode of MODES; the given model is not changed. Raises InputError where it cannot run here."""
    if mode not in MODES:
        raise InputError(f"a mode of {tuple(MODES)}", f"'{mode}'", "choose one of those")
    if reason := supported(model):
        raise InputError("a model that the fast decoder drives", reason, "decode exactly")
    if mode == "relaxed":
        return model, Fast(model, prompt, enough=ENOUGH)
    model = in_8_bits(model, mode == "fp8")
    return model, Fast(model, prompt)


def in_8_bits(model: Any, activations: bool) -> Any:
    """A copy of a model whose language model multiplies in fp8; its embedding and output layer stay as they are."""
    if activations and (model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < FIRST):
        raise InputError(
            f"a GPU of compute capability {FIRST} or later", f"{model.device}", "use fp8-weights, or decode exactly"
        )
    try:
        from torchao import quantization
    except ImportError:
        raise InputError("torchao, for fp8", "none installed", "install vla0[fp8]") from None
    how: Any = quantization.Float8WeightOnlyConfig()
    if activations:
        how = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    model = deepcopy(model)
    # fp8 products take sizes that are multiples of 16.
    fits = lambda part, _: isinstance(part, torch.nn.Linear) and not any(size % 16 for size in part.weight.shape)  # noqa: E731
    quantization.quantize_(model.model.language_model, how, fits)
    return model
