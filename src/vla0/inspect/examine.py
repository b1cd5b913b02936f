"""What is in a dataset, what its numbers lose as text, what the model will see, what training
takes.
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

PICTURES = 6  # shown
TRIED = 40  # episodes of which a frame is read


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One number of an action, in the dataset's units."""

    name: str
    low: float  # of the values
    high: float
    bounds: tuple[float, float]  # that become level 0 and level `bins`
    error: float  # mean distance of what is written from what was recorded, clipping included
    clipped: float  # share of the values outside the bounds
    levels: int  # different ones that occur
    histogram: tuple[int, ...]  # counts between low and high


@dataclass(frozen=True)
class Picture:
    """What the model will see of a frame of each camera."""

    # (h, w, 3) uint8; images that the model gets separately, side by side
    pixels: np.ndarray = field(repr=False)
    # which frame of which episode, its instruction, the cameras from left to right and their own
    # sizes
    caption: str


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What `examine` found."""

    dataset: str
    estimated: str  # the model and the config that tokens, time and memory are those of
    episodes: int
    frames: int
    fps: float
    lengths: tuple[int, int, int]  # frames of an episode: least, median, most
    instructions: dict[str, int]  # instruction → episodes
    cameras: dict[str, str]  # camera → width x height, and how it is stored
    squeezed: str  # which frames lose their shape in becoming squares; empty where all are squares
    dimensions: tuple[Dimension, ...]
    idle: float  # share of the frames whose action is the one before
    prompt_tokens: int | None  # None where the model's processor is not at hand
    answer_tokens: float
    steps: int
    samples: int  # of a step
    seconds: float | None  # of training, about; None where the model's size is not known
    # bytes for weights, gradients and moments, about; None where the model's size is not known
    memory: float | None
    trained: str  # what of the model is trained
    problems: tuple[str, ...]
    pictures: tuple[Picture, ...]
    # the turns before the answer, of the first picture; with the model's own marks where its
    # processor is at hand
    prompt: str
    answer: str  # what the model is to write then


def examine(config: TrainConfig, file: Path | None = None) -> Survey:
    """Reads the narrow columns whole and a frame of each of some episodes.

    Raises InputError for what cannot be read.

    file: which the config came from; None for the published settings.
    """
    source = Source(config.data)
    spec = spec_of(config, source)
    starts, counts = np.unique(source.start, return_counts=True)
    chosen = starts[np.linspace(0, len(starts) - 1, min(TRIED, len(starts))).astype(int)]
    rows = [int((start + source.end[start]) // 2) for start in chosen]
    samples = [source.sample(row, spec.chunk_size, spec.history) for row in rows]
    size, processor = size_of(config, spec, source)
    prompt_tokens, answer_tokens = _tokens(samples[:8], spec, processor)
    dimensions = _dimensions(source, spec)
    still = (
        np.abs(np.diff(source.actions, axis=0)) <= (np.array(spec.high) - spec.low) / spec.bins / 2
    )
    inside = source.start[1:] == source.start[:-1]
    idle = float(np.all(still, axis=1)[inside].mean()) if inside.any() else 0.0
    training = config.training
    batch = training.batch_size * training.gradient_accumulation_steps
    steps = training.num_steps or math.ceil((training.num_epochs or 0) * len(source) / batch)
    seconds = None
    if size is not None and prompt_tokens is not None:
        # Forwards, backwards through all weights, the gradients of those that are trained; and
        # forwards again.
        products = (
            4 * size.weights + 2 * size.trained + 2 * size.weights * training.gradient_checkpointing
        )
        seconds = (
            products * (prompt_tokens + answer_tokens) * batch * steps / rate(training.precision)
        )
    episodes_of = {int(start): source.tasks[source.task_of[start]] for start in starts}
    sizes = _sizes(samples[0], spec)
    shown = list(zip(rows, samples, strict=True))[:: max(1, len(samples) // PICTURES)][:PICTURES]
    by = f"config {file}" if file else "the published settings"
    return Survey(
        dataset=config.data.dataset,
        estimated=f"model {config.model.name}, {by}",
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
    """{camera: (width, height)} of its frames, pixels."""
    frames = {camera: sample.observation.images[camera] for camera in spec.cameras}
    shapes = {
        camera: (frame if spec.history == 1 else frame[0]).shape for camera, frame in frames.items()
    }
    return {camera: (shape[1], shape[0]) for camera, shape in shapes.items()}


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _squeezed(sizes: dict[str, tuple[int, int]], spec: Spec) -> str:
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
    pixels = np.concatenate(compose(sample.observation, spec), axis=1)
    place = f"episode {int(source.episode_of[row])}, frame {row - int(source.start[row])}"
    cameras = ", ".join(f"{camera} {_by(size)}" for camera, size in sizes.items())
    frames = f", {spec.history} frames of each" if spec.history > 1 else ""
    return Picture(pixels, f"{place}: “{sample.observation.instruction}” ({cameras}{frames})")


def _dimensions(source: Source, spec: Spec) -> tuple[Dimension, ...]:
    """Of absolute actions; of relative ones, of their differences from the state at the same
    instant.
    """
    actions = source.actions.astype(np.float64)
    if spec.relative_dims and source.states is not None:
        dims = list(spec.relative_dims)
        actions[:, dims] -= source.states[:, dims]
        actions = shortest(actions, [turn for turn in spec.periodic if turn[0] in dims])
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
    return (
        [f"{d} {name}" for d, name in enumerate(spec.action_names)]
        if spec.action_names
        else list(map(str, range(spec.dimensions)))
    )


def _answer(sample: Sample, spec: Spec) -> str:
    """The chunk of a sample as the model is to write it."""
    codec = ActionCodec(spec)
    return codec.write(codec.encode(to_written(sample.actions, sample.observation, spec)))


def _prompt(sample: Sample, spec: Spec, processor: Any) -> str:
    """The system and the user's turn, as the model gets them where there is a processor."""
    if processor is not None:
        return Prompt(spec, processor).see(sample.observation)[1]
    count = 1 if spec.tile else len(spec.cameras) * spec.history
    return (
        f"system: {spec.system_text()}\nuser: "
        f"{'[picture] ' * count}{words(sample.observation, spec)}"
    )


def _tokens(samples: Sequence[Sample], spec: Spec, processor: Any) -> tuple[int | None, float]:
    """(of the longest prompt, pictures included; None without a processor, of an answer and its
    end, on average).
    """
    answers = float(np.mean([len(_answer(sample, spec)) + 1 for sample in samples]))
    if processor is None:
        return None, answers
    batch = Prompt(spec, processor).observe([sample.observation for sample in samples])
    return int(batch["attention_mask"].sum(1).max()), answers


def _problems(
    source: Source, spec: Spec, dimensions: Sequence[Dimension], idle: float
) -> list[str]:
    found = []
    for own in dimensions:
        if own.clipped > 0.05:
            found.append(
                f"action {own.name}: {own.clipped:.0%} of the values are clipped; wider bounds: "
                f"statistics: minmax"
            )
        elif own.error > 0.02 * (own.high - own.low):
            found.append(
                f"action {own.name} loses {own.error:.3g} on average in writing; more bins"
            )
    if idle > 0.2:
        found.append(
            f"in {idle:.0%} of the frames nothing is asked for that was not before: a policy "
            f"learns to wait; cut them"
        )
    return found + source.problems(spec)
