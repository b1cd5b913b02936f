"""Families of vision-language models: what is not asked of a model and its processor themselves.

A family that is not listed works too: by its processor, its chat template and its forward pass.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import numpy as np
import torch

from vla0.errors import InputError

logger = logging.getLogger(__name__)

# Options by which some processors cut a picture into tiles, each of which costs as many tokens as a
# picture. Where they are, they are off.
TILING = ("crop_to_patches", "do_image_splitting", "do_pan_and_scan")
# Such options that no value turns off: of LLaVA-NeXT, Llama 4 and Llama 3.2. They are named.
TILES = ("image_grid_pinpoints", "max_patches", "max_image_tiles")

PLACE = "\x00"  # stands for the user's words in a chat
ANSWER = "0 1 2"  # stands for an answer in a chat
# How a template takes texts: as lists of parts, as strings beside a user's parts, or without a
# system's turn, whose text then begins the user's.
STYLES = ("parts", "strings", "user")
DATE = "01 Jan 2025"  # for templates that would write the day on which they are rendered

# What a processor gives for chats with their images: for each row a list of numbers for
# "input_ids" and all that is aligned with it, and tensors for the rest.
Read = tuple[dict[str, list[list[int]]], dict[str, torch.Tensor]]
Reader = Callable[[Any, Sequence[Sequence[np.ndarray]], Sequence[str], Mapping[str, Any]], Read]


def read(
    processor: Any,
    images: Sequence[Sequence[np.ndarray]],
    chats: Sequence[str],
    options: Mapping[str, Any],
) -> Read:
    """Read chats with their images by a processor's own means.

    Args:
        processor: The processor.
        images: The images (h, w, 3) uint8 of each chat.
        chats: The text of each chat, with a mark where an image stands.
        options: The processor's options for images.

    Returns:
        ({name: a list for each row}, {name: a tensor for all rows}).
    """
    bos = processor.tokenizer.bos_token
    begun = bos is not None and chats[0].startswith(bos)  # as apply_chat_template(tokenize=True)
    batch = processor(
        images=[list(row) for row in images] if any(map(len, images)) else None,
        text=list(chats),
        padding=True,
        padding_side="left",
        return_tensors="pt",
        **({"add_special_tokens": False} if begun else {}),
        **options,
    )
    ids, seen = batch["input_ids"], batch["attention_mask"].bool()
    rows, others = {}, {}
    of_images = set(processor.image_processor.model_input_names)
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(
                "a processor that gives tensors",
                f"{type(value).__name__} as {name} from {type(processor).__name__}",
                "use another base model",
            )
        if name not in of_images and value.shape[:2] == ids.shape and value.ndim > 2:
            raise InputError(
                "inputs that an answer can be appended to",
                f"{name} of {tuple(value.shape)} from {type(processor).__name__}",
                "use another base model",
            )
        if name not in of_images and value.shape == ids.shape:
            rows[name] = [line[kept].tolist() for line, kept in zip(value, seen, strict=True)]
        else:
            others[name] = value
    return rows, others


def read_qwen(
    processor: Any,
    images: Sequence[Sequence[np.ndarray]],
    chats: Sequence[str],
    options: Mapping[str, Any],
) -> Read:
    """Read as `read` does, for Qwen's processors, in a third of the time.

    Those build a validator in each call.
    """
    merged, mark = processor.image_processor.merge_size**2, processor.image_token
    pictures = processor.image_processor([image for row in images for image in row], **options)
    grids = torch.as_tensor(np.asarray(pictures["image_grid_thw"]))
    sizes = iter((grids.prod(1) // merged).tolist())
    texts = []
    for chat in chats:
        head, *tails = chat.split(mark)
        texts.append(head + "".join(mark * next(sizes) + part for part in tails))
    ids = processor.tokenizer(texts)["input_ids"]
    image_id = processor.image_token_id
    rows = {
        "input_ids": ids,
        "attention_mask": [[1] * len(row) for row in ids],
        "mm_token_type_ids": [[int(token == image_id) for token in row] for row in ids],
    }
    pixels = torch.as_tensor(np.asarray(pictures["pixel_values"]))
    return rows, {"pixel_values": pixels, "image_grid_thw": grids}


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What a family is told.

    Args:
        name: Its name, `config.model_type`.
        processor: The name of its processor's class.
        image_options: Options of its image processor, beside TILING.
        reader: Reads chats faster than the processor. It is compared with it once.
    """

    name: str = ""
    processor: str = ""
    image_options: Mapping[str, Any] = field(default_factory=dict)
    reader: Reader | None = None


_UNSCALED = {"do_resize": False}  # images have the model's size by then

BACKBONES = (
    Backbone(
        name="qwen2_5_vl", processor="Qwen2_5_VLProcessor", image_options=_UNSCALED,
        reader=read_qwen,
    ),
    Backbone(
        name="qwen3_vl", processor="Qwen3VLProcessor", image_options=_UNSCALED, reader=read_qwen
    ),
    Backbone(name="internvl", processor="InternVLProcessor"),
    Backbone(name="smolvlm", processor="SmolVLMProcessor"),
    Backbone(name="gemma3", processor="Gemma3Processor"),
)  # fmt: skip


def of_processor(processor: Any) -> Backbone:
    """Return the family of a processor, or what every family begins as."""
    name = type(processor).__name__
    return next((own for own in BACKBONES if own.processor == name), Backbone())


def image_options(processor: Any) -> dict[str, Any]:
    """Return the options of a processor with which a picture becomes one tile."""
    cutters = {name: False for name in TILING if hasattr(processor.image_processor, name)}
    return cutters | dict(of_processor(processor).image_options)


def check_image_size(processor: Any, options: Mapping[str, Any], size: int) -> None:
    """Raise InputError where a processor takes images as they are and this side does not fit it."""
    if options.get("do_resize", True):
        return
    side = processor.image_processor.patch_size * processor.image_processor.merge_size
    if size % side:
        nearest = max(side, round(size / side) * side)
        expected = f"image_size, a multiple of {side} for this model"
        raise InputError(expected, f"{size}", f"use {nearest}")


def chat_template(processor: Any) -> str:
    """Return the chat template of a processor.

    Raises:
        InputError: When there is none.
    """
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    if not template:
        raise InputError(
            "a processor with a chat template",
            f"{type(processor).__name__} without one",
            "use the instruction-tuned model of that family",
        )
    return template


def render(processor: Any, turns: list[dict[str, Any]], **options: Any) -> str:
    """Return the text of turns, by the processor's chat template."""
    template = chat_template(processor)
    if "strftime_now" in template:
        options["date_string"] = DATE
    # A processor's own method does the same, and some warn of options that they pass themselves.
    return processor.tokenizer.apply_chat_template(
        turns, chat_template=template, tokenize=False, **options
    )


def turns_of(style: str, system: str, words: str, count: int) -> list[dict[str, Any]]:
    """Return the turns before an answer, in a style of STYLES, with `count` images."""
    images = [{"type": "image"}] * count
    if style == "user":
        text = {"type": "text", "text": f"{system}\n\n{words}"}
        return [{"role": "user", "content": [*images, text]}]
    user = {"role": "user", "content": [*images, {"type": "text", "text": words}]}
    return [{"role": "system", "content": _content(style, system)}, user]


def _content(style: str, text: str) -> Any:
    """Return a turn's text as a template takes it."""
    return text if style == "strings" else [{"type": "text", "text": text}]


def template_style(processor: Any, system: str) -> str:
    """Return the style of STYLES in which a template writes all that it is given.

    Raises:
        InputError: When it leaves something out, or writes how it was given, in every style.
    """
    got = ""
    for style in STYLES:
        try:
            text = _whole(processor, style, turns_of(style, system, PLACE, 1))
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            got = f"{type(error).__name__}: {str(error)[:160]}"
            continue
        missing = [part for part in (system.strip(), PLACE, ANSWER) if part not in text]
        if not missing and "'type'" not in text.replace(system, ""):
            return style
        got = f"one without {missing[0]!r}" if missing else "one that writes its input's keys"
    expected = "a chat template that writes the system's text, the user's and an answer"
    raise InputError(expected, f"{got}, of {type(processor).__name__}", "use another base model")


def _whole(processor: Any, style: str, turns: list[dict[str, Any]]) -> str:
    """Return the text of turns with ANSWER behind them."""
    answer = {"role": "assistant", "content": _content(style, ANSWER)}
    return render(processor, [*turns, answer])


def answer_turn(processor: Any, style: str, turns: list[dict[str, Any]]) -> tuple[str, int]:
    """Return what a chat template writes before an answer, and the token that ends it.

    Args:
        processor: The processor.
        style: The template's style.
        turns: The turns before the answer.

    Returns:
        (text between the answer's role and the answer, mostly "", token).
    """
    tokenizer = processor.tokenizer
    before = render(processor, turns, add_generation_prompt=True)
    head, _, ending = _whole(processor, style, turns).rpartition(ANSWER)
    opening = head.removeprefix(before) if head.startswith(before) else ""
    ends = tokenizer.encode(ending, add_special_tokens=False)
    special = ends and ends[0] in tokenizer.added_tokens_decoder
    return opening, ends[0] if special else tokenizer.eos_token_id


def symbol_tokens(tokenizer: Any, characters: str, end: int) -> dict[str, int]:
    """Return {character: its one token}, as it is written within an answer.

    Args:
        tokenizer: The tokenizer.
        characters: The digits, the space, and whatever else an answer may have.
        end: The token that ends an answer.

    Raises:
        InputError: When a character is not one token, or when two are the same one.
    """
    remedy = "use another base model"
    ids = {}
    before = tokenizer.encode("7", add_special_tokens=False)
    for character in characters:
        # Behind a digit, since some write a mark before the first word.
        own = tokenizer.encode(f"7{character}", add_special_tokens=False)[len(before) :]
        if len(own) != 1:  # where digits are merged
            own = tokenizer.encode(character, add_special_tokens=False)
        if len(own) != 1:
            expected = "a tokenizer where a digit and a space are one token each"
            raise InputError(expected, f"'{character}' → {own}", remedy)
        ids[character] = own[0]
    tokens = [*ids.values(), end]
    if len(set(tokens)) < len(tokens):
        raise InputError(
            "a token of its own for each digit, for the space, '?' and the end",
            f"{tokens}, in which two are the same",
            remedy,
        )
    if len(tokenizer.encode("10 10", add_special_tokens=False)) < 5:
        logger.warning(
            "this tokenizer writes several digits, or a digit and a space, as one token; answers "
            "are written one character a token all the same, which the base model has seen less of"
        )
    return ids


def special_texts(processor: Any) -> list[str]:
    """Return the texts that a tokenizer or a processor takes for more than text, longest first."""
    names = ("image_token", "video_token", "audio_token", "boi_token", "eoi_token")
    texts = {*processor.tokenizer.get_added_vocab()}
    texts |= {str(text) for name in names if (text := getattr(processor, name, None))}
    return sorted(texts, key=len, reverse=True)


def vision_ids(processor: Any, wanted: bool) -> dict[str, bool]:
    """Return the template's option that writes "Picture 1: " before images, {} without one.

    Raises:
        InputError: When it is wanted and the template has no such option.
    """
    option = "add_vision_id"
    if option in chat_template(processor):
        return {option: wanted}
    if wanted:
        got = f"{type(processor).__name__}, whose chat template does not number images"
        raise InputError("a model for vision_id", got, "leave vision_id out")
    return {}


def checked_reader(
    processor: Any, options: Mapping[str, Any], size: int, chat: Callable[[int, str], str]
) -> Reader:
    """Return the family's faster reader where it reads as the processor does, else `read`.

    Args:
        processor: The processor.
        options: Its options for images.
        size: Side of the images.
        chat: Returns the chat of a number of images and a user's words.
    """
    fast = of_processor(processor).reader
    if fast is None:
        _name_tiles(processor, options, size, chat)
        return read
    images = [[np.zeros((size, size, 3), np.uint8)] * count for count in (1, 2)]
    given = processor, images, [chat(count, f"{count} 0?") for count in (1, 2)], options
    for one, other in zip(read(*given), fast(*given), strict=True):
        if one.keys() != other.keys() or not all(
            np.array_equal(one[name], other[name])
            if isinstance(one[name], torch.Tensor)
            else one[name] == other[name]
            for name in one
        ):
            logger.warning(
                "%s reads otherwise than vla0 expects: it is used as it is, which is slower",
                type(processor).__name__,
            )
            return read
    return fast


def _name_tiles(
    processor: Any, options: Mapping[str, Any], size: int, chat: Callable[[int, str], str]
) -> None:
    """Log what a picture costs where a processor cuts it into tiles, and which option says so."""
    names = [name for name in TILES if getattr(processor.image_processor, name, None)]
    if not names or set(TILING) & set(options):
        return
    picture = np.zeros((size, size, 3), np.uint8)
    with_picture, without = (
        len(read(processor, [[picture] * count], [chat(count, "0")], options)[0]["input_ids"][0])
        for count in (1, 0)
    )
    logger.warning(
        "%s cuts pictures into tiles: one of %d x %d pixels takes %d tokens. Fewer take less time: "
        "see %s in the model's preprocessor_config.json",
        type(processor).__name__,
        size,
        size,
        with_picture - without,
        ", ".join(names),
    )
