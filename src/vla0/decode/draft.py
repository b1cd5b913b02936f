"""Guess what an answer will probably say, as a tree that the model checks in one pass.

No guess changes a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush

import numpy as np

from vla0.core.codec import END, SPACE, SYMBOLS, Grammar

State = tuple[int, str]  # of the Grammar: numbers finished, digits of the current number
# symbols that may follow and their probabilities, likeliest first
Ranked = tuple[list[int], list[float]]
FLOOR = 0.02  # share of a prior that is spread over all levels, so that no level is impossible


@dataclass
class Tree:
    """A tree of guessed symbols.

    Node 0 is the last symbol that is certain. A parent comes before its children.
    """

    symbols: list[int]
    parents: list[int]  # the parent of each node, -1 for node 0
    states: list[State]  # the state of the Grammar after each node
    children: list[dict[int, int]]  # for each node: symbol → node

    def __len__(self) -> int:
        return len(self.symbols)

    @classmethod
    def of(cls, symbol: int, state: State) -> "Tree":
        """Return a tree that has only node 0."""
        return cls([symbol], [-1], [state], [{}])

    def add(self, parent: int, symbol: int) -> int:
        """Add a node unless the parent has such a child, and return the number of that child."""
        if symbol in self.children[parent]:
            return self.children[parent][symbol]
        node = len(self.symbols)
        self.children[parent][symbol] = node
        self.symbols.append(symbol)
        self.parents.append(parent)
        self.states.append(after(self.states[parent], symbol))
        self.children.append({})
        return node

    def walk(
        self, picks: Sequence[int], shares: np.ndarray | None = None, acceptance_ratio: float = 1.0
    ) -> tuple[list[int], int]:
        """Follow the model's picks from node 0 as far as they were guessed.

        Where a pick was not guessed, the likeliest guess there is taken instead if its probability
        is at least `acceptance_ratio` times that of the pick.

        Args:
            picks: The symbol that the model picks after each node.
            shares: (N, 12) probabilities of the symbols after each node. Without them, only the
                picks themselves are followed.
            acceptance_ratio: See above.

        Returns:
            The nodes of the path from node 0 on, and the pick after the last of them.
        """
        path = [0]
        while True:
            node, pick = path[-1], picks[path[-1]]
            children = self.children[node]
            if pick not in children and shares is not None and children:
                guess = max(children, key=lambda symbol: shares[node, symbol])
                pick = (
                    guess if shares[node, guess] >= acceptance_ratio * shares[node, pick] else pick
                )
            if pick not in children:
                return path, pick
            path.append(children[pick])


def drawn(trees: Sequence[Tree], grammar: Grammar, rows: int, nodes: int) -> tuple[np.ndarray, ...]:
    """Convert trees to arrays, padded to B = `rows` rows and N = `nodes` nodes.

    Returns:
        Symbols (B, N) int64.
        Depths (B, N) int64.
        Paths (B, N, N) int64: the nodes from node 0 to a node, by depth, and then that node
            repeated.
        Allowed (B, N, 12) bool: the symbols that may follow a node.
    """
    symbols, depths = np.zeros((2, rows, nodes), np.int64)
    paths = np.tile(np.arange(nodes)[:, None], (rows, 1, nodes))
    allowed = np.zeros((rows, nodes, len(SYMBOLS) + 1), np.bool_)
    for row, tree in enumerate(trees):
        symbols[row, : len(tree)] = tree.symbols
        row_paths, row_depths = paths[row], [0]
        for node, parent in enumerate(tree.parents[1:], 1):
            depth = row_depths[parent] + 1
            row_paths[node, :depth] = row_paths[parent, :depth]
            row_depths.append(depth)
        depths[row, : len(tree)] = row_depths
        allowed[row, : len(tree)] = [may_follow(grammar, state) for state in tree.states]
    allowed[..., 0] |= ~allowed.any(2)  # padding, and nodes after the end: one symbol is allowed
    return symbols, depths, paths, allowed


def may_follow(grammar: Grammar, state: State) -> np.ndarray:
    """Return which of the 12 symbols may follow a state, as (12,) bool."""
    number, digits = state
    if number == grammar.count:
        return np.zeros(len(SYMBOLS) + 1, np.bool_)
    return _row(grammar.bins, number == grammar.count - 1, digits)


@lru_cache(maxsize=10_000)
def _row(bins: int, last: bool, digits: str) -> np.ndarray:
    """Return which symbols may follow the digits of a number, (12,) bool."""
    row = np.zeros(len(SYMBOLS) + 1, np.bool_)
    row[list(Grammar(bins, 1 if last else 2).allowed((0, digits)))] = True
    return row


class Draft:
    """The guesses for one answer, improved by the model's probabilities at each guess.

    Args:
        grammar: The grammar of the answer.
        prior: (numbers, bins + 1) probabilities of the levels before the model has said anything.
        numbers: How many of the grammar's numbers are wanted.
    """

    def __init__(self, grammar: Grammar, prior: np.ndarray, numbers: int):
        self.grammar, self.numbers = grammar, numbers
        self.prior, self.mass = prior, _prefix_mass(prior)
        self.known: dict[State, Ranked] = {}

    def grow(
        self,
        symbol: int,
        state: State,
        tree_size: int,
        chain_fraction: int,
        min_probability: float = 0.0,
    ) -> Tree:
        """Grow a tree of the likeliest guesses.

        Args:
            symbol: The last symbol that is certain, which becomes node 0.
            state: The state after that symbol.
            tree_size: Nodes of the tree at most.
            chain_fraction: Number (not share) of these nodes that prolong the likeliest path,
                however unlikely that is.
            min_probability: Least probability of the other nodes.
        """
        tree, count = Tree.of(symbol, state), 0
        # -probability, order, parent, rank, the parent's probability
        heap: list[tuple[float, int, int, int, float]] = []

        def offer(parent: int, rank: int, probability: float) -> None:
            nonlocal count
            symbols, shares = self.next(tree.states[parent])
            if rank < len(symbols):
                count += 1
                heappush(heap, (-probability * shares[rank], count, parent, rank, probability))

        offer(0, 0, 1.0)
        while heap and len(tree) < tree_size - chain_fraction and -heap[0][0] >= min_probability:
            negative, _, parent, rank, above = heappop(heap)
            offer(parent, rank + 1, above)
            symbol = self.next(tree.states[parent])[0][rank]
            if self.ends(tree.states[parent], symbol):
                continue
            offer(tree.add(parent, symbol), 0, -negative)
        node = 0
        while len(tree) < tree_size and chain_fraction:
            symbol = self.next(tree.states[node])[0][0]
            if self.ends(tree.states[node], symbol):
                break
            node = tree.add(node, symbol)
        return tree

    def ends(self, state: State, symbol: int) -> bool:
        """Return whether a symbol closes the last wanted number, after which nothing is read."""
        return symbol >= SPACE and state[0] == self.numbers - 1

    def next(self, state: State) -> Ranked:
        """Rank the symbols that may follow a state, likeliest first.

        The ranking follows the model's last probabilities at that state. Where there are none, it
        follows the prior.
        """
        if state not in self.known:
            self.known[state] = self._prior(state)
        return self.known[state]

    def learn(self, tree: Tree, probabilities: np.ndarray) -> None:
        """Learn from the model's probabilities at the nodes of a tree.

        Args:
            tree: The tree that the model checked.
            probabilities: (nodes, 12) of the symbols after each node, 0 where the grammar forbids.
        """
        order = np.argsort(-probabilities, axis=1)
        shares = np.take_along_axis(probabilities, order, axis=1)
        possible = (shares > 0).sum(axis=1).tolist()
        ranked = zip(tree.states, order.tolist(), shares.tolist(), possible, strict=True)
        # Backwards, so that of several nodes in the same state the likelier one counts.
        for state, symbols, state_shares, count in reversed(list(ranked)):
            self.known[state] = symbols[:count], state_shares[:count]

    def _prior(self, state: State) -> Ranked:
        """Rank the symbols that may follow a state by the prior."""
        number, digits = state
        allowed = self.grammar.allowed(state)
        value = int(digits) if digits else 0
        first = value * 10
        shares = [
            float(
                self.prior[number, value] if symbol >= SPACE else self.mass[number, first + symbol]
            )
            for symbol in allowed
        ]
        total = sum(shares)
        ranked = sorted(zip(shares, allowed, strict=True), reverse=True)
        return [symbol for _, symbol in ranked], [share / total for share, _ in ranked]


def after(state: State, symbol: int) -> State:
    """Advance a state as `Grammar.advance` does, for a symbol that is known to be allowed."""
    finished, digits = state
    return (finished + 1, "") if symbol in (SPACE, END) else (finished, digits + SYMBOLS[symbol])


def filled(levels: np.ndarray, chunk_size: int) -> np.ndarray:
    """Fill levels (n, D) up to (chunk_size, D) by repeating the last step; n is at least 1."""
    return np.concatenate([levels, np.repeat(levels[-1:], chunk_size - len(levels), axis=0)])


def _prefix_mass(prior: np.ndarray) -> np.ndarray:
    """Return how likely it is that each number begins with the digits of each level."""
    mass = prior.copy()
    low = 10 ** (len(str(prior.shape[1] - 1)) - 1)  # from the longest levels to the shortest
    while low > 1:
        same_length = mass[:, low : 10 * low]  # levels with as many digits as `low`
        missing = -same_length.shape[1] % 10
        padded = np.pad(same_length, [(0, 0), (0, missing)])
        longer = padded.reshape(len(mass), -1, 10).sum(axis=2)
        mass[:, low // 10 : low // 10 + longer.shape[1]] += longer
        low //= 10
    return mass


class Expectation:
    """Learns how levels change from one chunk to the next, and gives the prior of each answer.

    It makes decoding faster and changes no token.
    """

    KEEP = 0.98  # share of what was learned that each chunk leaves

    def __init__(self, chunk_size: int, dimensions: int, bins: int):
        self.shape = (chunk_size, dimensions, bins + 1)
        self.levels = np.arange(bins + 1, dtype=np.float32)
        # mean distance from the guess, in levels
        self.spread = np.full(dimensions, bins / 20.0, np.float32)
        # share of each level among the levels that were decoded
        self.seen = np.full((dimensions, bins + 1), 1 / (bins + 1), np.float32)

    def prior(self, guess: np.ndarray | None) -> np.ndarray:
        """Return the probabilities of the levels, before the model has said anything.

        Args:
            guess: (H, D) levels that the chunk is expected to be near. None gives how often each
                level was decoded so far.

        Returns:
            (H * D, bins + 1) float32; each row sums to 1.
        """
        if guess is None:
            prior = np.broadcast_to(self.seen, self.shape) * np.float32(1 - FLOOR)
        else:
            prior = self.levels - guess[..., None].astype(np.float32)
            np.abs(prior, out=prior)
            prior *= -1 / self.spread[:, None]
            np.exp(prior, out=prior)
            prior *= self.seen + np.float32(0.01 / len(self.levels))
            prior *= 0.9 * (1 - FLOOR) / prior.sum(axis=2, keepdims=True)
            prior += 0.1 * (1 - FLOOR) * self.seen
        prior += np.float32(FLOOR / len(self.levels))
        return prior.reshape(-1, len(self.levels))

    def learn(self, levels: np.ndarray, guess: np.ndarray | None) -> None:
        """Learn from a decoded chunk.

        Args:
            levels: (H', D) decoded levels. H' may be smaller than the H of the guess.
            guess: (H, D) levels that the chunk was expected to be near, or None.
        """
        fresh = 1 - self.KEEP
        if guess is not None:
            off = np.abs(levels - guess[: len(levels)]).mean(axis=0)
            self.spread += 0.1 * (np.maximum(off, 0.3) - self.spread)
        counts = np.zeros_like(self.seen)
        for dimension, column in enumerate(levels.T):
            np.add.at(counts[dimension], column, 1 / len(levels))
        self.seen += fresh * (counts - self.seen)
