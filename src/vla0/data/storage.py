"""A LeRobot dataset on the disk: everything in it is looked up by its key, never by its place in a
table.
"""

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
    """A dataset's folder: `meta` as LeRobot reads it, the rows as `table`, instructions and
    episodes by their numbers.

    instructions: {task_index: instruction}. Raises InputError where there is no such dataset, or
    one that is not whole: a table that names what the files do not hold, or the other way round.
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
            # of half a dozen libraries; each means that the files are not what they should be
            raise InputError(
                f"a LeRobot dataset v3.0 in '{self.name}'",
                _reason(error),
                "fetch or write it again",
            ) from error
        self.fps, self.features = float(self.meta.fps), self.meta.features
        self.narrow = self.table.with_format("numpy")
        self.episode_of = self._whole("episode_index").astype(np.int64)
        # each episode's first row
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
        """(N, D) float32: a narrow column, checked.

        Raises InputError for what is no column of numbers, as many in each row.
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
        """(N,) float64: a column that LeRobot itself writes in each row.

        Raises InputError where it is not there.
        """
        values = (
            np.asarray(self.narrow[key], np.float64) if key in self.features else np.full(1, np.nan)
        )
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise InputError(f"'{key}' in each row of '{self.name}'", f"none in row {row}", WRITE)
        return values

    def sentence_numbers(self) -> np.ndarray:
        """(N,): each row's task_index.

        Raises InputError for one that the table of instructions does not have.
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
        """The keys of pictures that are no depth maps."""
        return [key for key in self.meta.camera_keys if key not in self.meta.depth_keys]

    def pictures(self, key: str) -> Pictures | Videos:
        """What reads one camera's frames."""
        feature = self.features[key]
        if key not in self.meta.video_keys:
            return Pictures(key, feature, self.table)
        table, base, found = self.meta.episodes, f"videos/{key}", {}
        try:
            columns = [
                table[f"{base}/{name}"] for name in ("chunk_index", "file_index", "from_timestamp")
            ]
            for number, place in self.places.items():
                chunk, file, first = (column[place] for column in columns)
                path = self.meta.video_path.format(
                    video_key=key, chunk_index=chunk, file_index=file
                )
                found[number] = (self.root / path, float(first))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            expected = (
                f"where the videos of '{key}' lie, in meta/episodes and video_path of "
                f"meta/info.json"
            )
            raise InputError(expected, _reason(error), WRITE) from None
        return Videos(key, feature, found, self.episode_of, self.times)

    def _compare_episodes(self) -> None:
        """The rows' episodes and the table's are the same, each in one stretch and in the order of
        time.
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
        told = dict(zip(self.places, self.meta.episodes["length"], strict=True))
        if lacking := [number for number, length in told.items() if length and number not in held]:
            got = f"none for episodes {some(lacking)} of '{self.name}'"
            raise InputError("rows in data/ for each episode of meta/episodes", got, WRITE)
        if strange := [number for number in held if number not in told]:
            got = f"none for episodes {some(strange)} of '{self.name}'"
            raise InputError("an entry in meta/episodes for each episode of data/", got, WRITE)
        if other := [number for number in held if held[number] != told[number]]:
            number = other[0]
            raise InputError(
                f"{told[number]} rows of episode {number}, as meta/episodes says",
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
    """What a dataset calls the numbers of a column, where it says so for each: a list, groups of
    lists, or {name: place}.
    """
    names = _flat(feature.get("names"))
    count = int(np.prod(feature["shape"]))
    return tuple(names) if len(names) == len(set(names)) == count else None


def _flat(names: Any) -> list[str]:
    if isinstance(names, Mapping):
        if names and all(isinstance(place, int) for place in names.values()):
            return sorted(names, key=names.__getitem__)
        names = list(names.values())
    if isinstance(names, list | tuple):
        return [name for own in names for name in _flat(own)]
    return [] if names is None else [str(names)]


def refuse_missing(dataset: str | Path) -> None:
    """Raises InputError for what is no folder here and cannot be a dataset of the Hub.

    Imports nothing heavy.
    """
    given = Path(dataset).expanduser()
    if given.is_dir() or (of_the_hub(dataset) and not given.exists()):
        return
    if given.exists():
        raise InputError(
            "the folder of a LeRobot dataset",
            f"'{dataset}', a file",
            "give the folder that holds meta/ and data/",
        )
    raise InputError(
        "a folder that is there, or owner/name on the Hub", f"'{dataset}'", "correct the path"
    )


def _folder(dataset: str | Path, revision: str | None) -> Path:
    """Where a dataset lies: a folder here, LeRobot's own, or one that is fetched from the Hub."""
    refuse_missing(dataset)
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
        from lerobot.datasets.utils import BackwardCompatibilityError
        from lerobot.utils.constants import HF_LEROBOT_HOME
    except ImportError as error:
        raise InputError(
            "lerobot to read datasets", str(error), "pip install 'vla0[lerobot]'"
        ) from None
    given = Path(dataset).expanduser()
    if given.is_dir() and revision is not None:
        raise InputError(
            "a dataset of the Hub for data.revision",
            f"the folder '{dataset}'",
            "leave the revision out",
        )
    own = HF_LEROBOT_HOME / dataset  # what was recorded here
    if given.is_dir() or (revision is None and (own / "meta" / "info.json").is_file()):
        folder = given if given.is_dir() else own
        _refuse_part(folder, str(dataset))
        return folder
    try:
        return LeRobotDataset(
            str(dataset), None, revision=revision, video_backend=video_backend()
        ).root
    except BackwardCompatibilityError:
        raise _old(f"--repo-id={dataset}") from None
    except Exception as error:
        # the Hub client raises a dozen kinds; each means that the dataset cannot be had
        got = f"no folder '{dataset}' here, and of the Hub: {_reason(error)}"
        raise InputError(
            "a LeRobot dataset: folder or Hub id",
            got,
            "correct the path, or the name and the connection",
        ) from error


def _refuse_part(folder: Path, name: str) -> None:
    """Raises InputError for a folder that is no whole dataset of v3.0.

    LeRobot would ask the Hub for what is missing.
    """
    info, whole = folder / "meta" / "info.json", "give the folder that holds meta/ and data/"
    if not info.is_file():
        raise InputError(f"a LeRobot dataset in '{name}'", "no meta/info.json", whole)
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
    return InputError(
        "a LeRobot dataset v3.0",
        "an older format",
        f"convert it: {CONVERTER} {words} --push-to-hub=false",
    )


def _sentences(root: Path) -> dict[int, str]:
    """{task_index: instruction} of meta/tasks.parquet, whose rows may lie in any order."""
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
    found: dict[int, str] = {}
    for number, text in zip(numbers.astype(int).tolist(), texts, strict=True):
        try:
            instruction = text.decode() if isinstance(text, bytes) else text
        except UnicodeDecodeError as error:
            raise InputError(
                f"instructions in UTF-8 in '{file}'", f"{text!r}: {error}", "write that table again"
            ) from None
        if found.setdefault(number, instruction) != instruction:
            raise InputError(
                f"one instruction for task_index {number} in '{file}'",
                "two",
                "write that table again",
            )
    return found


def _reason(error: BaseException) -> str:
    """Its first line; where the libraries say no more than that it failed, what it comes of."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    text = (
        lines[0]
        if len(lines) == 1 or len(lines[0]) > 20
        else " ".join([*lines[:4], "...", lines[-1]])
    )
    return f"{type(error).__name__}: {text[:300]}"
