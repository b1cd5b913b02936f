"""Build the model's text: chat turns, answer tokens, labels, and masked action augmentation."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from vla0.backbones import (
    PLACE,
    answer_turn,
    check_image_size,
    checked_reader,
    image_options,
    render,
    special_texts,
    symbol_tokens,
    template_style,
    turns_of,
    vision_ids,
)  # fmt: skip
from vla0.core.codec import SYMBOLS, to_levels
from vla0.core.images import compose
from vla0.core.relative import state_of
from vla0.core.spec import JITTER, Observation, Spec
from vla0.errors import InputError

# Images, the text before the answer, and the part of that text that a user wrote.
Seen = tuple[Sequence[np.ndarray], str, str]
IGNORE = -100  # label of tokens that the loss leaves out
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
        processor: The processor of the model, with a chat template.

    Raises:
        InputError: When the image size, the tokenizer or the template does not fit the method.
    """

    def __init__(self, spec: Spec, processor: Any):
        self.spec, self.processor = spec, processor
        self.options = image_options(processor)
        check_image_size(processor, self.options, spec.image_size)
        tokenizer = processor.tokenizer
        self.numbered = vision_ids(processor, spec.vision_id)
        self.style = template_style(processor, spec.system_text())
        turns = turns_of(self.style, spec.system_text(), PLACE, 1)
        self.opening, self.end_id = answer_turn(processor, self.style, turns)
        self.pad_id = self.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.ids = symbol_tokens(tokenizer, SYMBOLS + HIDDEN, self.end_id)
        added = special_texts(processor)
        # A lookahead, so that overlapping tokens are found too.
        self.marks = re.compile(f"(?=({'|'.join(map(re.escape, added))}))" if added else r"(?!)")
        # Token ids in the order of the symbols of vla0.core.codec.
        self.symbol_ids = [self.ids[character] for character in SYMBOLS] + [self.end_id]
        self.read = checked_reader(processor, self.options, spec.image_size, self.chat)

    def chat(self, count: int, words: str) -> str:
        """Return the text before the answer, for a user's words and `count` images."""
        turns = turns_of(self.style, self.spec.system_text(), words, count)
        text = render(self.processor, turns, add_generation_prompt=True, **self.numbered)
        return text + self.opening

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
        pieces = [self._pieces(*chat) for chat in prepared]
        rows, tensors = self.read(
            self.processor,
            [images for images, *_ in prepared],
            [head for head, *_ in pieces],
            self.options,
        )
        encode = self.processor.tokenizer.encode
        more = [
            [token for piece in tail for token in encode(piece, add_special_tokens=False)]
            for _, *tail in pieces
        ]
        prompts = [prompt + tail for prompt, tail in zip(rows["input_ids"], more, strict=True)]
        if prefixes is not None:
            prompts = [
                prompt + self.answer_ids(prefix)[:-1]
                for prompt, prefix in zip(prompts, prefixes, strict=True)
            ]
        tails = (
            [[] for _ in prompts]
            if answers is None
            else [self.answer_ids(answer) for answer in answers]
        )
        whole = [prompt + tail for prompt, tail in zip(prompts, tails, strict=True)]
        batch = {"input_ids": _left_padded(whole, self.pad_id)}
        # What is aligned with the tokens goes on as text: seen, and of type 0.
        for name in [name for name in rows if name not in batch]:
            text = int(name == "attention_mask")
            longer = [
                row + [text] * (len(line) - len(row))
                for row, line in zip(rows[name], whole, strict=True)
            ]
            batch[name] = _left_padded(longer, 0)
        batch |= tensors
        if answers is not None:
            hidden = self.ids[HIDDEN]
            labels = [
                [IGNORE] * len(prompt) + [IGNORE if token == hidden else token for token in tail]
                for prompt, tail in zip(prompts, tails, strict=True)
            ]
            batch["labels"] = _left_padded(labels, IGNORE)
        return batch

    def _pieces(self, images: Sequence[np.ndarray], chat: str, user_text: str) -> list[str]:
        """Cut a chat so that special tokens that a user's words spell out are read as plain text.

        Those are an end of a turn, an image and the like. The images are in the first piece.
        """
        if not self.marks.search(user_text):
            return [chat]
        before, _, after = self.chat(len(images), PLACE).partition(PLACE)
        if chat != before + user_text + after:  # a template that trims
            user_text = user_text.strip()
        if chat != before + user_text + after:
            raise InputError(
                "words without tokens of the model's",
                repr(user_text),
                "leave them out of the instruction",
            )
        cuts = [match.start() + 1 for match in self.marks.finditer(user_text)]
        bounds = [0, *cuts, len(user_text)]
        pieces = [user_text[first:last] for first, last in pairwise(bounds)]
        return [before + pieces[0], *pieces[1:-1], pieces[-1] + after]

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
