"""Decoding in few passes: guess, check many guesses at once, keep what the model itself would have
written.
"""

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vla0.core.codec import SYMBOLS, Grammar, written
from vla0.core.prompt import Prompt
from vla0.decode.draft import Draft, Expectation, State, Tree, after
from vla0.decode.engine import Engine
from vla0.decode.tree_size import measured_tree_size
from vla0.errors import InputError

TAIL = 0.75
logger = logging.getLogger(__name__)


def _steady(model: Any) -> bool:
    """Whether attention can be made not to depend on what else is guessed; a line in the log where
    it cannot.
    """
    reason: str | None = "Triton is not installed"
    if importlib.util.find_spec("triton") is not None:
        from vla0.decode.invariant import broken

        reason = broken(model.device, model.dtype)
    if reason is not None:
        logger.warning(
            "in %s a choice between two symbols as likely may depend on other guesses: %s",
            model.dtype,
            reason,
        )
    return reason is None


@dataclass
class Row:
    """One answer in the making."""

    draft: Draft
    state: State
    last: int = 0  # symbol
    symbols: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether all that is wanted is written."""
        return self.state[0] >= self.draft.numbers


class SpeculativeDecoder:
    """A decoder for one model and prompt, which learns how chunks differ from their predecessors.

    tree_size: nodes of a row's tree; None: what was measured on this device, less in a batch.
    chain_fraction: the share of them that run ahead on the one likeliest path. min_probability: how
    likely a node has to be. Off, for comparison: `learning` from the model's words at each guess.
    acceptance_ratio: below 1, a guess passes that the model finds so many times as likely as its
    own choice: other tokens. plain: no guesses, one token in a pass of the same size: what all else
    must equal. compiled: layers by torch.compile, seconds at the first decode. invariant: whether
    no choice may depend on what else is guessed, in any number format; None: where numbers are of
    16 bits on a GPU.
    """

    def __init__(
        self,
        model: Any,
        prompt: Prompt,
        tree_size: int | None = None,
        chain_fraction: float = TAIL,
        min_probability: float = 0.0,
        learning: bool = True,
        acceptance_ratio: float = 1.0,
        plain: bool = False,
        compiled: bool = False,
        invariant: bool | None = None,
    ):
        self.model, self.prompt, self.chain_fraction, self.min_probability, self.learning = (
            model,
            prompt,
            chain_fraction,
            min_probability,
            learning,
        )
        self.tree_size, self.acceptance_ratio, self.plain = tree_size, acceptance_ratio, plain
        self.chosen: dict[int, int] = {}
        spec = prompt.spec
        self.expectation = Expectation(spec.chunk_size, spec.dimensions, spec.bins)
        self.grammar = Grammar(spec.bins, spec.numbers)
        self.turn: object | None = None
        cuda: bool = model.device.type == "cuda"
        if invariant is None:
            invariant = cuda and model.dtype != torch.float32 and _steady(model)
        fixed = cuda or compiled or bool(invariant)
        self.engine = Engine(
            model, prompt.symbol_ids, self.grammar, fixed, compiled, bool(invariant)
        )

    def nodes(self, rows: int) -> int:
        """Of the tree of each row, of so many that are decoded together."""
        if rows not in self.chosen:
            self.chosen[rows] = self.tree_size or measured_tree_size(self.engine, rows)
        return self.chosen[rows]

    def decode(
        self,
        batch: dict[str, torch.Tensor],
        num_steps: int | None = None,
        guesses: Sequence[np.ndarray | None] | None = None,
        prefixes: Sequence[np.ndarray] | None = None,
    ) -> np.ndarray:
        """Levels (B, H, D) int64, the ones that `core.greedy.decode` gives; the first `num_steps`
        steps of them where given.

        guesses: for each row levels (H, D) that its chunk is thought to be near, or None. They cost
        or save time, nothing else. begun: for each row the levels (n, D) that its text in the batch
        ends with; they come back as the first.
        """
        *_, levels = self.stream(batch, num_steps, guesses, prefixes)
        return np.stack(levels)

    @torch.inference_mode()
    def stream(
        self,
        batch: dict[str, torch.Tensor],
        num_steps: int | None = None,
        guesses: Sequence[np.ndarray | None] | None = None,
        prefixes: Sequence[np.ndarray] | None = None,
    ) -> Iterator[list[np.ndarray]]:
        """After each pass the steps (H', D) that are finished, for each row; the last time all of
        them.
        """
        spec = self.prompt.spec
        count = len(batch["input_ids"])
        steps = spec.chunk_size if num_steps is None else num_steps
        guesses = [None] * count if guesses is None else list(guesses)
        for guess in guesses:
            if guess is not None and guess.shape != (spec.chunk_size, spec.dimensions):
                expected = f"a guess of shape {(spec.chunk_size, spec.dimensions)}"
                raise InputError(expected, f"{guess.shape}", "give the previous chunk, or None")
        numbers = steps * spec.dimensions
        rows = [
            Row(Draft(self.grammar, self.expectation.prior(guess), numbers), self.grammar.start)
            for guess in guesses
        ]
        for row, levels in zip(rows, prefixes or (), strict=False):
            row.symbols, row.state = (
                [SYMBOLS.index(character) for character in written(levels)],
                (levels.size, ""),
            )
        share = self.nodes(self.engine.held(count))
        most = share if self.engine.fixed else 4 * share  # nodes of one tree
        turn = self.turn = object()
        first = True
        while not all(row.done for row in rows):
            if self.turn is not turn:  # its cache holds another answer by now
                raise InputError(
                    "one stream at a time",
                    "a decode that began before this stream had ended",
                    "finish it first",
                )
            guessed = min(most, share * count // sum(not row.done for row in rows))
            trees = self._trees(
                rows, 1 if self.plain or (first and self.engine.invariant) else guessed
            )
            picks, probabilities = (
                self.engine.prefill(batch, trees, most) if first else self.engine.step(trees)
            )
            first = False
            judged = zip(rows, trees, picks, probabilities, strict=True)
            self.engine.accept([self._advance(*each) for each in judged])
            if self.learning:
                for row, tree, shares in zip(rows, trees, probabilities, strict=True):
                    row.draft.learn(tree, shares[: len(tree)])
            yield [self._levels(row, steps) for row in rows]
        for row, guess in zip(rows, guesses, strict=True):
            self.expectation.learn(self._levels(row, steps), guess)

    @property
    def passes(self) -> int:
        """Of the last decode."""
        return self.engine.passes

    def _trees(self, rows: Sequence[Row], tree_size: int) -> list[Tree]:
        """A tree for each row. Rows that have ended leave their nodes to the others."""
        chain_fraction = round(tree_size * self.chain_fraction)
        return [
            Tree.of(row.last, row.state)
            if row.done
            else row.draft.grow(
                row.last, row.state, tree_size, chain_fraction, self.min_probability
            )
            for row in rows
        ]

    def _levels(self, row: Row, steps: int) -> np.ndarray:
        """(H', D): the finished steps."""
        dimensions = self.prompt.spec.dimensions
        finished = min(row.state[0] // dimensions, steps) * dimensions
        words = "".join(SYMBOLS[s] if s < len(SYMBOLS) else " " for s in row.symbols).split(" ")[
            :finished
        ]
        return np.array([int(word) for word in words], np.int64).reshape(-1, dimensions)

    def _advance(self, row: Row, tree: Tree, picks: Sequence[int], shares: np.ndarray) -> list[int]:
        """The path of the tree that the row takes; none where it has ended."""
        if row.done:
            return []
        path, pick = tree.walk(
            picks, shares if self.acceptance_ratio < 1 else None, self.acceptance_ratio
        )
        row.symbols += [tree.symbols[node] for node in path[1:]] + [pick]
        row.last, row.state = pick, after(tree.states[path[-1]], pick)
        return path
