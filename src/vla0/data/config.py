"""Settings of data and augmentation. This module imports nothing heavy, so that it loads fast."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vla0.core.spec import JITTER, MAIN, tupled
from vla0.errors import InputError, refuse_unknown


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Names the dataset and its columns, and further datasets to train on beside it."""

    dataset: str  # folder of a LeRobot dataset v3.0, or Hub id
    # camera of the Spec → key of the dataset; None: all colour cameras of the dataset
    cameras: Mapping[str, str] | None = None
    action: str = "action"  # key of the actions
    state: str | None = None  # key of a state that is written into the prompt
    # action dimensions that are written as differences from the same dimension of the state
    relative_dims: tuple[int, ...] = ()
    # action dimension that wraps → its low and high, which are the same position
    periodic: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    # camera of depth maps → near and far in metres
    depth: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    # how the bounds of actions and state are computed: "minmax", or "quantiles" for 1 % and 99 %
    statistics: str = "minmax"
    held_out: int = 0  # how many of the last episodes are kept for the loss on unseen data
    revision: str | None = None  # branch, tag or commit on the Hub
    weight: float = 1.0  # how often each row comes in an epoch of a mixture
    # name → the fields in which another dataset differs from this one
    mixture: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    num_workers: int = 0  # processes that prepare batches

    def __post_init__(self):
        object.__setattr__(self, "relative_dims", tupled(self.relative_dims))
        if not isinstance(self.relative_dims, tuple):
            raise InputError(
                "relative_dims, a list of action dimensions",
                f"{self.relative_dims}",
                "e.g. data.relative_dims=[0, 1, 2]",
            )
        _check_mapping("mixture", self.mixture, "{other: {dataset: DIR}}")
        _check_mapping("depth", self.depth, "{top: [0.2, 1.5]}", pairs=True)
        _check_mapping("periodic", self.periodic, "{5: [-180, 180]}", pairs=True)
        object.__setattr__(
            self, "depth", {camera: tupled(span) for camera, span in self.depth.items()}
        )
        # Keys from the command line are text, also where they are numbers.
        turns = {
            int(d) if str(d).isdecimal() else d: tupled(turn) for d, turn in self.periodic.items()
        }
        object.__setattr__(self, "periodic", turns)
        if self.statistics not in ("minmax", "quantiles"):
            raise InputError(
                "statistics: minmax or quantiles", f"'{self.statistics}'", "choose one of those"
            )
        if self.cameras is not None and (not isinstance(self.cameras, Mapping) or not self.cameras):
            raise InputError(
                "cameras, {name: key of the dataset}", f"{self.cameras}", "name one camera at least"
            )
        keys = [key for key in (self.cameras or {}).values() if isinstance(key, str)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise InputError(
                "cameras, each of a key of its own", f"'{twice[0]}' twice", "leave one of them out"
            )
        if self.held_out < 0:
            raise InputError("held_out >= 0", f"{self.held_out}", "it counts episodes")
        if self.num_workers < 0:
            raise InputError(
                "num_workers >= 0",
                f"{self.num_workers}",
                "0 prepares batches in the process that trains",
            )
        if not self.weight > 0:
            raise InputError("weight > 0", f"{self.weight}", "1 shows each row once in an epoch")
        if unknown := [camera for camera in self.depth if camera not in (self.cameras or {})]:
            raise InputError(
                f"depth of cameras {list(self.cameras or {})}",
                f"'{unknown[0]}'",
                "name it under cameras too",
            )
        for name, changes in self.mixture.items():
            self._other(name, changes)

    def all(self) -> dict[str, "DataConfig"]:
        """Return {name: config} of all datasets, MAIN first.

        Fields that an entry of the mixture leaves out are taken from this config.
        """
        return {
            MAIN: self,
            **{name: self._other(name, changes) for name, changes in self.mixture.items()},
        }

    def _other(self, name: str, changes: Mapping[str, Any]) -> "DataConfig":
        """Return the config of one dataset of the mixture."""
        common = ("mixture", "num_workers")
        inherited = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in common}
        if not isinstance(changes, Mapping) or "dataset" not in changes:
            raise InputError(
                f"a dataset in mixture.{name}",
                f"{changes!r}",
                "give dataset, and what differs from data",
            )
        if not name.isidentifier():
            raise InputError(
                "names of letters, digits and _ in a mixture",
                f"'{name}'",
                "it becomes part of a file's name",
            )
        refuse_unknown(changes, inherited, f"mixture.{name}")
        # A revision belongs to one dataset only.
        config = DataConfig(**{**inherited, "weight": 1.0, "revision": None, **changes})
        if self.cameras is None or config.cameras is None:
            return config
        if set(config.cameras) != set(self.cameras):
            refuse_other_views(name, config.cameras, self.cameras)
        # All datasets list their cameras in the same order.
        return replace(config, cameras={camera: config.cameras[camera] for camera in self.cameras})


def _check_mapping(name: str, value: Any, example: str, pairs: bool = False) -> None:
    """Raise InputError unless the value is a mapping, with `pairs` to two numbers each."""
    if not (isinstance(value, Mapping) and (not pairs or all(map(_pair, value.values())))):
        raise InputError(
            f"{name}, a mapping{' to two numbers each' * pairs}",
            f"{value}",
            f"e.g. data.{name}={example}",
        )


def _pair(value: Any) -> bool:
    """Return whether the value is a list or tuple of two numbers."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(v, int | float) for v in value)
    )


def refuse_other_views(
    name: str,
    cameras: Sequence[str] | Mapping[str, str],
    expected: Sequence[str] | Mapping[str, str],
) -> None:
    """Raise InputError, because a dataset of the mixture has other cameras than the first."""
    remedy = (
        "give each dataset the same views under the same names: data.cameras and "
        "data.mixture.NAME.cameras"
    )
    raise InputError(f"the cameras {list(expected)} in mixture.{name}", f"{list(cameras)}", remedy)


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Settings of masked action augmentation: what of an answer is hidden while it is learned."""

    mask: str = "character"  # unit: "character" (published), "number" or "none"
    mask_most: float = 0.4  # the hidden share is uniform in 0..mask_most
    mask_none: float = 0.1  # probability that nothing is hidden

    def __post_init__(self):
        if self.mask not in ("character", "number", "none"):
            raise InputError(
                "mask: character, number or none", f"'{self.mask}'", "choose one of those"
            )
        if not (0 <= self.mask_most <= 1 and 0 <= self.mask_none <= 1):
            raise InputError(
                "mask_most and mask_none in 0..1",
                f"{self.mask_most}, {self.mask_none}",
                "they are shares",
            )


@dataclass(frozen=True, kw_only=True)
class Augmentation(Masking):
    """Settings of the random changes that training makes; acting makes none of them."""

    # strengths of brightness, contrast, saturation and hue
    jitter: tuple[float, float, float, float] = JITTER

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "jitter", tupled(self.jitter))
        if (
            len(self.jitter) != 4
            or not all(0 <= j <= 1 for j in self.jitter)
            or self.jitter[3] > 0.5
        ):
            raise InputError(
                "jitter: four strengths in 0..1, hue at most 0.5",
                f"{self.jitter}",
                "zeros turn it off",
            )
