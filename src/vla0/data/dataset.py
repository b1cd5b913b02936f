"""Samples → Batch: which row comes when, what is added at random, and the collation of both."""

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

# A Sample, the seed of its augmentation (None: it only fills a batch), and its dataset's place in a
# mixture.
Drawn = tuple[Sample, Sequence[int] | None, int]


class Samples(torch.utils.data.Dataset):
    """The rows of a Source, those to train on or those held out, each with the seed of its
    augmentation.

    The seed is made of the run's, the epoch's and the row's number, so that a batch is the same
    whichever process makes it, and a resumed run sees what an uninterrupted one sees.
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
        """The Sample of one of the rows."""
        return self.source.sample(self.rows[index], self.spec.chunk_size, self.spec.history)

    @cached_property
    def remarks(self) -> list[str]:
        """What the Spec's bounds lose of the rows; all of them are gone through, once."""
        return self.source.remarks(self.spec)

    def outside(self) -> np.ndarray:
        """(D,): how many of the actions clip.

        Relative ones are not counted: their bounds are over chunks.
        """
        absolute = [d for d in range(self.spec.dimensions) if d not in self.spec.relative_dims]
        counts = np.zeros(self.spec.dimensions, np.int64)
        actions = self.source.actions[self.rows.start : self.rows.stop]
        counts[absolute] = ActionCodec(self.spec).outside(actions)[absolute]
        return counts


class Mixture(torch.utils.data.Dataset):
    """Several Samples as one: each row of a part comes `weight` times in an epoch, whatever the
    sizes of the others.

    Of a weight that is not whole, the rows that come once more are drawn anew each epoch, from the
    run's seed.
    """

    epoch = 0

    def __init__(
        self,
        parts: Sequence[Samples],
        weights: Sequence[float],
        seed: int = 0,
        places: Sequence[int] | None = None,
    ):
        """places: of the parts among the prompts of the collator, where not all of those have a
        part here.
        """
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
    """An epoch's rows, each once and in an order of its own, filled up to whole batches of all
    processes.

    What fills is numbered -1: a row whose answer counts nothing. accelerate would repeat rows
    instead, and count them.
    """

    def __init__(self, rows: Any, batch: int, seed: int = 0):
        """rows: of a length.

        batch: what all processes together take in one pass; 1 where there is one process.
        """
        self.rows = SeedableRandomSampler(rows, generator=torch.Generator(), data_seed=seed)
        self.fill = -len(rows) % batch

    def __len__(self) -> int:
        return len(self.rows) + self.fill

    def __iter__(self) -> Iterator[int]:
        yield from self.rows
        yield from [-1] * self.fill

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)


@lru_cache(maxsize=16)
def _order(count: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


def collator(
    prompts: Sequence[Prompt], augmentation: Augmentation | None
) -> Callable[[Sequence[Drawn]], dict[str, torch.Tensor]]:
    """Drawn Samples → Batch with labels.

    augmentation None: as when acting, for the loss on held-out episodes.

    prompts: one for each dataset of a mixture.
    """
    return partial(_collate, prompts=prompts, augmentation=augmentation)


def _collate(
    drawn: Sequence[Drawn], prompts: Sequence[Prompt], augmentation: Augmentation | None
) -> dict[str, torch.Tensor]:
    settings = augmentation or Augmentation()
    seen, answers = [], []
    for sample, seed, which in drawn:
        prompt = prompts[which]
        codec = ActionCodec(prompt.spec)
        rng = None if augmentation is None or seed is None else np.random.default_rng(seed)
        text = codec.write(
            codec.encode(to_written(sample.actions, sample.observation, prompt.spec))
        )
        # nothing to learn after the end
        text = hide_numbers(text, np.repeat(~sample.valid, prompt.spec.dimensions))
        answers.append(hide(text, rng, settings.mask, settings.mask_most, settings.mask_none))
        seen.append(prompt.see(sample.observation, rng, settings.jitter))
    batch = prompts[0].gather(seen, answers)
    batch["labels"][[seed is None for _, seed, _ in drawn]] = IGNORE
    return batch
