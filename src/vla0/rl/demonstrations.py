"""Rows of a dataset as queries, and demonstrations that are learned beside what was played.

So that what was demonstrated is not forgotten for what success rewards (A. Rajeswaran et al., arXiv
1709.10087; L. Ouyang et al., arXiv 2203.02155).
"""

from collections.abc import Sequence

import numpy as np

from vla0.core.codec import ActionCodec
from vla0.core.prompt import Prompt, Seen
from vla0.core.relative import to_written
from vla0.core.spec import Spec
from vla0.data.config import DataConfig
from vla0.data.lerobot import Source
from vla0.errors import InputError
from vla0.rl import processes
from vla0.rl.weights import Weighed


class Recorded:
    """A row of a dataset as a query: what the policy would see, and what was done.

    Args:
        source: The dataset.
        row: Its row.
        prompt: The prompt of the policy.
    """

    def __init__(self, source: Source, row: int, prompt: Prompt):
        self.source, self.row, self.prompt = source, row, prompt
        self.known: np.ndarray | None = None

    @property
    def seen(self) -> Seen:
        """What the model sees; read anew each time, since pictures take memory."""
        spec = self.prompt.spec
        return self.prompt.see(
            self.source.sample(self.row, spec.chunk_size, spec.history).observation
        )

    @property
    def levels(self) -> np.ndarray:
        """(n, D) what it would have written, up to the end of the episode."""
        if self.known is None:
            spec = self.prompt.spec
            sample = self.source.numbers(self.row, spec.chunk_size)
            written = to_written(sample.actions, sample.observation, spec)
            self.known = ActionCodec(spec).encode(written)[sample.valid]
        return self.known


class Demonstrations:
    """The rows of a dataset, some of which are learned in each round.

    Args:
        source: The dataset.
        prompt: The prompt of the policy.
        share: Their share of all that a round learns from, below 1.
    """

    def __init__(self, source: Source, prompt: Prompt, share: float):
        self.source, self.prompt, self.share = source, prompt, share

    def beside(self, played: int, seed: Sequence[int]) -> list[Weighed]:
        """Return those that are learned beside what this process has played.

        Args:
            played: How many queries that are.
            seed: Of what is drawn.
        """
        rng = np.random.default_rng([*seed, processes.joined()[0]])
        count, rows = round(played * self.share / (1 - self.share)), self.source.first_held_out
        drawn = rng.choice(rows, count, replace=count > rows)
        return [
            Weighed(Recorded(self.source, int(row), self.prompt), 1.0, imitated=True)
            for row in drawn
        ]


def fitting(config: DataConfig, spec: Spec, name: str) -> Source:
    """Open a dataset.

    Args:
        config: The dataset and its columns.
        spec: That of the checkpoint.
        name: The checkpoint, for errors.

    Raises:
        InputError: When it is not what the checkpoint was trained on.
    """
    source = Source(config)
    remedy = "name its columns in data, as in the training of the checkpoint"
    for what, expected, got in (
        ("cameras", set(spec.cameras), set(source.cameras)),
        ("numbers in an action", spec.dimensions, source.actions.shape[1]),
        ("steps a second", spec.fps, source.fps),
        (
            "numbers in a state",
            0 if spec.state is None else len(spec.state[0]),
            0 if source.states is None else source.states.shape[1],
        ),
    ):
        if expected != got and not (what == "numbers in a state" and spec.relative_dims):
            raise InputError(f"{what}: {expected}, as '{name}' has", f"{got}", remedy)
    return source
