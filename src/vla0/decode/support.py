"""Say which models the engines can run, and what versions of transformers name differently."""

import inspect
from typing import Any

from transformers import Qwen2_5_VLForConditionalGeneration


def fused(model: Any) -> bool:
    """Return whether a model is one whose prompts and first trees one pass may read."""
    return type(model) is Qwen2_5_VLForConditionalGeneration and layer_types(model) == {
        "full_attention"
    }


def layer_types(model: Any) -> set[str]:
    """Return the kinds of attention that the layers of a language model have."""
    config = model.config.get_text_config()
    if kinds := getattr(config, "layer_types", None):
        return set(kinds)
    window = getattr(config, "sliding_window", None)
    return {"full_attention" if window is None else "sliding_attention without a full one"}


def unsupported(model: Any) -> str | None:
    """Return why no engine can run a model's trees, or None where one may."""
    others = layer_types(model) - {"full_attention", "sliding_attention"}
    if others:
        return f"layers of {', '.join(sorted(others))}, over which a tree of guesses cannot be run"
    attention = model.config.get_text_config()._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f"attention '{attention}', which takes no mask of a tree"
    return None


def cache_argument(model: Any) -> str:
    """Return the name of a language model's argument for its cache.

    It is `past_key_values`, and `cache` in later versions of transformers.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
