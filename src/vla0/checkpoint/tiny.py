"""Build the tiny model: the architecture of Qwen2.5-VL with few, random weights.

It needs neither a GPU nor a download.
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

TINY = "tiny"  # the base_model that is built by this module instead of loaded

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_CHAT = (  # the chat template of Qwen2.5-VL without video and tools
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
    """Build a Qwen2.5-VL processor without a download.

    Its tokenizer is a byte-level BPE in which every digit is a token of its own.

    Args:
        words: Texts from which the BPE is learned.
        vocabulary: The number of tokens, at least 256 and the special ones.
    """
    tokenizer = Tokenizer(models.BPE())
    # In answers every digit and every space becomes a piece of its own, as in Qwen2's tokenizer.
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
    """Build a randomly initialised Qwen2.5-VL with about 3 M parameters.

    Args:
        processor: The processor, whose vocabulary the model takes.
        width: Hidden size of the language model.
        layers: Layers of the language model.
        heads: Attention heads of the language model.
        vision_width: Hidden size of the vision tower.
        vision_layers: Layers of the vision tower.
        vision_heads: Attention heads of the vision tower.
        seed: Seed of the weights.
    """
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL}
    head = width // heads
    # A quarter of the rotary pairs encodes time, and the rest encodes height and width.
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
