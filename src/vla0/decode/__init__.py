"""Batch → levels.

Every decoder returns exactly (H, D) levels, the ones that `core.greedy.decode` returns.
"""

import logging
from typing import Any

from vla0.core.greedy import GreedyDecoder, decode
from vla0.core.prompt import Prompt
from vla0.decode.speculative import SpeculativeDecoder
from vla0.decode.support import supported

__all__ = ["GreedyDecoder", "SpeculativeDecoder", "decode", "decoder"]

logger = logging.getLogger(__name__)


def decoder(model: Any, prompt: Prompt) -> SpeculativeDecoder | GreedyDecoder:
    """The fastest decoder for a model; the plain one, and a line in the log, where the engine
    cannot drive it.
    """
    reason = supported(model)
    if reason is None:
        return SpeculativeDecoder(model, prompt)
    logger.warning("decoding one token a pass: %s", reason)
    return GreedyDecoder(model, prompt)
