"""Decode batches into levels.

For each row, every decoder returns exactly the (H, D) levels that `core.greedy.decode` returns.
"""

import logging
from typing import Any

import torch

from vla0.core.greedy import GreedyDecoder, decode
from vla0.core.prompt import Prompt
from vla0.decode.probe import unfit
from vla0.decode.speculative import UNSTEADY, SpeculativeDecoder
from vla0.decode.support import fused

__all__ = ["GreedyDecoder", "SpeculativeDecoder", "decode", "decoder"]

logger = logging.getLogger(__name__)


def decoder(
    model: Any, prompt: Prompt, compiled: bool = False
) -> SpeculativeDecoder | GreedyDecoder:
    """Return the fastest decoder for a model.

    Where the engine cannot run the model, that is the plain decoder, and the log says why.

    Args:
        model: The model.
        prompt: The prompt that makes its batches.
        compiled: As for `SpeculativeDecoder`.

    Raises:
        InputError: When a model other than Qwen2.5-VL is to be compiled.
    """
    fast = SpeculativeDecoder(model, prompt, compiled=compiled)
    reason = unfit(fast.engine, prompt)
    if reason is None:
        if model.dtype != torch.float32 and not fused(model):
            logger.warning(UNSTEADY, model.dtype, "only Qwen2.5-VL's engine excludes it")
        return fast
    logger.warning("decoding one token a pass: %s", reason)
    return GreedyDecoder(model, prompt)
