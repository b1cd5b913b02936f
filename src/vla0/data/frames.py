"""Read one camera's frames from a dataset; its format is always known and never guessed."""

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

# Modes of Pillow with at most 8 bits per channel.
COLOURS = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
# Pixel formats of FFmpeg that do not fit into colours of 8 bits.
WIDE = re.compile(r"(gray|ya)(f|9|10|12|14|16|32)")
TOLERANCE_S = 1e-4  # between the times of a row and of its video frame, as in LeRobot


class Pictures:
    """Frames that are stored as pictures in the rows of a table.

    Args:
        key: The camera's column.
        feature: What the dataset declares of the column.
        table: The rows.
    """

    def __init__(self, key: str, feature: Mapping[str, Any], table: Any):
        self.key, self.unit = key, (feature.get("info") or {}).get("depth_unit")
        # Select this column alone, since reading a row decodes the pictures of all its columns.
        self.column = table.with_format(None).select_columns([key])

    def read(self, rows: np.ndarray, depth: bool = False) -> np.ndarray:
        """Read the frames of some rows of one episode.

        Args:
            rows: (n,) row numbers.
            depth: Whether the pictures are depth maps.

        Returns:
            (n, h, w, 3) uint8 colours, or (n, h, w) depth maps, which are metres as floats or
            millimetres as integers.

        Raises:
            InputError: When pictures that are not declared as depth maps have more than 8 bits per
                channel, since they would saturate as colours.
        """
        frames = []
        for row in rows:
            picture = self.column[int(row)][self.key]
            if depth:
                frames.append(in_metres(np.asarray(picture), self.unit))
            elif picture.mode in COLOURS:
                frames.append(np.asarray(picture.convert("RGB")))
            else:
                refuse_depth(
                    self.key, f"pictures of more than 8 bits, Pillow's mode {picture.mode}"
                )
        return np.stack(frames)


class Videos:
    """Frames that are stored as videos of one or more episodes each.

    Args:
        key: The camera's key.
        feature: What the dataset declares of the camera.
        places: Episode → its file, and the time in seconds at which the episode begins there.
        episode_of: (N,) episode of each row.
        times: (N,) time of each row in its episode, in seconds.

    Raises:
        InputError: When a file is missing.
    """

    def __init__(
        self, key: str, feature: Mapping[str, Any], places: Mapping[int, tuple[Path, float]],
        episode_of: np.ndarray, times: np.ndarray,
    ):  # fmt: skip
        self.key, self.places, self.episode_of, self.times = key, places, episode_of, times
        self.info = feature.get("info") or feature.get("video_info") or {}
        for file in dict.fromkeys(places[int(number)][0] for number in np.unique(episode_of)):
            if not file.is_file():
                lacking = [number for number, (path, _) in places.items() if path == file]
                got = f"no '{file}', which holds episodes {some(lacking)}"
                raise InputError(f"the videos of '{key}'", got, "fetch the dataset again")

    def read(self, rows: np.ndarray, depth: bool = False) -> np.ndarray:
        """Read the frames of some rows of one episode.

        Args:
            rows: (n,) row numbers.
            depth: Whether the video holds depth maps.

        Returns:
            (n, h, w, 3) uint8 colours, or (n, h, w) depth maps in metres.

        Raises:
            InputError: When a video that is not declared as depth maps has more than 8 bits.
        """
        from lerobot.datasets.video_utils import decode_video_frames

        if not depth and WIDE.match(kind := str(self.info.get("video.pix_fmt"))):
            refuse_depth(self.key, f"a video of more than 8 bits, FFmpeg's format {kind}")
        file, first = self.places[int(self.episode_of[rows[-1]])]
        times = [first + float(self.times[row]) for row in rows]
        # LeRobot compares times as float32. After 17 minutes of a file, neighbouring float32 values
        # are more than 1e-4 s apart.
        tolerance = TOLERANCE_S + 2 * float(np.spacing(np.float32(max(times))))
        frames = decode_video_frames(
            file, times, tolerance, video_backend(),
            return_uint8=not depth, is_depth=depth,
        )  # fmt: skip
        if not depth:
            return frames.reshape(len(rows), *frames.shape[-3:]).permute(0, 2, 3, 1).numpy()
        from lerobot.configs import DepthEncoderConfig
        from lerobot.datasets.depth_utils import dequantize_depth

        encoder = DepthEncoderConfig.from_video_info(self.info)
        spread = {
            "depth_min": encoder.depth_min,
            "depth_max": encoder.depth_max,
            "shift": encoder.shift,
            "use_log": encoder.use_log,
        }
        metres = np.asarray(dequantize_depth(frames, **spread, output_unit="m"))
        return metres.reshape(len(rows), *metres.shape[-2:])


def in_metres(depths: np.ndarray, unit: str | None) -> np.ndarray:
    """Return depths as `vla0.core.images` takes them: metres as floats, millimetres as integers.

    unit: the unit that the dataset declares, "m" or "mm"; None: not declared.
    """
    floating = np.issubdtype(depths.dtype, np.floating)
    if unit == "mm" and floating:
        return depths / 1000
    return depths.astype(np.float32) if unit == "m" and not floating else depths


def refuse_depth(key: str, got: str) -> None:
    """Raise InputError, because a camera that is used for colours holds something else."""
    remedy = (
        "name near and far in metres under data.depth, e.g. data.depth={top: [0.2, 1.5]}, "
        "or leave that camera out"
    )
    raise InputError(f"'{key}' to be colours, or a camera of data.depth", got, remedy)


def some(numbers: Sequence[int]) -> str:
    """List the first eight numbers, and how many more there are, in words."""
    return ", ".join(map(str, numbers[:8])) + (
        f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    )


@cache
def video_backend() -> str:
    """Return the name of the library that decodes videos.

    It is torchcodec if that loads, which needs FFmpeg's shared libraries; else PyAV, which brings
    its own.
    """
    try:
        importlib.import_module("torchcodec")
    except (ImportError, OSError, RuntimeError):
        logger.debug("torchcodec does not load here: videos are read with PyAV")
        return "pyav"
    return "torchcodec"
