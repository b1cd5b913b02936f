"""What is in a dataset, what its numbers lose as text, what the model will see, what training takes."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vla0.adapter import LANGUAGE, adapted
from vla0.bench.inputs import product_rate
from vla0.codec import ActionCodec
from vla0.doctor import MODELS, TRAINING
from vla0.errors import InputError
from vla0.model import default_device, locate
from vla0.prompt import Prompt
from vla0.recipe import LoggingConfig, TrainConfig, TrainingConfig, read_config
from vla0.relative import shortest, to_written
from vla0.source import DataConfig, Source
from vla0.spec import MAIN, Sample, Spec
from vla0.tiny import TINY
from vla0.train import spec_of, tiny_of
from vla0.vision import compose

PICTURES = 6  # shown
TRIED = 40  # episodes of which a frame is read
NF4 = 0.52  # bytes of a weight in 4 bits, scales included
ALL = "full fine-tuning"
SHARE = {"cpu": 0.6, "cuda": 0.2}  # of the rate of large products of matrices that training reaches, about (docs/results.md)


@dataclass(frozen=True)
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
class Survey:
    """What `examine` found."""

    dataset: str
    episodes: int
    frames: int
    fps: float
    lengths: tuple[int, int, int]  # frames of an episode: least, median, most
    sentences: dict[str, int]  # sentence → episodes
    cameras: dict[str, str]  # camera → size and kind
    dimensions: tuple[Dimension, ...]
    idle: float  # share of the frames whose action is the one before
    prompt_tokens: int | None  # None where the model's processor is not at hand
    answer_tokens: float
    steps: int
    samples: int  # of a step
    hours: float | None  # about; None where the model's size is not known
    memory: float | None  # bytes for weights, gradients and moments, about; None where the model's size is not known
    trained: str  # what of the model is trained
    problems: tuple[str, ...]
    pictures: tuple[np.ndarray, ...] = field(repr=False)  # (h, w, 3) uint8, what the model will see


def recipe(words: Sequence[str], file: Path | None = None) -> TrainConfig:
    """What a dataset is looked at with: a recipe's settings, or the published ones for one epoch.

    words: a dataset, which a recipe may name itself, and for a recipe key=value.
    """
    overrides, named = [word for word in words if "=" in word], [word for word in words if "=" not in word]
    if len(named) > 1:
        raise InputError("one dataset", f"{named}", "look at one after another")
    if file is not None:
        return read_config(TrainConfig, file, [*(f"data.dataset={dataset}" for dataset in named), *overrides])
    if overrides:
        raise InputError(f"--config, a recipe for {overrides[0]} to change", "none", "name one, or leave that out")
    if not named:
        raise InputError("a dataset or --config", "neither", "name a folder, a Hub id or a recipe")
    return TrainConfig(DataConfig(named[0]), TrainingConfig(num_epochs=1.0), LoggingConfig(""))


def examine(config: TrainConfig) -> Survey:
    """Reads the narrow columns whole and a frame of each of some episodes. Raises InputError for what cannot be read."""
    source = Source(config.data)
    spec = spec_of(config, source)
    starts, counts = np.unique(source.start, return_counts=True)
    chosen = starts[np.linspace(0, len(starts) - 1, min(TRIED, len(starts))).astype(int)]
    samples = [source.sample(int((start + source.end[start]) // 2), spec.horizon, spec.history) for start in chosen]
    size, processor = _model(config, spec, source)
    prompt_tokens, answer_tokens = _tokens(samples[:8], spec, processor)
    dimensions = _dimensions(source, spec)
    still = np.abs(np.diff(source.actions, axis=0)) <= (np.array(spec.high) - spec.low) / spec.bins / 2
    inside = source.start[1:] == source.start[:-1]
    idle = float(np.all(still, axis=1)[inside].mean()) if inside.any() else 0.0
    training = config.training
    batch = training.batch_size * training.gradient_accumulation_steps
    steps = training.num_steps or math.ceil((training.num_epochs or 0) * len(source) / batch)
    hours = None
    if size is not None and prompt_tokens is not None:
        # Forwards, backwards through all weights, the gradients of those that are trained; and forwards again.
        products = 4 * size.weights + 2 * size.trained + 2 * size.weights * training.gradient_checkpointing
        hours = products * (prompt_tokens + answer_tokens) * batch * steps / rate(training.precision) / 3600
    episodes_of = {int(start): source.tasks[source.task_of[start]] for start in starts}
    return Survey(
        config.data.dataset, len(starts), len(source), source.fps,
        (int(counts.min()), int(np.median(counts)), int(counts.max())),
        dict(Counter(episodes_of.values()).most_common()),
        {name: _camera(source, key) for name, key in source.cameras.items()},
        dimensions, idle, prompt_tokens, answer_tokens, steps, batch, hours,
        None if size is None else size.memory, _trained(config),
        tuple(_problems(source, spec, dimensions, idle)),
        tuple(compose(sample.observation, spec)[0] for sample in samples[:: max(1, len(samples) // PICTURES)][:PICTURES]),
    )  # fmt: skip


def rate(precision: str) -> float:
    """FLOP a second that training may reach on this machine."""
    return SHARE.get(default_device().type, SHARE["cuda"]) * product_rate(precision == "bf16")


def _dimensions(source: Source, spec: Spec) -> tuple[Dimension, ...]:
    """Of absolute actions; of relative ones, of their differences from the state at the same instant."""
    actions = source.actions.astype(np.float64)
    if spec.relative and source.states is not None:
        dims = list(spec.relative)
        actions[:, dims] -= source.states[:, dims]
        actions = shortest(actions, [turn for turn in spec.periodic if turn[0] in dims])
    codec = ActionCodec(spec)
    levels = codec.encode(actions)
    errors = np.abs(codec.decode(levels) - actions).mean(axis=0)
    outside = codec.outside(actions) / len(actions)
    names = _names(spec)
    return tuple(
        Dimension(
            names[d], float(actions[:, d].min()), float(actions[:, d].max()), (spec.low[d], spec.high[d]), float(errors[d]),
            float(outside[d]), len(np.unique(levels[:, d])), tuple(np.histogram(actions[:, d], 40)[0].tolist()),
        )
        for d in range(spec.dimensions)
    )  # fmt: skip


def _names(spec: Spec) -> list[str]:
    return (
        [f"{d} {name}" for d, name in enumerate(spec.action_names)]
        if spec.action_names
        else list(map(str, range(spec.dimensions)))
    )


def _camera(source: Source, key: str) -> str:
    feature = source.dataset.features[key]
    return f"{' x '.join(map(str, feature['shape']))}, {feature['dtype']}"


def _tokens(samples: Sequence[Sample], spec: Spec, processor: Any) -> tuple[int | None, float]:
    """(of the longest prompt, pictures included; None without a processor, of an answer and its end, on average)."""
    codec = ActionCodec(spec)
    answers = [len(codec.write(codec.encode(to_written(s.actions, s.observation, spec)))) + 1 for s in samples]
    if processor is None:
        return None, float(np.mean(answers))
    batch = Prompt(spec, processor).observe([sample.observation for sample in samples])
    return int(batch["attention_mask"].sum(1).max()), float(np.mean(answers))


@dataclass(frozen=True)
class Size:
    """Of a model and of what training keeps of it."""

    weights: float
    trained: float
    memory: float  # bytes


def _model(config: TrainConfig, spec: Spec, source: Source) -> tuple[Size | None, Any]:
    """(Size, processor) of the recipe's model; None for what is not known or not at hand."""
    if config.model.name == TINY:
        model, processor = tiny_of(config, {MAIN: spec}, {MAIN: source})
        return _size(config, model), processor
    try:
        folder = locate(config.model.name, weights=False)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
        return _size(config, model), AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, InputError):
        count = next((count for name, count in MODELS.items() if name in config.model.name), None)
        return None if count is None or _trained(config) != ALL else Size(count, count, TRAINING * count), None


def _size(config: TrainConfig, model: Any) -> Size:
    model = adapted(model, config.model.lora, config.model.freeze_vision_encoder)
    whole = 2.0 if config.model.lora.rank and config.training.precision == "bf16" else 4.0  # bytes of a weight that stays
    weights = trained = memory = 0.0
    for name, weight in model.named_parameters():
        weights += weight.numel()
        trained += weight.numel() * weight.requires_grad
        packed = config.model.quantization and re.search(LANGUAGE + r"\.base_layer\.weight$", name)
        memory += weight.numel() * (TRAINING if weight.requires_grad else NF4 if packed else whole)
    return Size(weights, trained, memory)


def _trained(config: TrainConfig) -> str:
    lora, tower = config.model.lora.rank, "" if not config.model.freeze_vision_encoder else ", the vision tower frozen"
    kind = f"{'Q' if config.model.quantization else ''}LoRA of rank {lora}" if lora else ALL
    return kind + tower


def _problems(source: Source, spec: Spec, dimensions: Sequence[Dimension], idle: float) -> list[str]:
    found = []
    for own in dimensions:
        if own.clipped > 0.05:
            found.append(f"action {own.name}: {own.clipped:.0%} of the values are clipped; wider bounds: statistics: minmax")
        elif own.error > 0.02 * (own.high - own.low):
            found.append(f"action {own.name} loses {own.error:.3g} on average in writing; more bins")
    if idle > 0.2:
        found.append(f"in {idle:.0%} of the frames nothing is asked for that was not before: a policy learns to wait; cut them")
    return found + source.problems(spec)
