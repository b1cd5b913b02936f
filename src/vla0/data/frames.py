"""One camera's frames out of a dataset: what a picture is, is known and not guessed."""

import importlib
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vla0.errors import InputError

logger = logging.getLogger(__name__)

# modes of Pillow with 8 bits a channel or fewer
COLOURS = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
# formats of FFmpeg that colours of 8 bits would cut off
WIDE = re.compile(r"(gray|ya)(f|9|10|12|14|16|32)")
TOLERANCE_S = 1e-4  # between a row's time and its video frame's, as LeRobot's


class Pictures:
    """Frames that are stored as pictures in the rows of a table."""

    def __init__(self, key: str, feature: Mapping[str, Any], table: Any):
        self.key, self.unit = key, (feature.get("info") or {}).get("depth_unit")
        # A column of its own: asked for a row, the reader decodes all the pictures of its columns.
        self.column = table.with_format(None).select_columns([key])

    def read(self, rows: np.ndarray, depth: bool = False) -> np.ndarray:
        """(n, h, w, 3) uint8 at some rows of one episode; depth maps (n, h, w), metres as floats or
        millimetres as integers.

        Raises InputError for pictures of more than 8 bits that are not said to be depth maps: as
        colours they saturate.
        """
        found = []
        for row in rows:
            picture = self.column[int(row)][self.key]
            if depth:
                found.append(in_metres(np.asarray(picture), self.unit))
            elif picture.mode in COLOURS:
                found.append(np.asarray(picture.convert("RGB")))
            else:
                refuse_depth(
                    self.key, f"pictures of more than 8 bits, Pillow's mode {picture.mode}"
                )
        return np.stack(found)


class Videos:
    """Frames that are stored as videos of one or more episodes each."""

    def __init__(
        self, key: str, feature: Mapping[str, Any], places: Mapping[int, tuple[Path, float]],
        episode_of: np.ndarray, times: np.ndarray,
    ):  # fmt: skip
        """places: episode → its file and where in it the episode begins, seconds.

        episode_of, times: (N,) of the rows.
        """
        self.key, self.places, self.episode_of, self.times = key, places, episode_of, times
        self.info = feature.get("info") or feature.get("video_info") or {}
        for file in dict.fromkeys(places[int(number)][0] for number in np.unique(episode_of)):
            if not file.is_file():
                lacking = [number for number, (own, _) in places.items() if own == file]
                got = f"no '{file}', which holds episodes {some(lacking)}"
                raise InputError(f"the videos of '{key}'", got, "fetch the dataset again")

    def read(self, rows: np.ndarray, depth: bool = False) -> np.ndarray:
        """(n, h, w, 3) uint8 at some rows of one episode; depth maps (n, h, w) in metres."""
        from lerobot.datasets.video_utils import decode_video_frames

        if not depth and WIDE.match(kind := str(self.info.get("video.pix_fmt"))):
            refuse_depth(self.key, f"a video of more than 8 bits, FFmpeg's format {kind}")
        file, first = self.places[int(self.episode_of[rows[-1]])]
        times = [first + float(self.times[row]) for row in rows]
        # Rows' times are float32, and LeRobot compares them so: beyond 17 minutes of a file its
        # steps are wider than 1e-4 s.
        tolerance = TOLERANCE_S + 2 * float(np.spacing(np.float32(max(times))))
        frames = decode_video_frames(
            file, times, tolerance, video_backend(),
            return_uint8=not depth, is_depth=depth,
        )  # fmt: skip
        if not depth:
            return frames.reshape(len(rows), *frames.shape[-3:]).permute(0, 2, 3, 1).numpy()
        from lerobot.configs import DepthEncoderConfig
        from lerobot.datasets.depth_utils import dequantize_depth

        own = DepthEncoderConfig.from_video_info(self.info)
        spread = {
            "depth_min": own.depth_min,
            "depth_max": own.depth_max,
            "shift": own.shift,
            "use_log": own.use_log,
        }
        metres = np.asarray(dequantize_depth(frames, **spread, output_unit="m"))
        return metres.reshape(len(rows), *metres.shape[-2:])


def in_metres(depths: np.ndarray, unit: str | None) -> np.ndarray:
    """Depths as vla0.core.images takes them, whatever unit a dataset declares: metres are floats,
    millimetres integers.
    """
    floating = np.issubdtype(depths.dtype, np.floating)
    if unit == "mm" and floating:
        return depths / 1000
    return depths.astype(np.float32) if unit == "m" and not floating else depths


def refuse_depth(key: str, got: str) -> None:
    """Raises InputError: a camera that is used as one of colours gives something else."""
    remedy = (
        "name near and far in metres under data.depth, e.g. data.depth={top: [0.2, 1.5]}, "
        "or leave that camera out"
    )
    raise InputError(f"'{key}' to be colours, or a camera of data.depth", got, remedy)


def some(numbers: Sequence[int]) -> str:
    """The first of many numbers, in words."""
    return ", ".join(map(str, numbers[:8])) + (
        f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    )


@cache
def video_backend() -> str:
    """torchcodec where it loads (it needs FFmpeg's shared libraries), else PyAV, which brings its
    own.
    """
    try:
        importlib.import_module("torchcodec")
    except (ImportError, OSError, RuntimeError):
        logger.debug("torchcodec does not load here: videos are read with PyAV")
        return "pyav"
    return "torchcodec"
