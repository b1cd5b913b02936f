"""Say which models the fast decoder can run, and what versions of transformers name differently."""

import inspect
from typing import Any

from transformers import Qwen2_5_VLForConditionalGeneration


def supported(model: Any) -> str | None:
    """Return why the engine cannot run a model, or None where it can."""
    if type(model) is not Qwen2_5_VLForConditionalGeneration:
        return f"{type(model).__name__} is not Qwen2.5-VL as it is"
    text: Any = model.config.text_config
    if set(text.layer_types) != {"full_attention"}:
        return "layers of sliding attention"
    if text._attn_implementation not in ("sdpa", "eager"):
        return f"attention '{text._attn_implementation}', which takes no mask of a tree"
    return None


def cache_argument(model: Any) -> str:
    """Return the name of a language model's argument for its cache.

    It is `past_key_values`, and `cache` in later versions of transformers.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
