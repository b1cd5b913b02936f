"""Build the model's text: chat turns, answer tokens, labels, and masked action augmentation."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from vla0.core.codec import SYMBOLS, to_levels
from vla0.core.images import compose
from vla0.core.relative import state_of
from vla0.core.spec import JITTER, Observation, Spec
from vla0.errors import InputError

# Images, the text before the answer, and the part of that text that a user wrote.
Seen = tuple[Sequence[np.ndarray], str, str]
IGNORE = -100  # label of tokens that the loss leaves out
PLACE = "\x00"  # stands for the user's words in a chat
HIDDEN = "?"  # stands for a character that the model does not see and need not write


def words(observation: Observation, spec: Spec) -> str:
    """Return the user's text: the instruction, with the state's levels before it if used."""
    if not isinstance(observation.instruction, str) or not observation.instruction.strip():
        raise InputError(
            "an instruction in words", repr(observation.instruction), "say what the robot shall do"
        )
    if spec.state is None:
        return observation.instruction
    low, high = (np.array(bound) for bound in spec.state)
    levels = to_levels(state_of(observation, spec, len(low)), low, high, spec.bins)
    return f"State: {' '.join(map(str, levels.tolist()))}\n{observation.instruction}"


MARKS = 20  # special tokens that a user's words may spell: cutting each in two takes time


class Prompt:
    """Turns observations, and answers in training, into the inputs of the model.

    Args:
        spec: The Spec of the checkpoint.
        processor: The processor of a model of the Qwen2.5-VL family.

    Raises:
        InputError: When the image size or the tokenizer does not fit the method.
    """

    def __init__(self, spec: Spec, processor: Any):
        self.spec, self.processor = spec, processor
        images = processor.image_processor
        side, self.merged = images.patch_size * images.merge_size, images.merge_size**2
        if spec.image_size % side:
            nearest = max(side, round(spec.image_size / side) * side)
            raise InputError(
                f"image_size, a multiple of {side} for this model",
                f"{spec.image_size}",
                f"use {nearest}",
            )
        tokenizer = processor.tokenizer
        self.end_id, self.pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.ids = {}  # character → its one token
        for character in SYMBOLS + HIDDEN:
            ids = tokenizer.encode(character, add_special_tokens=False)
            if len(ids) != 1:
                raise InputError(
                    "a tokenizer where a digit and a space are one token each",
                    f"'{character}' → {ids}",
                    "use another base model",
                )
            self.ids[character] = ids[0]
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        # A lookahead, so that overlapping tokens are found too.
        self.marks = re.compile(f"(?=({'|'.join(map(re.escape, added))}))" if added else r"(?!)")
        # Token ids in the order of the symbols of vla0.core.codec.
        self.symbol_ids = [self.ids[character] for character in SYMBOLS] + [self.end_id]

    def chat(self, count: int, words: str) -> str:
        """Return the text before the answer, for a user's words and `count` images."""
        content = [{"type": "image"}] * count + [{"type": "text", "text": words}]
        system = [{"type": "text", "text": self.spec.system_text()}]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, add_vision_id=self.spec.vision_id
        )

    def gather(
        self,
        prepared: Sequence[Seen],
        answers: Sequence[str] | None = None,
        prefixes: Sequence[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Collate results of `see` into a batch, also of Prompts of several Specs.

        Those Prompts must share one processor. prefixes: in acting, the text with which each answer
        begins; the model goes on from there.
        """
        images = [chat_images for chat_images, *_ in prepared]
        # `processor(text, images)` does the same but builds a validator in each call, which makes
        # it slower: 5.0 ms instead of 1.6 ms.
        pictures = self.processor.image_processor(
            [image for chat_images in images for image in chat_images], do_resize=False
        )
        grids = torch.as_tensor(np.asarray(pictures["image_grid_thw"]))
        prompts = self._read(prepared, (grids.prod(1) // self.merged).tolist())
        if prefixes is not None:
            prompts = [
                prompt + self.answer_ids(prefix)[:-1]
                for prompt, prefix in zip(prompts, prefixes, strict=True)
            ]
        image = self.processor.image_token_id
        tails = (
            [[] for _ in prompts]
            if answers is None
            else [self.answer_ids(answer) for answer in answers]
        )
        rows = [prompt + tail for prompt, tail in zip(prompts, tails, strict=True)]
        kinds = [[int(token == image) for token in row] for row in rows]
        batch = {
            "input_ids": _left_padded(rows, self.pad_id),
            "attention_mask": _left_padded([[1] * len(row) for row in rows], 0),
            "mm_token_type_ids": _left_padded(kinds, 0),
            "pixel_values": torch.as_tensor(np.asarray(pictures["pixel_values"])),
            "image_grid_thw": grids,
        }
        if answers is not None:
            hidden = self.ids[HIDDEN]
            labels = [
                [IGNORE] * len(prompt) + [IGNORE if token == hidden else token for token in tail]
                for prompt, tail in zip(prompts, tails, strict=True)
            ]
            batch["labels"] = _left_padded(labels, IGNORE)
        return batch

    def _read(self, prepared: Sequence[Seen], sizes: Sequence[int]) -> list[list[int]]:
        """Tokenize chats and repeat the mark of each image once per token of the image.

        sizes: tokens of each image, over all chats in order. Special tokens (an end of a turn, an
        image) that a user's words spell out are read as plain text.
        """
        mark, left, parts = self.processor.image_token, iter(sizes), []
        for images, chat, user_text in prepared:
            cuts = [match.start() + 1 for match in self.marks.finditer(user_text)]
            pieces = [chat]
            if cuts:  # a special token that is cut in two is plain text
                before, _, after = self.chat(len(images), PLACE).partition(PLACE)
                if chat != before + user_text + after:
                    raise InputError(
                        "words without tokens of the model's",
                        repr(user_text),
                        "leave them out of the instruction",
                    )
                bounds = [0, *cuts, len(user_text)]
                pieces = [user_text[first:last] for first, last in pairwise(bounds)]
                pieces[0], pieces[-1] = before + pieces[0], pieces[-1] + after
            head, *tails = pieces[0].split(mark)
            parts.append([head + "".join(mark * next(left) + part for part in tails), *pieces[1:]])
        rows = iter(self.processor.tokenizer([part for row in parts for part in row])["input_ids"])
        return [[token for _ in pieces for token in next(rows)] for pieces in parts]

    def observe(
        self,
        observations: Sequence[Observation],
        answers: Sequence[str] | None = None,
        rngs: Sequence[np.random.Generator | None] | None = None,
        jitter: tuple[float, float, float, float] = JITTER,
        prefixes: Sequence[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Turn observations into a batch for the model, in training and in acting.

        Args:
            observations: B observations.
            answers: The text of each chunk, in training. None makes a batch without labels.
            rngs: Generators of the random crop and jitter, in training.
            jitter: Strengths of brightness, contrast, saturation and hue.
            prefixes: In acting, the text with which each answer begins.

        Returns:
            The model's inputs by name, padded on the left; with answers also "labels".

        Raises:
            InputError: When an observation does not fit the Spec.
        """
        pairs = zip(observations, rngs or [None] * len(observations), strict=True)
        prepared = [
            self.see(observation, rng, jitter)
            if observation.seen is None or rng is not None
            else observation.seen
            for observation, rng in pairs
        ]
        return self.gather(prepared, answers, prefixes)

    def see(
        self,
        observation: Observation,
        rng: np.random.Generator | None = None,
        jitter: tuple[float, float, float, float] = JITTER,
    ) -> Seen:
        """Return the images, the text before the answer, and the user's part of that text."""
        images, text = compose(observation, self.spec, rng, jitter), words(observation, self.spec)
        if sum(1 for _ in self.marks.finditer(text)) > MARKS:
            raise InputError(
                f"words with at most {MARKS} tokens of the model's in them",
                "more",
                "say it in words",
            )
        return images, self.chat(len(images), text), text

    def answer_ids(self, answer: str) -> list[int]:
        """Return an answer's tokens and the end: one per character, so hiding never merges any."""
        return [self.ids[character] for character in answer] + [self.end_id]


def hide(
    answer: str,
    rng: np.random.Generator | None,
    by: str = "character",
    max_share: float = 0.4,
    none: float = 0.1,
) -> str:
    """Apply masked action augmentation: hide a share ~ U(0, max_share) of the answer.

    With probability `none` nothing is hidden. by: "character" (as published: digits and spaces
    alike), "number" (whole numbers; spaces stay) or "none".
    """
    if by == "none" or rng is None or rng.random() < none:
        return answer
    share = rng.uniform(0, max_share)
    if by == "character":
        hidden = rng.random(len(answer)) < share
        return "".join(HIDDEN if h else c for h, c in zip(hidden, answer, strict=True))
    words = answer.split(" ")
    return hide_numbers(answer, rng.random(len(words)) < share)


def hide_numbers(answer: str, hidden: Sequence[bool] | np.ndarray) -> str:
    """Hide the digits of those numbers of the answer whose entry in `hidden` is True."""
    return " ".join(
        HIDDEN * len(w) if h else w for h, w in zip(hidden, answer.split(" "), strict=True)
    )


def _left_padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """Pad rows on the left to (B, L) int64.

    All rows then end at the same place, where acting appends and the loss cuts.
    """
    longest = max(len(row) for row in rows)
    return torch.tensor([[fill] * (longest - len(row)) + list(row) for row in rows])
