"""Turn rows of LeRobot datasets into Samples.

No module above this one knows the keys or the frame rate of a dataset.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vla0.core.relative import shortest
from vla0.core.spec import MAIN, Observation, Sample, Spec
from vla0.data.bounds import bounds, remarks
from vla0.data.config import DataConfig, refuse_other_views
from vla0.data.frames import refuse_depth, some
from vla0.data.storage import Stored, names_of
from vla0.errors import InputError, said


class Source:
    """A LeRobot dataset as arrays, with all columns in memory except pictures.

    Pictures are read row by row. When LeRobot's own reader is asked for a chunk of actions, it
    decodes the pictures of all the chunk's rows; slicing the columns here does not.

    Args:
        config: Names the dataset and its columns.

    Raises:
        InputError: When the dataset does not exist, is incomplete or does not fit the config.
    """

    def __init__(self, config: DataConfig):
        self.config, self.dataset = config, Stored(config.dataset, config.revision)
        self.fps, features, meta = self.dataset.fps, self.dataset.features, self.dataset.meta
        self.cameras = dict(config.cameras or named(self.dataset.colour_keys(), config.dataset))
        for name, key in {"action": config.action, "state": config.state, **self.cameras}.items():
            if key is not None and key not in features:
                raise InputError(
                    f"key '{key}' for {name}",
                    f"keys {sorted(features)}",
                    "correct the config's mapping",
                )
        for camera, key in self.cameras.items():
            if key not in meta.camera_keys:
                raise InputError(
                    f"pictures in '{key}' for camera '{camera}'",
                    features[key]["dtype"],
                    f"choose of {meta.camera_keys}",
                )
            if key in meta.depth_keys and camera not in config.depth:
                refuse_depth(key, "a camera that the dataset flags as depth maps")
        self.actions = self.dataset.column(config.action)
        self.states = None if config.state is None else self.dataset.column(config.state)
        self.episode_of = self.dataset.episode_of
        starts = self.dataset.starts
        ends = np.r_[starts[1:], len(self.episode_of)]
        lengths = ends - starts
        # (N,) first row of each row's episode, and the row after its last.
        self.start, self.end = np.repeat(starts, lengths), np.repeat(ends, lengths)
        if config.held_out >= len(starts):
            raise InputError(
                f"held_out below the {len(starts)} episodes", f"{config.held_out}", "hold out fewer"
            )
        self.first_held_out = (
            int(starts[-config.held_out]) if config.held_out else len(self.actions)
        )
        numbers = sorted(self.dataset.instructions)
        self.tasks = [self.dataset.instructions[number] for number in numbers]
        # (N,) index of each row's instruction in `tasks`.
        self.task_of = np.searchsorted(numbers, self.dataset.sentence_numbers())
        if blank := [
            task for task in np.unique(self.task_of).tolist() if not self.tasks[task].strip()
        ]:
            got = (
                f"an empty one for episodes "
                f"{some(np.unique(self.episode_of[np.isin(self.task_of, blank)]).tolist())}"
            )
            raise InputError(
                f"an instruction for each episode of '{config.dataset}'",
                got,
                "write it into meta/tasks.parquet",
            )
        self.pictures = {camera: self.dataset.pictures(key) for camera, key in self.cameras.items()}

    def __len__(self) -> int:
        return len(self.actions)

    def problems(self, spec: Spec | None = None) -> list[str]:
        """Describe problems of the data that a user should know but that do not stop training.

        Args:
            spec: With a Spec, the result includes its `remarks`.

        Returns:
            One sentence for each problem.
        """
        sentences = []
        still = np.flatnonzero(self.actions.min(axis=0) == self.actions.max(axis=0)).tolist()
        if still:
            sentences.append(
                f"actions {still} never change: they cost their tokens and say nothing"
            )
        gaps = np.diff(self.dataset.times)[self.start[1:] == self.start[:-1]]
        if len(gaps) and abs(np.median(gaps) * self.fps - 1) > 0.02:
            sentences.append(
                f"frames are {np.median(gaps):.4g} s apart, which is not the {self.fps:g} frames "
                f"a second it declares"
            )
        elif jumps := int((gaps * self.fps > 1.5).sum()):
            sentences.append(
                f"frames are missing at {jumps} places inside of episodes: a chunk goes on there "
                f"as if they were not"
            )
        listed, held = len(self.dataset.places), len(np.unique(self.episode_of))
        if listed != held:
            sentences.append(f"{listed - held} of {listed} episodes are empty")
        for dimension, (low, high) in self.config.periodic.items():
            lowest, highest = (float(end(self.actions[:, dimension])) for end in (np.min, np.max))
            if min(lowest - low, high - highest) < -1e-3 * (high - low):
                sentences.append(
                    f"action {dimension} goes from {lowest:g} to {highest:g}, outside of its "
                    f"data.periodic, {low:g} to {high:g}, "
                    "between which a policy gives it back: give the low and high that the dataset "
                    "has"
                )
        return sentences if spec is None else sentences + self.remarks(spec)

    def remarks(self, spec: Spec) -> list[str]:
        """Describe what the bounds of a Spec lose of the rows that are trained on."""
        actions = self._written(spec.chunk_size, spec.relative_dims, spec.periodic)
        states = self.states
        names = [f"action {name}" for name in spec.action_names or range(spec.dimensions)]
        sentences = remarks(
            actions,
            (spec.low, spec.high),
            self.config.statistics,
            spec.bins,
            names,
            spec.relative_dims,
        )
        if spec.state is not None and states is not None:
            names = [f"state {name}" for name in spec.state_names or range(states.shape[1])]
            sentences += remarks(
                states[: self.first_held_out], spec.state, self.config.statistics, spec.bins, names
            )
        return sentences

    def spec_fields(self, chunk_size: int) -> dict[str, Any]:
        """Return the fields of a Spec that come from data.

        The bounds of relative actions are computed over all chunks of the rows trained on.

        Args:
            chunk_size: H, steps in a chunk.

        Returns:
            A dict with fps, cameras, depth, bounds, relative and periodic dimensions, names and the
            largest changes.

        Raises:
            InputError: When relative_dims or periodic names a dimension that does not exist.
        """
        dims = list(self.config.relative_dims)
        if dims:
            shared_dimensions = min(
                len(self.actions[0]), 0 if self.states is None else len(self.states[0])
            )
            if not all(isinstance(d, int) and 0 <= d < shared_dimensions for d in dims):
                got = (
                    "no state"
                    if self.states is None
                    else f"{dims} of {len(self.actions[0])} and {len(self.states[0])}"
                )
                raise InputError(
                    "relative_dims: dimensions that action and state both have",
                    got,
                    "set data.state, count from 0",
                )
        if unknown := [
            d
            for d in self.config.periodic
            if not (isinstance(d, int) and 0 <= d < self.actions.shape[1])
        ]:
            expected = f"periodic: dimensions of actions, 0..{self.actions.shape[1] - 1}"
            raise InputError(expected, f"{unknown[0]}", "e.g. data.periodic={5: [-180, 180]}")
        periodic = tuple((dimension, *turn) for dimension, turn in self.config.periodic.items())
        fields: dict[str, Any] = {
            "fps": self.fps,
            "cameras": tuple(self.cameras),
            "relative_dims": tuple(dims),
            "periodic": periodic,
        }
        fields["depth"] = tuple((camera, *span) for camera, span in self.config.depth.items())
        fields["low"], fields["high"] = bounds(
            self._written(chunk_size, dims, periodic), self.config.statistics
        )
        fields["state"] = (
            None
            if self.states is None
            else bounds(self.states[: self.first_held_out], self.config.statistics)
        )
        changes = np.diff(self.actions, axis=0)[self.start[1:] == self.start[:-1]]
        steps = np.abs(shortest(changes, periodic))
        fields["max_step_change"] = (
            tuple(float(c) for c in steps.max(axis=0)) if len(steps) else None
        )
        for name, key in {
            "action_names": self.config.action,
            "state_names": self.config.state,
        }.items():
            fields[name] = None if key is None else names_of(self.dataset.features[key])
        return fields

    def _written(
        self,
        chunk_size: int,
        relative_dims: Sequence[int],
        periodic: Sequence[tuple[int, float, float]],
    ) -> np.ndarray:
        """Return the (M, D) values that are written for all chunks of the rows trained on.

        Without relative dimensions each action appears only once.
        """
        trained, dims = self.actions[: self.first_held_out], list(relative_dims)
        if not dims:
            return trained
        base, rows = np.zeros_like(trained), np.arange(self.first_held_out)
        assert self.states is not None
        base[:, dims] = self.states[: self.first_held_out][:, dims]
        chunks = [
            trained[np.minimum(rows + step, self.end[rows] - 1)] - base
            for step in range(chunk_size)
        ]
        return shortest(np.concatenate(chunks), [turn for turn in periodic if turn[0] in dims])

    def fingerprint(self) -> dict[str, Any]:
        """Return what must be the same when a run resumes, as {name: value}.

        It covers rows, episodes, instructions and cameras, and a digest of the actions and states.
        """
        digest = hashlib.sha256()
        for column in (self.actions, self.states, self.episode_of, self.task_of):
            digest.update(b"" if column is None else np.ascontiguousarray(column).tobytes())
        low, high = bounds(self.actions, "minmax")
        return {
            "rows": len(self),
            "episodes": len(np.unique(self.episode_of)),
            "cameras": dict(self.cameras),
            "instructions": f"{len(self.tasks)}, "
            f"{hashlib.sha256(repr(self.tasks).encode()).hexdigest()[:16]}",
            "lowest actions": list(low),
            "highest actions": list(high),
            "numbers": digest.hexdigest()[:16],
        }

    def numbers(self, row: int, chunk_size: int) -> Sample:
        """Return the Sample of a row without its pictures, which take the time.

        Args:
            row: Row number.
            chunk_size: H, steps of the chunk that begins at the row.
        """
        ahead = np.arange(row, row + chunk_size)
        state = None if self.states is None else self.states[row]
        return Sample(
            Observation({}, self.tasks[self.task_of[row]], state),
            self.actions[np.minimum(ahead, self.end[row] - 1)].astype(np.float32),
            ahead < self.end[row],
        )

    def sample(self, row: int, chunk_size: int, history: int) -> Sample:
        """Return the Sample of a row.

        Args:
            row: Row number.
            chunk_size: H, steps of the chunk that begins at the row.
            history: Frames per camera, of which the row's is the last.

        Raises:
            InputError: When a picture cannot be read.
        """
        back = np.maximum(np.arange(row - history + 1, row + 1), self.start[row])
        images = {}
        for camera, pictures in self.pictures.items():
            try:
                frames = pictures.read(back, camera in self.config.depth)
            except InputError:
                raise
            except Exception as error:
                # Decoders raise dozens of types; each means that this episode cannot be used.
                reason = said(error)
                where = (
                    f"episode {int(self.episode_of[row])}, frame "
                    f"{row - int(self.start[row])} of '{pictures.key}'"
                )
                raise InputError(
                    "readable pictures", f"{where}: {reason}", "mend or drop that episode"
                ) from error
            images[camera] = frames[0] if history == 1 else frames
        sample = self.numbers(row, chunk_size)
        return replace(sample, observation=replace(sample.observation, images=images))


def sources_of(config: DataConfig) -> dict[str, Source]:
    """Open all datasets of a config.

    Returns:
        The Source of each dataset by name, MAIN first.

    Raises:
        InputError: When the datasets do not all have the same cameras.
    """
    sources = {name: Source(dataset_config) for name, dataset_config in config.all().items()}
    for name, source in sources.items():
        if set(source.cameras) != set(sources[MAIN].cameras):
            refuse_other_views(name, source.cameras, sources[MAIN].cameras)
        # All datasets list their cameras in the same order.
        source.cameras = {camera: source.cameras[camera] for camera in sources[MAIN].cameras}
    return sources


def named(keys: Sequence[str], dataset: str) -> dict[str, str]:
    """Name the cameras of a dataset after the last words of their keys.

    Args:
        keys: The dataset's keys of pictures.
        dataset: Its name, for the error.

    Returns:
        A dict of camera and key. If two last words are equal, every camera has its key as its name.

    Raises:
        InputError: When there is no key.
    """
    if not keys:
        raise InputError(
            "a dataset with pictures of colours",
            f"'{dataset}', which has none",
            "record with a camera",
        )
    names = [key.rsplit(".", 1)[-1] for key in keys]
    return dict(zip(names if len(set(names)) == len(names) else keys, keys, strict=True))
