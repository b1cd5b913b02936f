"""Try whether a model honours the masks and positions of trees, before a decoder relies on it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vla0.core.codec import SYMBOLS
from vla0.core.prompt import Prompt
from vla0.decode.draft import Tree
from vla0.decode.engine import Engine
from vla0.decode.support import fused, unsupported

# What is right: a relative error of hidden states below this (in formats of 16 bits, the second),
# and below this share of the error of a tree whose masks or positions are spoilt. docs/results.md
# has what was measured.
MOST, MOST_16, SHARE = 1e-3, 5e-2, 0.5
# For each of two rows, the beginnings of answers that its first tree holds, and the one that is
# accepted; then the beginnings in the second tree, of both rows.
FIRST = (("1", "12", "1 ", "7"), ("7", "70", "7 ", "1"))
ACCEPTED = ("12", "7")
SECOND = (" ", " 5", " 57", " 0")


@dataclass(frozen=True)
class Trial:
    """What a trial found: relative errors of hidden states at the nodes of trees.

    Args:
        error: Of trees as they are.
        spoilt: Of the first tree, with something wrong on purpose.
    """

    error: float
    spoilt: dict[str, float]

    def fault(self, dtype: torch.dtype) -> str | None:
        """Return what is wrong, or None where trees can be relied on."""
        most = MOST if dtype == torch.float32 else MOST_16
        if not self.error <= most:
            return f"a tree is {self.error:.1g} off plain passes, where {most:g} is the most"
        for name, error in self.spoilt.items():
            if not self.error <= SHARE * error:
                return f"a tree is {self.error:.1g} off plain passes, one of {name} {error:.1g}"
        return None


def unfit(engine: Engine, prompt: Prompt) -> str | None:
    """Return why an engine cannot run a model's trees, or None where it can.

    Qwen2.5-VL is known. Others are tried, whatever the trial may raise.
    """
    reason = unsupported(engine.model)
    if reason is not None or fused(engine.model):
        return reason
    try:
        return tried(engine, prompt).fault(engine.model.dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"a trial of trees ended in {type(error).__name__}: {str(error)[:160]}"


@torch.inference_mode()
def tried(engine: Engine, prompt: Prompt) -> Trial:
    """Compare the nodes of trees with the model's own passes over their texts.

    Two prompts of different lengths, each with an image, are read at once. A second tree sees what
    was accepted of the first one.

    Args:
        engine: An engine that is not in use.
        prompt: The prompt of its model.
    """
    side = prompt.spec.image_size
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    prepared = [
        ([image], prompt.chat(1, words), words) for words in ("move", "move to the other side")
    ]

    def plain(*endings: str) -> list[torch.Tensor]:
        """Return the hidden states after the prompts and these texts."""
        return list(engine.plain_pass(prompt.gather(prepared, prefixes=endings))[2][:, -1])

    batch = prompt.gather(prepared)
    state = engine.read(batch, 16)
    trees = [_grown(engine, 0, row) for row in FIRST]
    expected = [end for pair in zip(*FIRST, strict=True) for end in plain(*pair)]
    nodes = [
        (row, _path(trees[row], text)[-1])
        for pair in zip(*FIRST, strict=True)
        for row, text in enumerate(pair)
    ]
    numbers = engine.inputs(state, trees, batch["input_ids"][:, -1].numpy())
    errors = {
        name: _error(engine.hidden(state, altered), nodes, expected)
        for name, altered in _spoilt(numbers).items()
    }
    first = _error(engine.hidden(state, numbers), nodes, expected)
    engine.accept(state, [_path(*pair) for pair in zip(trees, ACCEPTED, strict=True)])
    trees = [_grown(engine, SYMBOLS.index(SECOND[0]), [text[1:] for text in SECOND])] * 2
    nodes = [(row, _path(trees[row], text[1:])[-1]) for text in SECOND for row in (0, 1)]
    hidden = engine.hidden(state, engine.inputs(state, trees))
    expected = [end for text in SECOND for end in plain(*(before + text for before in ACCEPTED))]
    return Trial(max(first, _error(hidden, nodes, expected)), errors)


def _grown(engine: Engine, root: int, texts: Sequence[str]) -> Tree:
    """Return a tree that holds texts, whose node 0 is a symbol."""
    tree = Tree.of(root, engine.grammar.start)
    for text in texts:
        node = 0
        for character in text:
            node = tree.add(node, SYMBOLS.index(character))
    return tree


def _path(tree: Tree, text: str) -> list[int]:
    """Return the nodes of a text in a tree, from node 0 on."""
    nodes = [0]
    for character in text:
        nodes.append(tree.children[nodes[-1]][SYMBOLS.index(character)])
    return nodes


def _spoilt(numbers: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Return the numbers of a pass with something wrong in each, by what that is."""
    start, accepted, seen, tokens, places, paths, *rest = numbers
    nodes = np.arange(tokens.shape[1])
    siblings = np.minimum(nodes, nodes[:, None]) + np.zeros_like(paths)
    wrong_places = places + 8 * (places > places[:, :1])
    return {
        "wrong positions": [start, accepted, seen, tokens, wrong_places, paths, *rest],
        "nodes that see others": [start, accepted, seen, tokens, places, siblings, *rest],
        "nodes that see padding": [start, accepted, seen | True, tokens, places, paths, *rest],
    }


def _error(
    hidden: torch.Tensor, nodes: Sequence[tuple[int, int]], expected: Sequence[torch.Tensor]
) -> float:
    """Return how far hidden states (B, N, width) at nodes are from what is expected of them."""
    found = torch.stack([hidden[row, node] for row, node in nodes]).float()
    right = torch.stack(list(expected)).float()
    return float((found - right).norm() / right.norm())
