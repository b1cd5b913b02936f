"""Decode in few passes by speculation.

Each pass checks many guesses at once. Only the guesses that the model itself would have written are
kept.
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
from vla0.decode.engine import DecodeState, Engine
from vla0.decode.fused_engine import FusedEngine
from vla0.decode.sampling import Sampling
from vla0.decode.support import fused
from vla0.decode.tree_size import measured_tree_size
from vla0.errors import InputError

TAIL = 0.75  # share of a tree's nodes that prolong its likeliest path
UNSTEADY = "in %s a choice between two symbols as likely may depend on other guesses: %s"
logger = logging.getLogger(__name__)


def _steady(model: Any) -> bool:
    """Return whether attention can be made independent of the other guesses, and log if not."""
    reason: str | None = "Triton is not installed"
    if importlib.util.find_spec("triton") is not None:
        from vla0.decode.invariant import broken

        reason = broken(model.device, model.dtype)
    if reason is not None:
        logger.warning(UNSTEADY, model.dtype, reason)
    return reason is None


@dataclass
class Row:
    """One answer that is being decoded."""

    draft: Draft
    state: State
    last: int = 0  # the last symbol that is certain
    symbols: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether all wanted numbers are written."""
        return self.state[0] >= self.draft.numbers


class SpeculativeDecoder:
    """A decoder for one model and prompt, which learns how chunks differ from their predecessors.

    Args:
        model: The vision-language model. It is not changed.
        prompt: The prompt that made the batches.
        tree_size: Nodes of a row's tree. None takes the size that was measured to be fastest on
            this device, which is smaller in a batch.
        chain_fraction: Share of these nodes that prolong the likeliest path.
        min_probability: Least probability of the other nodes.
        learning: Whether guesses are learned from the model's probabilities at each guess. False
            serves comparisons.
        acceptance_ratio: Below 1, a guess is also accepted if the model finds it at least this
            many times as likely as its own choice. The tokens may then differ.
        plain: Make no guesses, and decode one token in each pass of the same size. Every other
            setting must give the result of this one, unless acceptance_ratio is below 1.
        compiled: Compile the layers with torch.compile, which takes seconds at the first decode.
        invariant: Whether no choice may depend on the other guesses, in any number format. None
            means True where numbers have 16 bits on a GPU and the kernel works there.

    Raises:
        InputError: When a model other than Qwen2.5-VL is to be compiled.
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
        self.model = model
        self.prompt = prompt
        self.chain_fraction = chain_fraction
        self.min_probability = min_probability
        self.learning = learning
        self.tree_size, self.acceptance_ratio, self.plain = tree_size, acceptance_ratio, plain
        self.chosen: dict[int, int] = {}
        self.forget()
        self.grammar = Grammar(prompt.spec.bins, prompt.spec.numbers)
        self.last_state: DecodeState | None = None
        cuda: bool = model.device.type == "cuda"
        if invariant is None:
            invariant = cuda and fused(model) and model.dtype != torch.float32 and _steady(model)
        if fused(model):
            fixed = cuda or compiled or bool(invariant)
            self.engine: Engine = FusedEngine(
                model, prompt.symbol_ids, self.grammar, fixed, compiled, bool(invariant)
            )
        elif compiled:
            got = type(model).__name__
            raise InputError("Qwen2.5-VL, to compile its layers", got, "decode without")
        else:
            self.engine = Engine(model, prompt.symbol_ids, self.grammar, fixed=False)

    def nodes(self, rows: int) -> int:
        """Return the nodes of each row's tree when this many rows are decoded together."""
        if rows not in self.chosen:
            self.chosen[rows] = self.tree_size or measured_tree_size(self.engine, rows)
        return self.chosen[rows]

    def forget(self) -> None:
        """Forget what was learned of chunks, which decides what is guessed and changes no token."""
        spec = self.prompt.spec
        self.expectation = Expectation(spec.chunk_size, spec.dimensions, spec.bins)

    def decode(
        self,
        batch: dict[str, torch.Tensor],
        num_steps: int | None = None,
        guesses: Sequence[np.ndarray | None] | None = None,
        prefixes: Sequence[np.ndarray] | None = None,
    ) -> np.ndarray:
        """Decode a batch into the levels that `core.greedy.decode` gives.

        Args:
            batch: The output of `Prompt.observe` for B observations, on the host.
            num_steps: Decode only this many steps. None decodes all H.
            guesses: For each row, levels (H, D) that its chunk is expected to be near, or None.
                Guesses change the time that decoding takes, and nothing else.
            prefixes: For each row, the levels (n, D) that its text in the batch ends with. They are
                returned as the first steps.

        Returns:
            (B, H, D) int64 levels, or (B, num_steps, D).

        Raises:
            InputError: When a guess has a wrong shape, or a prompt is too long for the model.
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
        sampling: Sampling | None = None,
    ) -> Iterator[list[np.ndarray]]:
        """Decode a batch as `decode` does, and yield after each pass what is finished.

        Args:
            batch: As for `decode`.
            num_steps: As for `decode`.
            guesses: As for `decode`.
            prefixes: As for `decode`.
            sampling: How answers are drawn at random. None takes the likeliest.

        Yields:
            For each row, the levels (H', D) of its finished steps. The last item has all steps.

        Raises:
            InputError: As `decode` does, and when another decode began before this stream ended.
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
        if sampling is not None:
            for place, row in enumerate(rows):
                row.draft = sampling.draft(place, row.draft)
        for row, levels in zip(rows, prefixes or (), strict=False):
            row.symbols = [SYMBOLS.index(character) for character in written(levels)]
            row.state = (levels.size, "")
        share = self.nodes(self.engine.held(count))
        max_nodes = share if self.engine.fixed else 4 * share  # of one tree
        state: DecodeState | None = None
        while not all(row.done for row in rows):
            if state is not None and state is not self.last_state:  # its cache may be overwritten
                raise InputError(
                    "one stream at a time",
                    "a decode that began before this stream had ended",
                    "finish it first",
                )
            guessed = min(max_nodes, share * count // sum(not row.done for row in rows))
            trees = self._trees(
                rows, 1 if self.plain or (state is None and self.engine.invariant) else guessed
            )
            if state is None:
                state, (picks, probabilities) = self.engine.prefill(batch, trees, max_nodes)
                self.last_state = state
            else:
                picks, probabilities = self.engine.step(state, trees)
            if sampling is not None:
                picks = sampling.picks(trees, probabilities)
            judged = zip(rows, trees, picks, probabilities, strict=True)
            self.engine.accept(state, [self._advance(*each) for each in judged])
            if self.learning:
                for row, tree, shares in zip(rows, trees, probabilities, strict=True):
                    row.draft.learn(tree, shares[: len(tree)])
            yield [self._levels(row, steps) for row in rows]
        for row, guess in zip(rows, guesses, strict=True):
            self.expectation.learn(self._levels(row, steps), guess)

    @property
    def passes(self) -> int:
        """Passes that the last decode took."""
        return self.last_state.passes if self.last_state is not None else 0

    def _trees(self, rows: Sequence[Row], tree_size: int) -> list[Tree]:
        """Return a tree for each row, with node 0 alone for rows that have ended."""
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
        """Return the levels (H', D) of the finished steps."""
        dimensions = self.prompt.spec.dimensions
        finished = min(row.state[0] // dimensions, steps) * dimensions
        words = "".join(SYMBOLS[s] if s < len(SYMBOLS) else " " for s in row.symbols).split(" ")[
            :finished
        ]
        return np.array([int(word) for word in words], np.int64).reshape(-1, dimensions)

    def _advance(self, row: Row, tree: Tree, picks: Sequence[int], shares: np.ndarray) -> list[int]:
        """Extend the row and return the path that it takes in the tree, [] where it has ended."""
        if row.done:
            return []
        path, pick = tree.walk(
            picks, shares if self.acceptance_ratio < 1 else None, self.acceptance_ratio
        )
        row.symbols += [tree.symbols[node] for node in path[1:]] + [pick]
        row.last, row.state = pick, after(tree.states[path[-1]], pick)
        return path
