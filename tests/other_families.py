"""Families that vla0 knows nothing of: what a user would bring, of public classes, made tiny."""

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText

from vla0.checkpoint.tiny import bpe
from vla0.checkpoint.tiny_families import Size, qwen_ids

AYA_CHAT = (  # Aya Vision's turns, without its preamble and tools
    "{{ bos_token }}{% for message in messages %}<|START_OF_TURN_TOKEN|>"
    "{{ {'user': '<|USER_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>'}.get(message.role, "
    "'<|CHATBOT_TOKEN|>') }}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
AYA_TOKENS = (
    "<PAD>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>",
    "<|IMG_PATCH|>", "TILE_GLOBAL",
)  # fmt: skip


def aya_processor(words: Iterable[str], side: int = 112) -> Any:
    """The processor of Aya Vision, which cuts pictures into tiles unless it is told not to."""
    tokenizer = bpe(
        words, AYA_TOKENS, eos_token="<|END_OF_TURN_TOKEN|>", pad_token="<PAD>",
        bos_token="<BOS_TOKEN>", chat_template=AYA_CHAT,
    )  # fmt: skip
    images = transformers.GotOcr2ImageProcessor(
        size={"height": side, "width": side}, crop_to_patches=True
    )
    return transformers.AyaVisionProcessor(
        images, tokenizer, patch_size=14, img_size=side, downsample_factor=2, chat_template=AYA_CHAT
    )


def aya_model(processor: Any, seed: int = 0, **size: int) -> Any:
    """Aya Vision: Cohere2's language model, with windows in three of four layers, and SigLIP."""
    tokenizer = processor.tokenizer
    made = Size(**size)
    text = made.text(tokenizer, sliding_window=32)
    text["layer_types"] = ["sliding_attention", "full_attention"] * (made.layers // 2)
    side = processor.img_size
    config = transformers.AyaVisionConfig(
        text_config=transformers.Cohere2Config(**text),
        vision_config=transformers.SiglipVisionConfig(
            **made.vision(image_size=side, patch_size=14, vision_use_head=False)
        ),
        image_token_index=processor.image_token_id,
        downsample_factor=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config).eval()


NEXT_CHAT = (  # of a LLaVA-NeXT
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def next_processor(words: Iterable[str]) -> Any:
    """The processor of LLaVA-NeXT, which cuts pictures into tiles that no option turns off."""
    tokenizer = bpe(
        words, ("<pad>", "</s>", "<image>"), eos_token="</s>", pad_token="<pad>",
        chat_template=NEXT_CHAT, extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )
    return transformers.LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
        chat_template=NEXT_CHAT, num_additional_image_tokens=1,
    )  # fmt: skip


def hybrid_model(processor: Any, **size: int) -> Any:
    """Qwen3.5, whose layers are recurrent but for every fourth; its processor is Qwen3-VL's."""
    made = Size(**size)
    rope = {
        "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0,
        "mrope_section": made.sections(), "mrope_interleaved": True,
    }  # fmt: skip
    text = made.text(processor.tokenizer, rope_parameters=rope)
    text |= {"linear_num_value_heads": 2, "linear_num_key_heads": 2}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    text["layer_types"] = ["linear_attention", "full_attention"] * (made.layers // 2)
    config = transformers.Qwen3_5Config(
        text_config=text,
        vision_config=made.qwen_vision(),
        tie_word_embeddings=True,
        **qwen_ids(processor),
    )
    return AutoModelForImageTextToText.from_config(config).eval()
