"""The architectures of tiny models: special tokens, chat templates, processors, configurations."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers

lib: Any = transformers  # the configurations take more than type checkers know

_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>")
_QWEN_TOKENS += ("<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_CHAT = (  # the chat template of Qwen2.5-VL without video and tools
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
_INTERNVL_CHAT = (  # of InternVL3, without video
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SMOLVLM_CHAT = (  # of SmolVLM2, without video
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content[0].type == 'image' %}:{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_GEMMA_CHAT = (  # of Gemma 3: the system's text begins the user's turn
    "{{ bos_token }}{% set first = namespace(text='') %}{% for message in messages %}"
    "{% if message.role == 'system' %}{% set first.text = message.content[0].text + '\n\n' %}"
    "{% else %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ first.text }}{% set first.text = '' %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}{% endif %}"
    "{% endfor %}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of a tiny model; the default has about 3 M parameters.

    Args:
        width: Hidden size of the language model.
        layers: Layers of the language model.
        heads: Attention heads of the language model.
        vision_width: Hidden size of the vision tower.
        vision_layers: Layers of the vision tower.
        vision_heads: Attention heads of the vision tower.
    """

    width: int = 192
    layers: int = 4
    heads: int = 6
    vision_width: int = 128
    vision_layers: int = 3
    vision_heads: int = 4

    def text(self, tokenizer: Any, **more: Any) -> dict[str, Any]:
        """Return the settings of a language model, which most families share."""
        return {
            "vocab_size": len(tokenizer),
            "hidden_size": self.width,
            "intermediate_size": self.width * 8 // 3 // 8 * 8,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": max(1, self.heads // 3),
            "head_dim": self.width // self.heads,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **more,
        }

    def vision(self, **more: Any) -> dict[str, Any]:
        """Return the settings of a vision tower, which most families share."""
        return {
            "hidden_size": self.vision_width,
            "intermediate_size": self.vision_width * 2,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.vision_heads,
            **more,
        }

    def qwen_vision(self, **more: Any) -> dict[str, Any]:
        """Return the settings of Qwen's vision towers."""
        return {
            "depth": self.vision_layers,
            "hidden_size": self.vision_width,
            "intermediate_size": self.vision_width * 2,
            "num_heads": self.vision_heads,
            "out_hidden_size": self.width,
            **more,
        }

    def sections(self) -> list[int]:
        """Return how Qwen's models divide rotary pairs: a quarter encodes time, the rest place."""
        pairs = self.width // self.heads // 2
        height = (pairs - pairs // 4) // 2
        return [pairs - 2 * height, height, height]


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, **more}}


@dataclass(frozen=True, kw_only=True)
class TinyFamily:
    """How a tiny model of a family is built.

    Args:
        tokens: Its special tokens.
        pad: The one that pads.
        end: The one that ends a turn.
        start: The one with which a text begins, "" where there is none.
        named: Special tokens that its processor asks the tokenizer for, by name.
        chat: Its chat template.
        processor: Makes the processor of a tokenizer and of images of a side.
        config: Makes the configuration of a size, a processor and images of a side.
        side: Side of images, of which each has then 16 tokens.
    """

    tokens: tuple[str, ...]
    pad: str
    end: str
    start: str = ""
    chat: str
    processor: Callable[[Any, int], Any]
    config: Callable[[Size, Any, int], Any]
    named: dict[str, str] = field(default_factory=dict)
    side: int = 112


def _ids(processor: Any, **tokens: str) -> dict[str, int]:
    """Return {name: id} of tokens."""
    return {
        name: processor.tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()
    }


def qwen_ids(processor: Any) -> dict[str, int]:
    """Return the tokens that configurations of Qwen's models name."""
    return _ids(
        processor,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )


def _qwen2_5_vl(size: Size, processor: Any, side: int) -> Any:
    text = size.text(processor.tokenizer, **_rope(mrope_section=size.sections()))
    del text["head_dim"]
    vision = size.qwen_vision(fullatt_block_indexes=list(range(size.vision_layers)))
    return lib.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **qwen_ids(processor)
    )


def _qwen3_vl(size: Size, processor: Any, side: int) -> Any:
    rope = _rope(mrope_section=size.sections(), mrope_interleaved=True)
    # Layers of the language model take the tower's inner features too.
    deep = list(range(min(size.vision_layers, size.layers, 3)))
    vision = size.qwen_vision(deepstack_visual_indexes=deep)
    return lib.Qwen3VLConfig(
        text_config=size.text(processor.tokenizer, **rope),
        vision_config=vision,
        tie_word_embeddings=True,
        **qwen_ids(processor),
    )


def _internvl(size: Size, processor: Any, side: int) -> Any:
    return lib.InternVLConfig(
        text_config=size.text(processor.tokenizer, model_type="qwen3", **_rope()),
        vision_config=size.vision(image_size=side),
        image_seq_length=processor.image_seq_length,
        tie_word_embeddings=True,
        **_ids(processor, image_token_id="<IMG_CONTEXT>"),
    )


def _smolvlm(size: Size, processor: Any, side: int) -> Any:
    return lib.SmolVLMConfig(
        text_config=size.text(processor.tokenizer, model_type="llama", **_rope()),
        vision_config=size.vision(image_size=side, patch_size=16),
        scale_factor=2,
        tie_word_embeddings=True,
        pad_token_id=processor.tokenizer.pad_token_id,
        **_ids(processor, image_token_id="<image>"),
    )


def _gemma3(size: Size, processor: Any, side: int) -> Any:
    text = size.text(
        processor.tokenizer,
        query_pre_attn_scalar=size.width // size.heads,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * (size.layers // 2)
        + ["sliding_attention"] * (size.layers % 2),
    )
    ids = _ids(
        processor,
        boi_token_index="<start_of_image>",
        eoi_token_index="<end_of_image>",
        image_token_index="<image_soft_token>",
    )
    return lib.Gemma3Config(
        text_config=lib.Gemma3TextConfig(**text),
        vision_config=size.vision(image_size=side, patch_size=14, vision_use_head=False),
        mm_tokens_per_image=processor.image_seq_length,
        tie_word_embeddings=True,
        **ids,
    )


def _qwen_processor(tokenizer: Any, side: int) -> Any:
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    return lib.Qwen2_5_VLProcessor(
        lib.Qwen2VLImageProcessor(),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )


def _qwen3_processor(tokenizer: Any, side: int) -> Any:
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    mean = [0.5, 0.5, 0.5]
    return lib.Qwen3VLProcessor(
        lib.Qwen2VLImageProcessor(patch_size=16, image_mean=mean, image_std=mean),
        tokenizer,
        Qwen3VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )


def _internvl_processor(tokenizer: Any, side: int) -> Any:
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    size = {"height": side, "width": side}
    images = lib.GotOcr2ImageProcessor(
        size=size,
        crop_to_patches=True,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return lib.InternVLProcessor(
        images,
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=(side // 14 // 2) ** 2,
        chat_template=tokenizer.chat_template,
    )


def _smolvlm_processor(tokenizer: Any, side: int) -> Any:
    from transformers.models.smolvlm import video_processing_smolvlm

    video_processor: Any = video_processing_smolvlm.SmolVLMVideoProcessor

    edge = {"longest_edge": side}
    # AutoProcessor loads this one too, since torchvision cannot resize by Lanczos's filter.
    images = lib.SmolVLMImageProcessorPil(size={"longest_edge": 4 * side}, max_image_size=edge)
    video = video_processor(
        size=edge, max_image_size=edge, video_sampling={"fps": 1, "max_frames": 64}
    )
    return lib.SmolVLMProcessor(
        images,
        tokenizer,
        video,
        image_seq_len=(side // 16 // 2) ** 2,
        chat_template=tokenizer.chat_template,
    )


def _gemma3_processor(tokenizer: Any, side: int) -> Any:
    size = {"height": side, "width": side}
    return lib.Gemma3Processor(
        lib.Gemma3ImageProcessor(size=size),
        tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=(side // 14 // 2) ** 2,
    )


FAMILIES: dict[str, TinyFamily] = {
    "qwen2_5_vl": TinyFamily(
        tokens=_QWEN_TOKENS,
        pad="<|endoftext|>",
        end="<|im_end|>",
        named={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        chat=_QWEN_CHAT,
        processor=_qwen_processor,
        config=_qwen2_5_vl,
    ),
    "qwen3_vl": TinyFamily(
        tokens=_QWEN_TOKENS,
        pad="<|endoftext|>",
        end="<|im_end|>",
        named={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
        chat=_QWEN_CHAT,
        processor=_qwen3_processor,
        config=_qwen3_vl,
        side=128,
    ),
    "internvl": TinyFamily(
        tokens=(
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<IMG_CONTEXT>",
            "<img>",
            "</img>",
            "<video>",
        ),
        pad="<|endoftext|>",
        end="<|im_end|>",
        named={
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
        chat=_INTERNVL_CHAT,
        processor=_internvl_processor,
        config=_internvl,
    ),
    "smolvlm": TinyFamily(
        tokens=(
            "<|im_start|>",
            "<|im_end|>",
            "<end_of_utterance>",
            "<image>",
            "<fake_token_around_image>",
            "<global-img>",
        ),
        pad="<|im_end|>",
        end="<end_of_utterance>",
        start="<|im_start|>",
        named={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
        chat=_SMOLVLM_CHAT,
        processor=_smolvlm_processor,
        config=_smolvlm,
        side=128,
    ),
    "gemma3": TinyFamily(
        tokens=(
            "<pad>",
            "<bos>",
            "<start_of_turn>",
            "<end_of_turn>",
            "<start_of_image>",
            "<end_of_image>",
            "<image_soft_token>",
        ),
        pad="<pad>",
        end="<end_of_turn>",
        start="<bos>",
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        chat=_GEMMA_CHAT,
        processor=_gemma3_processor,
        config=_gemma3,
    ),
}
