"""Examine a dataset for training.

A survey says what is in it, what its numbers lose as text, what the model will see, and what
training takes.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vla0.core.codec import ActionCodec
from vla0.core.images import compose
from vla0.core.prompt import Prompt, words
from vla0.core.relative import shortest, to_written
from vla0.core.spec import Sample, Spec
from vla0.data.lerobot import Source
from vla0.inspect.cost import rate, size_of, trained_of
from vla0.train.config import TrainConfig
from vla0.train.run import spec_of

PICTURES = 6  # pictures that are shown
TRIED = 40  # episodes from which a frame is read


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One dimension of the actions, in the dataset's units."""

    name: str
    low: float  # the lowest value
    high: float  # the highest value
    bounds: tuple[float, float]  # the values that become level 0 and level `bins`
    error: float  # mean distance between written and recorded values, including clipping
    clipped: float  # share of the values outside the bounds
    levels: int  # how many different levels occur
    histogram: tuple[int, ...]  # counts of values between low and high


@dataclass(frozen=True)
class Picture:
    """What the model will see of a frame of each camera."""

    # (h, w, 3) uint8; images that the model gets separately are side by side here
    pixels: np.ndarray = field(repr=False)
    # the episode and the frame, the instruction, the cameras from left to right and their sizes
    caption: str


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What `examine` finds out about a dataset."""

    dataset: str
    estimated: str  # the model and the config for which tokens, time and memory are estimated
    episodes: int
    frames: int
    fps: float
    lengths: tuple[int, int, int]  # frames of the shortest, the median and the longest episode
    instructions: dict[str, int]  # {instruction: episodes}
    cameras: dict[str, str]  # {camera: width x height, and how it is stored}
    squeezed: str  # which frames are distorted to become squares; empty when all are squares
    dimensions: tuple[Dimension, ...]
    idle: float  # share of the frames whose action equals the one before
    prompt_tokens: int | None  # None when the model's processor is not at hand
    answer_tokens: float
    steps: int
    samples: int  # samples of a step
    seconds: float | None  # estimated time of training; None when it cannot be estimated
    # estimated bytes for weights, gradients and moments; None when the model's size is not known
    memory: float | None
    trained: str  # which part of the model is trained
    problems: tuple[str, ...]
    pictures: tuple[Picture, ...]
    # the turns before the answer, for the first picture; they have the model's special marks when
    # its processor is at hand
    prompt: str
    answer: str  # what the model learns to write after this prompt


def examine(config: TrainConfig, file: Path | None = None) -> Survey:
    """Survey the dataset of a config.

    All actions and states are read, but only a frame of each of some episodes.

    Args:
        config: The dataset and the settings of training.
        file: The file that the config came from. None means the published settings.

    Raises:
        InputError: When something cannot be read.
    """
    source = Source(config.data)
    spec = spec_of(config, source)
    starts, counts = np.unique(source.start, return_counts=True)
    chosen_starts = starts[np.linspace(0, len(starts) - 1, min(TRIED, len(starts))).astype(int)]
    rows = [int((start + source.end[start]) // 2) for start in chosen_starts]
    samples = [source.sample(row, spec.chunk_size, spec.history) for row in rows]
    size, processor = size_of(config, spec, source)
    prompt_tokens, answer_tokens = _tokens(samples[:8], spec, processor)
    dimensions = _dimensions(source, spec)
    still = (
        np.abs(np.diff(source.actions, axis=0)) <= (np.array(spec.high) - spec.low) / spec.bins / 2
    )
    same_episode = source.start[1:] == source.start[:-1]
    idle = float(np.all(still, axis=1)[same_episode].mean()) if same_episode.any() else 0.0
    training = config.training
    batch = training.batch_size * training.gradient_accumulation_steps
    steps = training.num_steps or math.ceil((training.num_epochs or 0) * len(source) / batch)
    seconds = None
    if size is not None and prompt_tokens is not None:
        # FLOP per token and weight: 2 for a forward pass and 2 for a backward pass through all
        # weights, and 2 for the gradients of the trained ones. Checkpointing adds another forward
        # pass.
        products = (
            4 * size.weights + 2 * size.trained + 2 * size.weights * training.gradient_checkpointing
        )
        seconds = (
            products * (prompt_tokens + answer_tokens) * batch * steps / rate(training.precision)
        )
    episodes_of = {int(start): source.tasks[source.task_of[start]] for start in starts}
    sizes = _sizes(samples[0], spec)
    shown = list(zip(rows, samples, strict=True))[:: max(1, len(samples) // PICTURES)][:PICTURES]
    settings = f"config {file}" if file else "the published settings"
    return Survey(
        dataset=config.data.dataset,
        estimated=f"model {config.model.name}, {settings}",
        episodes=len(starts),
        frames=len(source),
        fps=source.fps,
        lengths=(int(counts.min()), int(np.median(counts)), int(counts.max())),
        instructions=dict(Counter(episodes_of.values()).most_common()),
        cameras={
            name: f"{_by(sizes[name])}, {source.dataset.features[key]['dtype']}"
            for name, key in source.cameras.items()
        },
        squeezed=_squeezed(sizes, spec),
        dimensions=dimensions,
        idle=idle,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        steps=steps,
        samples=batch,
        seconds=seconds,
        memory=None if size is None else size.memory,
        trained=trained_of(config),
        problems=tuple(_problems(source, spec, dimensions, idle)),
        pictures=tuple(_picture(source, row, sample, sizes, spec) for row, sample in shown),
        prompt=_prompt(samples[0], spec, processor),
        answer=_answer(samples[0], spec),
    )


def _sizes(sample: Sample, spec: Spec) -> dict[str, tuple[int, int]]:
    """Return {camera: (width, height)} of the frames in pixels."""
    frames = {camera: sample.observation.images[camera] for camera in spec.cameras}
    shapes = {
        camera: (frame if spec.history == 1 else frame[0]).shape for camera, frame in frames.items()
    }
    return {camera: (shape[1], shape[0]) for camera, shape in shapes.items()}


def _by(size: tuple[int, int]) -> str:
    """Write a size as "width x height"."""
    return f"{size[0]} x {size[1]}"


def _squeezed(sizes: dict[str, tuple[int, int]], spec: Spec) -> str:
    """Say which cameras' frames are distorted to become squares, or nothing if all are squares."""
    oblong = [f"{camera} ({_by(size)})" for camera, size in sizes.items() if size[0] != size[1]]
    if not oblong:
        return ""
    side = f"{spec.image_size} x {spec.image_size}"
    return (
        f"Seen squeezed to a square of {side} pixels, in training as in acting: {', '.join(oblong)}"
    )


def _picture(
    source: Source, row: int, sample: Sample, sizes: dict[str, tuple[int, int]], spec: Spec
) -> Picture:
    """Return what the model will see of a sample."""
    pixels = np.concatenate(compose(sample.observation, spec), axis=1)
    place = f"episode {int(source.episode_of[row])}, frame {row - int(source.start[row])}"
    cameras = ", ".join(f"{camera} {_by(size)}" for camera, size in sizes.items())
    frames = f", {spec.history} frames of each" if spec.history > 1 else ""
    return Picture(pixels, f"{place}: “{sample.observation.instruction}” ({cameras}{frames})")


def _dimensions(source: Source, spec: Spec) -> tuple[Dimension, ...]:
    """Return the statistics of each dimension of the actions.

    Those of relative dimensions are of the differences from the state at the same instant.
    """
    actions = source.actions.astype(np.float64)
    if spec.relative_dims and source.states is not None:
        dims = list(spec.relative_dims)
        actions[:, dims] -= source.states[:, dims]
        actions = shortest(actions, [period for period in spec.periodic if period[0] in dims])
    codec = ActionCodec(spec)
    levels = codec.encode(actions)
    errors = np.abs(codec.decode(levels) - actions).mean(axis=0)
    outside = codec.outside(actions) / len(actions)
    names = _names(spec)
    return tuple(
        Dimension(
            name=names[d],
            low=float(actions[:, d].min()),
            high=float(actions[:, d].max()),
            bounds=(spec.low[d], spec.high[d]),
            error=float(errors[d]),
            clipped=float(outside[d]),
            levels=len(np.unique(levels[:, d])),
            histogram=tuple(np.histogram(actions[:, d], 40)[0].tolist()),
        )
        for d in range(spec.dimensions)
    )


def _names(spec: Spec) -> list[str]:
    """Return a name for each dimension, which is its number where the Spec has no names."""
    return (
        [f"{d} {name}" for d, name in enumerate(spec.action_names)]
        if spec.action_names
        else list(map(str, range(spec.dimensions)))
    )


def _answer(sample: Sample, spec: Spec) -> str:
    """Write the chunk of a sample as the model learns to write it."""
    codec = ActionCodec(spec)
    return codec.write(codec.encode(to_written(sample.actions, sample.observation, spec)))


def _prompt(sample: Sample, spec: Spec, processor: Any) -> str:
    """Return the system's and the user's turn, in the model's format when there is a processor."""
    if processor is not None:
        return Prompt(spec, processor).see(sample.observation)[1]
    count = 1 if spec.tile else len(spec.cameras) * spec.history
    return (
        f"system: {spec.system_text()}\nuser: "
        f"{'[picture] ' * count}{words(sample.observation, spec)}"
    )


def _tokens(samples: Sequence[Sample], spec: Spec, processor: Any) -> tuple[int | None, float]:
    """Count the tokens of the longest prompt, with its pictures, and of an average answer.

    The former is None without a processor. The latter includes the token that ends the answer.
    """
    answers = float(np.mean([len(_answer(sample, spec)) + 1 for sample in samples]))
    if processor is None:
        return None, answers
    batch = Prompt(spec, processor).observe([sample.observation for sample in samples])
    return int(batch["attention_mask"].sum(1).max()), answers


def _problems(
    source: Source, spec: Spec, dimensions: Sequence[Dimension], idle: float
) -> list[str]:
    """Say what looks wrong with a dataset, a sentence for each problem."""
    problems = []
    for dimension in dimensions:
        if dimension.clipped > 0.05:
            problems.append(
                f"action {dimension.name}: {dimension.clipped:.0%} of the values are clipped; "
                f"wider bounds: statistics: minmax"
            )
        elif dimension.error > 0.02 * (dimension.high - dimension.low):
            problems.append(
                f"action {dimension.name} loses {dimension.error:.3g} on average in writing; "
                f"more bins"
            )
    if idle > 0.2:
        problems.append(
            f"in {idle:.0%} of the frames nothing is asked for that was not before: a policy "
            f"learns to wait; cut them"
        )
    return problems + source.problems(spec)
