"""Draw samples in order, augment them at random and collate them into batches."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler

from vla0.core.codec import ActionCodec
from vla0.core.prompt import IGNORE, Prompt, hide, hide_numbers
from vla0.core.relative import to_written
from vla0.core.spec import Sample, Spec
from vla0.data.config import Augmentation
from vla0.data.lerobot import Source

# A Sample, the seed of its augmentation, and the index of its dataset in a mixture. Without a seed
# the Sample only fills a batch.
Drawn = tuple[Sample, Sequence[int] | None, int]


class Samples(torch.utils.data.Dataset):
    """The rows of a Source that are trained on or held out, each with its augmentation seed.

    The seed combines the run's seed, the epoch and the row. A batch is therefore the same whichever
    process makes it, and a resumed run sees what an uninterrupted one sees.

    Args:
        source: The dataset.
        spec: The Spec of the checkpoint that is trained.
        seed: Seed of the run.
        held_out: Whether to take the episodes that are held out instead of the others.
    """

    epoch = 0

    def __init__(self, source: Source, spec: Spec, seed: int = 0, held_out: bool = False):
        self.source, self.spec, self.seed = source, spec, seed
        first = source.first_held_out
        self.rows = range(first, len(source)) if held_out else range(first)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Drawn:
        seed = None if index < 0 else (self.seed, self.epoch, self.rows[index])
        return self.sample(index), seed, 0

    def sample(self, index: int) -> Sample:
        """Return the Sample of one of the rows."""
        return self.source.sample(self.rows[index], self.spec.chunk_size, self.spec.history)

    @cached_property
    def remarks(self) -> list[str]:
        """What the Spec's bounds lose of the data. All rows are read, but only the first time."""
        return self.source.remarks(self.spec)

    def outside(self) -> np.ndarray:
        """Count the actions that clip in each dimension: (D,) int64.

        Relative dimensions count 0, because their bounds are computed over chunks.
        """
        absolute = [d for d in range(self.spec.dimensions) if d not in self.spec.relative_dims]
        counts = np.zeros(self.spec.dimensions, np.int64)
        actions = self.source.actions[self.rows.start : self.rows.stop]
        counts[absolute] = ActionCodec(self.spec).outside(actions)[absolute]
        return counts


class Mixture(torch.utils.data.Dataset):
    """Several Samples as one dataset, in which each row of a part comes `weight` times per epoch.

    If a weight is not a whole number, the rows that come once more are drawn anew in each epoch
    from the run's seed.

    Args:
        parts: The datasets.
        weights: One weight for each part.
        seed: Seed of the run.
        places: The index of each part's prompt among those of the collator. None means that every
            prompt has a part here, in the same order.
    """

    epoch = 0

    def __init__(
        self,
        parts: Sequence[Samples],
        weights: Sequence[float],
        seed: int = 0,
        places: Sequence[int] | None = None,
    ):
        self.parts, self.seed, self.places = parts, seed, places or range(len(parts))
        self.counts = [
            max(1, round(weight * len(part))) for part, weight in zip(parts, weights, strict=True)
        ]
        self.ends = np.cumsum(self.counts).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Drawn:
        which = bisect_right(self.ends, index)
        part, place = self.parts[which], index - self.ends[which] + self.counts[which]
        turn, row = divmod(place, len(part))
        if (turn + 1) * len(part) > self.counts[which]:
            row = int(_order(len(part), self.seed, self.epoch, which)[row])
        seed = None if index < 0 else (self.seed, self.epoch, index)
        return part.sample(row), seed, self.places[which]


class Order(torch.utils.data.Sampler[int]):
    """Yields the rows of an epoch in random order, then -1 until all processes have full batches.

    The answer of a row numbered -1 does not count in the loss. accelerate would instead repeat rows
    and count them.

    Args:
        rows: The dataset; only its length matters.
        batch: Rows that all processes together take in one pass; 1 for a single process.
        seed: Seed of the run.
    """

    def __init__(self, rows: Any, batch: int, seed: int = 0):
        self.rows = SeedableRandomSampler(rows, generator=torch.Generator(), data_seed=seed)
        self.fill = -len(rows) % batch

    def __len__(self) -> int:
        return len(self.rows) + self.fill

    def __iter__(self) -> Iterator[int]:
        yield from self.rows
        yield from [-1] * self.fill

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self.rows.set_epoch(epoch)


@lru_cache(maxsize=16)
def _order(count: int, *seed: int) -> np.ndarray:
    """Return a random order of `count` rows."""
    return np.random.default_rng(seed).permutation(count)


def collator(
    prompts: Sequence[Prompt],
    augmentation: Augmentation | None,
    others: Sequence[Prompt] = (),
    prefix: str = "",
) -> Callable[[Sequence[Drawn]], dict[str, torch.Tensor]]:
    """Return a function that collates drawn Samples into a batch with labels.

    Args:
        prompts: One for each dataset of a mixture.
        augmentation: None changes nothing, as in acting; the loss on held-out episodes uses it.
        others: Prompts of another model, whose inputs of the same rows, texts and random changes
            the batch has too.
        prefix: Of the names of these inputs.
    """
    collate = partial(_collate, prompts=prompts, augmentation=augmentation)
    if not others:
        return collate
    other = partial(_collate, prompts=others, augmentation=augmentation)
    return partial(_both, collate=collate, other=other, prefix=prefix)


def _both(drawn: Sequence[Drawn], collate: Any, other: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Collate for two models."""
    more = {f"{prefix}{name}": value for name, value in other(drawn).items()}
    return collate(drawn) | more


def _collate(
    drawn: Sequence[Drawn], prompts: Sequence[Prompt], augmentation: Augmentation | None
) -> dict[str, torch.Tensor]:
    """Write, augment and collate the Samples."""
    settings = augmentation or Augmentation()
    prepared, answers = [], []
    for sample, seed, which in drawn:
        prompt = prompts[which]
        codec = ActionCodec(prompt.spec)
        rng = None if augmentation is None or seed is None else np.random.default_rng(seed)
        text = codec.write(
            codec.encode(to_written(sample.actions, sample.observation, prompt.spec))
        )
        # There is nothing to learn after the end of an episode.
        text = hide_numbers(text, np.repeat(~sample.valid, prompt.spec.dimensions))
        answers.append(hide(text, rng, settings.mask, settings.mask_most, settings.mask_none))
        prepared.append(prompt.see(sample.observation, rng, settings.jitter))
    batch = prompts[0].gather(prepared, answers)
    batch["labels"][[seed is None for _, seed, _ in drawn]] = IGNORE
    return batch
