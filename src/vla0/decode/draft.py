"""What an answer will probably say: a tree of guesses that the model checks in one pass.

No guess changes a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush

import numpy as np

from vla0.core.codec import END, SPACE, SYMBOLS, Grammar

State = tuple[int, str]  # of the Grammar: numbers finished, digits of the current one
# symbols that may follow and their probabilities, likeliest first
Ranked = tuple[list[int], list[float]]
FLOOR = 0.02  # of a prior: mass spread over all levels, so that nothing is impossible


@dataclass
class Tree:
    """Guessed symbols; node 0 is the last symbol that is certain.

    A parent comes before its children.
    """

    symbols: list[int]
    parents: list[int]  # of node 0: -1
    states: list[State]  # of the Grammar, after the node
    children: list[dict[int, int]]  # of each node: symbol → node

    def __len__(self) -> int:
        return len(self.symbols)

    @classmethod
    def of(cls, symbol: int, state: State) -> "Tree":
        """Node 0 alone."""
        return cls([symbol], [-1], [state], [{}])

    def add(self, parent: int, symbol: int) -> int:
        """A new node's number; or that of the node that is there."""
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
        """(nodes from 0 on that the model's picks confirm, the pick after the last of them).

        picks: of each node.

        Where the pick was not guessed, a guess passes for it that the model finds
        `acceptance_ratio` times as likely. shares: (N, 12) how likely the model finds the symbols
        after each node; without them no other guess passes.
        """
        path = [0]
        while True:
            node, pick = path[-1], picks[path[-1]]
            children = self.children[node]
            if pick not in children and shares is not None and children:
                other = max(children, key=lambda symbol: shares[node, symbol])
                pick = (
                    other if shares[node, other] >= acceptance_ratio * shares[node, pick] else pick
                )
            if pick not in children:
                return path, pick
            path.append(children[pick])


def drawn(trees: Sequence[Tree], grammar: Grammar, rows: int, most: int) -> tuple[np.ndarray, ...]:
    """Trees as arrays, filled up to so many rows and nodes.

    Symbols (B, N), depths (B, N), paths (B, N, N): the nodes from node 0 to a node, by depth, then
    that node again and again; and allowed (B, N, 12): what may follow it.
    """
    symbols, depths = np.zeros((2, rows, most), np.int64)
    paths = np.tile(np.arange(most)[:, None], (rows, 1, most))
    allowed = np.zeros((rows, most, len(SYMBOLS) + 1), np.bool_)
    for row, tree in enumerate(trees):
        symbols[row, : len(tree)] = tree.symbols
        own, depth = paths[row], [0]
        for node, parent in enumerate(tree.parents[1:], 1):
            deep = depth[parent] + 1
            own[node, :deep] = own[parent, :deep]
            depth.append(deep)
        depths[row, : len(tree)] = depth
        allowed[row, : len(tree)] = [_may_follow(grammar, state) for state in tree.states]
    allowed[..., 0] |= ~allowed.any(2)  # of what only fills up, and after the end
    return symbols, depths, paths, allowed


def _may_follow(grammar: Grammar, state: State) -> np.ndarray:
    number, digits = state
    if number == grammar.count:
        return np.zeros(len(SYMBOLS) + 1, np.bool_)
    return _row(grammar.bins, number == grammar.count - 1, digits)


@lru_cache(maxsize=10_000)
def _row(bins: int, last: bool, digits: str) -> np.ndarray:
    row = np.zeros(len(SYMBOLS) + 1, np.bool_)
    row[list(Grammar(bins, 1 if last else 2).allowed((0, digits)))] = True
    return row


class Draft:
    """What is guessed of one answer, and learned from what the model says at each guess.

    prior: (numbers, bins + 1), how likely each level is at first. numbers: how many of the
    grammar's are wanted.
    """

    def __init__(self, grammar: Grammar, prior: np.ndarray, numbers: int):
        self.grammar, self.numbers = grammar, numbers
        self.whole, self.mass = prior, _below(prior)
        self.known: dict[State, Ranked] = {}

    def grow(
        self,
        symbol: int,
        state: State,
        tree_size: int,
        chain_fraction: int,
        min_probability: float = 0.0,
    ) -> Tree:
        """A tree of at most `tree_size` nodes, on a symbol and the state after it: the likeliest,
        if at least so likely.

        The last `chain_fraction` of them prolong its one likeliest path, however unlikely that is.
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
        """Whether a symbol closes the last number that is wanted: nothing is read after it."""
        return symbol >= SPACE and state[0] == self.numbers - 1

    def next(self, state: State) -> Ranked:
        """The symbols that may follow a state, likeliest first: by what the model said there last,
        else by the prior.
        """
        if state not in self.known:
            self.known[state] = self._prior(state)
        return self.known[state]

    def learn(self, tree: Tree, probabilities: np.ndarray) -> None:
        """probabilities: (nodes, 12) of the model at each node, 0 where the grammar forbids."""
        order = np.argsort(-probabilities, axis=1)
        shares = np.take_along_axis(probabilities, order, axis=1)
        possible = (shares > 0).sum(axis=1).tolist()
        ranked = zip(tree.states, order.tolist(), shares.tolist(), possible, strict=True)
        # Backwards: of nodes in the same state that one counts which was likelier.
        for state, symbols, own, count in reversed(list(ranked)):
            self.known[state] = symbols[:count], own[:count]

    def _prior(self, state: State) -> Ranked:
        number, digits = state
        allowed = self.grammar.allowed(state)
        value = int(digits) if digits else 0
        first = value * 10
        shares = [
            float(
                self.whole[number, value] if symbol >= SPACE else self.mass[number, first + symbol]
            )
            for symbol in allowed
        ]
        total = sum(shares)
        ranked = sorted(zip(shares, allowed, strict=True), reverse=True)
        return [symbol for _, symbol in ranked], [share / total for share, _ in ranked]


def after(state: State, symbol: int) -> State:
    """`Grammar.advance` of a symbol that is known to be allowed."""
    finished, digits = state
    return (finished + 1, "") if symbol in (SPACE, END) else (finished, digits + SYMBOLS[symbol])


def filled(levels: np.ndarray, chunk_size: int) -> np.ndarray:
    """(chunk_size, D): levels (n, D), n from 1 to chunk_size, and then their last again and
    again.
    """
    return np.concatenate([levels, np.repeat(levels[-1:], chunk_size - len(levels), axis=0)])


def _below(prior: np.ndarray) -> np.ndarray:
    """(numbers, bins + 1): how likely it is that a number begins with the digits of each level."""
    mass = prior.copy()
    low = 10 ** (len(str(prior.shape[1] - 1)) - 1)  # from the longest levels to the shortest
    while low > 1:
        own = mass[:, low : 10 * low]
        longer = (
            np.pad(own, [(0, 0), (0, -own.shape[1] % 10)]).reshape(len(mass), -1, 10).sum(axis=2)
        )
        mass[:, low // 10 : low // 10 + longer.shape[1]] += longer
        low //= 10
    return mass


class Expectation:
    """How levels change from one chunk to the next, learned while chunks are decoded: the prior of
    each answer.

    It makes decoding faster, and changes no token.
    """

    KEEP = 0.98  # of what was learned, at each chunk

    def __init__(self, chunk_size: int, dimensions: int, bins: int):
        self.shape, self.levels = (
            (chunk_size, dimensions, bins + 1),
            np.arange(bins + 1, dtype=np.float32),
        )
        # levels: mean distance from the guess
        self.spread = np.full(dimensions, bins / 20.0, np.float32)
        # share of each level
        self.seen = np.full((dimensions, bins + 1), 1 / (bins + 1), np.float32)

    def prior(self, guess: np.ndarray | None) -> np.ndarray:
        """(H * D, bins + 1), each row's sum 1, for a guess (H, D) of levels; None: as levels were
        so far.
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
        """levels: (H', D) that were decoded, their number may be smaller than the guess's."""
        fresh = 1 - self.KEEP
        if guess is not None:
            off = np.abs(levels - guess[: len(levels)]).mean(axis=0)
            self.spread += 0.1 * (np.maximum(off, 0.3) - self.spread)
        counts = np.zeros_like(self.seen)
        for dimension, column in enumerate(levels.T):
            np.add.at(counts[dimension], column, 1 / len(levels))
        self.seen += fresh * (counts - self.seen)
