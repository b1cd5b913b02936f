"""The tiny model: Qwen2.5-VL's architecture with random weights, for a machine without a GPU or a
download.
"""

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from vla0.decode.window_attention import in_windows

TINY = "tiny"  # the base_model that is built here instead of loaded

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_CHAT = (  # the turns of Qwen2.5-VL's template, without video and tools
    "{% set images = namespace(count=0) %}{% for message in messages %}<|im_start|>{{ "
    "message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in "
    "message.content %}"
    "{% if part.type == 'image' %}{% set images.count = images.count + 1 %}"
    "{% if add_vision_id %}Picture {{ images.count }}: {% endif "
    "%}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_processor(words: Iterable[str], vocabulary: int = 400) -> Qwen2_5_VLProcessor:
    """A Qwen2.5-VL processor whose byte-level BPE is learned from `words`, digits apart: no
    download.
    """
    tokenizer = Tokenizer(models.BPE())
    # Every digit and every space is a piece of its own, as in Qwen2's tokenizer where it matters:
    # in answers.
    split = pre_tokenizers.Split(Regex(r"\d| ?\p{L}+|\s|[^\s\p{L}\d]+"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocabulary, 256 + len(_SPECIAL)),
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*words, "system", "user", "assistant"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT,
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), fast, Qwen2VLVideoProcessor(), chat_template=_CHAT
    )


def tiny_model(
    processor: Any,
    width: int = 192,
    layers: int = 4,
    heads: int = 6,
    vision_width: int = 128,
    vision_layers: int = 3,
    vision_heads: int = 4,
    seed: int = 0,
) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised Qwen2.5-VL, the same architecture at about 3 M parameters."""
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL}
    head = width // heads
    # of the rotary pairs a quarter is time; the rest height and width
    height = (head // 2 - head // 8) // 2
    settings: dict[str, Any] = {
        "text_config": {
            "vocab_size": len(processor.tokenizer),
            "hidden_size": width,
            "intermediate_size": width * 8 // 3 // 8 * 8,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 3),
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [head // 2 - 2 * height, height, height],
            },
        },
        "vision_config": {
            "depth": vision_layers,
            "hidden_size": vision_width,
            "intermediate_size": vision_width * 2,
            "num_heads": vision_heads,
            "out_hidden_size": width,
            "fullatt_block_indexes": list(range(vision_layers)),
        },
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return in_windows(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings)).eval())
