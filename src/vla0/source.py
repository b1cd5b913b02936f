"""LeRobot rows → Sample. No dataset key and no frame rate is known above this file."""

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vla0.errors import InputError, refuse_unknown
from vla0.spec import MAIN, Observation, Sample, tupled

logger = logging.getLogger(__name__)

CONVERTER = "python -m lerobot.scripts.convert_dataset_v21_to_v30"


@dataclass(frozen=True)
class DataConfig:
    """Which dataset, and what its columns are called; others to learn from beside it."""

    dataset: str  # folder of a LeRobot dataset v3.0, or Hub id
    cameras: Mapping[str, str]  # camera of the Spec → key of the dataset
    action: str = "action"
    state: str | None = None  # key of a state, which is written into the prompt
    relative: tuple[int, ...] = ()  # action dimensions written as differences from the same dimension of the state
    depth: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # camera of depth maps → near and far, metres
    statistics: str = "minmax"  # bounds of actions and state: "minmax", or "quantiles" for 1 % and 99 %
    held_out: int = 0  # episodes kept from training, the last ones, for the loss on unseen data
    revision: str | None = None
    weight: float = 1.0  # how often a row comes in an epoch of a mixture
    mixture: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name → fields that differ for another dataset
    num_workers: int = 0  # processes that prepare batches

    def __post_init__(self):
        object.__setattr__(self, "relative", tupled(self.relative))
        object.__setattr__(self, "depth", {camera: tupled(span) for camera, span in self.depth.items()})
        if self.statistics not in ("minmax", "quantiles"):
            raise InputError("statistics: minmax or quantiles", f"'{self.statistics}'", "choose one of those")
        if not isinstance(self.cameras, Mapping) or not self.cameras:
            raise InputError("cameras, {name: key of the dataset}", f"{self.cameras}", "name one camera at least")
        if self.held_out < 0:
            raise InputError("held_out >= 0", f"{self.held_out}", "it counts episodes")
        if not self.weight > 0:
            raise InputError("weight > 0", f"{self.weight}", "1 shows each row once in an epoch")
        if unknown := [camera for camera in self.depth if camera not in self.cameras]:
            raise InputError(f"depth of cameras {list(self.cameras)}", f"'{unknown[0]}'", "name it under cameras too")
        for name, other in self.mixture.items():
            self._other(name, other)

    def all(self) -> dict[str, "DataConfig"]:
        """{name: the dataset's own}, the first of them MAIN; what an entry of the mixture leaves out is as here."""
        return {MAIN: self, **{name: self._other(name, other) for name, other in self.mixture.items()}}

    def _other(self, name: str, changes: Mapping[str, Any]) -> "DataConfig":
        common = ("mixture", "num_workers")
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in common}
        if not isinstance(changes, Mapping) or "dataset" not in changes:
            raise InputError(f"a dataset in mixture.{name}", f"{changes!r}", "give dataset, and what differs from data")
        if not name.isidentifier():
            raise InputError("names of letters, digits and _ in a mixture", f"'{name}'", "it becomes part of a file's name")
        refuse_unknown(changes, own, f"mixture.{name}")
        other = DataConfig(**{**own, "weight": 1.0, **changes})
        if set(other.cameras) != set(self.cameras):
            expected = f"the cameras {sorted(self.cameras)} in mixture.{name}"
            raise InputError(expected, f"{sorted(other.cameras)}", "give each dataset the same views under the same names")
        return replace(other, cameras={camera: other.cameras[camera] for camera in self.cameras})  # one order for all


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
        # A column each: asked for a row, the reader decodes all the pictures of its columns.
        self.pictures = {key: self.dataset.hf_dataset.with_format(None).select_columns([key]) for key in stored}

    def __len__(self) -> int:
        return len(self.actions)

    def problems(self) -> list[str]:
        """What training can live with, and a user should know."""
        found = []
        still = np.flatnonzero(self.actions.min(axis=0) == self.actions.max(axis=0)).tolist()
        if still:
            found.append(f"actions {still} never change: they cost their tokens and say nothing")
        gaps = np.diff(self.timestamps)[self.start[1:] == self.start[:-1]]
        if len(gaps) and abs(np.median(gaps) * self.fps - 1) > 0.02:
            found.append(f"frames are {np.median(gaps):.4g} s apart, which is not the {self.fps:g} frames a second it declares")
        declared, held = int(self.dataset.meta.total_episodes), len(np.unique(self.episode_of))
        if declared != held:
            found.append(f"{declared - held} of {declared} episodes are empty")
        if blank := [task for task in self.tasks if not task.strip()]:
            found.append(f"{len(blank)} of the sentences are empty: name the tasks")
        return found

    def spec_fields(self, horizon: int) -> dict[str, Any]:
        """What a Spec takes from data: bounds of actions over all chunks and of the state, names, fps, cameras, depth."""
        actions = [self.actions[: self.first_held_out]]
        dims = list(self.config.relative)
        if dims:
            most = min(len(self.actions[0]), 0 if self.states is None else len(self.states[0]))
            if not all(isinstance(d, int) and 0 <= d < most for d in dims):
                got = "no state" if self.states is None else f"{dims} of {len(self.actions[0])} and {len(self.states[0])}"
                raise InputError("relative: dimensions that action and state both have", got, "set data.state, count from 0")
            base = np.zeros_like(actions[0])
            assert self.states is not None
            base[:, dims] = self.states[: self.first_held_out][:, dims]
            last = self.end[: self.first_held_out] - 1
            rows = np.arange(self.first_held_out)
            actions = [actions[0][np.minimum(rows + step, last)] - base for step in range(horizon)]
        fields: dict[str, Any] = {"fps": self.fps, "cameras": tuple(self.config.cameras), "relative": tuple(dims)}
        fields["depth"] = tuple((camera, *span) for camera, span in self.config.depth.items())
        fields["low"], fields["high"] = _bounds(np.concatenate(actions), self.config.statistics)
        fields["state"] = None if self.states is None else _bounds(self.states[: self.first_held_out], self.config.statistics)
        steps = np.abs(np.diff(self.actions, axis=0))[self.start[1:] == self.start[:-1]]
        fields["most_change"] = tuple(float(c) for c in steps.max(axis=0)) if len(steps) else None
        for name, key in {"action_names": self.config.action, "state_names": self.config.state}.items():
            fields[name] = None if key is None else names_of(self.dataset.meta.features[key])
        return fields

    def sample(self, row: int, horizon: int, history: int) -> Sample:
        """The Sample of a row: pictures (and their history), state, task, and the chunk that follows."""
        ahead = np.arange(row, row + horizon)
        actions = self.actions[np.minimum(ahead, self.end[row] - 1)].astype(np.float32)
        back = np.maximum(np.arange(row - history + 1, row + 1), self.start[row])
        images = {}
        for camera, key in self.config.cameras.items():
            try:
                frames = self._frames(key, back, camera in self.config.depth)
            except Exception as error:  # decoders raise dozens of kinds; each means that this episode cannot be used
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
                where = f"episode {int(self.episode_of[row])}, frame {row - int(self.start[row])} of '{key}'"
                raise InputError("readable pictures", f"{where}: {reason}", "mend or drop that episode") from error
            images[camera] = frames[0] if history == 1 else frames
        state = None if self.states is None else self.states[row]
        return Sample(Observation(images, self.tasks[self.task_of[row]], state), actions, ahead < self.end[row])

    def _frames(self, key: str, rows: np.ndarray, depth: bool = False) -> np.ndarray:
        """(history, h, w, 3) uint8 of one camera at some rows of one episode; depth maps (history, h, w) as they are."""
        if key in self.dataset.meta.image_keys:
            pictures = [self.pictures[key][int(row)][key] for row in rows]
            return np.stack([np.asarray(picture if depth else picture.convert("RGB")) for picture in pictures])
        if depth:  # 12 bits in a video: LeRobot knows how it wrote them
            return np.stack([self.dataset[int(row)][key].numpy().squeeze() for row in rows])
        from lerobot.datasets.video_utils import decode_video_frames

        episode = int(self.episode_of[rows[-1]])
        first = self.dataset.meta.episodes[episode][f"videos/{key}/from_timestamp"]
        frames = decode_video_frames(
            self.dataset.root / self.dataset.meta.get_video_file_path(episode, key),
            [first + float(self.timestamps[row]) for row in rows],
            self.dataset.tolerance_s, self.dataset._video_backend, return_uint8=True,
        )  # fmt: skip
        return frames.reshape(len(rows), *frames.shape[-3:]).permute(0, 2, 3, 1).numpy()


def names_of(feature: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What a dataset calls the numbers of a column, where it says so for each."""
    names: Any = feature.get("names")
    if isinstance(names, Mapping):  # older datasets: {"motors": [...]}
        names = next(iter(names.values()), None)
    each = isinstance(names, list | tuple) and len(set(names)) == int(np.prod(feature["shape"]))
    return tuple(map(str, names)) if each else None


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
        return LeRobotDataset(repo_id, root, revision=revision, video_backend=video_backend(), depth_output_unit="m")
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
