"""The words: system text, chat turns, the answer's tokens, the label mask, masked action
augmentation.
"""

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

# images, the text before the answer, and of it what somebody said
Seen = tuple[Sequence[np.ndarray], str, str]
IGNORE = -100  # a label that the loss leaves out
PLACE = "\x00"  # where somebody's words stand in a chat
HIDDEN = "?"  # an answer's character that the model may not see and need not write


def words(observation: Observation, spec: Spec) -> str:
    """The user's text: the instruction, after the state's levels where the Spec has a state."""
    if not isinstance(observation.instruction, str) or not observation.instruction.strip():
        raise InputError(
            "an instruction in words", repr(observation.instruction), "say what the robot shall do"
        )
    if spec.state is None:
        return observation.instruction
    low, high = (np.array(bound) for bound in spec.state)
    levels = to_levels(state_of(observation, spec, len(low)), low, high, spec.bins)
    return f"State: {' '.join(map(str, levels.tolist()))}\n{observation.instruction}"


MARKS = 20  # tokens of the model's that words may spell: each is cut in two, which takes time


class Prompt:
    """Observations (and answers) → what the model takes.

    `processor` is that of a Qwen2.5-VL style model.
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
        # overlapping ones, too
        self.marks = re.compile(f"(?=({'|'.join(map(re.escape, added))}))" if added else r"(?!)")
        # by symbol of vla0.core.codec
        self.symbol_ids = [self.ids[character] for character in SYMBOLS] + [self.end_id]

    def chat(self, count: int, words: str) -> str:
        """The text before the answer: system turn, user turn with `count` images, the assistant's
        opening.
        """
        content = [{"type": "image"}] * count + [{"type": "text", "text": words}]
        system = [{"type": "text", "text": self.spec.system_text()}]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, add_vision_id=self.spec.vision_id
        )

    def gather(
        self,
        seen: Sequence[Seen],
        answers: Sequence[str] | None = None,
        prefixes: Sequence[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The batch of what `see` gave, of Prompts of several Specs too: they need one processor in
        common.

        begun: how each answer begins, when acting: the model goes on from there.
        """
        images = [own for own, *_ in seen]
        # What `processor(text, images)` does, without the validator that it builds anew at each
        # call: 5.0 → 1.6 ms.
        pictures = self.processor.image_processor(
            [image for own in images for image in own], do_resize=False
        )
        grids = torch.as_tensor(np.asarray(pictures["image_grid_thw"]))
        prompts = self._read(seen, (grids.prod(1) // self.merged).tolist())
        if prefixes is not None:
            prompts = [
                prompt + self.answer_ids(own)[:-1]
                for prompt, own in zip(prompts, prefixes, strict=True)
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

    def _read(self, seen: Sequence[Seen], sizes: Sequence[int]) -> list[list[int]]:
        """Tokens of chats; the mark of an image comes as often as the image has tokens.

        sizes: tokens of each image, of all chats one after another. Words are read as words: what
        looks like a token of the chat in them (an end of a turn, an image) is none.
        """
        mark, left, parts = self.processor.image_token, iter(sizes), []
        for images, chat, said in seen:
            cuts = [found.start() + 1 for found in self.marks.finditer(said)]
            own = [chat]
            if cuts:  # cut in two, none of them is a token
                before, _, after = self.chat(len(images), PLACE).partition(PLACE)
                if chat != before + said + after:
                    raise InputError(
                        "words without tokens of the model's",
                        repr(said),
                        "leave them out of the instruction",
                    )
                bounds = [0, *cuts, len(said)]
                own = [said[first:last] for first, last in pairwise(bounds)]
                own[0], own[-1] = before + own[0], own[-1] + after
            first, *others = own[0].split(mark)
            parts.append([first + "".join(mark * next(left) + part for part in others), *own[1:]])
        rows = iter(self.processor.tokenizer([part for own in parts for part in own])["input_ids"])
        return [[token for _ in own for token in next(rows)] for own in parts]

    def observe(
        self,
        observations: Sequence[Observation],
        answers: Sequence[str] | None = None,
        rngs: Sequence[np.random.Generator | None] | None = None,
        jitter: tuple[float, float, float, float] = JITTER,
        prefixes: Sequence[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The batch of observations: both flows come through here, and differ in answers and
        generators only.
        """
        pairs = zip(observations, rngs or [None] * len(observations), strict=True)
        seen = [
            self.see(own, rng, jitter) if own.seen is None or rng is not None else own.seen
            for own, rng in pairs
        ]
        return self.gather(seen, answers, prefixes)

    def see(
        self,
        observation: Observation,
        rng: np.random.Generator | None = None,
        jitter: tuple[float, float, float, float] = JITTER,
    ) -> Seen:
        """(images, text before the answer, of it the words of the observation)."""
        images, said = compose(observation, self.spec, rng, jitter), words(observation, self.spec)
        if sum(1 for _ in self.marks.finditer(said)) > MARKS:
            raise InputError(
                f"words with at most {MARKS} tokens of the model's in them",
                "more",
                "say it in words",
            )
        return images, self.chat(len(images), said), said

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens of an answer and its end: one a character, so that hiding some never merges
        others.
        """
        return [self.ids[character] for character in answer] + [self.end_id]


def hide(
    answer: str,
    rng: np.random.Generator | None,
    by: str = "character",
    most: float = 0.4,
    none: float = 0.1,
) -> str:
    """Masked action augmentation: the answer with a share ~ U(0, most) hidden; with probability
    `none` nothing is.

    by: "character" (published: digits and spaces alike), "number" (whole numbers, spaces stay) or
    "none".
    """
    if by == "none" or rng is None or rng.random() < none:
        return answer
    share = rng.uniform(0, most)
    if by == "character":
        hidden = rng.random(len(answer)) < share
        return "".join(HIDDEN if h else c for h, c in zip(hidden, answer, strict=True))
    words = answer.split(" ")
    return hide_numbers(answer, rng.random(len(words)) < share)


def hide_numbers(answer: str, hidden: Sequence[bool] | np.ndarray) -> str:
    """The answer with the digits of those numbers hidden whose entry is True."""
    return " ".join(
        HIDDEN * len(w) if h else w for h, w in zip(hidden, answer.split(" "), strict=True)
    )


def _left_padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """(B, L) int64.

    On the left, so that answers end together: acting appends there, the loss cuts there.
    """
    longest = max(len(row) for row in rows)
    return torch.tensor([[fill] * (longest - len(row)) + list(row) for row in rows])
