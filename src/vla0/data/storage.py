"""Read a LeRobot dataset from disk, looking everything up by key, never by position in a table."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla0.checkpoint.location import of_the_hub
from vla0.data.frames import Pictures, Videos, some, video_backend
from vla0.errors import InputError

WRITE = "fetch the dataset again, or write it again with LeRobot's own tools (lerobot-edit-dataset)"
CONVERTER = "python -m lerobot.scripts.convert_dataset_v21_to_v30"


class Stored:
    """A LeRobot dataset as it is stored.

    `meta` is what LeRobot reads of its metadata, `table` holds the rows, and `instructions` maps
    each task_index to its instruction.

    Args:
        dataset: Folder, or id of a dataset on the Hub.
        revision: Branch, tag or commit on the Hub.

    Raises:
        InputError: When there is no such dataset, or it is incomplete, because a table names
            something that the files do not hold or the files hold something that no table names.
    """

    def __init__(self, dataset: str | Path, revision: str | None = None):
        from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
        from lerobot.datasets.feature_utils import get_hf_features_from_features
        from lerobot.datasets.io_utils import load_nested_dataset

        self.name, self.root = str(dataset), _folder(dataset, revision)
        self.instructions = _sentences(self.root)
        try:
            self.meta: Any = LeRobotDatasetMetadata(f"local/{self.root.name}", self.root)
            features = get_hf_features_from_features(self.meta.features)
            self.table: Any = load_nested_dataset(self.root / "data", features=features)
        except Exception as error:
            # Half a dozen libraries raise here; each error means that the files are not valid.
            raise InputError(
                f"a LeRobot dataset v3.0 in '{self.name}'",
                _reason(error),
                "fetch or write it again",
            ) from error
        self.fps, self.features = float(self.meta.fps), self.meta.features
        self.narrow = self.table.with_format("numpy")
        self.episode_of = self._whole("episode_index").astype(np.int64)
        # The first row of each episode.
        self.starts = np.flatnonzero(np.r_[True, self.episode_of[1:] != self.episode_of[:-1]])
        self.times = self._whole("timestamp")
        if lacking := [
            name
            for name in ("episode_index", "length")
            if name not in self.meta.episodes.column_names
        ]:
            raise InputError(
                f"'{lacking[0]}' in meta/episodes of '{self.name}'", "no such column", WRITE
            )
        self.places = {
            int(number): place for place, number in enumerate(self.meta.episodes["episode_index"])
        }
        self._compare_episodes()

    def column(self, key: str) -> np.ndarray:
        """Read a column of numbers.

        Args:
            key: Key of the column.

        Returns:
            (N, D) float32.

        Raises:
            InputError: When the rows do not hold finite numbers, the same count in each.
        """
        expected = f"numbers in '{key}', as many in each row"
        if key in self.meta.camera_keys:
            raise InputError(expected, "pictures", "name the column of actions, or of the state")
        try:
            values = np.stack(list(self.narrow[key])).astype(np.float32)
        except (ValueError, TypeError) as error:
            raise InputError(
                expected, _reason(error), "name another column, or mend those rows"
            ) from None
        values = values.reshape(len(values), -1)
        if not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values))[0][0])
            raise InputError(
                f"finite numbers in '{key}'",
                f"row {row}: {values[row].tolist()}",
                "mend or drop that episode",
            )
        return values

    def _whole(self, key: str) -> np.ndarray:
        """Read a column that LeRobot writes, as (N,) float64; InputError if a row lacks it."""
        values = (
            np.asarray(self.narrow[key], np.float64) if key in self.features else np.full(1, np.nan)
        )
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise InputError(f"'{key}' in each row of '{self.name}'", f"none in row {row}", WRITE)
        return values

    def sentence_numbers(self) -> np.ndarray:
        """Return the task_index of each row.

        Returns:
            (N,) int64.

        Raises:
            InputError: When the table of instructions lacks a task_index.
        """
        numbers = self._whole("task_index").astype(np.int64)
        if unknown := sorted(set(map(int, numbers)) - set(self.instructions)):
            episodes = sorted(set(self.episode_of[numbers == unknown[0]].tolist()))
            got = (
                f"task_index {unknown[0]} in episode {episodes[0]}, and instructions "
                f"{sorted(self.instructions)}"
            )
            raise InputError(
                "an instruction for each task_index",
                got,
                f"add it to '{self.root / 'meta' / 'tasks.parquet'}'",
            )
        return numbers

    def colour_keys(self) -> list[str]:
        """List the keys of cameras that do not hold depth maps."""
        return [key for key in self.meta.camera_keys if key not in self.meta.depth_keys]

    def pictures(self, key: str) -> Pictures | Videos:
        """Return the reader of one camera's frames.

        Args:
            key: Key of the camera.

        Raises:
            InputError: When the metadata does not say where the videos are, or one is missing.
        """
        feature = self.features[key]
        if key not in self.meta.video_keys:
            return Pictures(key, feature, self.table)
        table, base, videos = self.meta.episodes, f"videos/{key}", {}
        try:
            columns = [
                table[f"{base}/{name}"] for name in ("chunk_index", "file_index", "from_timestamp")
            ]
            for number, place in self.places.items():
                chunk, file, first = (column[place] for column in columns)
                path = self.meta.video_path.format(
                    video_key=key, chunk_index=chunk, file_index=file
                )
                videos[number] = (self.root / path, float(first))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            expected = (
                f"where the videos of '{key}' lie, in meta/episodes and video_path of "
                f"meta/info.json"
            )
            raise InputError(expected, _reason(error), WRITE) from None
        return Videos(key, feature, videos, self.episode_of, self.times)

    def _compare_episodes(self) -> None:
        """Raise InputError unless rows and meta/episodes hold the same episodes.

        The rows of each episode must also be contiguous and in the order of time.
        """
        order = self.episode_of[self.starts].tolist()
        if len(order) != len(set(order)):
            twice = next(number for number in order if order.count(number) > 1)
            raise InputError(
                "each episode's rows together", f"episode {twice} in several places", WRITE
            )
        if len(self.places) != len(self.meta.episodes):
            raise InputError(
                "each episode once in meta/episodes",
                f"{len(self.places)} of {len(self.meta.episodes)}",
                WRITE,
            )
        held = dict(
            zip(order, np.diff(np.r_[self.starts, len(self.episode_of)]).tolist(), strict=True)
        )
        listed = dict(zip(self.places, self.meta.episodes["length"], strict=True))
        if lacking := [
            number for number, length in listed.items() if length and number not in held
        ]:
            got = f"none for episodes {some(lacking)} of '{self.name}'"
            raise InputError("rows in data/ for each episode of meta/episodes", got, WRITE)
        if strange := [number for number in held if number not in listed]:
            got = f"none for episodes {some(strange)} of '{self.name}'"
            raise InputError("an entry in meta/episodes for each episode of data/", got, WRITE)
        if unequal := [number for number in held if held[number] != listed[number]]:
            number = unequal[0]
            raise InputError(
                f"{listed[number]} rows of episode {number}, as meta/episodes says",
                f"{held[number]}",
                WRITE,
            )
        times = self.times
        back = np.flatnonzero((np.diff(times) <= 0) & (self.episode_of[1:] == self.episode_of[:-1]))
        if len(back):
            row = int(back[0])
            got = f"{times[row + 1]:g} s after {times[row]:g} s in episode {self.episode_of[row]}"
            raise InputError("rows of an episode in the order of time", got, WRITE)


def names_of(feature: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of the numbers in a column.

    Args:
        feature: What the dataset declares of the column. Its names may be a list, groups of lists,
            or {name: index}.

    Returns:
        One name for each number, or None where the dataset does not name each of them once.
    """
    names = _flat(feature.get("names"))
    count = int(np.prod(feature["shape"]))
    return tuple(names) if len(names) == len(set(names)) == count else None


def _flat(names: Any) -> list[str]:
    """Flatten declared names, whatever their form, into a list."""
    if isinstance(names, Mapping):
        if names and all(isinstance(place, int) for place in names.values()):
            return sorted(names, key=names.__getitem__)
        names = list(names.values())
    if isinstance(names, list | tuple):
        return [name for group in names for name in _flat(group)]
    return [] if names is None else [str(names)]


def refuse_missing(dataset: str | Path) -> None:
    """Check, without importing anything heavy, that a dataset may exist.

    Args:
        dataset: Folder, or id of a dataset on the Hub.

    Raises:
        InputError: When it is neither a local folder nor an id that the Hub could know.
    """
    folder = Path(dataset).expanduser()
    if folder.is_dir() or (of_the_hub(dataset) and not folder.exists()):
        return
    if folder.exists():
        raise InputError(
            "the folder of a LeRobot dataset",
            f"'{dataset}', a file",
            "give the folder that holds meta/ and data/",
        )
    raise InputError(
        "a folder that is there, or owner/name on the Hub", f"'{dataset}'", "correct the path"
    )


def _folder(dataset: str | Path, revision: str | None) -> Path:
    """Return a dataset's folder: a local one, one in LeRobot's home, or one from the Hub."""
    refuse_missing(dataset)
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
        from lerobot.datasets.utils import BackwardCompatibilityError
        from lerobot.utils.constants import HF_LEROBOT_HOME
    except ImportError as error:
        raise InputError(
            "lerobot to read datasets", str(error), "pip install 'vla0[lerobot]'"
        ) from None
    local = Path(dataset).expanduser()
    if local.is_dir() and revision is not None:
        raise InputError(
            "a dataset of the Hub for data.revision",
            f"the folder '{dataset}'",
            "leave the revision out",
        )
    recorded = HF_LEROBOT_HOME / dataset  # where LeRobot puts what is recorded on this machine
    if local.is_dir() or (revision is None and (recorded / "meta" / "info.json").is_file()):
        folder = local if local.is_dir() else recorded
        _refuse_part(folder, str(dataset))
        return folder
    try:
        return LeRobotDataset(
            str(dataset), None, revision=revision, video_backend=video_backend()
        ).root
    except BackwardCompatibilityError:
        raise _old(f"--repo-id={dataset}") from None
    except Exception as error:
        # The Hub client raises a dozen types; each means that the dataset is not available.
        got = f"no folder '{dataset}' here, and of the Hub: {_reason(error)}"
        raise InputError(
            "a LeRobot dataset: folder or Hub id",
            got,
            "correct the path, or the name and the connection",
        ) from error


def _refuse_part(folder: Path, name: str) -> None:
    """Raise InputError for a folder without a complete dataset of v3.0.

    LeRobot would ask the Hub for the missing files.
    """
    info = folder / "meta" / "info.json"
    folder_remedy = "give the folder that holds meta/ and data/"
    if not info.is_file():
        raise InputError(f"a LeRobot dataset in '{name}'", "no meta/info.json", folder_remedy)
    try:
        version = str(json.loads(info.read_text(encoding="utf-8"))["codebase_version"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"JSON with codebase_version in '{info}'", _reason(error), "fetch the dataset again"
        ) from None
    if version.startswith(("v1.", "v2.")):
        raise _old(f"--repo-id=local/{folder.name} --root={folder}")
    if not version.startswith("v3."):
        remedy = "write it with the LeRobot that vla0 takes"
        raise InputError(f"a LeRobot dataset v3.0 in '{name}'", f"'{version[:40]}'", remedy)
    for pattern in ("meta/tasks.parquet", "meta/episodes/*/*.parquet", "data/*/*.parquet"):
        if not any(folder.glob(pattern)):
            raise InputError(
                f"{pattern} in '{name}'",
                "no such file",
                "fetch the dataset again, or record an episode",
            )


def _old(words: str) -> InputError:
    """Return the error for a dataset of an older format; words: options of LeRobot's converter."""
    return InputError(
        "a LeRobot dataset v3.0",
        "an older format",
        f"convert it: {CONVERTER} {words} --push-to-hub=false",
    )


def _sentences(root: Path) -> dict[int, str]:
    """Read {task_index: instruction} from meta/tasks.parquet, whose rows may be in any order."""
    import pandas
    from pyarrow import ArrowException

    file = root / "meta" / "tasks.parquet"
    try:
        table = pandas.read_parquet(file)
    except (UnicodeDecodeError, ArrowException) as error:
        raise InputError(
            f"instructions in UTF-8 in '{file}'", _reason(error), "write that table again"
        ) from None
    texts = list(table["task"] if "task" in table.columns else table.index)
    if "task_index" not in table.columns or not all(
        isinstance(text, str | bytes) for text in texts
    ):
        got = (
            f"columns {list(table.columns)}, index of "
            f"{type(texts[0]).__name__ if texts else 'nothing'}"
        )
        raise InputError(
            f"instructions and their task_index in '{file}'", got, "write that table again"
        )
    numbers = np.asarray(pandas.to_numeric(table["task_index"], errors="coerce"), np.float64)
    if not (np.isfinite(numbers).all() and (numbers % 1 == 0).all()):
        got = f"{table['task_index'].tolist()[:8]}"
        raise InputError(f"whole numbers as task_index in '{file}'", got, "write that table again")
    instructions: dict[int, str] = {}
    for number, text in zip(numbers.astype(int).tolist(), texts, strict=True):
        try:
            instruction = text.decode() if isinstance(text, bytes) else text
        except UnicodeDecodeError as error:
            raise InputError(
                f"instructions in UTF-8 in '{file}'", f"{text!r}: {error}", "write that table again"
            ) from None
        if instructions.setdefault(number, instruction) != instruction:
            raise InputError(
                f"one instruction for task_index {number} in '{file}'",
                "two",
                "write that table again",
            )
    return instructions


def _reason(error: BaseException) -> str:
    """Return an error's first line, and more of it where that line only says that it failed."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    text = (
        lines[0]
        if len(lines) == 1 or len(lines[0]) > 20
        else " ".join([*lines[:4], "...", lines[-1]])
    )
    return f"{type(error).__name__}: {text[:300]}"
