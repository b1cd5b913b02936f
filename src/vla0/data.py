"""LeRobot rows → Sample → Batch. No dataset key and no frame rate is known above this file."""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla0.codec import ActionCodec
from vla0.prompt import Prompt, hide, hide_numbers
from vla0.spec import InputError, Observation, Sample, Spec, offset, tupled
from vla0.vision import JITTER

logger = logging.getLogger(__name__)

CONVERTER = "python -m lerobot.scripts.convert_dataset_v21_to_v30"


@dataclass(frozen=True)
class DataConfig:
    """Which dataset, and what its columns are called."""

    dataset: str  # folder of a LeRobot dataset v3.0, or Hub id
    cameras: Mapping[str, str]  # camera of the Spec → key of the dataset
    action: str = "action"
    state: str | None = None  # key of a state to write into the prompt, or that relative actions refer to
    statistics: str = "minmax"  # bounds of actions and state: "minmax", or "quantiles" for 1 % and 99 %
    held_out: int = 0  # episodes kept from training, the last ones, for the loss on unseen data
    revision: str | None = None

    def __post_init__(self):
        if self.statistics not in ("minmax", "quantiles"):
            raise InputError("statistics: minmax or quantiles", f"'{self.statistics}'", "choose one of those")
        if not isinstance(self.cameras, Mapping) or not self.cameras:
            raise InputError("cameras, {name: key of the dataset}", f"{self.cameras}", "name one camera at least")
        if self.held_out < 0:
            raise InputError("held_out >= 0", f"{self.held_out}", "it counts episodes")


class Source:
    """A LeRobot dataset as arrays: the narrow columns in memory, pictures one row at a time.

    A chunk query of LeRobot's own reader decodes the pictures of all its rows; slicing the columns here does not.
    """

    def __init__(self, config: DataConfig):
        self.config = config
        self.dataset = open_dataset(config.dataset, config.revision)
        meta = self.dataset.meta
        self.fps = float(meta.fps)
        for name, key in {"action": config.action, "state": config.state, **config.cameras}.items():
            if key is not None and key not in meta.features:
                raise InputError(f"key '{key}' for {name}", f"keys {sorted(meta.features)}", "correct the recipe's mapping")
        for camera, key in config.cameras.items():
            if key not in meta.camera_keys:
                raise InputError(
                    f"pictures in '{key}' for camera '{camera}'", meta.features[key]["dtype"], f"choose of {meta.camera_keys}"
                )
        table = self.dataset.hf_dataset.with_format("numpy")
        self.actions = _matrix(table, config.action)
        self.states = None if config.state is None else _matrix(table, config.state)
        self.episode_of = np.asarray(table["episode_index"])
        self.timestamps = np.asarray(table["timestamp"], np.float64)
        starts = np.flatnonzero(np.r_[True, self.episode_of[1:] != self.episode_of[:-1]])
        ends = np.r_[starts[1:], len(self.episode_of)]
        lengths = ends - starts
        self.start, self.end = np.repeat(starts, lengths), np.repeat(ends, lengths)  # (N,) of each row's episode
        if config.held_out >= len(starts):
            raise InputError(f"held_out below the {len(starts)} episodes", f"{config.held_out}", "hold out fewer")
        self.first_held_out = int(starts[-config.held_out]) if config.held_out else len(self.actions)
        self.tasks = [str(task) for task in meta.tasks.index]
        self.task_of = np.asarray(table["task_index"])
        stored = [key for key in config.cameras.values() if key in meta.image_keys]
        self.pictures = self.dataset.hf_dataset.with_format(None).select_columns(stored) if stored else None

    def __len__(self) -> int:
        return len(self.actions)

    def spec_fields(self, horizon: int, relative: Sequence[int]) -> dict[str, Any]:
        """What a Spec takes from data: low and high over all chunks, fps, cameras, and the state's bounds."""
        actions = [self.actions[: self.first_held_out]]
        if relative:
            if self.states is None:
                raise InputError("a state for relative actions", "none", "set data.state")
            dims = list(relative)
            base = np.zeros_like(actions[0])
            base[:, dims] = self.states[: self.first_held_out][:, dims]
            last = self.end[: self.first_held_out] - 1
            rows = np.arange(self.first_held_out)
            actions = [actions[0][np.minimum(rows + step, last)] - base for step in range(horizon)]
        fields = {"fps": self.fps, "cameras": tuple(self.config.cameras)}
        fields["low"], fields["high"] = _bounds(np.concatenate(actions), self.config.statistics)
        fields["state"] = None if self.states is None else _bounds(self.states[: self.first_held_out], self.config.statistics)
        return fields

    def sample(self, row: int, horizon: int, history: int) -> Sample:
        """The Sample of a row: pictures (and their history), state, task, and the chunk that follows."""
        ahead = np.arange(row, row + horizon)
        actions = self.actions[np.minimum(ahead, self.end[row] - 1)].astype(np.float32)
        back = np.maximum(np.arange(row - history + 1, row + 1), self.start[row])
        images = {camera: self._frames(key, back) for camera, key in self.config.cameras.items()}
        if history == 1:
            images = {camera: frames[0] for camera, frames in images.items()}
        state = None if self.states is None else self.states[row]
        return Sample(Observation(images, self.tasks[self.task_of[row]], state), actions, ahead < self.end[row])

    def _frames(self, key: str, rows: np.ndarray) -> np.ndarray:
        """(history, h, w, 3) uint8 of one camera at some rows of one episode."""
        if key in self.dataset.meta.image_keys:
            assert self.pictures is not None
            return np.stack([np.asarray(self.pictures[int(row)][key].convert("RGB")) for row in rows])
        from lerobot.datasets.video_utils import decode_video_frames

        episode = int(self.episode_of[rows[-1]])
        first = self.dataset.meta.episodes[episode][f"videos/{key}/from_timestamp"]
        frames = decode_video_frames(
            self.dataset.root / self.dataset.meta.get_video_file_path(episode, key),
            [first + float(self.timestamps[row]) for row in rows],
            self.dataset.tolerance_s, self.dataset._video_backend, return_uint8=True,
        )  # fmt: skip
        return frames.reshape(len(rows), *frames.shape[-3:]).permute(0, 2, 3, 1).numpy()


Drawn = tuple[Sample, Sequence[int]]  # a Sample and the seed of its augmentation


class Samples(torch.utils.data.Dataset):
    """The rows of a Source, those to train on or those held out, each with the seed of its augmentation.

    The seed is made of the run's, the epoch's and the row's number, so that a batch is the same whichever process makes
    it, and a resumed run sees what an uninterrupted one sees.
    """

    epoch = 0

    def __init__(self, source: Source, spec: Spec, seed: int = 0, held_out: bool = False):
        self.source, self.spec, self.seed = source, spec, seed
        first = source.first_held_out
        self.rows = range(first, len(source)) if held_out else range(first)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Drawn:
        row = self.rows[index]
        return self.source.sample(row, self.spec.horizon, self.spec.history), (self.seed, self.epoch, row)

    def outside(self) -> np.ndarray:
        """(D,): how many of the actions clip. Relative ones are not counted: their bounds are over chunks."""
        absolute = [d for d in range(self.spec.dimensions) if d not in self.spec.relative]
        counts = np.zeros(self.spec.dimensions, np.int64)
        actions = self.source.actions[self.rows.start : self.rows.stop]
        counts[absolute] = ActionCodec(self.spec).outside(actions)[absolute]
        return counts


@dataclass(frozen=True)
class Augmentation:
    """What training adds at random; acting has none of it."""

    mask: str = "character"  # masked action augmentation by "character" (published), "number", or "none"
    mask_most: float = 0.4  # the share hidden is uniform in 0..mask_most
    mask_none: float = 0.1  # probability that nothing is hidden
    jitter: tuple[float, float, float, float] = JITTER

    def __post_init__(self):
        object.__setattr__(self, "jitter", tupled(self.jitter))
        if self.mask not in ("character", "number", "none"):
            raise InputError("mask: character, number or none", f"'{self.mask}'", "choose one of those")
        if not (0 <= self.mask_most <= 1 and 0 <= self.mask_none <= 1):
            raise InputError("mask_most and mask_none in 0..1", f"{self.mask_most}, {self.mask_none}", "they are shares")
        if len(self.jitter) != 4 or not all(0 <= j <= 1 for j in self.jitter) or self.jitter[3] > 0.5:
            raise InputError("jitter: four strengths in 0..1, hue at most 0.5", f"{self.jitter}", "zeros turn it off")


def collator(prompt: Prompt, augmentation: Augmentation | None) -> Callable[[Sequence[Drawn]], dict[str, torch.Tensor]]:
    """Drawn Samples → Batch with labels. augmentation None: as when acting, for the loss on held-out episodes."""
    return partial(_collate, prompt=prompt, augmentation=augmentation)


def _collate(drawn: Sequence[Drawn], prompt: Prompt, augmentation: Augmentation | None) -> dict[str, torch.Tensor]:
    settings = augmentation or Augmentation()
    codec = ActionCodec(prompt.spec)
    answers, rngs = [], []
    for sample, seed in drawn:
        rng = None if augmentation is None else np.random.default_rng(seed)
        text = codec.write(codec.encode(sample.actions - offset(sample.observation, prompt.spec)))
        text = hide_numbers(text, np.repeat(~sample.valid, prompt.spec.dimensions))  # nothing to learn after the end
        answers.append(hide(text, rng, settings.mask, settings.mask_most, settings.mask_none))
        rngs.append(rng)
    return prompt.observe([sample.observation for sample, _ in drawn], answers, rngs, settings.jitter)


def open_dataset(dataset: str | Path, revision: str | None = None) -> Any:
    """The LeRobotDataset of a folder or Hub id. Raises InputError where there is none, or one of an older format."""
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
        from lerobot.datasets.utils import BackwardCompatibilityError
    except ImportError as error:
        raise InputError("lerobot to read datasets", str(error), "pip install 'vla0[lerobot]'") from None
    folder = Path(dataset).expanduser()
    local = folder.is_dir()
    if local and not (folder / "meta" / "info.json").is_file():
        raise InputError(f"a LeRobot dataset in '{dataset}'", "no meta/info.json", "give the folder that holds meta/ and data/")
    repo_id, root = (f"local/{folder.name}", folder) if local else (str(dataset), None)
    try:
        return LeRobotDataset(repo_id, root, revision=revision, video_backend=video_backend())
    except BackwardCompatibilityError:
        command = f"{CONVERTER} --repo-id={repo_id}{f' --root={root}' if local else ''} --push-to-hub=false"
        raise InputError("a LeRobot dataset v3.0", "an older format", f"convert it: {command}") from None
    except Exception as error:  # the Hub client raises a dozen kinds; each means that the dataset cannot be had
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        raise InputError(
            "a LeRobot dataset: folder or Hub id", f"'{dataset}' ({reason})", "check the path or the connection"
        ) from error


@cache
def video_backend() -> str:
    """torchcodec where it loads (it needs FFmpeg's shared libraries), else PyAV, which brings its own."""
    try:
        importlib.import_module("torchcodec")
    except (ImportError, OSError, RuntimeError):
        logger.info("torchcodec does not load here: videos are read with PyAV")
        return "pyav"
    return "torchcodec"


def _matrix(table: Any, key: str) -> np.ndarray:
    """(N, D) float32: a narrow column, checked."""
    values = np.stack(list(table[key])).astype(np.float32)
    values = values.reshape(len(values), -1)
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0][0])
        raise InputError(f"finite numbers in '{key}'", f"row {row}: {values[row].tolist()}", "mend or drop that episode")
    return values


def _bounds(values: np.ndarray, statistics: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(low, high) of values (N, D)."""
    if statistics == "minmax":
        low, high = values.min(axis=0), values.max(axis=0)
    else:
        low, high = np.quantile(values, [0.01, 0.99], axis=0)
    return tuple(float(v) for v in low), tuple(float(v) for v in high)
