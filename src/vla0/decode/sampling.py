"""Draw answers at random, exactly, in as few passes as the likeliest answer takes.

An answer is drawn by noise that is there before the model is asked: at each place of it, the symbol
is taken whose log-probability plus noise is the largest. With Gumbel noise that symbol is
distributed as the model's probabilities are (E. J. Gumbel 1954; C. J. Maddison et al., arXiv
1411.0030). So an answer is a function of the model and the noise, as the likeliest answer is a
function of the model, and guesses are checked against it in the same way: they change no symbol.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla0.core.codec import SYMBOLS, Grammar
from vla0.decode.draft import Draft, Ranked, State, Tree
from vla0.errors import InputError


def noise_for(grammar: Grammar, rng: np.random.Generator) -> np.ndarray:
    """Draw the noise of one answer.

    Returns:
        (numbers, digits + 1, 12) float64: for each number, how many of its digits are written, and
        the symbol that may follow. A path through the grammar comes to each of these once.
    """
    shape = grammar.count, len(str(grammar.bins)) + 1, len(SYMBOLS) + 1
    return rng.gumbel(size=shape)


@dataclass(frozen=True)
class Sampling:
    """How the answers of a batch are drawn.

    Args:
        temperature: Divides the log-probabilities. 1 draws from the model's own distribution over
            what the grammar allows; below, likelier answers come more often.
        noise: For each row, what `noise_for` drew.

    Raises:
        InputError: When the temperature is not above 0.
    """

    temperature: float
    noise: Sequence[np.ndarray]

    def __post_init__(self):
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            remedy = (
                "1 draws from the model's own probabilities; decode without it for the likeliest"
            )
            raise InputError("a temperature above 0", f"{self.temperature}", remedy)

    def picks(self, trees: Sequence[Tree], probabilities: np.ndarray) -> list[list[int]]:
        """Return the symbol that is drawn after each node of trees.

        Args:
            trees: A tree for each row.
            probabilities: (B, N, 12) of the symbols after a node, 0 where the grammar forbids one.
        """
        return [
            self._scores(row, tree.states, shares[: len(tree)]).argmax(1).tolist()
            for row, (tree, shares) in enumerate(zip(trees, probabilities, strict=True))
        ]

    def draft(self, row: int, plain: Draft) -> Draft:
        """Return the guesses of a row: what would be drawn if the probabilities were as guessed."""
        return _NoisyDraft(plain, self, row)

    def _scores(self, row: int, states: Sequence[State], shares: np.ndarray) -> np.ndarray:
        """Return (N, 12): log-probabilities over the temperature, plus noise."""
        noise = self.noise[row]
        # After the last number nothing may follow; such nodes are never read.
        at = [(min(number, len(noise) - 1), len(digits)) for number, digits in states]
        with np.errstate(divide="ignore"):
            return np.log(shares, dtype=np.float64) / self.temperature + noise[*np.array(at).T]


class _NoisyDraft(Draft):
    """A Draft whose likeliest guess is what the noise would draw from it."""

    def __init__(self, plain: Draft, sampling: Sampling, row: int):
        super().__init__(plain.grammar, plain.prior, plain.numbers)
        self.sampling, self.row = sampling, row
        self.drawn: dict[State, Ranked] = {}

    def next(self, state: State) -> Ranked:
        if state not in self.drawn:
            symbols, likely = super().next(state)
            shares = np.zeros((1, len(SYMBOLS) + 1))
            shares[0, symbols] = likely
            scores = self.sampling._scores(self.row, [state], shares)[0, symbols]
            # How far the largest score is ahead tells how sure the guess is.
            weights = np.exp(2 * (scores - scores.max()))
            order = np.argsort(-weights)
            chosen = weights[order] / weights.sum()
            self.drawn[state] = [symbols[place] for place in order], chosen.tolist()
        return self.drawn[state]

    def learn(self, tree: Tree, probabilities: np.ndarray) -> None:
        super().learn(tree, probabilities)
        for state in tree.states:
            self.drawn.pop(state, None)
