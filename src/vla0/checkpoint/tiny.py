"""Build tiny models: the architectures of several families with few, random weights.

They need neither a GPU nor a download.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from vla0.backbones import of_processor
from vla0.checkpoint.tiny_families import FAMILIES, Size
from vla0.decode.window_attention import in_windows
from vla0.errors import InputError, nearest

TINY = "tiny"  # the base_model that is built by this module; "tiny:FAMILY" names another family
FAMILY = "qwen2_5_vl"


def family_of(name: str) -> str | None:
    """Return the family of a tiny model's name, "tiny" or "tiny:FAMILY", or None for others.

    Raises:
        InputError: When there is no tiny model of that family.
    """
    base, _, family = name.partition(":")
    if base != TINY:
        return None
    if (family or FAMILY) not in FAMILIES:
        raise InputError(
            f"tiny: and one of {tuple(FAMILIES)}", f"'{name}'", nearest(family, FAMILIES)
        )
    return family or FAMILY


def tiny_processor(
    words: Iterable[str], vocabulary: int = 400, family: str = FAMILY, side: int | None = None
) -> Any:
    """Build a processor without a download.

    Its tokenizer is a byte-level BPE in which every digit is a token of its parts.

    Args:
        words: Texts from which the BPE is learned.
        vocabulary: The number of tokens, at least 256 and the special ones.
        family: The family of the model.
        side: Side of images, in families whose processor makes all images of one size. None takes
            the family's.
    """
    parts = FAMILIES[family]
    start = {"bos_token": parts.start} if parts.start else {}
    tokenizer = bpe(
        words, parts.tokens, vocabulary, eos_token=parts.end, pad_token=parts.pad,
        chat_template=parts.chat, extra_special_tokens=parts.named, **start,
    )  # fmt: skip
    return parts.processor(tokenizer, side or parts.side)


def bpe(
    words: Iterable[str], special: Sequence[str], vocabulary: int = 400, **settings: Any
) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE in which every digit is a token of its own.

    Args:
        words: Texts from which it is learned.
        special: Its special tokens.
        vocabulary: The number of tokens, at least 256 and the special ones.
        **settings: Arguments of the tokenizer of transformers.
    """
    tokenizer = Tokenizer(models.BPE())
    # In answers every digit and every space becomes a piece of its own, as in Qwen2's tokenizer.
    split = pre_tokenizers.Split(Regex(r"\d| ?\p{L}+|\s|[^\s\p{L}\d]+"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocabulary, 256 + len(special)),
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*words, "system", "user", "assistant"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def tiny_model(processor: Any, seed: int = 0, **size: int) -> Any:
    """Build a randomly initialised model.

    Args:
        processor: The processor, whose family and vocabulary the model takes.
        seed: Seed of the weights.
        **size: Arguments of `Size`.
    """
    name = of_processor(processor).name
    images = processor.image_processor
    side = getattr(images, "max_image_size", None) or images.size
    side = dict(side).get("height") or dict(side).get("longest_edge") or 0
    config = FAMILIES[name].config(Size(**size), processor, side)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return in_windows(AutoModelForImageTextToText.from_config(config).eval())
