"""Which models the fast decoder drives, and what one version of transformers names otherwise than
another.
"""

import inspect
from typing import Any

from transformers import Qwen2_5_VLForConditionalGeneration


def supported(model: Any) -> str | None:
    """Why the engine cannot drive a model; None where it can."""
    if type(model) is not Qwen2_5_VLForConditionalGeneration:
        return f"{type(model).__name__} is not Qwen2.5-VL as it is"
    text: Any = model.config.text_config
    if set(text.layer_types) != {"full_attention"}:
        return "layers of sliding attention"
    if text._attn_implementation not in ("sdpa", "eager"):
        return f"attention '{text._attn_implementation}', which takes no mask of a tree"
    return None


def cache_argument(model: Any) -> str:
    """The name under which a language model takes its cache: `past_key_values`, in later
    transformers `cache`.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
