"""Constrained greedy decoding, a token per pass. Faster decoders must give the same results."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from vla0.core.codec import END, ActionCodec, Grammar, written
from vla0.core.prompt import Prompt


class GrammarLogits(LogitsProcessor):
    """Forbids tokens that the grammar does not allow next; after `numbers` numbers, all but END.

    starts: the grammar states from which rows go on whose answers have already begun.
    """

    def __init__(
        self,
        grammar: Grammar,
        symbol_ids: list[int],
        numbers: int,
        starts: Sequence[tuple[int, str]] = (),
    ):
        self.grammar = grammar
        self.symbol_ids = symbol_ids
        self.numbers = numbers
        self.starts = starts
        self.symbol_of = {token: symbol for symbol, token in enumerate(symbol_ids)}
        self.states: list[tuple[int, str]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return (B, V) scores, -inf for forbidden tokens; a row that has ended may end again."""
        if not self.states:
            self.states = list(self.starts) or [self.grammar.start for _ in input_ids]
        else:
            last = [self.symbol_of.get(token) for token in input_ids[:, -1].tolist()]
            self.states = [
                state if state[0] >= self.numbers else self.grammar.advance(state, symbol)  # type: ignore[arg-type]
                for state, symbol in zip(self.states, last, strict=True)
            ]
        allowed = torch.zeros(scores.shape, dtype=torch.bool)
        for row, state in enumerate(self.states):
            symbols = self.grammar.allowed(state) if state[0] < self.numbers else (END,)
            allowed[row, [self.symbol_ids[s] for s in symbols]] = True
        return scores.float().masked_fill(~allowed.to(scores.device), float("-inf"))  # type: ignore[return-value]


class GreedyDecoder:
    """Decodes with any model. It has the interface of the fast decoder and ignores guesses."""

    def __init__(self, model: Any, prompt: Prompt):
        self.model, self.prompt = model, prompt

    def decode(
        self,
        batch: dict[str, torch.Tensor],
        num_steps: int | None = None,
        guesses: Sequence[np.ndarray | None] | None = None,
        prefixes: Sequence[np.ndarray] | None = None,
    ) -> np.ndarray:
        """Return (B, H, D) int64 levels, or only the first `num_steps` steps of them."""
        return decode(self.model, batch, self.prompt, num_steps, prefixes)

    def stream(
        self,
        batch: dict[str, torch.Tensor],
        num_steps: int | None = None,
        guesses: Sequence[np.ndarray | None] | None = None,
        prefixes: Sequence[np.ndarray] | None = None,
    ) -> Iterator[list[np.ndarray]]:
        """Yield once: the steps of each row."""
        yield list(self.decode(batch, num_steps, guesses, prefixes))


def model_inputs(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch on the model's device, with pixels in its number format."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs


@torch.inference_mode()
def decode(
    model: Any,
    batch: dict[str, torch.Tensor],
    prompt: Prompt,
    num_steps: int | None = None,
    prefixes: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Decode a batch without labels into (B, H, D) int64 levels.

    With `num_steps`, only that many steps are decoded, and no more work is done. prefixes: for each
    row, the (n, D) levels with which its text in the batch ends. The result begins with them.
    """
    steps = prompt.spec.chunk_size if num_steps is None else num_steps
    codec = ActionCodec(replace(prompt.spec, chunk_size=steps))
    # The grammar of the whole chunk, since stopping early must not change an earlier token.
    grammar = Grammar(codec.bins, prompt.spec.numbers)
    numbers = steps * prompt.spec.dimensions
    starts = [(levels.size, "") for levels in prefixes or ()]
    output = model.generate(
        **model_inputs(model, batch),
        logits_processor=LogitsProcessorList(
            [GrammarLogits(grammar, prompt.symbol_ids, numbers, starts)]
        ),
        max_new_tokens=grammar.longest,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        # These override the generation settings in the base model's own file.
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        eos_token_id=prompt.end_id,
        pad_token_id=prompt.pad_id,
    )
    answers = output[:, batch["input_ids"].shape[1] :].tolist()
    characters = {token: character for character, token in prompt.ids.items()}
    text = [
        "".join(characters[t] for t in answer[: answer.index(prompt.end_id)]) for answer in answers
    ]
    if prefixes is not None:
        text = [written(levels) + line for levels, line in zip(prefixes, text, strict=True)]
    return np.stack([codec.read(line.removesuffix(" ")) for line in text])
