"""How much each query of a round counts, by how much better than its group its episode went.

Z. Shao et al., arXiv 2402.03300.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vla0.core.prompt import Seen
from vla0.rl.config import UpdateConfig
from vla0.rl.rollouts import Played


class Query(Protocol):
    """What was seen and written at one step; `Turn` is one."""

    @property
    def seen(self) -> Seen:
        """What the model saw."""
        ...

    @property
    def levels(self) -> np.ndarray:
        """(n, D) what was written."""
        ...


@dataclass(frozen=True)
class Weighed:
    """A query that is learned from.

    Args:
        turn: The query.
        advantage: How much better than its group its episode was, or how much it counts.
        imitated: It was not played by the model as it is. What was done becomes likelier as in
            training, and `advantage` must not be negative.
    """

    turn: Query
    advantage: float
    imitated: bool = False


def advantages(group: Sequence[float], scale: bool) -> list[float]:
    """Return how much better than its group each episode was.

    Args:
        group: The rewards of episodes from one initial state.
        scale: Divide by the group's standard deviation.

    Returns:
        As many numbers, which sum to 0; all 0 where no episode differs.
    """
    rewards = np.asarray(group, np.float64)
    apart = rewards - rewards.mean()
    spread = rewards.std()
    if spread == 0:
        return [0.0] * len(rewards)
    return (apart / spread if scale else apart).tolist()


def weighed(groups: Sequence[Sequence[Played]], config: UpdateConfig) -> list[Weighed]:
    """Return all queries of groups of episodes with their advantages, but for those of 0.

    Args:
        groups: The episodes of each initial state.
        config: Whether advantages are scaled, and how much failures count.
    """
    found = []
    for group in groups:
        apart = advantages([float(episode.success) for episode in group], config.scale_by_deviation)
        for episode, advantage in zip(group, apart, strict=True):
            weight = advantage if advantage > 0 else config.failures * advantage
            if weight:
                found += [Weighed(turn, weight) for turn in episode.turns]
    return found
