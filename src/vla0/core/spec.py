"""The data types of vla0: the Spec of a checkpoint, observations, samples and episodes."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from vla0.errors import InputError, refuse_unknown

SPEC_FILE = "vla0.json"
MAIN = ""  # the embodiment whose Spec is `vla0.json`; that of another one is `vla0.NAME.json`
SPEC_VERSION = 2
# Keys of version 1 of the file, and what they are called now.
VERSION_1 = {"horizon": "chunk_size", "relative": "relative_dims", "most_change": "max_step_change"}
# Published strengths of the jitter in training: brightness, contrast, saturation and hue.
JITTER = (0.2, 0.2, 0.2, 0.05)

SYSTEM = (  # VLA-0, arXiv 2510.13054, section 3; the Spec fills in the four names
    "Analyze the input image and predict robot actions for the next {chunk_size} timesteps. "
    "Each action has {dimensions} dimensions. Output a single sequence of {numbers} integers "
    "(0-{bins} each), "
    "representing the {chunk_size} timesteps sequentially. Provide only space separated numbers. "
    "Nothing else."
)


def tupled(value: Any) -> Any:
    """Turn lists, also nested ones, into tuples, which frozen dataclasses can hold."""
    return tuple(tupled(v) for v in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What training and acting with a checkpoint must agree on.

    It is saved beside the weights as `vla0.json`. The page "Configuration reference" describes its
    fields. A value out of range raises InputError.
    """

    low: tuple[float, ...]  # (D,) in the dataset's action units; written as level 0
    high: tuple[float, ...]  # (D,) written as level `bins`
    fps: float  # control rate of the data in Hz
    cameras: tuple[str, ...]  # in the order in which the model sees them
    base_model: str  # the model that was fine-tuned: Hub id, path or "tiny"
    chunk_size: int = 8  # H, the number of steps in a chunk
    bins: int = 1000  # levels are 0..bins, both included
    image_size: int = 224  # side in pixels of one camera's square, after crop and resize
    crop: float = 0.875  # side of the crop as a fraction of the frame's side
    tile: bool = True  # whether all cameras stand side by side in one image; else one image each
    history: int = 1  # frames per camera, oldest first
    vision_id: bool = False  # whether "Picture 1: " precedes an image
    # (low, high) bounds of the state that is written into the prompt; None: no state
    state: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    # action dimensions that are written as differences from the same dimension of the state
    relative_dims: tuple[int, ...] = ()
    # (dimension, low, high): an angle for which `low` and `high` are the same position
    periodic: tuple[tuple[int, float, float], ...] = ()
    # (camera, near, far): a camera of depth maps; near (black) and far (white) are metres
    depth: tuple[tuple[str, float, float], ...] = ()
    system: str = SYSTEM  # text of the system turn; the Spec fills in names in braces
    # how many of the newest chunks acting averages; None: all that reach the present step
    ensemble_k: int | None = None
    # (D,) names of the dataset, e.g. shoulder_pan.pos; None: not known
    action_names: tuple[str, ...] | None = None
    state_names: tuple[str, ...] | None = None  # (S,) names of the dataset; None: not known
    # (D,) largest change from one action of the data to the next; None: not known
    max_step_change: tuple[float, ...] | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, tupled(getattr(self, field.name)))
        _check_bounds("low and high", self.low, self.high)
        if self.state is not None:
            if len(self.state) != 2:
                raise InputError(
                    "state as [low, high]", f"{len(self.state)} lists", "give two lists or null"
                )
            _check_bounds("state", *self.state)
        _check(
            math.isfinite(self.fps) and self.fps > 0,
            "fps > 0",
            self.fps,
            "give the dataset's control rate in Hz",
        )
        _check(
            len(self.cameras) > 0 and len(set(self.cameras)) == len(self.cameras),
            "one camera or more, each named once",
            self.cameras,
            "name the cameras in the order the model sees them",
        )
        _check(
            _whole(self.chunk_size, 1),
            "chunk_size, a whole number >= 1",
            self.chunk_size,
            "8 is the published one",
        )
        _check(
            _whole(self.bins, 2),
            "bins, a whole number >= 2",
            self.bins,
            "1000 is the published one",
        )
        _check(
            _whole(self.history, 1),
            "history, a whole number >= 1",
            self.history,
            "1 is the published one",
        )
        _check(
            _whole(self.image_size, 28),
            "image_size, pixels >= 28",
            self.image_size,
            "224 is the published one",
        )
        _check(
            0 < self.crop <= 1,
            "crop in (0, 1]",
            self.crop,
            "0.875 is the published one, 1 keeps the whole frame",
        )
        _check(
            all(_whole(d, 0) and d < len(self.low) for d in self.relative_dims)
            and len(set(self.relative_dims)) == len(self.relative_dims),
            f"relative_dims, dimensions in 0..{len(self.low) - 1}, each once",
            self.relative_dims,
            "name action dimensions from 0",
        )
        turns = {
            turn[0]: turn[1:]
            for turn in self.periodic
            if isinstance(turn, tuple) and len(turn) == 3
        }
        dimensions = [d for d in turns if _whole(d, 0) and d < len(self.low)]
        _check(
            len(turns) == len(self.periodic) == len(dimensions)
            and all(
                math.isfinite(low) and math.isfinite(high) and low < high
                for low, high in turns.values()
            ),
            f"periodic, (dimension in 0..{len(self.low) - 1}, low, high), each dimension once",
            self.periodic,
            "e.g. periodic: {5: [-180, 180]}",
        )
        spans = {
            span[0]: span[1:] for span in self.depth if isinstance(span, tuple) and len(span) == 3
        }
        _check(
            len(spans) == len(self.depth)
            and all(c in self.cameras and 0 <= near < far for c, (near, far) in spans.items()),
            "depth, (camera, near, far) in metres, each camera once",
            self.depth,
            "e.g. depth: {top: [0.2, 1.5]}",
        )
        _check(
            self.ensemble_k is None
            or (_whole(self.ensemble_k, 1) and self.ensemble_k <= self.chunk_size),
            f"ensemble_k in 1..{self.chunk_size} (the chunk's size)",
            self.ensemble_k,
            "no more chunks reach an instant",
        )
        for name, count in (
            ("action_names", self.dimensions),
            ("state_names", self.state and len(self.state[0])),
        ):
            names = getattr(self, name)
            fine = names is None or (
                len(names) == len(set(names)) and len(names) == (count or len(names))
            )
            _check(fine, f"{name}: {count} names, each once", names, "take the dataset's, or null")
        change = self.max_step_change
        fine = change is None or (
            len(change) == self.dimensions and all(math.isfinite(c) and c >= 0 for c in change)
        )
        _check(
            fine,
            f"max_step_change: {self.dimensions} numbers >= 0",
            change,
            "take the dataset's, or null",
        )
        _check(
            isinstance(self.system, str),
            "system, a text",
            self.system,
            "leave it out for the published one",
        )
        try:
            self.system_text()
        except (KeyError, IndexError, ValueError) as error:
            known = "{chunk_size}, {dimensions}, {numbers} and {bins}"
            raise InputError(
                f"a system text with no names but {known}", repr(error), "double any other brace"
            ) from None

    @property
    def dimensions(self) -> int:
        """D, the number of values in one action."""
        return len(self.low)

    @property
    def numbers(self) -> int:
        """H * D, the number of values in one chunk."""
        return self.chunk_size * self.dimensions

    def system_text(self) -> str:
        """Return the system turn with this Spec's numbers filled in."""
        return self.system.format(
            chunk_size=self.chunk_size,
            dimensions=self.dimensions,
            numbers=self.numbers,
            bins=self.bins,
        )

    def text(self) -> str:
        """Return the Spec as JSON, which `parse` reads."""
        return json.dumps({"version": SPEC_VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def parse(cls, text: str, source: str = SPEC_FILE) -> Self:
        """Read a Spec from JSON.

        Raises:
            InputError: When the text is not a Spec. The message names `source`.
        """
        again = "fetch the checkpoint again"
        try:
            content = json.loads(text)
        except ValueError as error:
            raise InputError(f"JSON in {source}", str(error), f"it is damaged: {again}") from None
        if not isinstance(content, dict):
            raise InputError(f"a JSON object in {source}", type(content).__name__, again)
        version = content.pop("version", None)
        if version == 1:
            content = {VERSION_1.get(str(key), str(key)): value for key, value in content.items()}
            if isinstance(content.get("system"), str):
                content["system"] = content["system"].replace("{horizon}", "{chunk_size}")
        elif version != SPEC_VERSION:
            raise InputError(
                f"{SPEC_FILE} of version 1 to {SPEC_VERSION}",
                f"version {version}",
                "install the vla0 that wrote it",
            )
        refuse_unknown(content, (field.name for field in dataclasses.fields(cls)), source)
        try:
            return cls(**content)
        except TypeError as error:
            raise InputError(f"a complete {SPEC_FILE}", str(error), again) from None

    def save(self, folder: str | Path, embodiment: str = MAIN) -> None:
        """Write `vla0.json` into the folder, or the file of another embodiment."""
        (Path(folder) / spec_file(embodiment)).write_text(self.text(), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, embodiment: str = MAIN) -> Self:
        """Read the Spec of a checkpoint folder.

        Raises:
            InputError: When the folder has no Spec of this embodiment, or not a valid one.
        """
        file = Path(folder) / spec_file(embodiment)
        if not file.is_file() and embodiment != MAIN:
            known = [name for name in embodiments(folder) if name != MAIN]
            raise InputError(
                f"an embodiment of '{folder}': {known}",
                f"'{embodiment}'",
                "choose one of those, or none",
            )
        if not file.is_file():
            adapters = (Path(folder) / "adapter_config.json").is_file()
            remedy = (
                "merge these adapters: `vla0 convert`"
                if adapters
                else "train one with `vla0 train`"
            )
            if (Path(folder) / "best" / SPEC_FILE).is_file():
                remedy = f"it is a run: name '{Path(folder) / 'best'}'"
            raise InputError(
                f"a checkpoint folder with {SPEC_FILE}", f"'{folder}' without it", remedy
            )
        return cls.parse(file.read_text(encoding="utf-8"), str(file))


def spec_file(embodiment: str = MAIN) -> str:
    """Return the name of the file that holds an embodiment's Spec."""
    return SPEC_FILE if embodiment == MAIN else f"vla0.{embodiment}.json"


def embodiments(folder: str | Path) -> list[str]:
    """List the embodiments of a checkpoint folder, MAIN first."""
    return [
        MAIN,
        *(file.name.split(".")[1] for file in sorted(Path(folder).glob(spec_file("*")))),
    ]


@dataclass(frozen=True)
class Observation:
    """What a policy sees at one step."""

    # camera → (h, w, 3) uint8 RGB, upright; (history, h, w, 3) if Spec.history > 1. A camera in
    # Spec.depth has (h, w) or (h, w, 1): metres as floats, or millimetres as integers.
    images: Mapping[str, np.ndarray]
    instruction: str
    state: np.ndarray | None = None  # (S,) in the dataset's units
    captured_at: float | None = None  # monotonic time of the oldest frame in seconds
    # (n, D) expected actions, from the last chunk: they speed up decoding and change no result
    draft_actions: np.ndarray | None = None
    # (n, D) actions that will have been executed by then: the chunk begins with them
    action_prefix: np.ndarray | None = None
    seen: Any = None  # what VLA0.see prepared from the images and the words


@dataclass(frozen=True)
class Sample:
    """A row of a dataset before it becomes text: an observation and the actions that followed."""

    observation: Observation
    actions: np.ndarray  # (H, D) float32; the last action is repeated after the end
    valid: np.ndarray  # (H,) bool; False after the episode's end


@dataclass(frozen=True)
class Episode:
    """The result of one rollout."""

    seed: int
    success: bool
    actions: np.ndarray  # (T, D) as executed
    chunks: tuple[tuple[int, np.ndarray], ...] = ()  # step and (H, D) chunk of each query

    @property
    def steps(self) -> int:
        """T, the number of executed control ticks."""
        return len(self.actions)


def _whole(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _check(holds: bool, expected: str, got: Any, remedy: str) -> None:
    if not holds:
        raise InputError(expected, repr(got), remedy)


def _check_bounds(name: str, low: Any, high: Any) -> None:
    fine = (
        isinstance(low, tuple) and isinstance(high, tuple) and len(low) == len(high) > 0
        and all(isinstance(v, int | float) and math.isfinite(v) for v in low + high)
        and all(a <= b for a, b in zip(low, high, strict=True))
    )  # fmt: skip
    _check(
        fine,
        f"{name}: two equally long lists of finite numbers, low <= high",
        (low, high),
        "take the dataset's statistics",
    )
