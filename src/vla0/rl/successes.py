"""The successes of the last rounds, which imitation draws from.

One's own successes are imitated by H. Dong et al., arXiv 2304.06767, and those of earlier rounds
with them by J. Oh et al., arXiv 1806.05635.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla0.errors import InputError, said
from vla0.files import write_whole
from vla0.rl import processes
from vla0.rl.rollouts import Played, Turn
from vla0.rl.weights import Weighed
from vla0.train.resume import DAMAGED, saved

EASY = 0.1  # weight of a success in a group where none failed, where it is 1 if nearly all did


@dataclass(frozen=True)
class Success:
    """An episode that succeeded.

    Args:
        task: Its task.
        weight: How much it counts beside others of its task.
        turns: What was seen and written.
    """

    task: str
    weight: float
    turns: Sequence[Turn]


class Successes:
    """The successes of this process in the last rounds.

    Args:
        folder: Keeps them for a run that resumes.
        rounds: How many rounds they stay. 1: only the newest is drawn from, and nothing is kept.
    """

    def __init__(self, folder: Path, rounds: int):
        self.folder, self.rounds = folder, rounds
        self.rank, self.count = processes.joined()
        self.kept: dict[int, list[Success]] = {}

    def add(self, number: int, groups: Sequence[Sequence[Played]]) -> None:
        """Take over a round's successes, and forget those that have stayed long enough."""
        found = [
            Success(episode.job[1], _failed(group) + EASY, episode.turns)
            for group in groups
            for episode in group
            if episode.success and episode.turns
        ]
        self.kept = {n: each for n, each in self.kept.items() if n > number - self.rounds}
        self.kept[number] = found
        if self.rounds > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            torch.save([_plain(success) for success in found], content)
            file = self.folder / f"{number:06d}-{self.rank}.pt"
            write_whole(file, content.getvalue())

    def draw(self, seed: Sequence[int]) -> list[Weighed]:
        """Return as many queries as the newest round's successes have, drawn from all.

        All tasks come alike, so that none is forgotten while others are learned. Within a task an
        episode comes the more often, the more of its group failed. Where there are several
        processes, all ask together, and each draws its share from its own.

        Args:
            seed: Of what is drawn.
        """
        newest = self.kept[max(self.kept)]
        every = [success for n in sorted(self.kept) for success in self.kept[n]]
        every.sort(key=lambda success: success.task)  # each task then comes exactly alike
        sums: dict[str, float] = {}
        count = 0
        own = (sum(len(s.turns) for s in newest), [(s.task, s.weight) for s in every])
        for more, others in processes.gathered(own):
            count += more
            for task, weight in others:
                sums[task] = sums.get(task, 0.0) + weight
        share = np.array([s.weight / sums[s.task] / len(sums) for s in every])
        turns = [turn for s in every for turn in s.turns]
        if not turns:
            return []
        lengths = [len(s.turns) for s in every]
        ends = np.cumsum(np.repeat(share / lengths, lengths)) * count
        rng = np.random.default_rng([*seed, self.rank])
        # Evenly spaced, so that what counts alike comes equally often
        places = np.arange(round(ends[-1])) + rng.random()
        places = np.searchsorted(ends[:-1], places, "right")
        return [Weighed(turns[place], 1.0, imitated=True) for place in places]

    def load(self, number: int) -> None:
        """Read of a round and those before it what the next one draws from.

        What a kill left of later rounds is removed, since they are played anew, perhaps by fewer
        processes.

        Raises:
            InputError: When a file is missing or damaged.
        """
        for file in self.folder.glob("*.pt"):
            if _round(file) > number:
                file.unlink(missing_ok=True)
        for kept in range(max(1, number + 2 - self.rounds), number + 1):
            files = sorted(self.folder.glob(f"{kept:06d}-*.pt"))
            if not files:
                raise InputError(f"the successes of round {kept}", "no file of them", DAMAGED)
            self.kept[kept] = [s for file in files[self.rank :: self.count] for s in _read(file)]

    def prune(self, number: int) -> None:
        """Remove what no round after this one draws from."""
        for file in self.folder.glob("*.pt"):
            if _round(file) < number + 2 - self.rounds:
                file.unlink()


def _round(file: Path) -> int:
    """Return the round of a file."""
    return int(file.name.partition("-")[0])


def _failed(group: Sequence[Played]) -> float:
    """Return the share of a group's episodes that failed."""
    return sum(not episode.success for episode in group) / len(group)


def _plain(success: Success) -> dict[str, Any]:
    """Return a success as text, numbers and tensors, which torch reads without running anything."""
    turns = [
        {
            "images": [torch.from_numpy(np.ascontiguousarray(image)) for image in turn.seen[0]],
            "texts": list(turn.seen[1:]),
            "levels": torch.from_numpy(np.ascontiguousarray(turn.levels)),
        }
        for turn in success.turns
    ]
    return {"task": success.task, "weight": success.weight, "turns": turns}


def _read(file: Path) -> list[Success]:
    """Return the successes of a file, or raise InputError."""
    content = saved(file)
    try:
        return [
            Success(
                each["task"],
                each["weight"],
                [
                    Turn(
                        ([i.numpy() for i in turn["images"]], *turn["texts"]),
                        turn["levels"].numpy(),
                    )
                    for turn in each["turns"]
                ],
            )
            for each in content
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the successes of a round in '{file}'", said(error), DAMAGED) from None
